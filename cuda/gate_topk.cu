/* Routing of rows: a warp takes a row, its logits in registers (expert e in lane e % 32), and picks the highest top_k times. */
#include "cuda/base_device.cuh"

#define WARPS 4
#define NO_EXPERT 0x7fffffff
#define FEW_THREADS 512 /* and most experts, of the launch that sorts too */

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

/* A row by one warp. Its j-th expert in ascending order is returned to one of the first top_k lanes, with *place = j; -1 of
 * padding. */
template <int VALUES>
static __device__ __forceinline__ int32_t route_row(const moe_cuda_gate &a, int64_t row, int lane, int *place) {
    float logits[VALUES], highest = -CUDART_INF_F, total = 0, weight = 0, sum = 0;
    *place = lane;
    if (a.num_rows && row >= *a.num_rows) {
        if (lane < a.top_k) a.experts[row * a.top_k + lane] = -1;
        return -1;
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
    for (int i = 0; i < a.top_k; i++) {
        int from = __ffs((int)__ballot_sync(~0u, lane < a.top_k && rank == i)) - 1;
        sum += __shfl_sync(~0u, weight, from);
    }
    *place = rank;
    if (lane >= a.top_k) return mine;
    a.experts[row * a.top_k + rank] = mine;
    a.weights[row * a.top_k + rank] = a.norm_topk ? weight / sum : weight;
    return mine;
}

template <int VALUES>
static __global__ void __launch_bounds__(WARPS * 32) gate_kernel(const moe_cuda_gate a) {
    int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    int place;
    let_successor_start();
    wait_for_predecessor();
    if (row < a.max_rows) route_row<VALUES>(a, row, threadIdx.x % 32, &place);
}

/* One block: routes the rows, then sorts the assignments by expert. A thread counts one expert's, another finds one assignment's
 * place among those before it. */
template <int VALUES>
static __global__ void __launch_bounds__(FEW_THREADS) route_few_kernel(const moe_cuda_route_few a) {
    __shared__ int32_t ids[MOE_CUDA_FEW_ASSIGNMENTS], first[FEW_THREADS], warp_sums[FEW_THREADS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, count = a.gate.max_rows * a.gate.top_k;
    let_successor_start();
    wait_for_predecessor();
    for (int row = warp; row < a.gate.max_rows; row += FEW_THREADS / 32) {
        int place;
        int32_t expert = route_row<VALUES>(a.gate, row, lane, &place);
        if (lane < a.gate.top_k) ids[row * a.gate.top_k + place] = expert;
    }
    __syncthreads();
    int expert = threadIdx.x, rows = 0, sum;
    for (int i = 0; expert < a.gate.num_experts && i < count; i++) rows += ids[i] == expert;
    sum = rows;
    for (int d = 1; d < 32; d *= 2) {
        int other = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += other;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; w++) sum += warp_sums[w];
    first[expert] = sum - rows;
    if (expert < a.gate.num_experts) {
        a.expert_first[expert + 1] = sum;
        if (a.expert_rows) a.expert_rows[expert] += rows;
    }
    if (expert == 0) a.expert_first[0] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += FEW_THREADS) {
        if (ids[i] < 0) continue;
        int at = first[ids[i]];
        for (int j = 0; j < i; j++) at += ids[j] == ids[i];
        a.sorted_rows[at] = i / a.gate.top_k;
        a.slot_of[at] = i;
    }
}

static bool takes(const moe_cuda_gate *a) {
    return a->top_k >= 1 && a->top_k <= MOE_CUDA_GATE_TOP_K && a->top_k <= a->num_experts && a->num_experts <= 1024;
}

extern "C" cudaError_t moe_cuda_gate_topk(const moe_cuda_queue *q, const moe_cuda_gate *a) {
    dim3 grid((unsigned)((a->max_rows + WARPS - 1) / WARPS));
    if (!takes(a)) return cudaErrorInvalidValue;
    if (a->num_experts <= 64) return launch(q, gate_kernel<2>, grid, WARPS * 32, 0, *a);
    if (a->num_experts <= 128) return launch(q, gate_kernel<4>, grid, WARPS * 32, 0, *a);
    if (a->num_experts <= 256) return launch(q, gate_kernel<8>, grid, WARPS * 32, 0, *a);
    if (a->num_experts <= 512) return launch(q, gate_kernel<16>, grid, WARPS * 32, 0, *a);
    return launch(q, gate_kernel<32>, grid, WARPS * 32, 0, *a);
}

extern "C" bool moe_cuda_route_few_takes(const moe_cuda_gate *a) {
    return takes(a) && a->max_rows * a->top_k <= MOE_CUDA_FEW_ASSIGNMENTS && a->num_experts <= FEW_THREADS;
}

extern "C" cudaError_t moe_cuda_route_few_rows(const moe_cuda_queue *q, const moe_cuda_route_few *a) {
    if (!moe_cuda_route_few_takes(&a->gate)) return cudaErrorInvalidValue;
    if (a->gate.num_experts <= 64) return launch(q, route_few_kernel<2>, dim3(1), FEW_THREADS, 0, *a);
    if (a->gate.num_experts <= 128) return launch(q, route_few_kernel<4>, dim3(1), FEW_THREADS, 0, *a);
    return launch(q, route_few_kernel<16>, dim3(1), FEW_THREADS, 0, *a);
}
