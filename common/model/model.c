#include "common/model/model.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "common/model/checkpoint_digest.h"
#include "common/model/dummy.h"
#include "common/model/family.h"
#include "common/model/safetensors.h"

#define MAX_KEY_BYTES 256

/* The first failure stays in `status`; what follows does nothing. */
typedef struct loader {
    moe_model *model;
    moe_dummy *dummy; /* makes the tensors; NULL: they are in the checkpoint */
    moe_status status;
    moe_error *err;
} loader;

static void format_layer_key(char name[MAX_KEY_BYTES], int32_t layer, const char *key) {
    snprintf(name, MAX_KEY_BYTES, "model.layers.%" PRId32 ".%s", layer, key);
}

/* A key of the family row with "{E}" replaced by the expert's number. */
static void format_expert_key(char name[MAX_KEY_BYTES], int32_t layer, const char *key, int32_t expert) {
    const char *mark = strstr(key, "{E}");
    MOE_ASSERT(mark);
    snprintf(name, MAX_KEY_BYTES, "model.layers.%" PRId32 ".%.*s%" PRId32 "%s", layer, (int)(mark - key), key, expert, mark + 3);
}

static void format_shape(const moe_safetensor *t, char text[MAX_KEY_BYTES]) {
    size_t at = 0;
    text[0] = '\0';
    for (int i = 0; i < t->num_dims; i++)
        at += (size_t)snprintf(text + at, MAX_KEY_BYTES - at, "%s%" PRId64, i ? ", " : "", t->dims[i]);
}

/* The tensor of that name and shape; NULL after a failure. */
static const moe_safetensor *find(loader *l, const char *name, int num_dims, const int64_t *dims) {
    if (l->status != MOE_OK) return NULL;
    const moe_safetensor *t = moe_safetensors_find(l->model->checkpoint, name);
    if (!t) {
        l->status = moe_fail(l->err, MOE_INVALID_ARGUMENT, "%s: tensor %s is missing", l->model->dir, name);
        return NULL;
    }
    if (t->num_dims == num_dims && memcmp(t->dims, dims, (size_t)num_dims * sizeof *dims) == 0) return t;
    moe_safetensor wanted = {.num_dims = num_dims};
    char is[MAX_KEY_BYTES], want[MAX_KEY_BYTES];
    memcpy(wanted.dims, dims, (size_t)num_dims * sizeof *dims);
    format_shape(t, is);
    format_shape(&wanted, want);
    l->status = moe_fail(l->err, MOE_INVALID_ARGUMENT, "%s: tensor %s has the shape [%s]; config.json asks for [%s]",
                         l->model->dir, name, is, want);
    return NULL;
}

static void load_matrix_named(loader *l, const char *name, int64_t rows, int64_t cols, moe_tensor *out) {
    if (l->dummy) {
        *out = moe_dummy_tensor(l->dummy, name, MOE_DUMMY_MATRIX, rows, cols);
        return;
    }
    const moe_safetensor *t = find(l, name, 2, (int64_t[]){rows, cols});
    if (t) *out = (moe_tensor){.data = t->data, .dtype = t->dtype, .rows = rows, .cols = cols};
}

static bool ends_in(const char *name, const char *suffix) {
    size_t length = strlen(name), suffix_length = strlen(suffix);
    return length >= suffix_length && strcmp(name + length - suffix_length, suffix) == 0;
}

/* A norm's weights or a bias. */
static void load_vector_named(loader *l, const char *name, int64_t size, moe_tensor *out) {
    if (l->dummy) {
        *out = moe_dummy_tensor(l->dummy, name, ends_in(name, ".bias") ? MOE_DUMMY_BIAS : MOE_DUMMY_NORM, 1, size);
        return;
    }
    const moe_safetensor *t = find(l, name, 1, &size);
    if (t) *out = (moe_tensor){.data = t->data, .dtype = t->dtype, .rows = 1, .cols = size};
}

static void load_matrix(loader *l, int32_t layer, const char *key, int64_t rows, int64_t cols, moe_tensor *out) {
    char name[MAX_KEY_BYTES];
    format_layer_key(name, layer, key);
    load_matrix_named(l, name, rows, cols, out);
}

static void load_vector(loader *l, int32_t layer, const char *key, int64_t size, moe_tensor *out) {
    char name[MAX_KEY_BYTES];
    format_layer_key(name, layer, key);
    load_vector_named(l, name, size, out);
}

static void load_attention(loader *l, int32_t layer) {
    const moe_model_config *c = &l->model->config;
    moe_layer_weights *w = &l->model->layers[layer];
    int64_t q_width = (int64_t)c->num_heads * c->head_dim, kv_width = (int64_t)c->num_kv_heads * c->head_dim;
    load_matrix(l, layer, "self_attn.q_proj.weight", q_width, c->hidden, &w->q);
    load_matrix(l, layer, "self_attn.k_proj.weight", kv_width, c->hidden, &w->k);
    load_matrix(l, layer, "self_attn.v_proj.weight", kv_width, c->hidden, &w->v);
    load_matrix(l, layer, "self_attn.o_proj.weight", c->hidden, q_width, &w->o);
    if (c->qkv_bias) {
        load_vector(l, layer, "self_attn.q_proj.bias", q_width, &w->q_bias);
        load_vector(l, layer, "self_attn.k_proj.bias", kv_width, &w->k_bias);
        load_vector(l, layer, "self_attn.v_proj.bias", kv_width, &w->v_bias);
    }
    if (c->o_bias) load_vector(l, layer, "self_attn.o_proj.bias", c->hidden, &w->o_bias);
    if (c->qk_norm != MOE_QK_NORM_NONE) {
        bool by_head = c->qk_norm == MOE_QK_NORM_HEAD;
        load_vector(l, layer, "self_attn.q_norm.weight", by_head ? c->head_dim : q_width, &w->q_norm);
        load_vector(l, layer, "self_attn.k_norm.weight", by_head ? c->head_dim : kv_width, &w->k_norm);
    }
}

/* gate NULL: a network of two matrices. */
static void load_ffn(loader *l, int32_t layer, const char *gate, const char *up, const char *down, int64_t width,
                     moe_ffn_weights *out) {
    int64_t hidden = l->model->config.hidden;
    if (gate) load_matrix(l, layer, gate, width, hidden, &out->gate);
    load_matrix(l, layer, up, width, hidden, &out->up);
    load_matrix(l, layer, down, hidden, width, &out->down);
}

/* Expert e of a packed [E, rows, cols] tensor, `count` of its rows from `first`. */
static moe_tensor slice(const moe_safetensor *t, int64_t expert, int64_t first, int64_t count) {
    size_t row_bytes = (size_t)t->dims[2] * moe_dtype_bytes(t->dtype);
    const uint8_t *data = (const uint8_t *)t->data + ((size_t)expert * (size_t)t->dims[1] + (size_t)first) * row_bytes;
    return (moe_tensor){.data = data, .dtype = t->dtype, .rows = count, .cols = t->dims[2]};
}

static void load_packed_experts(loader *l, int32_t layer, moe_ffn_weights *experts) {
    const moe_model_config *c = &l->model->config;
    int64_t width = c->expert_intermediate;
    char name[MAX_KEY_BYTES];
    format_layer_key(name, layer, c->family->packed_gate_up_key);
    const moe_safetensor *gate_up = find(l, name, 3, (int64_t[]){c->num_experts, 2 * width, c->hidden});
    format_layer_key(name, layer, c->family->packed_down_key);
    const moe_safetensor *down = find(l, name, 3, (int64_t[]){c->num_experts, c->hidden, width});
    if (!gate_up || !down) return;
    for (int32_t e = 0; e < c->num_experts; e++)
        experts[e] = (moe_ffn_weights){
            .gate = slice(gate_up, e, 0, width), .up = slice(gate_up, e, width, width), .down = slice(down, e, 0, c->hidden)};
}

static void load_single_experts(loader *l, int32_t layer, moe_ffn_weights *experts) {
    const moe_model_config *c = &l->model->config;
    for (int32_t e = 0; e < c->num_experts && l->status == MOE_OK; e++) {
        char name[MAX_KEY_BYTES];
        if (c->family->expert_gate_key) {
            format_expert_key(name, layer, c->family->expert_gate_key, e);
            load_matrix_named(l, name, c->expert_intermediate, c->hidden, &experts[e].gate);
        }
        format_expert_key(name, layer, c->family->expert_up_key, e);
        load_matrix_named(l, name, c->expert_intermediate, c->hidden, &experts[e].up);
        format_expert_key(name, layer, c->family->expert_down_key, e);
        load_matrix_named(l, name, c->hidden, c->expert_intermediate, &experts[e].down);
    }
}

static bool is_packed(loader *l, int32_t layer) {
    const moe_family *family = l->model->config.family;
    char single[MAX_KEY_BYTES], packed[MAX_KEY_BYTES];
    if (l->dummy || !family->packed_gate_up_key) return false;
    format_expert_key(single, layer, family->expert_gate_key, 0);
    format_layer_key(packed, layer, family->packed_gate_up_key);
    return !moe_safetensors_find(l->model->checkpoint, single) && moe_safetensors_find(l->model->checkpoint, packed);
}

static void load_moe(loader *l, int32_t moe_index) {
    const moe_model_config *c = &l->model->config;
    const moe_family *family = c->family;
    int32_t layer = c->moe_layers[moe_index];
    moe_layer_weights *w = &l->model->layers[layer];
    moe_ffn_weights *experts = &l->model->experts[(int64_t)moe_index * c->num_experts];
    bool packed = is_packed(l, layer);
    load_matrix(l, layer, packed && family->packed_gate_key ? family->packed_gate_key : family->gate_key, c->num_experts,
                c->hidden, &w->gate);
    packed ? load_packed_experts(l, layer, experts) : load_single_experts(l, layer, experts);
    if (c->shared_intermediate > 0)
        load_ffn(l, layer, family->shared_gate_proj_key, family->shared_up_key, family->shared_down_key, c->shared_intermediate,
                 &w->shared);
    if (c->shared_gated) load_matrix(l, layer, family->shared_expert_gate_key, 1, c->hidden, &w->shared_gate);
    if (l->dummy) return; /* dummy models have no pre-gates: most checkpoints have none */
    char name[MAX_KEY_BYTES];
    format_layer_key(name, layer, family->pre_gate_key);
    if (moe_safetensors_find(l->model->checkpoint, name)) load_matrix_named(l, name, c->num_experts, c->hidden, &w->pre_gate);
}

static void load_layers(loader *l) {
    const moe_model_config *c = &l->model->config;
    int32_t moe_index = 0;
    for (int32_t layer = 0; layer < c->num_layers && l->status == MOE_OK; layer++) {
        moe_layer_weights *w = &l->model->layers[layer];
        load_vector(l, layer, "input_layernorm.weight", c->hidden, &w->input_norm);
        load_attention(l, layer);
        load_vector(l, layer, "post_attention_layernorm.weight", c->hidden, &w->post_norm);
        if (c->layer_is_moe[layer])
            load_moe(l, moe_index++);
        else
            load_ffn(l, layer, c->family->dense_gate_proj_key, c->family->dense_up_key, c->family->dense_down_key,
                     c->dense_intermediate, &w->dense);
    }
}

static void load_ends(loader *l) {
    moe_model *m = l->model;
    load_matrix_named(l, "model.embed_tokens.weight", m->config.vocab, m->config.hidden, &m->embed);
    load_vector_named(l, "model.norm.weight", m->config.hidden, &m->final_norm);
    if (m->config.tied_embeddings)
        m->lm_head = m->embed;
    else
        load_matrix_named(l, "lm_head.weight", m->config.vocab, m->config.hidden, &m->lm_head);
}

static bool is_ignored(const moe_model_config *c, const char *name) {
    if (c->tied_embeddings && strcmp(name, "lm_head.weight") == 0) return true;
    for (size_t i = 0; i < sizeof c->family->ignored_suffixes / sizeof c->family->ignored_suffixes[0]; i++)
        if (c->family->ignored_suffixes[i] && ends_in(name, c->family->ignored_suffixes[i])) return true;
    return false;
}

static void refuse_unused(loader *l) {
    const moe_safetensors *checkpoint = l->model->checkpoint;
    for (int64_t i = 0; i < moe_safetensors_count(checkpoint) && l->status == MOE_OK; i++) {
        const moe_safetensor *t = moe_safetensors_at(checkpoint, i);
        if (!t->used && !is_ignored(&l->model->config, t->name))
            l->status =
                moe_fail(l->err, MOE_INVALID_ARGUMENT, "%s: tensor %.200s is not one that a %s model with this config.json has",
                         l->model->dir, t->name, l->model->config.family->model_type);
    }
}

static bool find_pre_gates(const moe_model *m) {
    for (int32_t i = 0; i + 1 < m->config.num_moe_layers; i++)
        if (!moe_tensor_present(&m->layers[m->config.moe_layers[i]].pre_gate)) return false;
    return m->config.num_moe_layers > 1;
}

static moe_status allocate(moe_model *m, const char *dir, moe_error *err) {
    m->dir = moe_strdup(dir);
    m->layers = moe_calloc((size_t)m->config.num_layers, sizeof *m->layers);
    m->experts = moe_calloc((size_t)m->config.num_moe_layers * (size_t)m->config.num_experts, sizeof *m->experts);
    if (m->dir && m->layers && m->experts) return MOE_OK;
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%s: out of memory for the model's tables", dir);
}

static moe_status load_checkpoint(moe_model *m, const char *dir, moe_error *err) {
    moe_status status = moe_safetensors_open(dir, &m->checkpoint, err);
    if (status != MOE_OK) return status;
    loader l = {.model = m, .err = err};
    load_ends(&l);
    load_layers(&l);
    refuse_unused(&l);
    if (l.status != MOE_OK) return l.status;
    m->has_pre_gates = find_pre_gates(m);
    return moe_checkpoint_digest(m->checkpoint, &m->digest, err);
}

static moe_status load_dummy(moe_model *m, const char *dir, uint64_t seed, moe_error *err) {
    moe_dummy dummy;
    moe_status status = moe_dummy_begin(dir, seed, &dummy, err);
    if (status != MOE_OK) return status;
    loader l = {.model = m, .dummy = &dummy, .err = err};
    load_ends(&l);
    load_layers(&l);
    m->digest = moe_dummy_end(&dummy);
    return l.status;
}

/* dummy NULL: of the checkpoint. */
static moe_status open_model(const char *dir, const moe_dummy_options *dummy, moe_model **out, moe_error *err) {
    moe_model *m = moe_calloc(1, sizeof *m);
    if (!m) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%s: out of memory", dir);
    moe_status status = moe_model_config_read(dir, &m->config, err);
    if (status == MOE_OK && dummy && dummy->num_layers) status = moe_model_config_cut(&m->config, dummy->num_layers, err);
    if (status == MOE_OK) status = moe_generation_config_read(dir, &m->generation, err);
    if (status == MOE_OK) status = allocate(m, dir, err);
    if (status == MOE_OK) status = dummy ? load_dummy(m, dir, dummy->seed, err) : load_checkpoint(m, dir, err);
    if (status != MOE_OK) {
        moe_model_close(&m);
        return status;
    }
    *out = m;
    return MOE_OK;
}

moe_status moe_model_open(const char *dir, moe_model **out, moe_error *err) { return open_model(dir, NULL, out, err); }

moe_status moe_model_open_dummy(const char *dir, const moe_dummy_options *options, moe_model **out, moe_error *err) {
    return open_model(dir, options, out, err);
}

void moe_model_close(moe_model **model) {
    moe_model *m = *model;
    if (!m) return;
    moe_safetensors_close(&m->checkpoint);
    moe_safetensors_close(&m->pre_gates);
    moe_free((char *)m->dir);
    moe_free(m->layers);
    moe_free(m->experts);
    moe_free(m);
    *model = NULL;
}
