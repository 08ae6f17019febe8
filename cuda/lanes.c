/* What jobs in flight have to themselves. */
#include "common/alloc.h"
#include "cuda/backend.h"

static moe_status new_lane(moe_cuda *cuda, moe_cuda_lane **out, moe_error *err) {
    if (cuda->num_lanes >= MOE_CUDA_MAX_LANES)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%d expert batches are in flight on this GPU, the most that may be",
                        cuda->num_lanes);
    moe_cuda_lane *lane = moe_calloc(1, sizeof *lane);
    if (!lane) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for an expert batch");
    moe_status status = moe_cuda_check(cudaStreamCreateWithFlags(&lane->stream, cudaStreamNonBlocking), "creating a stream", err);
    lane->in.pinned = lane->out.pinned = true;
    if (status == MOE_OK) {
        cuda->num_lanes++;
        *out = lane;
    } else {
        moe_free(lane);
    }
    return status;
}

static void give_lane_back(void *owner, void *resource) {
    moe_cuda *cuda = owner;
    moe_cuda_lane *lane = resource;
    lane->next = cuda->idle_lanes;
    cuda->idle_lanes = lane;
}

moe_status moe_cuda_lane_take(moe_cuda *cuda, moe_cuda_job *job, moe_cuda_lane **out, moe_error *err) {
    moe_cuda_lane *lane = cuda->idle_lanes;
    moe_status status = MOE_OK;
    if (lane)
        cuda->idle_lanes = lane->next;
    else
        status = new_lane(cuda, &lane, err);
    if (status != MOE_OK) return status;
    job->release = give_lane_back;
    job->owner = cuda;
    job->resource = lane;
    *out = lane;
    return MOE_OK;
}

void moe_cuda_lanes_close(moe_cuda *cuda) {
    while (cuda->idle_lanes) {
        moe_cuda_lane *lane = cuda->idle_lanes;
        cuda->idle_lanes = lane->next;
        moe_cuda_buffer_free(&lane->device);
        moe_cuda_buffer_free(&lane->in);
        moe_cuda_buffer_free(&lane->out);
        cudaStreamDestroy(lane->stream);
        moe_free(lane);
    }
}
