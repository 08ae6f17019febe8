#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "common/model/config.h"
#include "common/model/json_fields.h"

static void add_eos(moe_fields *f, const json_t *id, moe_generation_config *g) {
    if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) > INT32_MAX) {
        moe_fields_fail(f, MOE_INVALID_ARGUMENT, "eos_token_id is not a token id or a list of them");
    } else if (g->num_eos == MOE_MAX_EOS) {
        moe_fields_fail(f, MOE_INVALID_ARGUMENT, "eos_token_id: more than %d ids", MOE_MAX_EOS);
    } else {
        g->eos_ids[g->num_eos++] = (int32_t)json_integer_value(id);
    }
}

static void read_eos(moe_fields *f, moe_generation_config *g) {
    const json_t *value = moe_fields_get(f, "eos_token_id"), *item;
    size_t i;
    if (value && !json_is_array(value)) add_eos(f, value, g);
    json_array_foreach(value, i, item) add_eos(f, item, g);
}

static void read_sampling(moe_fields *f, moe_generation_config *g) {
    g->do_sample = moe_fields_bool(f, "do_sample", false);
    g->temperature = (float)moe_fields_number(f, "temperature", 0, 100, 1);
    g->top_p = (float)moe_fields_number(f, "top_p", 1e-6, 1, 1);
    g->min_p = (float)moe_fields_number(f, "min_p", 0, 1, 0);
    g->top_k = (int32_t)moe_fields_integer(f, "top_k", 0, INT32_MAX, 0);
    g->repetition_penalty = (float)moe_fields_number(f, "repetition_penalty", 1e-3, 1e3, 1);
}

static moe_status read_file(const char *dir, const char *file, void (*const *readers)(moe_fields *, moe_generation_config *),
                            int num_readers, moe_generation_config *g, moe_error *err) {
    char path[PATH_MAX];
    json_t *root = NULL;
    if (snprintf(path, sizeof path, "%s/%s", dir, file) >= (int)sizeof path)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%.128s…: the path is too long", dir);
    moe_status status = moe_json_read_file(path, MOE_JSON_MAX_CONFIG_BYTES, &root, err);
    if (status != MOE_OK) return status;
    moe_fields f = {.object = root, .name = path, .err = err};
    for (int i = 0; i < num_readers; i++) readers[i](&f, g);
    json_decref(root);
    return f.status;
}

moe_status moe_generation_config_read(const char *dir, moe_generation_config *out, moe_error *err) {
    static void (*const readers[])(moe_fields *, moe_generation_config *) = {read_eos, read_sampling};
    *out = (moe_generation_config){.temperature = 1, .top_p = 1, .repetition_penalty = 1};
    moe_status status = read_file(dir, "generation_config.json", readers, 2, out, err);
    if (status != MOE_OK && status != MOE_NOT_FOUND) return status;
    return out->num_eos > 0 ? MOE_OK : read_file(dir, "config.json", readers, 1, out, err);
}
