/* moe_backend over the CUDA runtime: the vtable. */
#include "cuda/backend.h"

#include <stdio.h>

#include "common/alloc.h"
#include "cuda/cuda.h"
#include "cuda/fill.h"
#include "cuda/layer_ffn.h"
#include "cuda/local.h"

static void close_backend(moe_backend *backend) {
    moe_cuda *cuda = moe_cuda_of(backend);
    moe_cuda_device_use(&cuda->device);
    moe_cuda_jobs_close(&cuda->jobs);
    moe_cuda_lanes_close(cuda);
    moe_cuda_slots_close(&cuda->slots);
    moe_cuda_upload_close(&cuda->upload);
    moe_free(cuda);
}

static const char *profile(const moe_backend *backend) { return ((const moe_cuda *)backend)->profile; }

static moe_status memory_info(moe_backend *backend, moe_memory_info *out, moe_error *err) {
    moe_cuda *cuda = moe_cuda_of(backend);
    size_t free_bytes, total_bytes;
    moe_cuda_device_use(&cuda->device);
    moe_status status = moe_cuda_check(cudaMemGetInfo(&free_bytes, &total_bytes), "asking for the GPU's memory", err);
    if (status != MOE_OK) return status;
    pthread_mutex_lock(&cuda->slots.lock);
    out->free_bytes = (int64_t)free_bytes + cuda->slots.free_bytes;
    pthread_mutex_unlock(&cuda->slots.lock);
    out->total_bytes = (int64_t)total_bytes;
    return MOE_OK;
}

static void *host_alloc(moe_backend *backend, size_t bytes) {
    void *memory;
    moe_cuda_device_use(&moe_cuda_of(backend)->device);
    return moe_cuda_pinned_alloc(bytes, "a host buffer", &memory, NULL) == MOE_OK ? memory : NULL;
}

static void host_free(moe_backend *backend, void *memory) {
    moe_cuda_device_use(&moe_cuda_of(backend)->device);
    moe_cuda_pinned_free(memory);
}

static bool poll(moe_backend *backend) { return moe_cuda_jobs_poll(&moe_cuda_of(backend)->jobs); }

static moe_status base_load(moe_backend *b, const moe_model *model, void (*progress)(void *ctx, double fraction), void *ctx,
                            moe_base **out, moe_error *err) {
    moe_cuda *cuda = moe_cuda_of(b);
    moe_cuda_device_use(&cuda->device);
    return moe_cuda_base_load(&cuda->upload, b->dtype, model, progress, ctx, out, err);
}

static void base_free(moe_backend *b, moe_base *base) {
    moe_cuda_device_use(&moe_cuda_of(b)->device);
    moe_cuda_base_free(base);
}

static moe_status kv_create(moe_backend *b, moe_base *base, int32_t num_blocks, moe_kv **out, moe_error *err) {
    moe_cuda_device_use(&moe_cuda_of(b)->device);
    return moe_cuda_kv_create(&moe_cuda_of(b)->device, b->dtype, &base->model->config, num_blocks, out, err);
}

static void kv_free(moe_backend *b, moe_kv *kv) {
    moe_cuda_device_use(&moe_cuda_of(b)->device);
    moe_cuda_kv_free(kv);
}

static int64_t kv_block_bytes(const moe_backend *b, const moe_model_config *config) {
    return moe_cuda_kv_block_bytes(config, b->dtype);
}

static moe_status rows_create(moe_backend *b, moe_base *base, int32_t max_rows, moe_rows **out, moe_error *err) {
    moe_cuda_device_use(&moe_cuda_of(b)->device);
    return moe_cuda_rows_create(moe_cuda_of(b), base, max_rows, out, err);
}

static void rows_free(moe_backend *b, moe_rows *rows) {
    moe_cuda_device_use(&moe_cuda_of(b)->device);
    moe_cuda_rows_free(rows);
}

static void segment_submit(moe_backend *b, moe_base *base, const moe_segment *segment, moe_job *job) {
    moe_cuda_device_use(&moe_cuda_of(b)->device);
    moe_cuda_segment_submit(moe_cuda_of(b), base, segment, job);
}

static moe_status expert_load(moe_backend *b, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi,
                              moe_expert **out, moe_error *err) {
    moe_cuda *cuda = moe_cuda_of(b);
    moe_cuda_device_use(&cuda->device);
    return moe_cuda_expert_load(&cuda->slots, &cuda->upload, b->dtype, weights, block_lo, block_hi, out, err);
}

static void expert_free(moe_backend *b, moe_expert *expert) {
    moe_cuda_device_use(&moe_cuda_of(b)->device);
    moe_cuda_expert_free(&moe_cuda_of(b)->slots, expert);
}

static int64_t expert_bytes(const moe_expert *expert) { return (int64_t)moe_cuda_network_bytes(&expert->network.shape); }

static void ffn_submit(moe_backend *b, const moe_ffn_batch *batch, moe_job *job) {
    moe_cuda_device_use(&moe_cuda_of(b)->device);
    moe_cuda_ffn_submit(moe_cuda_of(b), batch, job);
}

static void layer_ffn_submit(moe_backend *b, moe_base *base, const moe_layer_ffn *ffn, moe_job *job) {
    moe_cuda_device_use(&moe_cuda_of(b)->device);
    moe_cuda_layer_ffn_submit(moe_cuda_of(b), base, ffn, job);
}

static moe_expert_size expert_size(const moe_backend *b, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi) {
    return moe_cuda_expert_size(weights, block_lo, block_hi, b->dtype);
}

static void expert_layout(const moe_backend *b, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi,
                          moe_image_layout *out) {
    moe_cuda_expert_layout(weights, block_lo, block_hi, b->dtype, out);
}

static void expert_pack(const moe_backend *b, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi, void *image) {
    moe_cuda_expert_pack(weights, block_lo, block_hi, b->dtype, image);
}

static moe_status slots_create(moe_backend *b, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi, int32_t count,
                               moe_slots **out, moe_error *err) {
    moe_cuda_device_use(&moe_cuda_of(b)->device);
    return moe_cuda_slots_create(moe_cuda_of(b), weights, block_lo, block_hi, count, out, err);
}

static void slots_free(moe_backend *b, moe_slots *slots) {
    moe_cuda_device_use(&moe_cuda_of(b)->device);
    moe_cuda_slots_free(slots);
}

static void slot_fill_submit(moe_backend *b, const moe_slot_fill *fill, moe_job *job) {
    moe_cuda_device_use(&moe_cuda_of(b)->device);
    moe_cuda_slot_fill_submit(moe_cuda_of(b), fill, job);
}

static moe_status local_create(moe_backend *b, moe_base *base, moe_expert *const *experts, moe_local **out, moe_error *err) {
    moe_cuda_device_use(&moe_cuda_of(b)->device);
    return moe_cuda_local_create(moe_cuda_of(b), base, experts, out, err);
}

static void local_free(moe_backend *b, moe_local *local) {
    moe_cuda_device_use(&moe_cuda_of(b)->device);
    moe_cuda_local_free(local);
}

static void local_submit(moe_backend *b, moe_base *base, moe_local *local, const moe_local_step *step, moe_job *job) {
    moe_cuda_device_use(&moe_cuda_of(b)->device);
    moe_cuda_local_submit(moe_cuda_of(b), base, local, step, job);
}

static const moe_backend_ops common_ops = {
    .name = "cuda",
    .close = close_backend,
    .profile = profile,
    .memory_info = memory_info,
    .host_alloc = host_alloc,
    .host_free = host_free,
    .poll = poll,
    .base_load = base_load,
    .base_free = base_free,
    .kv_create = kv_create,
    .kv_free = kv_free,
    .kv_block_bytes = kv_block_bytes,
    .rows_create = rows_create,
    .rows_free = rows_free,
    .segment_submit = segment_submit,
    .expert_load = expert_load,
    .expert_free = expert_free,
    .expert_bytes = expert_bytes,
    .ffn_submit = ffn_submit,
    .layer_ffn_submit = layer_ffn_submit,
    .expert_size = expert_size,
    .expert_pack = expert_pack,
    .expert_layout = expert_layout,
    .slots_create = slots_create,
    .slots_free = slots_free,
    .slot = moe_cuda_slot,
    .slot_fill_submit = slot_fill_submit,
    .local_create = local_create,
    .local_free = local_free,
    .local_submit = local_submit,
};

static moe_status open_parts(moe_cuda *cuda, const char *tune_file, moe_error *err) {
    moe_status status = moe_cuda_jobs_open(&cuda->jobs, err);
    if (status != MOE_OK) return status;
    status = moe_cuda_check(moe_cuda_expert_device_open(cuda->device.arch == 80, &cuda->expert_device), "preparing kernels", err);
    if (status == MOE_OK && tune_file) status = moe_cuda_tune_read(tune_file, &cuda->tune, err);
    if (status == MOE_OK) status = moe_cuda_upload_open(&cuda->device, &cuda->upload, err);
    if (status == MOE_OK) status = moe_cuda_slots_open(&cuda->device, &cuda->slots, err);
    if (status == MOE_OK) return MOE_OK;
    moe_cuda_upload_close(&cuda->upload);
    moe_cuda_jobs_close(&cuda->jobs);
    return status;
}

moe_status moe_cuda_open(const moe_cuda_config *config, moe_backend **out, moe_error *err) {
    moe_cuda_device device;
    *out = NULL;
    if (config->dtype != MOE_F32 && config->dtype != MOE_BF16)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "cuda computes in float32 or bfloat16, not in %s",
                        moe_dtype_name(config->dtype));
    moe_status status = moe_cuda_device_open(config->device, &device, err);
    if (status != MOE_OK) return status;
    moe_cuda *cuda = moe_calloc(1, sizeof *cuda);
    if (!cuda) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a backend");
    cuda->device = device;
    cuda->deterministic = config->deterministic;
    cuda->ops = common_ops;
    cuda->ops.single = config->dtype == MOE_BF16 ? &moe_cuda_single_bf16 : &moe_cuda_single_f32;
    cuda->public.ops = &cuda->ops;
    cuda->public.dtype = config->dtype;
    snprintf(cuda->profile, sizeof cuda->profile, "cuda/sm%d/%s%s", device.arch, moe_dtype_name(config->dtype),
             config->deterministic ? "/deterministic" : "");
    status = open_parts(cuda, config->tune_file, err);
    if (status == MOE_OK)
        *out = &cuda->public;
    else
        moe_free(cuda);
    return status;
}
