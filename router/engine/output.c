#include "router/engine/output.h"

#include <string.h>

#include "common/alloc.h"

struct moe_output_processor {
    moe_output_config config;
    moe_detokenizer detokenizer;
    char *stops[MOE_MAX_STOP_STRINGS]; /* owned */
    size_t stop_bytes[MOE_MAX_STOP_STRINGS];
    moe_buf pending; /* detokenized, not yet emitted: the first `ready` bytes were emitted by the previous event */
    size_t ready;
    int32_t token;      /* of the current event */
    int32_t num_tokens; /* sampled so far */
};

moe_status moe_output_processor_new(const moe_output_config *config, moe_output_processor **out, moe_error *err) {
    *out = NULL;
    if (config->num_stop > 0 && !config->tokenizer)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "stop strings need a tokenizer, and this model is served without one");
    if (config->num_stop > MOE_MAX_STOP_STRINGS)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%d stop strings; at most %d are allowed", config->num_stop,
                        MOE_MAX_STOP_STRINGS);
    moe_output_processor *p = *out = moe_calloc(1, sizeof *p);
    bool have = p != NULL;
    for (int32_t i = 0; have && i < config->num_stop; i++) {
        p->stop_bytes[i] = strlen(config->stop[i]);
        if (p->stop_bytes[i] == 0 || p->stop_bytes[i] > MOE_MAX_STOP_STRING_BYTES) {
            size_t bytes = p->stop_bytes[i];
            moe_output_processor_free(out);
            return moe_fail(err, MOE_INVALID_ARGUMENT, "a stop string has 1 to %d bytes, not %zu", MOE_MAX_STOP_STRING_BYTES,
                            bytes);
        }
        p->stops[i] = moe_strdup(config->stop[i]);
        have = p->stops[i] != NULL;
    }
    if (!have) {
        moe_output_processor_free(out);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a request's output");
    }
    p->config = *config;
    if (config->tokenizer) moe_detokenizer_init(&p->detokenizer, config->tokenizer, config->sampling->skip_special_tokens);
    return MOE_OK;
}

void moe_output_processor_free(moe_output_processor **processor) {
    moe_output_processor *p = *processor;
    *processor = NULL;
    if (!p) return;
    for (int i = 0; i < MOE_MAX_STOP_STRINGS; i++) moe_free(p->stops[i]);
    moe_buf_free(&p->pending);
    moe_free(p);
}

static bool contains(const int32_t *ids, int32_t count, int32_t id) {
    for (int32_t i = 0; i < count; i++)
        if (ids[i] == id) return true;
    return false;
}

static bool is_stop_token(const moe_output_processor *p, int32_t token) {
    const moe_sampling_params *s = p->config.sampling;
    if (p->num_tokens <= s->min_tokens) return false;
    return (!s->ignore_eos && contains(p->config.eos_ids, p->config.num_eos, token)) ||
           contains(s->stop_token_ids, s->num_stop_token_ids, token);
}

/* The stop string that is complete first, of those that end together the longest, or -1: what one token adds at once ends the
 * text where character by character would have. */
static int find_stop(const moe_output_processor *p, size_t *at) {
    int found = -1;
    size_t found_end = 0;
    for (int i = 0; i < p->config.num_stop; i++) {
        const char *hit = p->pending.size ? memmem(p->pending.data, p->pending.size, p->stops[i], p->stop_bytes[i]) : NULL;
        if (!hit) continue;
        size_t where = (size_t)(hit - p->pending.data), end = where + p->stop_bytes[i];
        if (found < 0 || end < found_end || (end == found_end && where < *at)) {
            found = i;
            found_end = end;
            *at = where;
        }
    }
    return found;
}

/* Bytes at the end of the pending text that could be the beginning of a stop string. */
static size_t possible_stop_bytes(const moe_output_processor *p) {
    size_t longest = 0;
    for (int i = 0; i < p->config.num_stop; i++) {
        size_t n = p->stop_bytes[i] - 1 < p->pending.size ? p->stop_bytes[i] - 1 : p->pending.size;
        while (n > longest && memcmp(p->pending.data + p->pending.size - n, p->stops[i], n) != 0) n--;
        if (n > longest) longest = n;
    }
    return longest;
}

static void drop_emitted(moe_output_processor *p) {
    if (p->ready == 0) return;
    memmove(p->pending.data, p->pending.data + p->ready, p->pending.size - p->ready);
    p->pending.size -= p->ready;
    p->pending.data[p->pending.size] = '\0';
    p->ready = 0;
}

/* Decides how much of the pending text is certain; a found stop string ends the request. */
static void settle_text(moe_output_processor *p, moe_output *out) {
    size_t at = 0;
    int stop = p->num_tokens > p->config.sampling->min_tokens ? find_stop(p, &at) : -1;
    if (stop >= 0) {
        out->finish = MOE_FINISH_STOP;
        out->stop_reason = p->stops[stop];
        p->ready = at + (p->config.include_stop_in_output ? p->stop_bytes[stop] : 0);
    } else {
        p->ready = p->pending.size - (out->finish == MOE_FINISH_NONE ? possible_stop_bytes(p) : 0);
    }
    out->text = moe_buf_text(&p->pending);
    out->text_bytes = p->ready;
}

void moe_output_processor_feed(moe_output_processor *p, int32_t token, moe_output *out) {
    *out = (moe_output){.text = "", .message = "", .num_tokens = 1, .token_ids = &p->token, .stop_token_id = -1};
    drop_emitted(p);
    p->token = token;
    p->num_tokens++;
    bool stop_token = is_stop_token(p, token);
    if (stop_token) {
        out->finish = MOE_FINISH_STOP;
        out->stop_token_id = token;
    } else if (p->num_tokens >= p->config.sampling->max_tokens) {
        out->finish = MOE_FINISH_LENGTH;
    }
    if (!p->config.tokenizer) return;
    if (!stop_token || p->config.include_stop_in_output) moe_detokenizer_feed(&p->detokenizer, token, &p->pending);
    if (out->finish != MOE_FINISH_NONE) moe_detokenizer_finish(&p->detokenizer, &p->pending);
    if (p->pending.failed) {
        out->finish = MOE_FINISH_ERROR;
        out->status = MOE_RESOURCE_EXHAUSTED;
        out->message = "out of memory for a request's text";
        return;
    }
    settle_text(p, out);
}
