/* Reads tokenizer.json. Its "truncation" and "padding" are settings of a training run, which serving leaves out as transformers
 * does. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "common/alloc.h"
#include "router/tokenizer/json_read.h"
#include "router/tokenizer/parts.h"

#define TOKENIZER_MAX_FILE_BYTES (256 << 20)

static moe_status read_json(const char *path, json_t **out, moe_error *err) {
    *out = NULL;
    FILE *file = fopen(path, "rbe");
    if (!file)
        return moe_fail(err, errno == ENOENT ? MOE_NOT_FOUND : MOE_INVALID_ARGUMENT, "cannot be read: %s", strerror(errno));
    struct stat stat;
    json_error_t error;
    moe_status status = MOE_OK;
    if (fstat(fileno(file), &stat) != 0 || !S_ISREG(stat.st_mode) || stat.st_size > TOKENIZER_MAX_FILE_BYTES)
        status = moe_fail(err, MOE_INVALID_ARGUMENT, "is no file of at most %d bytes", TOKENIZER_MAX_FILE_BYTES);
    else if (!(*out = json_loadf(file, JSON_REJECT_DUPLICATES, &error)))
        status = moe_fail(err, MOE_INVALID_ARGUMENT, "line %d: %s", error.line, error.text);
    fclose(file);
    return status;
}

static moe_status read_id(const char *token, const json_t *id, int32_t *out, moe_error *err) {
    json_int_t value = json_is_integer(id) ? json_integer_value(id) : -1;
    if (value < 0 || value >= MOE_VOCAB_MAX_TOKENS)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "token '%s' has no id in 0 … %d", token, MOE_VOCAB_MAX_TOKENS - 1);
    *out = (int32_t)value;
    return MOE_OK;
}

static moe_status highest_id(const json_t *vocab, const json_t *added, int32_t *out, moe_error *err) {
    const char *token;
    json_t *value;
    size_t i;
    int32_t id = -1;
    *out = -1;
    json_object_foreach((json_t *)vocab, token, value) {
        moe_status status = read_id(token, value, &id, err);
        if (status != MOE_OK) return status;
        if (id > *out) *out = id;
    }
    json_array_foreach((json_t *)added, i, value) {
        const char *content = json_string_value(json_object_get(value, "content"));
        if (!content) return moe_fail(err, MOE_INVALID_ARGUMENT, "added token %zu has no 'content'", i);
        moe_status status = read_id(content, json_object_get(value, "id"), &id, err);
        if (status != MOE_OK) return status;
        if (id > *out) *out = id;
    }
    return MOE_OK;
}

/* An added token that the model has too must have the same id there. */
static moe_status add_token_to_vocab(moe_vocab *vocab, const json_t *added, moe_error *err) {
    const json_t *content = json_object_get(added, "content");
    const char *token = json_string_value(content);
    size_t size = json_string_length(content);
    int32_t id = (int32_t)json_integer_value(json_object_get(added, "id"));
    bool special;
    moe_status status = moe_json_bool(added, "special", false, &special, err);
    if (status == MOE_OK && moe_vocab_find(vocab, token, size) != id) status = moe_vocab_add(vocab, token, size, id, err);
    if (status == MOE_OK) vocab->entries[id].special = special;
    return status;
}

static moe_status load_vocab(const json_t *root, moe_vocab *out, moe_error *err) {
    const json_t *vocab = json_object_get(json_object_get(root, "model"), "vocab");
    const json_t *added = json_object_get(root, "added_tokens");
    if (!json_is_object(vocab)) return moe_fail(err, MOE_INVALID_ARGUMENT, "model: 'vocab' is not an object");
    if (json_array_size(added) > MOE_MAX_ADDED_TOKENS)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "more than %d added tokens", MOE_MAX_ADDED_TOKENS);
    int32_t highest;
    moe_status status = highest_id(vocab, added, &highest, err);
    if (status == MOE_OK) status = moe_vocab_init(out, highest + 1, json_object_size(vocab) + json_array_size(added), err);
    const char *token;
    json_t *value;
    size_t i;
    json_object_foreach((json_t *)vocab, token, value) {
        if (status == MOE_OK) status = moe_vocab_add(out, token, strlen(token), (int32_t)json_integer_value(value), err);
    }
    json_array_foreach(added, i, value) {
        if (status == MOE_OK) status = add_token_to_vocab(out, value, err);
    }
    return status;
}

static moe_status load_added_token(moe_tokenizer *t, const json_t *json, moe_regex_scratch *scratch, moe_buf *text,
                                   moe_buf *spare, moe_error *err) {
    const json_t *content = json_object_get(json, "content");
    moe_added_token token = {.id = (int32_t)json_integer_value(json_object_get(json, "id"))};
    bool special, normalized;
    moe_status status = moe_json_bool(json, "special", false, &special, err);
    if (status == MOE_OK) status = moe_json_bool(json, "normalized", !special, &normalized, err);
    if (status == MOE_OK) status = moe_json_bool(json, "single_word", false, &token.single_word, err);
    if (status == MOE_OK) status = moe_json_bool(json, "lstrip", false, &token.lstrip, err);
    if (status == MOE_OK) status = moe_json_bool(json, "rstrip", false, &token.rstrip, err);
    if (status != MOE_OK) return status;
    const char *spelling = json_string_value(content);
    size_t size = json_string_length(content);
    if (!normalized) return moe_added_tokens_add(&t->raw_added, spelling, size, &token, err);
    status = moe_normalize(&t->normalizer, scratch, spelling, size, text, spare, err);
    return status == MOE_OK ? moe_added_tokens_add(&t->normalized_added, moe_buf_text(text), text->size, &token, err) : status;
}

static moe_status load_added_tokens(moe_tokenizer *t, const json_t *added, moe_error *err) {
    moe_buf text = {0}, spare = {0};
    moe_regex_scratch *scratch = moe_regex_scratch_new();
    moe_status status = scratch ? MOE_OK : moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the added tokens");
    for (size_t i = 0; i < json_array_size(added) && status == MOE_OK; i++)
        status = load_added_token(t, json_array_get(added, i), scratch, &text, &spare, err);
    moe_added_tokens_seal(&t->raw_added);
    moe_added_tokens_seal(&t->normalized_added);
    moe_regex_scratch_free(&scratch);
    moe_buf_free(&text);
    moe_buf_free(&spare);
    return status;
}

static moe_status load_model(moe_tokenizer *t, const json_t *root, moe_error *err) {
    const json_t *model = json_object_get(root, "model");
    const char *type = moe_json_type(model);
    bool untyped_bpe = !*type && json_object_get(model, "merges"); /* files before the field was written */
    if (strcmp(type, "BPE") != 0 && !untyped_bpe)
        return moe_fail(err, MOE_UNIMPLEMENTED, "model: type '%s' is not supported (BPE is)", type);
    moe_status status = load_vocab(root, &t->vocab, err);
    if (status == MOE_OK) status = moe_bpe_load(model, &t->vocab, &t->bpe, err);
    return status == MOE_OK ? MOE_OK : moe_fail_prefix(err, status, "model");
}

static moe_status load_parts(moe_tokenizer *t, const json_t *root, moe_error *err) {
    moe_status status = load_model(t, root, err);
    if (status == MOE_OK) status = moe_normalizer_load(json_object_get(root, "normalizer"), &t->normalizer, err);
    if (status == MOE_OK) status = moe_pretokenizer_load(json_object_get(root, "pre_tokenizer"), &t->pretokenizer, err);
    if (status == MOE_OK)
        status = moe_postprocessor_load(json_object_get(root, "post_processor"), &t->vocab, &t->postprocessor, err);
    if (status == MOE_OK) status = moe_decoder_load(json_object_get(root, "decoder"), &t->vocab, &t->decoder, err);
    if (status == MOE_OK) status = load_added_tokens(t, json_object_get(root, "added_tokens"), err);
    return status;
}

moe_status moe_tokenizer_load(const char *dir, moe_tokenizer **out, moe_error *err) {
    *out = NULL;
    moe_buf path = {0};
    moe_buf_printf(&path, "%s/tokenizer.json", dir);
    moe_tokenizer *t = moe_calloc(1, sizeof *t);
    json_t *root = NULL;
    moe_status status = MOE_OK;
    if (path.failed || !t) status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    if (status == MOE_OK) status = read_json(path.data, &root, err);
    if (status == MOE_OK) status = load_parts(t, root, err);
    json_decref(root);
    if (status == MOE_OK)
        *out = t;
    else {
        moe_fail_prefix(err, status, "%s", moe_buf_text(&path));
        moe_tokenizer_free(&t);
    }
    moe_buf_free(&path);
    return status;
}

void moe_tokenizer_free(moe_tokenizer **tokenizer) {
    moe_tokenizer *t = *tokenizer;
    if (!t) return;
    moe_added_tokens_free(&t->raw_added);
    moe_added_tokens_free(&t->normalized_added);
    moe_normalizer_free(&t->normalizer);
    moe_pretokenizer_free(&t->pretokenizer);
    moe_bpe_free(&t->bpe);
    moe_decoder_free(&t->decoder);
    moe_vocab_free(&t->vocab);
    moe_free(t);
    *tokenizer = NULL;
}
