#include "cuda/graphs.h"

#include "common/alloc.h"

typedef struct moe_cuda_graph {
    moe_cuda_graph_key key;
    bool used;
    cudaGraphExec_t exec; /* NULL: ran once, not captured yet */
    uint64_t last_run;
} moe_cuda_graph;

static void forget(moe_cuda_graph *g) {
    if (g->exec) cudaGraphExecDestroy(g->exec);
    *g = (moe_cuda_graph){0};
}

void moe_cuda_graphs_clear(moe_cuda_graphs *graphs) {
    for (int32_t i = 0; graphs->all && i < MOE_CUDA_MAX_GRAPHS; i++) forget(&graphs->all[i]);
}

void moe_cuda_graphs_free(moe_cuda_graphs *graphs) {
    moe_cuda_graphs_clear(graphs);
    moe_free(graphs->all);
    graphs->all = NULL;
}

/* The key's own place, else the one to be given to it, which is then not in use. */
static moe_cuda_graph *place_of(moe_cuda_graphs *graphs, const moe_cuda_graph_key *key) {
    moe_cuda_graph *oldest = &graphs->all[0];
    for (int32_t i = 0; i < MOE_CUDA_MAX_GRAPHS; i++) {
        moe_cuda_graph *g = &graphs->all[i];
        if (g->used && memcmp(&g->key, key, sizeof *key) == 0) return g;
        if (!g->used || (oldest->used && g->last_run < oldest->last_run)) oldest = g;
    }
    forget(oldest);
    return oldest;
}

static moe_status capture(moe_cuda_graph *g, cudaStream_t stream, moe_status (*record)(void *, moe_error *), void *ctx,
                          moe_error *err) {
    cudaGraph_t graph = NULL;
    moe_status status =
        moe_cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "beginning a capture", err);
    if (status != MOE_OK) return status;
    status = record(ctx, err);
    cudaError_t code = cudaStreamEndCapture(stream, &graph);
    if (status == MOE_OK) status = moe_cuda_check(code, "capturing a step", err);
    if (status == MOE_OK) status = moe_cuda_check(cudaGraphInstantiate(&g->exec, graph, 0), "instantiating a step", err);
    if (graph) cudaGraphDestroy(graph);
    return status;
}

moe_status moe_cuda_graphs_run(moe_cuda_graphs *graphs, const moe_cuda_graph_key *key, cudaStream_t stream,
                               moe_status (*record)(void *ctx, moe_error *err), void *ctx, moe_error *err) {
    if (!graphs->all) graphs->all = moe_calloc(MOE_CUDA_MAX_GRAPHS, sizeof *graphs->all);
    if (!graphs->all) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for CUDA graphs");
    moe_cuda_graph *g = place_of(graphs, key);
    bool first = !g->used;
    g->used = true;
    g->key = *key;
    g->last_run = ++graphs->clock;
    if (first) return record(ctx, err);
    moe_status status = g->exec ? MOE_OK : capture(g, stream, record, ctx, err);
    return status == MOE_OK ? moe_cuda_check(cudaGraphLaunch(g->exec, stream), "launching a step", err) : status;
}
