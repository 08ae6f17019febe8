#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "router/tokenizer/byte_level.h"
#include "router/tokenizer/component.h"
#include "router/tokenizer/decode.h"
#include "router/tokenizer/regex.h"
#include "router/tokenizer/utf8.h"

typedef enum decode_kind { DECODE_BYTE_LEVEL, DECODE_BYTE_FALLBACK, DECODE_FUSE, DECODE_REPLACE } decode_kind;

typedef struct decode_step {
    decode_kind kind;
    moe_regex *pattern;  /* REPLACE: owned */
    const char *content; /* REPLACE: borrowed from the JSON */
} decode_step;

/* The steps before the tables are made. */
typedef struct decode_plan {
    decode_step steps[MOE_DECODER_MAX_STEPS];
    int num_steps;
    int strip_first;
    bool byte_steps; /* tokens are bytes from here on: a step on text cannot follow */
    bool fused;      /* all tokens are one from here on */
} decode_plan;

static moe_status add_step(decode_plan *plan, decode_step step, moe_error *err) {
    if (plan->num_steps == MOE_DECODER_MAX_STEPS || plan->byte_steps || plan->fused) {
        moe_regex_free(&step.pattern);
        return moe_fail(err, MOE_UNIMPLEMENTED, "this order or number of steps is not supported");
    }
    plan->steps[plan->num_steps++] = step;
    return MOE_OK;
}

static moe_status load_byte_level(const json_t *json, void *out, moe_error *err) {
    decode_plan *plan = out;
    (void)json;
    moe_status status = add_step(plan, (decode_step){.kind = DECODE_BYTE_LEVEL}, err);
    plan->byte_steps = true;
    return status;
}

static moe_status load_byte_fallback(const json_t *json, void *out, moe_error *err) {
    decode_plan *plan = out;
    (void)json;
    moe_status status = add_step(plan, (decode_step){.kind = DECODE_BYTE_FALLBACK}, err);
    plan->byte_steps = true;
    return status;
}

static moe_status load_fuse(const json_t *json, void *out, moe_error *err) {
    decode_plan *plan = out;
    (void)json, (void)err;
    plan->fused = true;
    return MOE_OK;
}

static moe_status load_replace(const json_t *json, void *out, moe_error *err) {
    decode_step step = {.kind = DECODE_REPLACE};
    const char *pattern;
    size_t size;
    bool literal;
    moe_status status = moe_json_pattern(json, &pattern, &size, &literal, err);
    if (status == MOE_OK) status = moe_json_text(json, "content", &step.content, err);
    if (status == MOE_OK && !step.content) status = moe_fail(err, MOE_INVALID_ARGUMENT, "'content' is missing");
    if (status == MOE_OK) status = moe_regex_compile(pattern, size, literal, &step.pattern, err);
    return status == MOE_OK ? add_step(out, step, err) : status;
}

/* One leading character of the whole text; on every token, or more, or at the end, it is not built. */
static moe_status load_strip(const json_t *json, void *out, moe_error *err) {
    decode_plan *plan = out;
    const char *content = NULL;
    int64_t start, stop;
    moe_status status = moe_json_text(json, "content", &content, err);
    if (status == MOE_OK) status = moe_json_int(json, "start", 0, INT32_MAX, &start, err);
    if (status == MOE_OK) status = moe_json_int(json, "stop", 0, INT32_MAX, &stop, err);
    if (status != MOE_OK) return status;
    bool ascii = content && content[0] > 0 && content[1] == '\0';
    if (!plan->fused || plan->strip_first >= 0 || start > 1 || stop > 0 || !ascii)
        return moe_fail(err, MOE_UNIMPLEMENTED,
                        "Strip is supported once, behind Fuse, with an ASCII 'content', 'start' 1, 'stop' 0");
    if (start == 1) plan->strip_first = content[0];
    return MOE_OK;
}

static const moe_component_row rows[] = {{"ByteFallback", load_byte_fallback},
                                         {"ByteLevel", load_byte_level},
                                         {"Fuse", load_fuse},
                                         {"Replace", load_replace},
                                         {"Strip", load_strip}};
static const moe_component_table table = {"decoders", rows, sizeof rows / sizeof *rows};

/* A token with any character outside the alphabet (an added token) stands for its own spelling. */
static void byte_level_bytes(const char *text, size_t size, moe_buf *out) {
    size_t start = out->size;
    for (size_t at = 0; at < size; at += moe_utf8_size((unsigned char)text[at])) {
        int byte = moe_byte_level_byte(moe_utf8_code_point(text + at));
        char c = (char)byte;
        if (byte < 0) {
            if (!out->failed) out->size = start;
            moe_buf_append(out, text, size);
            return;
        }
        moe_buf_append(out, &c, 1);
    }
}

/* "<0x0A>" is the byte 0x0A. */
static void byte_fallback_bytes(const char *text, size_t size, moe_buf *out) {
    char *end = NULL;
    if (size == 6 && memcmp(text, "<0x", 3) == 0 && text[5] == '>') {
        char digits[] = {text[3], text[4], '\0'};
        char byte = (char)strtoul(digits, &end, 16);
        if (end == digits + 2 && digits[0] != '+' && digits[0] != '-' && digits[0] != ' ') {
            moe_buf_append(out, &byte, 1);
            return;
        }
    }
    moe_buf_append(out, text, size);
}

static moe_status apply_step(const decode_step *step, moe_regex_scratch *scratch, const moe_buf *in, moe_buf *out,
                             moe_error *err) {
    const char *text = moe_buf_text(in);
    switch (step->kind) {
        case DECODE_BYTE_LEVEL:
            byte_level_bytes(text, in->size, out);
            return MOE_OK;
        case DECODE_BYTE_FALLBACK:
            byte_fallback_bytes(text, in->size, out);
            return MOE_OK;
        case DECODE_REPLACE:
            return moe_regex_replace(step->pattern, scratch, text, in->size, step->content, out, err);
        default:
            moe_buf_append(out, text, in->size);
            return MOE_OK;
    }
}

/* Runs one spelling through all steps; the result is in *token. */
static moe_status decode_token(const decode_plan *plan, moe_regex_scratch *scratch, moe_buf *token, moe_buf *spare,
                               moe_error *err) {
    for (int i = 0; i < plan->num_steps; i++) {
        moe_buf_clear(spare);
        moe_status status = apply_step(&plan->steps[i], scratch, token, spare, err);
        if (status != MOE_OK) return status;
        moe_buf swap = *token;
        *token = *spare;
        *spare = swap;
    }
    return MOE_OK;
}

static moe_status fill_tables(const decode_plan *plan, const moe_vocab *vocab, moe_regex_scratch *scratch, moe_decoder *out,
                              moe_error *err) {
    moe_buf token = {0}, spare = {0};
    moe_status status = MOE_OK;
    for (int32_t id = 0; id < vocab->num_entries && status == MOE_OK; id++) {
        const moe_vocab_entry *entry = moe_vocab_entry_of(vocab, id);
        moe_buf_clear(&token);
        if (entry) {
            moe_buf_append(&token, moe_vocab_text(vocab, entry), entry->size);
            status = decode_token(plan, scratch, &token, &spare, err);
        }
        moe_buf_append(&out->bytes, moe_buf_text(&token), token.size);
        if (token.failed || spare.failed || out->bytes.failed || out->bytes.size > MOE_DECODER_MAX_BYTES)
            status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "no memory for the tokens' bytes");
        out->offsets[id + 1] = (uint32_t)out->bytes.size;
    }
    moe_buf_free(&token);
    moe_buf_free(&spare);
    return status;
}

moe_status moe_decoder_load(const json_t *json, const moe_vocab *vocab, moe_decoder *out, moe_error *err) {
    if (!json || json_is_null(json)) return moe_fail(err, MOE_UNIMPLEMENTED, "decoder: a tokenizer without one is not supported");
    decode_plan plan = {.strip_first = -1};
    moe_status status = moe_component_load(&table, json, &plan, err);
    moe_regex_scratch *scratch = moe_regex_scratch_new();
    out->offsets = moe_calloc((size_t)vocab->num_entries + 1, sizeof *out->offsets);
    if (status == MOE_OK && (!scratch || !out->offsets)) status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    if (status == MOE_OK) status = fill_tables(&plan, vocab, scratch, out, err);
    out->strip_first = plan.strip_first;
    for (int i = 0; i < plan.num_steps; i++) moe_regex_free(&plan.steps[i].pattern);
    moe_regex_scratch_free(&scratch);
    if (status == MOE_OK) return MOE_OK;
    moe_decoder_free(out);
    return moe_fail_prefix(err, status, "decoder");
}

void moe_decoder_free(moe_decoder *decoder) {
    moe_buf_free(&decoder->bytes);
    moe_free(decoder->offsets);
    *decoder = (moe_decoder){.strip_first = -1};
}
