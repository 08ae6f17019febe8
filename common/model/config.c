#include "common/model/config.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "common/buf.h"
#include "common/model/family.h"
#include "common/model/json_fields.h"

#define MAX_HIDDEN (1 << 16)
#define MAX_INTERMEDIATE (1 << 20)
#define MAX_HEADS 1024
#define MAX_HEAD_DIM 1024
#define MAX_VOCAB (1 << 22)
#define MAX_POSITIONS (1 << 24)
#define MAX_ROPE_THETA 1e12

static const char *first_present(const moe_fields *f, const char *const *keys, int count) {
    for (int i = 0; i < count && keys[i]; i++)
        if (moe_fields_get(f, keys[i])) return keys[i];
    return keys[0]; /* the reader then names it as missing */
}

static void read_family(moe_fields *f, moe_model_config *c) {
    const char *model_type = moe_fields_text(f, "model_type", NULL);
    if (!model_type) {
        moe_fields_fail(f, MOE_INVALID_ARGUMENT, "model_type is missing");
        return;
    }
    c->family = moe_family_find(model_type);
    if (c->family) return;
    moe_buf known = {0};
    int count;
    const moe_family *table = moe_family_table(&count);
    for (int i = 0; i < count; i++) moe_buf_printf(&known, "%s%s", i ? ", " : "", table[i].model_type);
    moe_fields_fail(f, MOE_UNIMPLEMENTED, "model_type \"%.64s\" is not supported; known are %s", model_type,
                    moe_buf_text(&known));
    moe_buf_free(&known);
}

/* Settings that change the arithmetic and for which only the plain value is built. */
static void refuse_unbuilt(moe_fields *f, const moe_family *family) {
    const char *built = family->relu ? "relu" : "silu", *act = moe_fields_text(f, "hidden_act", built);
    if (strcmp(act, built) != 0)
        moe_fields_fail(f, MOE_UNIMPLEMENTED, "hidden_act \"%.64s\" is not supported; of %s only %s is", act, family->model_type,
                        built);
    if (moe_fields_bool(f, "mlp_bias", false)) moe_fields_fail(f, MOE_UNIMPLEMENTED, "mlp_bias true is not supported");
    if (moe_fields_bool(f, "use_sliding_window", false))
        moe_fields_fail(f, MOE_UNIMPLEMENTED, "use_sliding_window true is not supported");
    if (moe_fields_get(f, "quantization_config"))
        moe_fields_fail(f, MOE_UNIMPLEMENTED, "quantization_config: quantized checkpoints are not supported");
    const json_t *types = moe_fields_get(f, "layer_types"), *type;
    size_t i;
    json_array_foreach(types, i, type) {
        const char *name = json_string_value(type);
        if (!name || strcmp(name, "full_attention") != 0)
            moe_fields_fail(f, MOE_UNIMPLEMENTED, "layer_types \"%.64s\" is not supported; only full_attention is",
                            name ? name : "");
    }
}

/* One of rope_parameters, rope_scaling or the top level: they share the keys read here. */
static void read_rope_object(moe_fields *f, moe_model_config *c) {
    const char *type = moe_fields_text(f, "rope_type", moe_fields_text(f, "type", "default"));
    if (strcmp(type, "default") != 0)
        moe_fields_fail(f, MOE_UNIMPLEMENTED, "rope type \"%.64s\" is not supported; only default is", type);
    double part = moe_fields_number(f, "partial_rotary_factor", 0, 1, 1);
    if (part < 1) moe_fields_fail(f, MOE_UNIMPLEMENTED, "partial_rotary_factor %g is not supported; only 1 is", part);
    c->rope_theta = (float)moe_fields_number(f, "rope_theta", 1, MAX_ROPE_THETA, c->rope_theta);
}

static void read_rope(moe_fields *f, moe_model_config *c) {
    static const char *const keys[] = {"rope_scaling", "rope_parameters"};
    c->rope_theta = c->family->rope_theta_default;
    read_rope_object(f, c);
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        char name[PATH_MAX + 32];
        const json_t *object = moe_fields_get(f, keys[i]), *value;
        const char *key;
        if (!object) continue;
        if (!json_is_object(object)) moe_fields_fail(f, MOE_INVALID_ARGUMENT, "%s is not an object", keys[i]);
        json_object_foreach((json_t *)object, key, value) {
            if (json_is_object(value))
                moe_fields_fail(f, MOE_UNIMPLEMENTED, "%s.%.64s: settings by layer are not supported", keys[i], key);
        }
        if (f->status != MOE_OK) return;
        snprintf(name, sizeof name, "%s: %s", f->name, keys[i]);
        moe_fields inner = {.object = object, .name = name, .err = f->err};
        read_rope_object(&inner, c);
        f->status = inner.status;
    }
}

static void read_attention(moe_fields *f, moe_model_config *c) {
    const moe_family *family = c->family;
    c->hidden = (int32_t)moe_fields_required(f, "hidden_size", 1, MAX_HIDDEN);
    c->num_heads = (int32_t)moe_fields_required(f, "num_attention_heads", 1, MAX_HEADS);
    c->num_kv_heads = (int32_t)moe_fields_integer(f, "num_key_value_heads", 1, MAX_HEADS, c->num_heads);
    c->head_dim = (int32_t)moe_fields_integer(f, "head_dim", 1, MAX_HEAD_DIM, 0);
    if (c->head_dim == 0) {
        if (c->hidden % c->num_heads != 0)
            moe_fields_fail(f, MOE_INVALID_ARGUMENT, "hidden_size %d is not a multiple of num_attention_heads %d", c->hidden,
                            c->num_heads);
        c->head_dim = c->hidden / c->num_heads;
    }
    if (c->head_dim % 2 != 0 || c->head_dim > MAX_HEAD_DIM)
        moe_fields_fail(f, MOE_INVALID_ARGUMENT, "head_dim %d is odd or above %d", c->head_dim, MAX_HEAD_DIM);
    if (c->num_heads % c->num_kv_heads != 0)
        moe_fields_fail(f, MOE_INVALID_ARGUMENT, "num_attention_heads %d is not a multiple of num_key_value_heads %d",
                        c->num_heads, c->num_kv_heads);
    c->qk_norm = family->qk_norm;
    if (family->attention_bias_key) c->qkv_bias = moe_fields_bool(f, family->attention_bias_key, family->qkv_bias_default);
    c->o_bias = c->qkv_bias && family->o_bias;
    c->clip_qkv = (float)moe_fields_number(f, "clip_qkv", 0, 1e6, 0);
    if (family->sliding_window) c->sliding_window = (int32_t)moe_fields_integer(f, "sliding_window", 1, MAX_POSITIONS, 0);
    c->rms_eps = (float)moe_fields_number(f, "rms_norm_eps", 1e-12, 1, -1);
    if (c->rms_eps < 0) moe_fields_fail(f, MOE_INVALID_ARGUMENT, "rms_norm_eps is missing");
}

static void mark_dense_layers(moe_fields *f, bool *is_moe, int32_t num_layers) {
    int64_t step = moe_fields_integer(f, "decoder_sparse_step", 1, MOE_MAX_LAYERS, 1);
    for (int32_t layer = 0; layer < num_layers; layer++) is_moe[layer] = (layer + 1) % step == 0;
    const json_t *list = moe_fields_get(f, "mlp_only_layers"), *item;
    size_t i;
    if (list && !json_is_array(list)) moe_fields_fail(f, MOE_INVALID_ARGUMENT, "mlp_only_layers is not a list");
    json_array_foreach(list, i, item) {
        int64_t layer = json_is_integer(item) ? json_integer_value(item) : -1;
        if (layer < 0 || layer >= num_layers) {
            moe_fields_fail(f, MOE_INVALID_ARGUMENT, "mlp_only_layers: item %zu is not a layer in [0, %d)", i, num_layers);
            return;
        }
        is_moe[layer] = false;
    }
}

static void read_layers(moe_fields *f, moe_model_config *c) {
    const moe_family *family = c->family;
    c->num_layers = (int32_t)moe_fields_required(f, "num_hidden_layers", 1, MOE_MAX_LAYERS);
    for (int32_t layer = 0; layer < c->num_layers; layer++) c->layer_is_moe[layer] = family->num_experts_keys[0] != NULL;
    if (family->dense_layers) mark_dense_layers(f, c->layer_is_moe, c->num_layers);
    for (int32_t layer = 0; layer < c->num_layers; layer++)
        if (c->layer_is_moe[layer]) c->moe_layers[c->num_moe_layers++] = layer;
    if (c->num_moe_layers < c->num_layers)
        c->dense_intermediate = (int32_t)moe_fields_required(f, "intermediate_size", 1, MAX_INTERMEDIATE);
}

static void read_experts(moe_fields *f, moe_model_config *c) {
    const moe_family *family = c->family;
    c->num_experts = (int32_t)moe_fields_required(f, first_present(f, family->num_experts_keys, 4), 1, MOE_MAX_EXPERTS);
    c->top_k = (int32_t)moe_fields_required(f, "num_experts_per_tok", 1, MOE_MAX_TOP_K);
    if (c->top_k > c->num_experts)
        moe_fields_fail(f, MOE_INVALID_ARGUMENT, "num_experts_per_tok %d is above the number of experts, %d", c->top_k,
                        c->num_experts);
    c->expert_intermediate =
        (int32_t)moe_fields_required(f, first_present(f, family->expert_intermediate_keys, 3), 1, MAX_INTERMEDIATE);
    if (family->shared_intermediate_keys[0]) {
        c->shared_intermediate =
            (int32_t)moe_fields_required(f, first_present(f, family->shared_intermediate_keys, 3), 1, MAX_INTERMEDIATE);
        c->shared_gated = family->shared_gated;
    }
    c->gate_kind = family->gate_kind;
    c->norm_topk = moe_fields_bool(f, "norm_topk_prob", family->norm_topk_default);
}

static void read_config(moe_fields *f, moe_model_config *c) {
    read_family(f, c);
    if (f->status != MOE_OK) return;
    refuse_unbuilt(f, c->family);
    read_layers(f, c);
    read_attention(f, c);
    read_rope(f, c);
    if (c->num_moe_layers > 0) read_experts(f, c);
    c->vocab = (int32_t)moe_fields_required(f, "vocab_size", 1, MAX_VOCAB);
    c->max_positions = (int32_t)moe_fields_required(f, "max_position_embeddings", 1, MAX_POSITIONS);
    c->tied_embeddings = moe_fields_bool(f, "tie_word_embeddings", false);
}

moe_status moe_model_config_read(const char *dir, moe_model_config *out, moe_error *err) {
    char path[PATH_MAX];
    json_t *root = NULL;
    memset(out, 0, sizeof *out);
    if (snprintf(path, sizeof path, "%s/config.json", dir) >= (int)sizeof path)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%.128s…: the path is too long", dir);
    moe_status status = moe_json_read_file(path, MOE_JSON_MAX_CONFIG_BYTES, &root, err);
    if (status != MOE_OK) return status;
    moe_fields f = {.object = root, .name = path, .err = err};
    read_config(&f, out);
    json_decref(root);
    return f.status;
}

moe_status moe_model_config_cut(moe_model_config *c, int32_t num_layers, moe_error *err) {
    if (num_layers < 1 || num_layers > c->num_layers)
        return moe_fail(err, MOE_OUT_OF_RANGE, "%d layers of this model: it has %d", num_layers, c->num_layers);
    c->num_layers = num_layers;
    while (c->num_moe_layers > 0 && c->moe_layers[c->num_moe_layers - 1] >= num_layers) c->num_moe_layers--;
    return MOE_OK;
}
