/* y = x @ W^T and the expert FFN, one warp an output and a few rows: the weights of an output are read once for each tile of
 * rows. */
#include "cuda/numbers.cuh"
#include "cuda/simple.h"

#define WARPS 8       /* of a block */
#define TILE_ROWS 4   /* rows that share a pass over an output's weights */
#define MAX_SPLITS 64 /* blocks that share the rows of an output */

static int splits(int rows, int groups) {
    int tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, wanted = (tiles + groups - 1) / groups;
    return wanted < 1 ? 1 : wanted > MAX_SPLITS ? MAX_SPLITS : wanted;
}

/* Elements of K that a lane takes at a step: 8 where rows of this many elements stay aligned, and the bases are. */
static bool wide_loads(int k, const void *a, const void *b) { return k % 8 == 0 && ((uintptr_t)a | (uintptr_t)b) % 16 == 0; }

/* sums[r] += w[lo, hi) · x_r[lo, hi) over this lane's elements; x rows by pointer. */
template <typename T, typename W, int VEC>
static __device__ __forceinline__ void dot_rows(const W *w, const T *const x[TILE_ROWS], int rows, int lo, int hi, int lane,
                                                float sums[TILE_ROWS]) {
    for (int k = lo + lane * VEC; k < hi; k += MOE_WARP * VEC) {
        float wide[VEC], values[VEC];
        moe_load<W, VEC>(w + k, wide);
#pragma unroll
        for (int r = 0; r < TILE_ROWS; r++) {
            if (r >= rows) break;
            moe_load<T, VEC>(x[r] + k, values);
#pragma unroll
            for (int i = 0; i < VEC; i++) sums[r] = fmaf(wide[i], values[i], sums[r]);
        }
    }
}

/* ---- linear ---- */

template <typename T, typename W, int VEC>
static __global__ void linear_kernel(moe_simple_linear_args a) {
    int lane = threadIdx.x % MOE_WARP, n = blockIdx.x * WARPS + threadIdx.x / MOE_WARP, k = a.w.k;
    if (n >= a.w.n) return;
    const W *w = static_cast<const W *>(a.w.data) + (int64_t)n * k;
    for (int row = blockIdx.y * TILE_ROWS; row < a.rows; row += gridDim.y * TILE_ROWS) {
        int rows = min(TILE_ROWS, a.rows - row);
        const T *x[TILE_ROWS];
        float sums[TILE_ROWS] = {0};
        for (int r = 0; r < TILE_ROWS; r++) x[r] = static_cast<const T *>(a.x) + (int64_t)min(row + r, a.rows - 1) * k;
        dot_rows<T, W, VEC>(w, x, rows, 0, k, lane, sums);
#pragma unroll
        for (int r = 0; r < TILE_ROWS; r++) {
            float sum = moe_warp_sum(sums[r]);
            if (lane != 0 || r >= rows) continue;
            float *y = a.y + (int64_t)(row + r) * a.w.n + n;
            if (a.bias) sum += a.bias[n];
            *y = a.accumulate ? *y + sum : sum;
        }
    }
}

template <typename T, typename W>
static void launch_linear(const moe_simple_linear_args *a, cudaStream_t stream) {
    dim3 grid((a->w.n + WARPS - 1) / WARPS, splits(a->rows, 1));
    if (wide_loads(a->w.k, a->x, a->w.data))
        linear_kernel<T, W, 8><<<grid, WARPS * MOE_WARP, 0, stream>>>(*a);
    else
        linear_kernel<T, W, 1><<<grid, WARPS * MOE_WARP, 0, stream>>>(*a);
}

extern "C" cudaError_t moe_simple_linear(const moe_simple_linear_args *a, cudaStream_t stream) {
    if (a->rows == 0) return cudaSuccess;
    if (a->x_dtype == MOE_BF16 && a->w.dtype == MOE_BF16)
        launch_linear<moe_bf16, moe_bf16>(a, stream);
    else if (a->x_dtype == MOE_F32 && a->w.dtype == MOE_BF16)
        launch_linear<float, moe_bf16>(a, stream);
    else if (a->x_dtype == MOE_F32 && a->w.dtype == MOE_F16)
        launch_linear<float, __half>(a, stream);
    else if (a->x_dtype == MOE_F32 && a->w.dtype == MOE_F32)
        launch_linear<float, float>(a, stream);
    else
        return cudaErrorInvalidValue;
    return cudaGetLastError();
}

/* ---- expert FFN ---- */

static __host__ __device__ int block_start(int intermediate, int block) {
    return (int)((int64_t)intermediate * block / MOE_CUDA_FFN_BLOCKS);
}

/* Where block `block` begins in the columns of the slice that is held. */
static __host__ __device__ int slice_start(const moe_simple_ffn_args &a, int block) {
    return block_start(a.intermediate, block) - block_start(a.intermediate, a.slice_lo);
}

template <typename T, typename W, int VEC, bool GATED>
static __global__ void gate_up_kernel(moe_simple_ffn_args a) {
    int lane = threadIdx.x % MOE_WARP, group = blockIdx.y, k = a.hidden;
    int i = slice_start(a, a.block_lo) + blockIdx.x * WARPS + threadIdx.x / MOE_WARP;
    if (i >= slice_start(a, a.block_hi)) return;
    const W *gate = static_cast<const W *>(a.gate_up[group]) + (int64_t)(GATED ? i / 8 * 16 + i % 8 : i) * k;
    const W *up = GATED ? gate + (int64_t)8 * k : gate;
    int first = a.expert_first[group], end = a.expert_first[group + 1];
    for (int at = first + blockIdx.z * TILE_ROWS; at < end; at += gridDim.z * TILE_ROWS) {
        int rows = min(TILE_ROWS, end - at);
        const T *x[TILE_ROWS];
        float gates[TILE_ROWS] = {0}, ups[TILE_ROWS] = {0};
        for (int r = 0; r < TILE_ROWS; r++) x[r] = static_cast<const T *>(a.x) + (int64_t)a.sorted_rows[min(at + r, end - 1)] * k;
        if (GATED) dot_rows<T, W, VEC>(gate, x, rows, 0, k, lane, gates);
        dot_rows<T, W, VEC>(up, x, rows, 0, k, lane, ups);
#pragma unroll
        for (int r = 0; r < TILE_ROWS; r++) {
            float g = GATED ? moe_warp_sum(gates[r]) : 0.0f, u = moe_warp_sum(ups[r]);
            if (lane == 0 && r < rows)
                static_cast<T *>(a.inner)[(int64_t)(at + r) * a.padded + i] = moe_narrow<T>(GATED ? moe_silu(g) * u : moe_relu(u));
        }
    }
}

/* sums[0] = the tree sum of sums[0 … blocks), neighbours first; blocks is 1, 2, 4 or 8. */
static __device__ __forceinline__ float tree_sum(float sums[MOE_CUDA_FFN_BLOCKS], int blocks) {
#pragma unroll
    for (int step = 1; step < MOE_CUDA_FFN_BLOCKS; step *= 2) {
        if (step >= blocks) break;
#pragma unroll
        for (int b = 0; b < MOE_CUDA_FFN_BLOCKS; b += 2 * step) sums[b] += sums[b + step];
    }
    return sums[0];
}

template <typename T, typename W, int VEC>
static __global__ void down_kernel(moe_simple_ffn_args a) {
    int lane = threadIdx.x % MOE_WARP, group = blockIdx.y, h = blockIdx.x * WARPS + threadIdx.x / MOE_WARP;
    if (h >= a.hidden) return;
    const W *w = static_cast<const W *>(a.down[group]) + (int64_t)h * a.padded;
    int first = a.expert_first[group], end = a.expert_first[group + 1], blocks = a.block_hi - a.block_lo;
    for (int at = first + blockIdx.z * TILE_ROWS; at < end; at += gridDim.z * TILE_ROWS) {
        int rows = min(TILE_ROWS, end - at);
        const T *x[TILE_ROWS];
        float sums[TILE_ROWS][MOE_CUDA_FFN_BLOCKS];
        for (int r = 0; r < TILE_ROWS; r++) x[r] = static_cast<const T *>(a.inner) + (int64_t)min(at + r, end - 1) * a.padded;
#pragma unroll
        for (int b = 0; b < MOE_CUDA_FFN_BLOCKS; b++) {
            float block[TILE_ROWS] = {0};
            if (b < blocks)
                dot_rows<T, W, VEC>(w, x, rows, slice_start(a, a.block_lo + b), slice_start(a, a.block_lo + b + 1), lane, block);
#pragma unroll
            for (int r = 0; r < TILE_ROWS; r++) sums[r][b] = moe_warp_sum(block[r]);
        }
#pragma unroll
        for (int r = 0; r < TILE_ROWS; r++) {
            float sum = tree_sum(sums[r], blocks);
            if (lane == 0 && r < rows) a.y[(int64_t)(a.slot_of ? a.slot_of[at + r] : at + r) * a.hidden + h] = sum;
        }
    }
}

template <typename T, typename W, bool GATED>
static void launch_gate_up(const moe_simple_ffn_args &a, cudaStream_t stream) {
    int outputs = slice_start(a, a.block_hi) - slice_start(a, a.block_lo);
    if (outputs == 0) return;
    dim3 grid((outputs + WARPS - 1) / WARPS, a.num_groups, splits(a.num_assignments, a.num_groups));
    if (wide_loads(a.hidden, a.x, NULL)) /* slots are aligned */
        gate_up_kernel<T, W, 8, GATED><<<grid, WARPS * MOE_WARP, 0, stream>>>(a);
    else
        gate_up_kernel<T, W, 1, GATED><<<grid, WARPS * MOE_WARP, 0, stream>>>(a);
}

template <typename T, typename W>
static void launch_down(const moe_simple_ffn_args &a, cudaStream_t stream) {
    dim3 grid((a.hidden + WARPS - 1) / WARPS, a.num_groups, splits(a.num_assignments, a.num_groups));
    if (a.intermediate % (8 * MOE_CUDA_FFN_BLOCKS) == 0) /* every block is a multiple of 8 */
        down_kernel<T, W, 8><<<grid, WARPS * MOE_WARP, 0, stream>>>(a);
    else
        down_kernel<T, W, 1><<<grid, WARPS * MOE_WARP, 0, stream>>>(a);
}

template <typename T, typename W>
static void launch(const moe_simple_ffn_args &a, bool down, cudaStream_t stream) {
    if (down)
        launch_down<T, W>(a, stream);
    else if (a.gated)
        launch_gate_up<T, W, true>(a, stream);
    else
        launch_gate_up<T, W, false>(a, stream);
}

static cudaError_t dispatch(const moe_simple_ffn_args &a, bool down, cudaStream_t stream) {
    if (a.num_assignments == 0) return cudaSuccess;
    if (a.dtype == MOE_BF16 && a.weight_dtype == MOE_BF16)
        launch<moe_bf16, moe_bf16>(a, down, stream);
    else if (a.dtype == MOE_F32 && a.weight_dtype == MOE_BF16)
        launch<float, moe_bf16>(a, down, stream);
    else if (a.dtype == MOE_F32 && a.weight_dtype == MOE_F16)
        launch<float, __half>(a, down, stream);
    else if (a.dtype == MOE_F32 && a.weight_dtype == MOE_F32)
        launch<float, float>(a, down, stream);
    else
        return cudaErrorInvalidValue;
    return cudaGetLastError();
}

extern "C" cudaError_t moe_simple_ffn_gate_up(const moe_simple_ffn_args *args, cudaStream_t stream) {
    return dispatch(*args, false, stream);
}

extern "C" cudaError_t moe_simple_ffn_down(const moe_simple_ffn_args *args, cudaStream_t stream) {
    return dispatch(*args, true, stream);
}

template <typename T>
static __global__ void sum_rows_kernel(moe_simple_sum_args a) {
    int row = blockIdx.x, h = blockIdx.y * blockDim.x + threadIdx.x;
    if (h >= a.width) return;
    float sum = 0;
    for (int i = a.row_first[row]; i < a.row_first[row + 1]; i++) {
        int item = a.row_items[i];
        sum = fmaf(a.weights[item], a.y[(int64_t)item * a.width + h], sum);
    }
    static_cast<T *>(a.out)[(int64_t)row * a.width + h] = moe_narrow<T>(sum);
}

extern "C" cudaError_t moe_simple_sum_rows(const moe_simple_sum_args *a, cudaStream_t stream) {
    if (a->rows == 0) return cudaSuccess;
    dim3 grid(a->rows, (a->width + 255) / 256);
    if (a->dtype == MOE_BF16)
        sum_rows_kernel<moe_bf16><<<grid, 256, 0, stream>>>(*a);
    else
        sum_rows_kernel<float><<<grid, 256, 0, stream>>>(*a);
    return cudaGetLastError();
}
