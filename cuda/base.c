#include "cuda/base.h"

#include <math.h>

#include "common/alloc.h"

#define ADVICE "choose a GPU with more memory, or put the router and the workers on different GPUs (--devices)"

/* Laying out and filling are one pass over the weights, made twice: with uploading false it only counts and assigns places. */
typedef struct packer {
    moe_cuda_upload *upload;
    moe_dtype profile;
    moe_cuda_arena arena;
    bool uploading;
    moe_status status;
    moe_error *err;
} packer;

static void failed(packer *p, moe_status status) {
    if (p->status == MOE_OK) p->status = status;
}

/* The parts below each other, as float32; NULL where none is present. */
static void pack_vector(packer *p, const moe_tensor *parts, int num_parts, float **out) {
    int64_t count = 0, at = 0;
    for (int i = 0; i < num_parts; i++) count += moe_tensor_present(&parts[i]) ? parts[i].rows * parts[i].cols : 0;
    *out = count ? moe_cuda_arena_take(&p->arena, (size_t)count * sizeof(float)) : NULL;
    for (int i = 0; i < num_parts && p->uploading && p->status == MOE_OK; i++) {
        if (!moe_tensor_present(&parts[i])) continue;
        int64_t size = parts[i].rows * parts[i].cols;
        moe_cuda_plane plane = {.tensor = &parts[i], .row_hi = parts[i].rows, .col_hi = parts[i].cols, .dtype = MOE_F32};
        plane.stride = parts[i].cols;
        plane.run = plane.run_stride = 1;
        plane.to = *out + at;
        failed(p, moe_cuda_upload_plane(p->upload, &plane, p->err));
        at += size;
    }
}

/* The parts below each other in one matrix; of parts of different types it is float32. */
static void pack_matrix(packer *p, const moe_tensor *parts, int num_parts, moe_cuda_matrix *out) {
    *out = (moe_cuda_matrix){.dtype = MOE_DTYPE_COUNT};
    for (int i = 0; i < num_parts; i++) {
        if (!moe_tensor_present(&parts[i])) continue;
        moe_dtype dtype = moe_cuda_weight_dtype(p->profile, parts[i].dtype);
        out->dtype = out->dtype == MOE_DTYPE_COUNT || out->dtype == dtype ? dtype : MOE_F32;
        out->n += (int32_t)parts[i].rows;
        out->k = (int32_t)parts[i].cols;
    }
    if (out->n == 0) return;
    size_t row_bytes = (size_t)out->k * moe_dtype_bytes(out->dtype), at = 0;
    out->data = moe_cuda_arena_take(&p->arena, (size_t)out->n * row_bytes);
    for (int i = 0; i < num_parts && p->uploading && p->status == MOE_OK; i++) {
        if (!moe_tensor_present(&parts[i])) continue;
        moe_cuda_plane plane = {.tensor = &parts[i], .row_hi = parts[i].rows, .col_hi = out->k, .dtype = out->dtype};
        plane.stride = out->k;
        plane.run = plane.run_stride = 1;
        plane.to = (uint8_t *)out->data + at;
        failed(p, moe_cuda_upload_plane(p->upload, &plane, p->err));
        at += (size_t)parts[i].rows * row_bytes;
    }
}

static void pack_network(packer *p, const moe_ffn_weights *w, moe_cuda_base_network *out) {
    *out = (moe_cuda_base_network){0};
    if (!moe_ffn_present(w)) return;
    moe_cuda_network_shape shape = moe_cuda_network_shape_of(w, 0, MOE_FFN_BLOCKS, p->profile);
    out->network = moe_cuda_network_at(&shape, moe_cuda_arena_take(&p->arena, moe_cuda_network_bytes(&shape)));
    out->tables = moe_cuda_arena_take(&p->arena, 3 * sizeof(void *));
    if (!p->uploading || p->status != MOE_OK) return;
    const void *const tables[3] = {out->network.gate_up, out->network.down, out->network.tail};
    failed(p, moe_cuda_network_upload(p->upload, &out->network, w, p->err));
    if (p->status == MOE_OK) failed(p, moe_cuda_upload_bytes(p->upload, out->tables, tables, sizeof tables, p->err));
}

static void pack_layer(packer *p, const moe_layer_weights *w, moe_cuda_layer *out) {
    const moe_tensor qkv[] = {w->q, w->k, w->v}, bias[] = {w->q_bias, w->k_bias, w->v_bias};
    pack_vector(p, &w->input_norm, 1, &out->input_norm);
    pack_vector(p, &w->post_norm, 1, &out->post_norm);
    pack_vector(p, &w->q_norm, 1, &out->q_norm);
    pack_vector(p, &w->k_norm, 1, &out->k_norm);
    pack_vector(p, bias, 3, &out->qkv_bias);
    pack_vector(p, &w->o_bias, 1, &out->o_bias);
    pack_matrix(p, qkv, 3, &out->qkv);
    pack_matrix(p, &w->o, 1, &out->o);
    pack_matrix(p, &w->gate, 1, &out->gate);
    pack_matrix(p, &w->pre_gate, 1, &out->pre_gate);
    pack_matrix(p, &w->shared_gate, 1, &out->shared_gate);
    pack_network(p, &w->dense, &out->dense);
    pack_network(p, &w->shared, &out->shared);
}

/* theta^(-2i / head_dim), in float32 as transformers computes it. */
static void pack_frequency(packer *p, const moe_model_config *c, float **out) {
    float frequency[512];
    int32_t half = c->head_dim / 2;
    MOE_ASSERT(half <= 512);
    *out = moe_cuda_arena_take(&p->arena, (size_t)half * sizeof(float));
    for (int32_t i = 0; i < half; i++) frequency[i] = 1.0f / powf(c->rope_theta, (float)(2 * i) / (float)c->head_dim);
    if (p->uploading && p->status == MOE_OK)
        failed(p, moe_cuda_upload_bytes(p->upload, *out, frequency, (size_t)half * sizeof(float), p->err));
}

static void pack_all(packer *p, const moe_model *model, void (*progress)(void *, double), void *ctx, moe_base *base) {
    int32_t num_layers = model->config.num_layers;
    const moe_tensor *lm_head = &model->lm_head;
    pack_frequency(p, &model->config, &base->inverse_frequency);
    pack_vector(p, &model->final_norm, 1, &base->final_norm);
    for (int32_t i = 0; i < num_layers; i++) {
        if (p->uploading && progress) progress(ctx, (double)i / (num_layers + 2));
        if (p->uploading && i + 1 < num_layers) moe_model_layer_will_need(model, &model->layers[i + 1]);
        pack_layer(p, &model->layers[i], &base->layers[i]);
        if (p->uploading) moe_model_layer_release(model, &model->layers[i]);
        if (p->status != MOE_OK) {
            moe_fail_prefix(p->err, p->status, "layer %d", i);
            return;
        }
    }
    if (p->uploading && progress) progress(ctx, (double)num_layers / (num_layers + 2));
    pack_matrix(p, &model->embed, 1, &base->embed);
    if (p->uploading) moe_model_tensor_release(model, &model->embed);
    if (p->uploading && progress) progress(ctx, (double)(num_layers + 1) / (num_layers + 2));
    if (model->config.tied_embeddings)
        base->lm_head = base->embed;
    else
        pack_matrix(p, lm_head, 1, &base->lm_head);
    if (p->uploading) moe_model_tensor_release(model, lm_head);
}

static moe_status load(packer *p, const moe_model *model, void (*progress)(void *, double), void *ctx, moe_base *base) {
    base->model = model;
    base->layers = moe_calloc((size_t)model->config.num_layers, sizeof *base->layers);
    if (!base->layers) return moe_fail(p->err, MOE_RESOURCE_EXHAUSTED, "out of memory for the base layers");
    pack_all(p, model, NULL, NULL, base);
    moe_status status =
        moe_cuda_device_alloc(p->upload->device, p->arena.used, "the weights of the base layers", ADVICE, &base->memory, p->err);
    if (status != MOE_OK) return status;
    p->arena = (moe_cuda_arena){.memory = base->memory};
    p->uploading = true;
    pthread_mutex_lock(&p->upload->lock);
    pack_all(p, model, progress, ctx, base);
    status = moe_cuda_upload_finish(p->upload, p->status == MOE_OK ? p->err : NULL);
    pthread_mutex_unlock(&p->upload->lock);
    if (p->status == MOE_OK && status == MOE_OK && progress) progress(ctx, 1.0);
    return p->status != MOE_OK ? p->status : status;
}

moe_status moe_cuda_base_load(moe_cuda_upload *upload, moe_dtype profile, const moe_model *model,
                              void (*progress)(void *ctx, double fraction), void *ctx, moe_base **out, moe_error *err) {
    packer p = {.upload = upload, .profile = profile, .err = err};
    moe_base *base = moe_calloc(1, sizeof *base);
    *out = NULL;
    if (!base) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the base layers");
    moe_status status = load(&p, model, progress, ctx, base);
    if (status == MOE_OK)
        *out = base;
    else
        moe_cuda_base_free(base);
    return status;
}

void moe_cuda_base_free(moe_base *base) {
    if (!base) return;
    moe_cuda_device_free(base->memory);
    moe_free(base->layers);
    moe_free(base);
}
