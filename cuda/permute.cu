// Device top-k ids to assignments sorted by expert: a counting sort, stable, in one launch for few assignments and two for more.
#include "cuda/expert_kernels.h"

namespace {

constexpr int kChunk = 1024;  // assignments of a block, one a thread
constexpr int kWarps = kChunk / 32;
constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ int expert_of(const moe_cuda_permute &p, int i) {
    if (i >= p.rows * p.top_k) return -1;
    int e = p.ids[i];
    return e >= 0 && e < p.num_experts ? e : -1;
}

// Assignments of each expert in each chunk: scratch [chunks, E].
__global__ void __launch_bounds__(kChunk) count_kernel(const moe_cuda_permute p) {
    __shared__ int counts[MOE_CUDA_MAX_GROUPS];
    for (int e = threadIdx.x; e < p.num_experts; e += kChunk) counts[e] = 0;
    __syncthreads();
    int e = expert_of(p, blockIdx.x * kChunk + threadIdx.x);
    if (e >= 0) atomicAdd(&counts[e], 1);
    __syncthreads();
    for (int i = threadIdx.x; i < p.num_experts; i += kChunk) p.scratch[blockIdx.x * p.num_experts + i] = counts[i];
}

// The next grid may begin, up to where it waits for this one.
__device__ __forceinline__ void allow_next_grid() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Exclusive sum over the block's threads; *total is the sum of all.
__device__ int block_scan(int value, int *total) {
    __shared__ int warp_sums[kWarps];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, sum = value;
    for (int d = 1; d < 32; d *= 2) {
        int other = __shfl_up_sync(kAll, sum, d);
        if (lane >= d) sum += other;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        int s = warp_sums[lane];
        for (int d = 1; d < 32; d *= 2) {
            int other = __shfl_up_sync(kAll, s, d);
            if (lane >= d) s += other;
        }
        warp_sums[lane] = s;
    }
    __syncthreads();
    *total = warp_sums[kWarps - 1];
    return sum - value + (warp ? warp_sums[warp - 1] : 0);
}

// Places one chunk. With one chunk its counts are found here; with more, count_kernel has left them in scratch.
__global__ void __launch_bounds__(kChunk) place_kernel(const moe_cuda_permute p, int chunks) {
    extern __shared__ uint16_t warp_counts[];  // [kWarps, E]: of an expert in a warp, then in the warps before it
    __shared__ int base[MOE_CUDA_MAX_GROUPS];  // sorted position of the chunk's first assignment of an expert
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num_experts = p.num_experts;
    allow_next_grid();
    for (int i = threadIdx.x; i < kWarps * num_experts; i += kChunk) warp_counts[i] = 0;
    __syncthreads();

    int i = blockIdx.x * kChunk + threadIdx.x, e = expert_of(p, i);
    unsigned same = __match_any_sync(kAll, e);
    int rank = __popc(same & ((1u << lane) - 1));
    if (e >= 0 && rank == 0) warp_counts[warp * num_experts + e] = (uint16_t)__popc(same);
    __syncthreads();

    int expert = threadIdx.x, in_chunk = 0, before = 0, all = 0;
    if (expert < num_experts) {
        for (int w = 0; w < kWarps; w++) {
            int count = warp_counts[w * num_experts + expert];
            warp_counts[w * num_experts + expert] = (uint16_t)in_chunk;
            in_chunk += count;
        }
        all = in_chunk;
        if (chunks > 1) {
            all = 0;
#pragma unroll 8
            for (int c = 0; c < chunks; c++) {
                int count = p.scratch[c * num_experts + expert];
                if (c < (int)blockIdx.x) before += count;
                all += count;
            }
        }
    }
    int total, first = block_scan(all, &total);
    if (expert < num_experts) {
        base[expert] = first + before;
        if (blockIdx.x == 0) p.expert_first[expert] = first;
        if (blockIdx.x == 0 && p.expert_rows) p.expert_rows[expert] += all;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) p.expert_first[num_experts] = total;
    __syncthreads();

    if (e < 0) return;
    int at = base[e] + warp_counts[warp * num_experts + e] + rank;
    p.sorted_rows[at] = i / p.top_k;
    p.slot_of[at] = i;
    if (p.sorted_weights && p.weights) p.sorted_weights[at] = p.weights[i];
}

int num_chunks(int rows, int top_k) { return (rows * top_k + kChunk - 1) / kChunk; }

}  // namespace

size_t moe_cuda_permute_scratch_bytes(int32_t rows, int32_t top_k, int32_t num_experts) {
    return (size_t)num_chunks(rows, top_k) * (size_t)num_experts * sizeof(int32_t);
}

cudaError_t moe_cuda_permute_run(const moe_cuda_permute *args, cudaStream_t stream) {
    int chunks = num_chunks(args->rows, args->top_k);
    if (chunks < 1 || args->num_experts < 1 || args->num_experts > MOE_CUDA_MAX_GROUPS) return cudaErrorInvalidValue;
    size_t shared = (size_t)kWarps * args->num_experts * sizeof(uint16_t);
    if (shared > 40 << 10) {  // beyond what a block may have unasked, beside the static arrays
        cudaError_t error = cudaFuncSetAttribute(place_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
        if (error != cudaSuccess) return error;
    }
    if (chunks > 1) count_kernel<<<chunks, kChunk, 0, stream>>>(*args);
    place_kernel<<<chunks, kChunk, shared, stream>>>(*args, chunks);
    return cudaGetLastError();
}
