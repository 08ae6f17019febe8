#include "router/tokenizer/postprocess.h"

#include <string.h>

#include "router/tokenizer/json_read.h"

typedef struct id_row {
    int32_t ids[MOE_POSTPROCESSOR_MAX_IDS];
    int count;
} id_row;

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

static moe_status load_template(const json_t *json, const moe_vocab *vocab, moe_postprocessor *out, moe_error *err) {
    const json_t *pieces = json_object_get(json, "single"), *specials = json_object_get(json, "special_tokens"), *piece;
    id_row before = {0}, after = {0};
    int num_texts = 0;
    size_t i;
    if (!json_is_array(pieces)) return moe_fail(err, MOE_INVALID_ARGUMENT, "'single' is not an array");
    json_array_foreach((json_t *)pieces, i, piece) {
        const json_t *special = json_object_get(piece, "SpecialToken");
        num_texts += json_object_get(piece, "Sequence") != NULL;
        moe_status status = special ? add_special(special, specials, vocab, num_texts ? &after : &before, err) : MOE_OK;
        if (status != MOE_OK) return status;
    }
    if (num_texts != 1) return moe_fail(err, MOE_UNIMPLEMENTED, "a template with the text %d times is not supported", num_texts);
    return wrap(out, &before, &after, err);
}

/* It moves offsets only, never ids. */
static moe_status load_byte_level(const json_t *json, const moe_vocab *vocab, moe_postprocessor *out, moe_error *err) {
    (void)json, (void)vocab, (void)out, (void)err;
    return MOE_OK;
}

static moe_status load_any(const json_t *json, const moe_vocab *vocab, moe_postprocessor *out, moe_error *err);

static moe_status load_sequence(const json_t *json, const moe_vocab *vocab, moe_postprocessor *out, moe_error *err) {
    const json_t *parts = json_object_get(json, "processors"), *part;
    if (!json_is_array(parts)) return moe_fail(err, MOE_INVALID_ARGUMENT, "'processors' is not an array");
    size_t i;
    json_array_foreach((json_t *)parts, i, part) {
        if (strcmp(moe_json_type(part), "Sequence") == 0)
            return moe_fail(err, MOE_UNIMPLEMENTED, "a Sequence inside a Sequence is not supported");
        moe_status status = load_any(part, vocab, out, err);
        if (status != MOE_OK) return status;
    }
    return MOE_OK;
}

static moe_status load_any(const json_t *json, const moe_vocab *vocab, moe_postprocessor *out, moe_error *err) {
    static const struct {
        const char *type;
        moe_status (*load)(const json_t *json, const moe_vocab *vocab, moe_postprocessor *out, moe_error *err);
    } rows[] = {{"ByteLevel", load_byte_level}, {"Sequence", load_sequence}, {"TemplateProcessing", load_template}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (strcmp(rows[i].type, moe_json_type(json)) == 0) return rows[i].load(json, vocab, out, err);
    return moe_fail(err, MOE_UNIMPLEMENTED, "type '%s' is not supported", moe_json_type(json));
}

moe_status moe_postprocessor_load(const json_t *json, const moe_vocab *vocab, moe_postprocessor *out, moe_error *err) {
    *out = (moe_postprocessor){0};
    if (!json || json_is_null(json)) return MOE_OK;
    moe_status status = load_any(json, vocab, out, err);
    return status == MOE_OK ? MOE_OK : moe_fail_prefix(err, status, "post_processor");
}
