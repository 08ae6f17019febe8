#include "router/tokenizer/postprocess.h"

#include <string.h>

#include "router/tokenizer/component.h"

typedef struct id_row {
    int32_t ids[MOE_POSTPROCESSOR_MAX_IDS];
    int count;
} id_row;

typedef struct loading {
    const moe_vocab *vocab;
    moe_postprocessor *out;
} loading;

static moe_status add_special(const json_t *piece, const json_t *specials, const moe_vocab *vocab, id_row *row, moe_error *err) {
    const char *name = json_string_value(json_object_get(piece, "id"));
    const json_t *ids = json_object_get(json_object_get(specials, name ? name : ""), "ids"), *id;
    if (!json_is_array(ids)) return moe_fail(err, MOE_INVALID_ARGUMENT, "the template's '%s' has no ids", name ? name : "?");
    size_t i;
    json_array_foreach((json_t *)ids, i, id) {
        json_int_t value = json_is_integer(id) ? json_integer_value(id) : -1;
        if (value < 0 || value > INT32_MAX || !moe_vocab_entry_of(vocab, (int32_t)value))
            return moe_fail(err, MOE_INVALID_ARGUMENT, "an id of the template's '%s' is no token", name);
        if (row->count == MOE_POSTPROCESSOR_MAX_IDS)
            return moe_fail(err, MOE_UNIMPLEMENTED, "a template of more than %d ids a side", MOE_POSTPROCESSOR_MAX_IDS);
        row->ids[row->count++] = (int32_t)value;
    }
    return MOE_OK;
}

/* A later processor wraps what earlier ones made. */
static moe_status wrap(moe_postprocessor *out, const id_row *before, const id_row *after, moe_error *err) {
    if (out->num_before + before->count > MOE_POSTPROCESSOR_MAX_IDS || out->num_after + after->count > MOE_POSTPROCESSOR_MAX_IDS)
        return moe_fail(err, MOE_UNIMPLEMENTED, "templates of more than %d ids a side", MOE_POSTPROCESSOR_MAX_IDS);
    memmove(out->before + before->count, out->before, (size_t)out->num_before * sizeof *out->before);
    memcpy(out->before, before->ids, (size_t)before->count * sizeof *out->before);
    memcpy(out->after + out->num_after, after->ids, (size_t)after->count * sizeof *out->after);
    out->num_before += before->count;
    out->num_after += after->count;
    return MOE_OK;
}

static moe_status load_template(const json_t *json, void *ctx, moe_error *err) {
    const loading *to = ctx;
    const json_t *pieces = json_object_get(json, "single"), *specials = json_object_get(json, "special_tokens"), *piece;
    id_row before = {0}, after = {0};
    int num_texts = 0;
    size_t i;
    if (!json_is_array(pieces)) return moe_fail(err, MOE_INVALID_ARGUMENT, "'single' is not an array");
    json_array_foreach((json_t *)pieces, i, piece) {
        const json_t *special = json_object_get(piece, "SpecialToken");
        num_texts += json_object_get(piece, "Sequence") != NULL;
        moe_status status = special ? add_special(special, specials, to->vocab, num_texts ? &after : &before, err) : MOE_OK;
        if (status != MOE_OK) return status;
    }
    if (num_texts != 1) return moe_fail(err, MOE_UNIMPLEMENTED, "a template with the text %d times is not supported", num_texts);
    return wrap(to->out, &before, &after, err);
}

/* It moves offsets only, never ids. */
static moe_status load_byte_level(const json_t *json, void *ctx, moe_error *err) {
    (void)json, (void)ctx, (void)err;
    return MOE_OK;
}

static const moe_component_row rows[] = {{"ByteLevel", load_byte_level}, {"TemplateProcessing", load_template}};
static const moe_component_table table = {"processors", rows, sizeof rows / sizeof *rows};

moe_status moe_postprocessor_load(const json_t *json, const moe_vocab *vocab, moe_postprocessor *out, moe_error *err) {
    *out = (moe_postprocessor){0};
    if (!json || json_is_null(json)) return MOE_OK;
    loading to = {vocab, out};
    moe_status status = moe_component_load(&table, json, &to, err);
    return status == MOE_OK ? MOE_OK : moe_fail_prefix(err, status, "post_processor");
}
