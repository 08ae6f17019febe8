/* The highest logits of rows: each block finds those of a piece of the vocabulary, then one block a row those of the pieces.
 * Logits become 64-bit keys, value before id, so that one comparison orders them and equal values too. */
#include "cuda/base_device.cuh"

#define THREADS 256
#define PIECE 2048 /* logits of a block, a power of two */
#define MERGE_THREADS 1024
#define MERGE 8192         /* keys that the second stage sorts at once, a power of two */
#define NOT_FINITE (~0ull) /* a piece's first key when it holds a value that is not finite; no finite value has it */

typedef unsigned long long key64;

static __device__ __forceinline__ key64 key_of(float value, int32_t id) {
    return (key64)order_of(value) << 32 | (0xffffffffu - (uint32_t)id);
}

static __device__ __forceinline__ key64 warp_max(key64 x) {
    for (int d = 16; d > 0; d >>= 1) {
        key64 other = __shfl_xor_sync(~0u, x, d);
        x = other > x ? other : x;
    }
    return x;
}

/* Descending, in shared memory; count a power of two. */
static __device__ void sort_descending(key64 *keys, int count) {
    for (int size = 2; size <= count; size *= 2)
        for (int step = size / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int i = (int)threadIdx.x; i < count / 2; i += (int)blockDim.x) {
                int low = i / step * 2 * step + i % step, high = low + step;
                bool descending = (low & size) == 0;
                key64 x = keys[low], y = keys[high];
                if ((x < y) == descending) {
                    keys[low] = y;
                    keys[high] = x;
                }
            }
        }
    __syncthreads();
}

static __device__ key64 block_max(key64 x) {
    __shared__ key64 best[32];
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) best[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x < 32) x = warp_max(threadIdx.x < blockDim.x / 32 ? best[threadIdx.x] : 0);
    return x; /* right in thread 0 */
}

static __global__ void __launch_bounds__(THREADS) piece_kernel(const moe_cuda_logits_top a) {
    __shared__ key64 keys[PIECE];
    int32_t row = blockIdx.y, first = (int32_t)blockIdx.x * PIECE;
    key64 *out = (key64 *)a.scratch + ((int64_t)row * gridDim.x + blockIdx.x) * a.num_top, best = 0;
    bool bad = false;
    let_successor_start();
    wait_for_predecessor();
    for (int i = (int)threadIdx.x; i < PIECE; i += THREADS) {
        key64 key = 0;
        if (first + i < a.vocab) {
            float value = a.logits[(int64_t)row * a.vocab + first + i];
            bad |= !isfinite(value);
            key = key_of(value, first + i);
        }
        best = key > best ? key : best;
        if (a.num_top > 1) keys[i] = key;
    }
    bad = __syncthreads_or(bad);
    if (bad || a.num_top == 1) {
        if (!bad) best = block_max(best);
        if (threadIdx.x == 0) out[0] = bad ? NOT_FINITE : best;
        return;
    }
    sort_descending(keys, PIECE);
    for (int i = (int)threadIdx.x; i < a.num_top; i += THREADS) out[i] = keys[i];
}

/* Takes MERGE - num_top keys at a time behind the best of those before. */
static __global__ void __launch_bounds__(MERGE_THREADS)
    merge_kernel(const moe_cuda_logits_top a, int32_t pieces, int32_t capacity) {
    extern __shared__ key64 sorted[];
    int32_t row = blockIdx.x, count = pieces * a.num_top;
    const key64 *from = (const key64 *)a.scratch + (int64_t)row * count;
    bool bad = false;
    let_successor_start();
    wait_for_predecessor();
    for (int i = (int)threadIdx.x; i < pieces; i += MERGE_THREADS) bad |= from[(int64_t)i * a.num_top] == NOT_FINITE;
    bad = __syncthreads_or(bad);
    if (!bad && a.num_top == 1) {
        key64 best = 0;
        for (int i = (int)threadIdx.x; i < count; i += MERGE_THREADS) best = from[i] > best ? from[i] : best;
        best = block_max(best);
        if (threadIdx.x == 0) sorted[0] = best;
        __syncthreads();
    } else if (!bad) {
        for (int32_t done = 0; done < count;) {
            int32_t kept = done == 0 ? 0 : a.num_top, taken = min(capacity - kept, count - done);
            for (int i = (int)threadIdx.x; i < capacity - kept; i += MERGE_THREADS)
                sorted[kept + i] = i < taken ? from[done + i] : 0;
            done += taken;
            sort_descending(sorted, capacity);
        }
    }
    for (int i = (int)threadIdx.x; i < a.num_top; i += MERGE_THREADS) {
        int32_t id = bad ? -1 : (int32_t)(0xffffffffu - (uint32_t)sorted[i]);
        a.ids[(int64_t)row * a.num_top + i] = id;
        a.values[(int64_t)row * a.num_top + i] = bad ? CUDART_NAN_F : a.logits[(int64_t)row * a.vocab + id];
    }
}

extern "C" size_t moe_cuda_logits_top_scratch(int32_t rows, int32_t vocab, int32_t num_top) {
    return (size_t)rows * (size_t)((vocab + PIECE - 1) / PIECE) * (size_t)num_top * sizeof(key64);
}

extern "C" cudaError_t moe_cuda_logits_top_rows(const moe_cuda_queue *q, const moe_cuda_logits_top *a) {
    int32_t pieces = (a->vocab + PIECE - 1) / PIECE, capacity = 2;
    if (a->num_top < 1 || a->num_top > a->vocab || a->num_top > MERGE / 4) return cudaErrorInvalidValue;
    while (capacity < MERGE && capacity < pieces * a->num_top) capacity *= 2;
    cudaError_t error = launch(q, piece_kernel, dim3((unsigned)pieces, (unsigned)a->rows), THREADS, 0, *a);
    if (error != cudaSuccess) return error;
    return launch(q, merge_kernel, dim3((unsigned)a->rows), MERGE_THREADS, (size_t)capacity * sizeof(key64), *a, pieces,
                  capacity);
}
