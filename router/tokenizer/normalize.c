#include "router/tokenizer/normalize.h"

#include <string.h>
#include <utf8proc.h>

#include "common/alloc.h"
#include "router/tokenizer/component.h"
#include "router/tokenizer/normalize_form.h"

static moe_status add_step(moe_normalizer *normalizer, moe_normalizer_step step, moe_error *err) {
    if (normalizer->num_steps == MOE_NORMALIZER_MAX_STEPS)
        return moe_fail(err, MOE_UNIMPLEMENTED, "a normalizer of more than %d steps", MOE_NORMALIZER_MAX_STEPS);
    normalizer->steps[normalizer->num_steps++] = step;
    return MOE_OK;
}

static moe_status load_form(const json_t *json, void *out, moe_error *err) {
    const char *type = moe_json_type(json);
    int form = UTF8PROC_STABLE;
    form |= type[2] == 'C' || type[3] == 'C' ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
    if (type[2] == 'K') form |= UTF8PROC_COMPAT;
    return add_step(out, (moe_normalizer_step){.kind = MOE_NORMALIZE_FORM, .form = form}, err);
}

static moe_status load_text_step(moe_normalizer_step step, const json_t *json, const char *key, moe_normalizer *out,
                                 moe_error *err) {
    const char *text = NULL;
    moe_status status = moe_json_text(json, key, &text, err);
    if (status == MOE_OK && !text) status = moe_fail(err, MOE_INVALID_ARGUMENT, "'%s' is missing", key);
    if (status == MOE_OK && !(step.text = moe_strdup(text))) status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    if (status == MOE_OK) status = add_step(out, step, err);
    if (status != MOE_OK) {
        moe_free(step.text);
        moe_regex_free(&step.pattern);
    }
    return status;
}

static moe_status load_prepend(const json_t *json, void *out, moe_error *err) {
    return load_text_step((moe_normalizer_step){.kind = MOE_NORMALIZE_PREPEND}, json, "prepend", out, err);
}

static moe_status load_replace(const json_t *json, void *out, moe_error *err) {
    moe_normalizer_step step = {.kind = MOE_NORMALIZE_REPLACE};
    const char *pattern;
    size_t size;
    bool literal;
    moe_status status = moe_json_pattern(json, &pattern, &size, &literal, err);
    if (status == MOE_OK) status = moe_regex_compile(pattern, size, literal, &step.pattern, err);
    return status == MOE_OK ? load_text_step(step, json, "content", out, err) : status;
}

static const moe_component_row rows[] = {{"NFC", load_form},  {"NFD", load_form},        {"NFKC", load_form},
                                         {"NFKD", load_form}, {"Prepend", load_prepend}, {"Replace", load_replace}};
static const moe_component_table table = {"normalizers", rows, sizeof rows / sizeof *rows};

moe_status moe_normalizer_load(const json_t *json, moe_normalizer *out, moe_error *err) {
    moe_status status = !json || json_is_null(json) ? MOE_OK : moe_component_load(&table, json, out, err);
    if (status == MOE_OK) return MOE_OK;
    moe_normalizer_free(out);
    return moe_fail_prefix(err, status, "normalizer");
}

void moe_normalizer_free(moe_normalizer *normalizer) {
    for (int i = 0; i < normalizer->num_steps; i++) {
        moe_regex_free(&normalizer->steps[i].pattern);
        moe_free(normalizer->steps[i].text);
    }
    *normalizer = (moe_normalizer){0};
}

static moe_status apply_step(const moe_normalizer_step *step, moe_regex_scratch *scratch, const char *text, size_t size,
                             moe_buf *out, moe_error *err) {
    if (step->kind == MOE_NORMALIZE_FORM) return moe_normalize_form(step->form, text, size, out, err);
    if (step->kind == MOE_NORMALIZE_REPLACE) return moe_regex_replace(step->pattern, scratch, text, size, step->text, out, err);
    if (size) moe_buf_append_text(out, step->text);
    moe_buf_append(out, text, size);
    return MOE_OK;
}

moe_status moe_normalize(const moe_normalizer *normalizer, moe_regex_scratch *scratch, const char *text, size_t size,
                         moe_buf *out, moe_buf *spare, moe_error *err) {
    moe_buf_clear(out);
    moe_buf_append(out, text, size);
    for (int i = 0; i < normalizer->num_steps; i++) {
        moe_buf_clear(spare);
        moe_status status = apply_step(&normalizer->steps[i], scratch, moe_buf_text(out), out->size, spare, err);
        if (status != MOE_OK) return status;
        if (out->failed || spare->failed)
            return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory normalizing %zu bytes", size);
        moe_buf swap = *out;
        *out = *spare;
        *spare = swap;
    }
    return out->failed ? moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory normalizing %zu bytes", size) : MOE_OK;
}
