#include "cli/chat_client.h"

#include <stdio.h>
#include <string.h>

#include "cli/http_client.h"
#include "common/alloc.h"

#define MAX_EVENT_BYTES ((size_t)4 << 20) /* of one server-sent event */

struct moe_chat_client {
    moe_chat_client_config config;
    char *model;
    json_t *history; /* messages without the system's */
};

/* The answer being read: lines of the event stream. */
typedef struct answer {
    moe_buf line, text;
    char finish[32];
    bool done;
    void (*on_text)(void *ctx, const char *text);
    void *ctx;
} answer;

static moe_status no_memory(moe_error *err) { return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory"); }

static moe_http_call call_of(const moe_chat_client *c, const char *path) {
    return (moe_http_call){.url = c->config.url,
                           .ca_file = c->config.ca_file,
                           .path = path,
                           .key = c->config.key,
                           .silence_ns = c->config.silence_ns,
                           .cancel_fd = c->config.cancel_fd};
}

static moe_status server_says(const moe_http_call *call, int http_status, const moe_buf *body, moe_error *err) {
    char text[MOE_ERROR_MESSAGE_BYTES / 2];
    moe_http_error_text(moe_buf_text(body), text, sizeof text);
    return moe_fail(err, MOE_FAILED_PRECONDITION, "%s%s: HTTP %d: %s", call->url, call->path, http_status, text);
}

/* ---- opening ---- */

static moe_status find_model(moe_chat_client *c, moe_error *err) {
    moe_http_call call = call_of(c, "/v1/models");
    moe_buf body = {0};
    int http_status;
    moe_status status = moe_http_run(&call, &http_status, &body, err);
    if (status == MOE_OK && http_status != 200) status = server_says(&call, http_status, &body, err);
    json_t *root = status == MOE_OK ? json_loads(moe_buf_text(&body), 0, NULL) : NULL;
    const char *id = json_string_value(json_object_get(json_array_get(json_object_get(root, "data"), 0), "id"));
    if (status == MOE_OK && !id) status = moe_fail(err, MOE_DATA_LOSS, "%s%s: no list of models", call.url, call.path);
    if (status == MOE_OK && !(c->model = moe_strdup(id))) status = no_memory(err);
    json_decref(root);
    moe_buf_free(&body);
    return status;
}

moe_status moe_chat_client_open(const moe_chat_client_config *config, moe_chat_client **out, moe_error *err) {
    moe_chat_client *c = *out = moe_calloc(1, sizeof *c);
    if (!c) return no_memory(err);
    c->config = *config;
    c->history = json_array();
    moe_status status = c->history ? find_model(c, err) : no_memory(err);
    if (status != MOE_OK) moe_chat_client_close(out);
    return status;
}

void moe_chat_client_close(moe_chat_client **client) {
    moe_chat_client *c = *client;
    *client = NULL;
    if (!c) return;
    json_decref(c->history);
    moe_free(c->model);
    moe_free(c);
}

const char *moe_chat_client_model(const moe_chat_client *c) { return c->model; }
int moe_chat_client_messages(const moe_chat_client *c) { return (int)json_array_size(c->history); }
void moe_chat_client_reset(moe_chat_client *c) { json_array_clear(c->history); }

/* ---- asking ---- */

static json_t *message(const char *role, const char *content) {
    return json_pack("{s:s, s:s}", "role", role, "content", content);
}

/* The request's JSON; NULL when out of memory or the text is not UTF-8. */
static char *request_body(const moe_chat_client *c, const char *text) {
    json_t *messages = json_array();
    bool good = true;
    if (c->config.system) good = json_array_append_new(messages, message("system", c->config.system)) == 0;
    good = json_array_extend(messages, c->history) == 0 && good;
    good = json_array_append_new(messages, message("user", text)) == 0 && good;
    json_t *root = json_pack("{s:s, s:o, s:b, s:I}", "model", c->model, "messages", messages, "stream", 1, "max_tokens",
                             (json_int_t)c->config.max_tokens);
    if (root && c->config.has_temperature)
        good = json_object_set_new(root, "temperature", json_real(c->config.temperature)) == 0 && good;
    if (root && c->config.has_seed) good = json_object_set_new(root, "seed", json_integer(c->config.seed)) == 0 && good;
    char *body = good && root ? json_dumps(root, JSON_COMPACT) : NULL;
    json_decref(root);
    return body;
}

static moe_status take_event(answer *a, const char *data, moe_error *err) {
    if (strcmp(data, "[DONE]") == 0) {
        a->done = true;
        return MOE_OK;
    }
    json_t *root = json_loads(data, 0, NULL);
    const char *failure = json_string_value(json_object_get(json_object_get(root, "error"), "message"));
    const json_t *choice = json_array_get(json_object_get(root, "choices"), 0);
    const char *content = json_string_value(json_object_get(json_object_get(choice, "delta"), "content"));
    const char *finish = json_string_value(json_object_get(choice, "finish_reason"));
    moe_status status = MOE_OK;
    if (!root) status = moe_fail(err, MOE_DATA_LOSS, "the server sent an event that is not JSON");
    if (failure) status = moe_fail(err, MOE_UNAVAILABLE, "the server broke off: %s", failure);
    if (finish) snprintf(a->finish, sizeof a->finish, "%s", finish);
    if (status == MOE_OK && content && *content) {
        moe_buf_append_text(&a->text, content);
        a->on_text(a->ctx, content);
    }
    json_decref(root);
    return status;
}

static moe_status take_line(answer *a, moe_error *err) {
    static const char prefix[] = "data:";
    const char *line = moe_buf_text(&a->line);
    if (a->line.size && line[a->line.size - 1] == '\r') a->line.data[--a->line.size] = '\0';
    if (strncmp(line, prefix, sizeof prefix - 1) != 0) return MOE_OK; /* comments, blank lines, other fields */
    line += sizeof prefix - 1;
    return take_event(a, line + (*line == ' '), err);
}

static moe_status on_data(void *ctx, const char *data, size_t size, moe_error *err) {
    answer *a = ctx;
    moe_status status = MOE_OK;
    while (size > 0 && status == MOE_OK) {
        const char *end = memchr(data, '\n', size);
        size_t part = end ? (size_t)(end - data) : size;
        moe_buf_append(&a->line, data, part);
        if (a->line.failed || a->line.size > MAX_EVENT_BYTES)
            return moe_fail(err, MOE_DATA_LOSS, "the server sent too long an event");
        if (end) status = take_line(a, err);
        if (end) moe_buf_clear(&a->line);
        data += part + (end != NULL);
        size -= part + (end != NULL);
    }
    return status;
}

static moe_status remember(moe_chat_client *c, const char *question, const moe_buf *text, moe_error *err) {
    if (text->failed || json_array_append_new(c->history, message("user", question)) != 0 ||
        json_array_append_new(c->history, message("assistant", moe_buf_text(text))) != 0)
        return no_memory(err);
    return MOE_OK;
}

moe_status moe_chat_client_ask(moe_chat_client *c, const char *text, void (*on_text)(void *ctx, const char *text), void *ctx,
                               char finish[32], moe_error *err) {
    answer a = {.on_text = on_text, .ctx = ctx};
    moe_http_call call = call_of(c, "/v1/chat/completions");
    moe_buf body = {0};
    int http_status;
    char *request = request_body(c, text);
    if (!request) return moe_fail(err, MOE_INVALID_ARGUMENT, "the message is not UTF-8 (or there is no memory)");
    call.body = request;
    call.on_data = on_data;
    call.ctx = &a;
    moe_status status = moe_http_run(&call, &http_status, &body, err);
    if (status == MOE_OK && http_status != 200) status = server_says(&call, http_status, &body, err);
    if (status == MOE_OK && !a.done) status = moe_fail(err, MOE_UNAVAILABLE, "the answer ended too early");
    if (status == MOE_OK || (status == MOE_CANCELLED && a.text.size > 0)) {
        moe_status kept = remember(c, text, &a.text, err);
        if (kept != MOE_OK) status = kept;
    }
    if (finish) snprintf(finish, sizeof a.finish, "%s", a.finish);
    moe_free(request);
    moe_buf_free(&body);
    moe_buf_free(&a.line);
    moe_buf_free(&a.text);
    return status;
}

void moe_chat_printable(const char *text, moe_buf *out) {
    for (const char *p = text; *p; p++) {
        unsigned char c = (unsigned char)*p, next = (unsigned char)p[1];
        if (c == 0xc2 && next >= 0x80 && next < 0xa0)
            p++; /* U+0080 … U+009F */
        else if ((c >= 0x20 && c != 0x7f) || c == '\n' || c == '\t')
            moe_buf_append(out, p, 1);
    }
}
