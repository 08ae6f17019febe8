/* Launches that come again, kept as CUDA graphs: the first time they run as they are (which also makes cuBLASLt's plans), the
 * second time they are captured, from then on one launch replays them. */
#pragma once
#include "cuda/device.h"

#define MOE_CUDA_MAX_GRAPHS 512 /* of one micro-batch; the one that rested longest makes room */

/* What the launches depend on: two runs with equal keys launch the same kernels on the same addresses. Compared as bytes. */
typedef struct moe_cuda_graph_key {
    const void *keys, *local;
    int32_t kv_blocks, segment, rows;
    uint32_t flags;
} moe_cuda_graph_key;

typedef struct moe_cuda_graphs {
    struct moe_cuda_graph *all; /* [MOE_CUDA_MAX_GRAPHS] once there is one */
    uint64_t clock;
} moe_cuda_graphs;

/* `record` enqueues on the stream, and must be able to do so while the stream is captured. */
moe_status moe_cuda_graphs_run(moe_cuda_graphs *graphs, const moe_cuda_graph_key *key, cudaStream_t stream,
                               moe_status (*record)(void *ctx, moe_error *err), void *ctx, moe_error *err);
void moe_cuda_graphs_clear(moe_cuda_graphs *graphs); /* none is running; the addresses may change afterwards */
void moe_cuda_graphs_free(moe_cuda_graphs *graphs);  /* idempotent */
