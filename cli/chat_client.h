/* A conversation with a served model over /v1/chat/completions, with history. One thread; blocks. */
#pragma once
#include <jansson.h>

#include "common/buf.h"
#include "common/status.h"

typedef struct moe_chat_client_config { /* texts borrowed for the client's life */
    const char *url;
    const char *ca_file; /* https: as of moe_tls_client */
    const char *key;    /* API key; NULL: none */
    const char *system; /* system message; NULL: none */
    bool has_temperature, has_seed;
    double temperature;
    int64_t seed;
    int64_t max_tokens;
    int64_t silence_ns; /* longest wait for the next piece of an answer */
    int cancel_fd;      /* an answer is broken off once it is readable; -1: never */
} moe_chat_client_config;

typedef struct moe_chat_client moe_chat_client;

/* Asks the server which model it serves. Errors as those of moe_http_run, and what the server says. */
moe_status moe_chat_client_open(const moe_chat_client_config *config, moe_chat_client **out, moe_error *err);
void moe_chat_client_close(moe_chat_client **client); /* NULLs; idempotent */

const char *moe_chat_client_model(const moe_chat_client *client);
int moe_chat_client_messages(const moe_chat_client *client); /* in the history, the system message not counted */
void moe_chat_client_reset(moe_chat_client *client);         /* forgets the history */

/* Sends `text` with the history and calls on_text with each piece of the answer. The question and its answer join the history; of
 * a CANCELLED answer what came of it; after another failure the history is as before. *finish (may be NULL) receives
 * finish_reason, "" where none came. */
moe_status moe_chat_client_ask(moe_chat_client *client, const char *text, void (*on_text)(void *ctx, const char *text), void *ctx,
                               char finish[32], moe_error *err);

/* Copies model output for a terminal: control characters (but newline and tab) and C1 codes are dropped, so that an answer cannot
 * steer the terminal. Appends to out. */
void moe_chat_printable(const char *text, moe_buf *out);
