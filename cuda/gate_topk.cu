/* Routing of rows: a warp takes a row, its logits in registers (expert e in lane e % 32), and picks the highest top_k times. */
#include "cuda/base_device.cuh"

#define WARPS 4
#define NO_EXPERT 0x7fffffff

static __device__ __forceinline__ float warp_max(float x) {
    for (int d = 16; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
    return x;
}

/* Of the lane's experts the best that is not chosen yet: by order, of equal ones the lower id. */
template <int VALUES>
static __device__ __forceinline__ int32_t choose_best(const float (&logits)[VALUES], uint32_t chosen, int32_t num_experts,
                                                      int lane) {
    uint32_t best = 0, id = NO_EXPERT;
#pragma unroll
    for (int v = 0; v < VALUES; v++) {
        uint32_t expert = (uint32_t)(v * 32 + lane);
        if (expert >= (uint32_t)num_experts || (chosen >> v & 1)) continue;
        uint32_t order = order_of(logits[v] != logits[v] ? -CUDART_INF_F : logits[v]);
        if (id == NO_EXPERT || order > best) {
            best = order;
            id = expert;
        }
    }
    uint32_t highest = __reduce_max_sync(~0u, best);
    return (int32_t)__reduce_min_sync(~0u, best == highest ? id : NO_EXPERT);
}

template <int VALUES>
static __global__ void __launch_bounds__(WARPS * 32) gate_kernel(const moe_cuda_gate a) {
    const int lane = threadIdx.x % 32;
    int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    float logits[VALUES], highest = -CUDART_INF_F, total = 0, weight = 0, sum = 0;
    let_successor_start();
    wait_for_predecessor();
    if (row >= a.max_rows) return;
    if (a.num_rows && row >= *a.num_rows) {
        if (lane < a.top_k) a.experts[row * a.top_k + lane] = -1;
        return;
    }
#pragma unroll
    for (int v = 0; v < VALUES; v++) {
        logits[v] = v * 32 + lane < a.num_experts ? a.logits[row * a.num_experts + v * 32 + lane] : -CUDART_INF_F;
        highest = fmaxf(highest, logits[v]);
    }
    highest = warp_max(highest);
    int32_t mine = NO_EXPERT; /* lane j: the expert chosen j-th */
    uint32_t chosen = 0;
    for (int32_t j = 0; j < a.top_k; j++) {
        int32_t expert = choose_best<VALUES>(logits, chosen, a.num_experts, lane);
        if (expert % 32 == lane) chosen |= 1u << (expert / 32);
        if (lane == j) mine = expert;
    }
#pragma unroll
    for (int v = 0; v < VALUES; v++)
        if (v * 32 + lane < a.num_experts) total += logits[v] = expf(logits[v] - highest);
    total = warp_sum(total);
    int rank = 0;
    for (int j = 0; j < a.top_k; j++) {
        int32_t expert = __shfl_sync(~0u, mine, j);
        rank += expert < mine;
        float value = 0;
#pragma unroll
        for (int v = 0; v < VALUES; v++)
            if (expert / 32 == v) value = logits[v];
        value = __shfl_sync(~0u, value, expert % 32);
        if (lane == j) weight = value / total;
    }
    for (int place = 0; place < a.top_k; place++) {
        int from = __ffs((int)__ballot_sync(~0u, lane < a.top_k && rank == place)) - 1;
        sum += __shfl_sync(~0u, weight, from);
    }
    if (lane >= a.top_k) return;
    a.experts[row * a.top_k + rank] = mine;
    a.weights[row * a.top_k + rank] = a.norm_topk ? weight / sum : weight;
    if (a.expert_rows) atomicAdd(&a.expert_rows[mine], 1);
}

extern "C" cudaError_t moe_cuda_gate_topk(const moe_cuda_queue *q, const moe_cuda_gate *a) {
    dim3 grid((unsigned)((a->max_rows + WARPS - 1) / WARPS));
    if (a->top_k < 1 || a->top_k > MOE_CUDA_GATE_TOP_K || a->top_k > a->num_experts || a->num_experts > 1024)
        return cudaErrorInvalidValue;
    if (a->num_experts <= 64) return launch(q, gate_kernel<2>, grid, WARPS * 32, 0, *a);
    if (a->num_experts <= 128) return launch(q, gate_kernel<4>, grid, WARPS * 32, 0, *a);
    if (a->num_experts <= 256) return launch(q, gate_kernel<8>, grid, WARPS * 32, 0, *a);
    if (a->num_experts <= 512) return launch(q, gate_kernel<16>, grid, WARPS * 32, 0, *a);
    return launch(q, gate_kernel<32>, grid, WARPS * 32, 0, *a);
}
