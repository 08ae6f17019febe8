#include "cpu/base.h"

#include <math.h>

#include "common/alloc.h"
#include "cpu/matrix.h"

static moe_status load_attention(const moe_cpu_kernels *kernels, const moe_layer_weights *w, moe_cpu_layer *out, moe_error *err) {
    const moe_tensor qkv[] = {w->q, w->k, w->v}, bias[] = {w->q_bias, w->k_bias, w->v_bias};
    moe_status status = moe_cpu_vector_read(&w->input_norm, 1, &out->input_norm, err);
    if (status == MOE_OK) status = moe_cpu_vector_read(&w->post_norm, 1, &out->post_norm, err);
    if (status == MOE_OK) status = moe_cpu_vector_read(&w->q_norm, 1, &out->q_norm, err);
    if (status == MOE_OK) status = moe_cpu_vector_read(&w->k_norm, 1, &out->k_norm, err);
    if (status == MOE_OK) status = moe_cpu_vector_read(bias, 3, &out->qkv_bias, err);
    if (status == MOE_OK) status = moe_cpu_vector_read(&w->o_bias, 1, &out->o_bias, err);
    if (status == MOE_OK) status = moe_cpu_matrix_pack(kernels, qkv, 3, 0, w->q.cols, &out->qkv, err);
    if (status == MOE_OK) status = moe_cpu_matrix_pack_one(kernels, &w->o, &out->o, err);
    return status;
}

static moe_status load_ffn(const moe_cpu_kernels *kernels, const moe_ffn_weights *w, moe_cpu_ffn *out, moe_error *err) {
    return moe_ffn_present(w) ? moe_cpu_ffn_load(kernels, w, 0, MOE_FFN_BLOCKS, out, err) : MOE_OK;
}

static moe_status load_layer(const moe_cpu_kernels *kernels, const moe_layer_weights *w, moe_cpu_layer *out, moe_error *err) {
    moe_status status = load_attention(kernels, w, out, err);
    if (status == MOE_OK) status = moe_cpu_matrix_pack_one(kernels, &w->gate, &out->gate, err);
    if (status == MOE_OK) status = moe_cpu_matrix_pack_one(kernels, &w->pre_gate, &out->pre_gate, err);
    if (status == MOE_OK) status = moe_cpu_matrix_pack_one(kernels, &w->shared_gate, &out->shared_gate, err);
    if (status == MOE_OK) status = load_ffn(kernels, &w->dense, &out->dense, err);
    if (status == MOE_OK) status = load_ffn(kernels, &w->shared, &out->shared, err);
    return status;
}

static moe_status load_all(const moe_cpu_kernels *kernels, const moe_model *model, void (*progress)(void *, double), void *ctx,
                           moe_base *base, moe_error *err) {
    int32_t num_layers = model->config.num_layers, half = model->config.head_dim / 2;
    base->model = model;
    base->layers = moe_calloc((size_t)num_layers, sizeof *base->layers);
    base->inverse_frequency = moe_calloc((size_t)half, sizeof(float));
    if (!base->layers || !base->inverse_frequency)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the base layers");
    moe_cpu_inverse_frequency(model->config.rope_theta, model->config.head_dim, base->inverse_frequency);
    if (num_layers > 0) moe_model_layer_will_need(model, &model->layers[0]);
    for (int32_t i = 0; i < num_layers; i++) {
        if (progress) progress(ctx, (double)i / (num_layers + 1));
        if (i + 1 < num_layers) moe_model_layer_will_need(model, &model->layers[i + 1]);
        moe_status status = load_layer(kernels, &model->layers[i], &base->layers[i], err);
        moe_model_layer_release(model, &model->layers[i]);
        if (status != MOE_OK) return moe_fail_prefix(err, status, "layer %d", i);
    }
    if (progress) progress(ctx, (double)num_layers / (num_layers + 1));
    moe_model_tensor_will_need(model, &model->lm_head);
    moe_status status = moe_cpu_vector_read(&model->final_norm, 1, &base->final_norm, err);
    if (status == MOE_OK) status = moe_cpu_matrix_pack_one(kernels, &model->lm_head, &base->lm_head, err);
    moe_model_tensor_release(model, &model->lm_head);
    if (status == MOE_OK && progress) progress(ctx, 1.0);
    return status;
}

moe_status moe_cpu_base_load(const moe_cpu_kernels *kernels, const moe_model *model, void (*progress)(void *ctx, double fraction),
                             void *ctx, moe_base **out, moe_error *err) {
    moe_base *base = moe_calloc(1, sizeof *base);
    *out = NULL;
    if (!base) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the base layers");
    moe_status status = load_all(kernels, model, progress, ctx, base, err);
    if (status == MOE_OK)
        *out = base;
    else
        moe_cpu_base_free(base);
    return status;
}

static void free_layer(moe_cpu_layer *l) {
    float *vectors[] = {l->input_norm, l->post_norm, l->q_norm, l->k_norm, l->qkv_bias, l->o_bias};
    moe_cpu_matrix *matrices[] = {&l->qkv, &l->o, &l->gate, &l->pre_gate, &l->shared_gate};
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) moe_free(vectors[i]);
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++) moe_cpu_matrix_free(matrices[i]);
    moe_cpu_ffn_free(&l->dense);
    moe_cpu_ffn_free(&l->shared);
}

void moe_cpu_base_free(moe_base *base) {
    if (!base) return;
    for (int32_t i = 0; base->layers && i < base->model->config.num_layers; i++) free_layer(&base->layers[i]);
    moe_free(base->layers);
    moe_free(base->final_norm);
    moe_cpu_matrix_free(&base->lm_head);
    moe_free(base->inverse_frequency);
    moe_free(base);
}

void moe_cpu_inverse_frequency(float theta, int32_t head_dim, float *out) {
    for (int32_t i = 0; i < head_dim / 2; i++) out[i] = 1.0f / powf(theta, (float)(2 * i) / (float)head_dim);
}

void moe_cpu_rotary_angles(const float *inverse_frequency, int32_t head_dim, int32_t position, float *cosine, float *sine) {
    for (int32_t i = 0; i < head_dim / 2; i++) {
        float angle = (float)position * inverse_frequency[i];
        cosine[i] = cosf(angle);
        sine[i] = sinf(angle);
    }
}
