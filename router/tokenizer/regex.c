#include "router/tokenizer/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "common/alloc.h"
#include "router/tokenizer/utf8.h"

#define REGEX_MATCH_LIMIT 20000000u /* calls of PCRE2's inner match; linear patterns need a few per character of a run */
#define REGEX_HEAP_LIMIT_KIB 65536u /* backtracking frames of the interpreter */
#define REGEX_PATTERN_MAX_BYTES 65536u

struct moe_regex {
    pcre2_code *code;
    pcre2_match_context *limits;
};

static void *pcre2_alloc(size_t size, void *ctx) {
    (void)ctx;
    return moe_calloc(1, size);
}

static void pcre2_release(void *memory, void *ctx) {
    (void)ctx;
    moe_free(memory);
}

static moe_status compile_code(moe_regex *regex, pcre2_general_context *general, const moe_buf *pattern, bool literal,
                               moe_error *err) {
    pcre2_compile_context *context = pcre2_compile_context_create(general);
    regex->limits = pcre2_match_context_create(general);
    if (!context || !regex->limits) {
        pcre2_compile_context_free(context);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory compiling a pattern");
    }
    int code;
    PCRE2_SIZE offset;
    uint32_t options = PCRE2_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C);
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    regex->code = pcre2_compile((PCRE2_SPTR)moe_buf_text(pattern), pattern->size, options, &code, &offset, context);
    pcre2_compile_context_free(context);
    if (!regex->code && code == PCRE2_ERROR_HEAP_FAILED)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory compiling a pattern");
    if (!regex->code) {
        PCRE2_UCHAR message[160];
        pcre2_get_error_message(code, message, sizeof message);
        return moe_fail(err, MOE_INVALID_ARGUMENT, "pattern '%.200s' is refused at byte %zu: %s", moe_buf_text(pattern), offset,
                        (const char *)message);
    }
    pcre2_set_match_limit(regex->limits, REGEX_MATCH_LIMIT);
    pcre2_set_heap_limit(regex->limits, REGEX_HEAP_LIMIT_KIB);
    pcre2_jit_compile(regex->code, PCRE2_JIT_COMPLETE); /* without JIT the interpreter matches the same */
    return MOE_OK;
}

moe_status moe_regex_compile(const char *pattern, size_t size, bool literal, moe_regex **out, moe_error *err) {
    *out = NULL;
    if (size > REGEX_PATTERN_MAX_BYTES) return moe_fail(err, MOE_INVALID_ARGUMENT, "a pattern of %zu bytes is too long", size);
    moe_buf translated = {0};
    moe_status status = MOE_OK;
    if (literal)
        moe_buf_append(&translated, pattern, size);
    else
        status = moe_regex_translate(pattern, size, &translated, err);
    moe_regex *regex = moe_calloc(1, sizeof *regex);
    pcre2_general_context *general = pcre2_general_context_create(pcre2_alloc, pcre2_release, NULL);
    if (status == MOE_OK && (!regex || !general || translated.failed))
        status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory compiling a pattern");
    if (status == MOE_OK) status = compile_code(regex, general, &translated, literal, err);
    pcre2_general_context_free(general);
    moe_buf_free(&translated);
    if (status != MOE_OK) {
        moe_regex_free(&regex);
        return status;
    }
    *out = regex;
    return MOE_OK;
}

void moe_regex_free(moe_regex **regex) {
    if (!*regex) return;
    pcre2_match_context_free((*regex)->limits);
    pcre2_code_free((*regex)->code);
    moe_free(*regex);
    *regex = NULL;
}

struct moe_regex_scratch {
    pcre2_match_data *data;
};

moe_regex_scratch *moe_regex_scratch_new(void) {
    moe_regex_scratch *scratch = moe_calloc(1, sizeof *scratch);
    pcre2_general_context *general = pcre2_general_context_create(pcre2_alloc, pcre2_release, NULL);
    if (scratch && general) scratch->data = pcre2_match_data_create(1, general);
    pcre2_general_context_free(general);
    if (scratch && !scratch->data) moe_regex_scratch_free(&scratch);
    return scratch;
}

void moe_regex_scratch_free(moe_regex_scratch **scratch) {
    if (!*scratch) return;
    pcre2_match_data_free((*scratch)->data);
    moe_free(*scratch);
    *scratch = NULL;
}

static int match_from(const moe_regex *regex, moe_regex_scratch *scratch, const moe_regex_walk *walk) {
    PCRE2_SPTR text = (PCRE2_SPTR)walk->text;
    int rc = pcre2_match(regex->code, text, walk->size, walk->next, PCRE2_NO_UTF_CHECK, scratch->data, regex->limits);
    /* The JIT's stack is small and fixed; the interpreter's is bounded by the heap limit. */
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
        rc = pcre2_match(regex->code, text, walk->size, walk->next, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, scratch->data,
                         regex->limits);
    return rc;
}

moe_status moe_regex_next(const moe_regex *regex, moe_regex_scratch *scratch, moe_regex_walk *walk, bool *found, moe_error *err) {
    *found = false;
    while (walk->next <= walk->size) {
        int rc = match_from(regex, scratch, walk);
        if (rc == PCRE2_ERROR_NOMATCH) return MOE_OK;
        if (rc < 0) {
            PCRE2_UCHAR message[160];
            pcre2_get_error_message(rc, message, sizeof message);
            return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "the text cannot be split: %s", (const char *)message);
        }
        const PCRE2_SIZE *span = pcre2_get_ovector_pointer(scratch->data);
        if (span[0] == span[1] && walk->any && walk->last_end == span[1]) {
            walk->next += walk->next < walk->size ? moe_utf8_size((unsigned char)walk->text[walk->next]) : 1;
            continue;
        }
        walk->start = span[0];
        walk->end = walk->last_end = walk->next = span[1];
        walk->any = true;
        *found = true;
        return MOE_OK;
    }
    return MOE_OK;
}

moe_status moe_regex_replace(const moe_regex *regex, moe_regex_scratch *scratch, const char *text, size_t size, const char *with,
                             moe_buf *out, moe_error *err) {
    moe_regex_walk walk = {.text = text, .size = size};
    size_t copied = 0;
    for (bool found = true; found;) {
        moe_status status = moe_regex_next(regex, scratch, &walk, &found, err);
        if (status != MOE_OK) return status;
        size_t until = found ? walk.start : size;
        moe_buf_append(out, text + copied, until - copied);
        if (found) moe_buf_append_text(out, with);
        copied = walk.end;
    }
    return MOE_OK;
}
