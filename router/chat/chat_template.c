#include "router/chat/chat_template.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "router/chat/chat_fallback.h"
#include "router/chat/jinja_run.h"

#define MAX_TOKEN_TEXTS 16

typedef struct token_text {
    char *name, *text; /* "bos_token", "<s>" */
} token_text;

struct moe_chat_template {
    jinja_arena arena; /* of both trees */
    jinja_node *ordinary, *tool_use;
    bool has_tool_use; /* rendered instead when there are tools */
    token_text tokens[MAX_TOKEN_TEXTS];
    size_t num_tokens;
};

static moe_status new_template(moe_chat_template **out, moe_error *err) {
    *out = moe_calloc(1, sizeof **out);
    if (!*out) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the chat template");
    (*out)->arena.limit_bytes = MOE_JINJA_MAX_TREE_BYTES;
    return MOE_OK;
}

moe_status moe_chat_template_parse(const char *source, moe_chat_template **out, moe_error *err) {
    moe_status status = new_template(out, err);
    if (status == MOE_OK) status = moe_jinja_parse(&(*out)->arena, source, &(*out)->ordinary, err);
    if (status != MOE_OK) moe_chat_template_free(out);
    return status;
}

void moe_chat_template_free(moe_chat_template **chat_template) {
    if (!*chat_template) return;
    for (size_t i = 0; i < (*chat_template)->num_tokens; i++) {
        moe_free((*chat_template)->tokens[i].name);
        moe_free((*chat_template)->tokens[i].text);
    }
    moe_jinja_arena_free(&(*chat_template)->arena);
    moe_free(*chat_template);
    *chat_template = NULL;
}

/* ---- loading ---- */

/* The whole file; MOE_NOT_FOUND where there is none. */
static moe_status read_source(const char *path, moe_buf *out, moe_error *err) {
    char block[8192];
    FILE *file = fopen(path, "rb");
    if (!file) return moe_fail(err, errno == ENOENT ? MOE_NOT_FOUND : MOE_INVALID_ARGUMENT, "%s: %s", path, strerror(errno));
    size_t got;
    while (out->size <= MOE_JINJA_MAX_SOURCE_BYTES && (got = fread(block, 1, sizeof block, file)) > 0)
        moe_buf_append(out, block, got);
    bool failed = ferror(file) != 0;
    fclose(file);
    if (failed || out->failed) return moe_fail(err, MOE_INVALID_ARGUMENT, "%s cannot be read", path);
    if (out->size > MOE_JINJA_MAX_SOURCE_BYTES || strlen(moe_buf_text(out)) != out->size)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s is longer than %zu bytes or not a text", path, MOE_JINJA_MAX_SOURCE_BYTES);
    return MOE_OK;
}

/* "bos_token": "<s>" or {"content": "<s>", …}; others are not token texts. */
static const char *token_content(const char *name, const json_t *value) {
    size_t length = strlen(name);
    if (length <= 6 || strcmp(name + length - 6, "_token") != 0) return NULL;
    return json_string_value(json_is_object(value) ? json_object_get(value, "content") : value);
}

static moe_status load_tokens(moe_chat_template *t, json_t *config, moe_error *err) {
    for (void *it = json_object_iter(config); it && t->num_tokens < MAX_TOKEN_TEXTS; it = json_object_iter_next(config, it)) {
        const char *name = json_object_iter_key(it), *text = token_content(name, json_object_iter_value(it));
        if (!text) continue;
        token_text *token = &t->tokens[t->num_tokens++];
        *token = (token_text){moe_strdup(name), moe_strdup(text)};
        if (!token->name || !token->text) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the chat template");
    }
    return MOE_OK;
}

/* [{"name": "default", "template": "…"}, …] */
static const char *named_source(const json_t *templates, const char *name) {
    size_t index;
    json_t *entry;
    json_array_foreach(templates, index, entry) {
        const char *entry_name = json_string_value(json_object_get(entry, "name"));
        if (entry_name && strcmp(entry_name, name) == 0) return json_string_value(json_object_get(entry, "template"));
    }
    return NULL;
}

static moe_status parse_sources(moe_chat_template *t, const char *ordinary, const char *tool_use, moe_error *err) {
    moe_status status = moe_jinja_parse(&t->arena, ordinary, &t->ordinary, err);
    if (status != MOE_OK || !tool_use) return status;
    t->has_tool_use = true;
    return moe_jinja_parse(&t->arena, tool_use, &t->tool_use, err);
}

/* The model's own template, else the fallback. */
static moe_status load_sources(moe_chat_template *t, const char *dir, const json_t *config, const char *fallback,
                               moe_error *err) {
    char path[PATH_MAX];
    moe_buf file = {0};
    const json_t *own = json_object_get(config, "chat_template");
    snprintf(path, sizeof path, "%s/chat_template.jinja", dir);
    moe_status status = read_source(path, &file, err);
    if (status == MOE_OK) {
        status = parse_sources(t, moe_buf_text(&file), NULL, err);
    } else if (status == MOE_NOT_FOUND) {
        bool many = json_is_array(own);
        const char *source = many ? named_source(own, "default") : json_string_value(own);
        if (!source && fallback) source = moe_chat_fallback_source(fallback);
        status = source ? parse_sources(t, source, many ? named_source(own, "tool_use") : NULL, err)
                        : moe_fail(err, MOE_NOT_FOUND, "%s has no chat template; name a fallback (%s)", dir,
                                   moe_chat_fallback_names());
    }
    moe_buf_free(&file);
    return status;
}

moe_status moe_chat_template_load(const char *dir, const char *fallback, moe_chat_template **out, moe_error *err) {
    char path[PATH_MAX];
    json_error_t json_error;
    *out = NULL;
    if (fallback && !moe_chat_fallback_source(fallback))
        return moe_fail(err, MOE_INVALID_ARGUMENT, "there is no built-in chat template '%s' (there are %s)", fallback,
                        moe_chat_fallback_names());
    snprintf(path, sizeof path, "%s/tokenizer_config.json", dir);
    /* Real files have a "model_max_length" of 10^30, spelled as an integer. */
    json_t *config = json_load_file(path, JSON_DECODE_INT_AS_REAL, &json_error);
    if (!config && json_error_code(&json_error) != json_error_cannot_open_file)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: line %d: %s", path, json_error.line, json_error.text);
    moe_status status = new_template(out, err);
    if (status == MOE_OK) status = load_tokens(*out, config, err);
    if (status == MOE_OK) status = load_sources(*out, dir, config, fallback, err);
    json_decref(config);
    if (status == MOE_INVALID_ARGUMENT) moe_fail_prefix(err, status, "chat template of %s", dir);
    if (status != MOE_OK) moe_chat_template_free(out);
    return status;
}

/* ---- rendering ---- */

/* What a template may count on, as in transformers: the special tokens, and none for what the caller left out. */
static bool add_defaults(const moe_chat_template *t, json_t *variables) {
    bool good = true;
    for (size_t i = 0; i < t->num_tokens; i++)
        if (!json_object_get(variables, t->tokens[i].name))
            good = good && json_object_set_new(variables, t->tokens[i].name, json_string(t->tokens[i].text)) == 0;
    if (!json_object_get(variables, "tools")) good = good && json_object_set_new(variables, "tools", json_null()) == 0;
    if (!json_object_get(variables, "documents")) good = good && json_object_set_new(variables, "documents", json_null()) == 0;
    return good;
}

moe_status moe_chat_template_render(const moe_chat_template *t, json_t *variables, moe_buf *out, moe_error *err) {
    if (!json_is_object(variables)) return moe_fail(err, MOE_INVALID_ARGUMENT, "chat template: the variables are not an object");
    if (!add_defaults(t, variables)) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    bool tools = t->has_tool_use && !json_is_null(json_object_get(variables, "tools"));
    moe_status status = moe_jinja_render(tools ? t->tool_use : t->ordinary, variables, out, err);
    return status == MOE_OK ? MOE_OK : moe_fail_prefix(err, status, "chat template");
}
