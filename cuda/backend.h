/* The backend's own state: what its files share. */
#pragma once
#include "cuda/base.h"
#include "cuda/bring.h"
#include "cuda/groups.h"
#include "cuda/jobs.h"

#define MOE_CUDA_MAX_LANES 32 /* expert batches in flight, of the host's rows or of micro-batches */

/* What one expert batch in flight has to itself. One on a micro-batch uses `in` alone: it runs where the micro-batch does. */
typedef struct moe_cuda_lane {
    cudaStream_t stream;
    moe_cuda_buffer device, in, out; /* in, out: pinned */
    struct moe_cuda_lane *next;
} moe_cuda_lane;

typedef struct moe_cuda {
    moe_backend public; /* first: a moe_backend * is a moe_cuda * */
    moe_backend_ops ops;
    moe_cuda_device device;
    bool deterministic;
    moe_cuda_expert_device expert_device;
    moe_cuda_tune tune;
    char profile[64];
    moe_cuda_jobs jobs; /* its lock is also that of the lanes */
    moe_cuda_upload upload;
    moe_cuda_slots slots;
    moe_cuda_lane *idle_lanes;
    int32_t num_lanes;
} moe_cuda;

static inline moe_cuda *moe_cuda_of(moe_backend *backend) { return (moe_cuda *)backend; }

/* A lane for a job that is being submitted, until it has ended; the jobs' lock is held. RESOURCE_EXHAUSTED. */
moe_status moe_cuda_lane_take(moe_cuda *cuda, moe_cuda_job *job, moe_cuda_lane **out, moe_error *err);
void moe_cuda_lanes_close(moe_cuda *cuda);

/* As ffn_submit of backend.h. */
void moe_cuda_ffn_submit(moe_cuda *cuda, const moe_ffn_batch *batch, moe_job *job);

/* As rows_create, rows_free and segment_submit of backend.h. */
moe_status moe_cuda_rows_create(moe_cuda *cuda, const moe_base *base, int32_t max_rows, moe_rows **out, moe_error *err);
void moe_cuda_rows_free(moe_rows *rows);
void moe_cuda_segment_submit(moe_cuda *cuda, const moe_base *base, const moe_segment *segment, moe_job *job);

/* Small arrays on their way to the device: gathered in pinned memory, copied at once. */
typedef struct moe_cuda_parcel {
    uint8_t *pinned, *device;
    size_t used, capacity;
} moe_cuda_parcel;

#define MOE_CUDA_PARCEL_ALIGNMENT 16
static inline size_t moe_cuda_parcel_bytes(size_t bytes) {
    return (bytes + MOE_CUDA_PARCEL_ALIGNMENT - 1) / MOE_CUDA_PARCEL_ALIGNMENT * MOE_CUDA_PARCEL_ALIGNMENT;
}
/* A place for `bytes`: *pinned to be filled, and where it will be on the device. */
static inline void *moe_cuda_parcel_take(moe_cuda_parcel *parcel, size_t bytes, void **pinned) {
    size_t at = parcel->used;
    MOE_ASSERT(parcel->capacity - at >= moe_cuda_parcel_bytes(bytes));
    parcel->used += moe_cuda_parcel_bytes(bytes);
    *pinned = parcel->pinned + at;
    return parcel->device + at;
}
static inline void *moe_cuda_parcel_put(moe_cuda_parcel *parcel, const void *from, size_t bytes) {
    void *pinned, *device = moe_cuda_parcel_take(parcel, bytes, &pinned);
    memcpy(pinned, from, bytes);
    return device;
}
static inline cudaError_t moe_cuda_parcel_send(const moe_cuda_parcel *parcel, cudaStream_t stream) {
    return moe_cuda_bring(parcel->device, parcel->pinned, parcel->used, stream);
}

extern const moe_ops moe_cuda_single_f32, moe_cuda_single_bf16; /* on the calling thread's current device */
