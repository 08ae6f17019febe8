#include "cuda/fill.h"

#include "common/alloc.h"

#define ADVICE "give --device-memory less"

struct moe_slots {
    void *memory;
    cudaStream_t copies; /* nothing else runs on it, so that copies pass beside kernels */
    moe_expert *experts; /* [count] */
    int32_t count;
};

moe_expert_size moe_cuda_expert_size(const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi, moe_dtype profile) {
    moe_cuda_network_shape shape = moe_cuda_network_shape_of(weights, block_lo, block_hi, profile);
    return (moe_expert_size){(int64_t)moe_cuda_network_image_bytes(&shape), (int64_t)moe_cuda_network_bytes(&shape)};
}

void moe_cuda_expert_layout(const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi, moe_dtype profile, moe_image_layout *out) {
    moe_cuda_network_shape shape = moe_cuda_network_shape_of(weights, block_lo, block_hi, profile);
    *out = moe_cuda_network_layout(&shape);
}

void moe_cuda_expert_pack(const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi, moe_dtype profile, void *image) {
    moe_cuda_network_shape shape = moe_cuda_network_shape_of(weights, block_lo, block_hi, profile);
    moe_cuda_network network = moe_cuda_network_at(&shape, image);
    moe_cuda_network_pack(&network, weights);
}

/* Each slot's place, and what the kernels want to know of it. */
static moe_status prepare(moe_cuda *cuda, const moe_cuda_network_shape *shape, moe_slots *s, moe_error *err) {
    size_t each = moe_cuda_network_bytes(shape);
    moe_status status = MOE_OK;
    pthread_mutex_lock(&cuda->upload.lock);
    for (int32_t i = 0; i < s->count && status == MOE_OK; i++) {
        s->experts[i].slots = s;
        s->experts[i].network = moe_cuda_network_at(shape, (uint8_t *)s->memory + (size_t)i * each);
        status = moe_cuda_network_prepare(&cuda->upload, &s->experts[i].network, err);
    }
    moe_status finished = moe_cuda_upload_finish(&cuda->upload, status == MOE_OK ? err : NULL);
    pthread_mutex_unlock(&cuda->upload.lock);
    return status == MOE_OK ? finished : status;
}

moe_status moe_cuda_slots_create(moe_cuda *cuda, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi, int32_t count,
                                 moe_slots **out, moe_error *err) {
    MOE_ASSERT(moe_ffn_slice_legal(block_lo, block_hi) && count > 0);
    moe_cuda_network_shape shape = moe_cuda_network_shape_of(weights, block_lo, block_hi, cuda->public.dtype);
    moe_slots *s = moe_calloc(1, sizeof *s);
    *out = NULL;
    if (s) s->experts = moe_calloc((size_t)count, sizeof *s->experts);
    if (!s || !s->experts) {
        moe_free(s);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for %d expert slots", count);
    }
    s->count = count;
    moe_status status = moe_cuda_device_alloc(&cuda->device, (size_t)count * moe_cuda_network_bytes(&shape), "expert slots", ADVICE,
                                              &s->memory, err);
    if (status == MOE_OK)
        status = moe_cuda_check(cudaStreamCreateWithFlags(&s->copies, cudaStreamNonBlocking), "creating a stream", err);
    if (status == MOE_OK) status = prepare(cuda, &shape, s, err);
    if (status == MOE_OK)
        *out = s;
    else
        moe_cuda_slots_free(s);
    return status;
}

void moe_cuda_slots_free(moe_slots *s) {
    if (!s) return;
    if (s->copies) cudaStreamDestroy(s->copies);
    moe_cuda_device_free(s->memory);
    moe_free(s->experts);
    moe_free(s);
}

moe_expert *moe_cuda_slot(const moe_slots *s, int32_t index) {
    MOE_ASSERT(index >= 0 && index < s->count);
    return &s->experts[index];
}

static moe_status enqueue(void *ctx, moe_cuda_job *job, moe_error *err) {
    const moe_slot_fill *f = ctx;
    cudaStream_t stream = f->slot->slots->copies;
    uint8_t *to = (uint8_t *)f->slot->network.gate_up + f->offset;
    cudaError_t code = moe_cuda_job_mark(job, MOE_CUDA_START, stream);
    if (code == cudaSuccess)
        code = cudaMemcpyAsync(to, (const uint8_t *)f->image + f->offset, (size_t)f->bytes, cudaMemcpyHostToDevice, stream);
    if (code == cudaSuccess) code = moe_cuda_job_mark(job, MOE_CUDA_DONE, stream); /* no more marks: each holds up the next copy */
    return moe_cuda_check(code, "copying an expert to the GPU", err);
}

void moe_cuda_slot_fill_submit(moe_cuda *cuda, const moe_slot_fill *fill, moe_job *job) {
    moe_slot_fill f = *fill;
    MOE_ASSERT(fill->slot->slots && fill->offset >= 0 && fill->bytes > 0);
    MOE_ASSERT(fill->bytes <= (int64_t)moe_cuda_network_image_bytes(&fill->slot->network.shape) - fill->offset);
    moe_cuda_jobs_submit(&cuda->jobs, job, enqueue, &f);
}
