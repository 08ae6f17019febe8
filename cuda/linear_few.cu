/* y = x W^T for few rows, bound by reading W once. A block takes 16 outputs, its 8 warps take turns at stretches of 64 of K; W
 * stands on the wide side of the tensor cores' product, rows of x on the narrow side, 8 at a time. Which element of K meets
 * which place of a product is free as long as both sides agree, so every lane reads 16 consecutive bytes of both and nothing
 * passes through shared memory. An output's sums have one order whatever the number of rows. */
#include "cuda/base_device.cuh"

#define WARPS 8
#define OUTPUTS 16
#define STRETCH 64
#define SUM_STRIDE (OUTPUTS + 4)

struct weights {
    uint4 at[2][2]; /* [row lane / 4, and + 8][half of the stretch] */
};

static __device__ __forceinline__ uint4 read_once(const bf16 *from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

static __device__ __forceinline__ void read_weights(weights &w, const bf16 *low, const bf16 *high, int32_t k) {
    w.at[0][0] = read_once(low + k);
    w.at[0][1] = read_once(low + k + 32);
    w.at[1][0] = read_once(high + k);
    w.at[1][1] = read_once(high + k + 32);
}

static __device__ __forceinline__ void multiply_stretch(float (&sums)[4], const weights &w, const uint4 (&x)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 low = w.at[0][half], high = w.at[1][half], b = x[half];
        const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
        multiply(sums, first, b.x, b.y);
        multiply(sums, second, b.z, b.w);
    }
}

template <int OUT>
static __device__ __forceinline__ void store(void *y, int64_t at, float value) {
    if (OUT == MOE_CUDA_OUT_BF16) ((bf16 *)y)[at] = __float2bfloat16(value);
    if (OUT == MOE_CUDA_OUT_F32) ((float *)y)[at] = value;
    if (OUT == MOE_CUDA_OUT_F32_ADD) ((float *)y)[at] += value;
}

/* NT: eights of rows. AHEAD: stretches whose weights are on their way, more where a multiprocessor has fewer blocks. */
template <int NT, int OUT, int AHEAD>
static __global__ void __launch_bounds__(WARPS * 32, NT <= 2 && AHEAD == 2 ? 3 : 2) linear_kernel(const moe_cuda_product a) {
    __shared__ float shared[WARPS][NT * 8][SUM_STRIDE];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int32_t first_output = (int32_t)blockIdx.x * OUTPUTS, first_row = (int32_t)blockIdx.y * NT * 8;
    const bf16 *low = (const bf16 *)a.w + (int64_t)min(first_output + g, a.n - 1) * a.k + t * 8;
    const bf16 *high = (const bf16 *)a.w + (int64_t)min(first_output + g + 8, a.n - 1) * a.k + t * 8;
    const bf16 *x = (const bf16 *)a.x + (int64_t)(first_row + g) * a.k + t * 8;
    weights ring[AHEAD];
    float sums[NT][4] = {};
    let_successor_start();
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if ((warp + i * WARPS) * STRETCH < a.k) read_weights(ring[i], low, high, (warp + i * WARPS) * STRETCH);
    wait_for_predecessor();
    for (int32_t k = warp * STRETCH; k < a.k; k += AHEAD * WARPS * STRETCH) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int32_t at = k + i * WARPS * STRETCH, next = at + AHEAD * WARPS * STRETCH;
            if (at >= a.k) break;
            weights now = ring[i];
            if (next < a.k) read_weights(ring[i], low, high, next);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                uint4 values[2] = {};
                if (first_row + n * 8 + g < a.rows) {
                    const bf16 *from = x + (int64_t)n * 8 * a.k + at;
                    values[0] = *(const uint4 *)from;
                    values[1] = *(const uint4 *)(from + 32);
                }
                multiply_stretch(sums[n], now, values);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < NT; n++)
        for (int i = 0; i < 4; i++) shared[warp][n * 8 + t * 2 + (i & 1)][g + i / 2 * 8] = sums[n][i];
    __syncthreads();
    for (int i = threadIdx.x; i < NT * 8 * OUTPUTS; i += WARPS * 32) {
        int32_t row = i / OUTPUTS, output = i % OUTPUTS;
        if (first_row + row >= a.rows || first_output + output >= a.n) continue;
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += shared[w][row][output];
        store<OUT>(a.y, (int64_t)(first_row + row) * a.n + first_output + output, sum);
    }
}

template <int NT, int AHEAD>
static cudaError_t start(const moe_cuda_queue *q, const moe_cuda_product *a) {
    dim3 grid((unsigned)((a->n + OUTPUTS - 1) / OUTPUTS), (unsigned)((a->rows + NT * 8 - 1) / (NT * 8)));
    if (a->out == MOE_CUDA_OUT_BF16) return launch(q, linear_kernel<NT, MOE_CUDA_OUT_BF16, AHEAD>, grid, WARPS * 32, 0, *a);
    if (a->out == MOE_CUDA_OUT_F32) return launch(q, linear_kernel<NT, MOE_CUDA_OUT_F32, AHEAD>, grid, WARPS * 32, 0, *a);
    return launch(q, linear_kernel<NT, MOE_CUDA_OUT_F32_ADD, AHEAD>, grid, WARPS * 32, 0, *a);
}

extern "C" cudaError_t moe_cuda_linear_few(const moe_cuda_queue *q, const moe_cuda_product *a) {
    if (a->k % STRETCH != 0 || a->rows < 1 || a->n < 1) return cudaErrorInvalidValue;
    bool few_blocks = a->n <= 2 * q->num_sms * OUTPUTS;
    if (a->rows <= 8) return few_blocks ? start<1, 4>(q, a) : start<1, 2>(q, a);
    if (a->rows <= 16) return start<2, 2>(q, a);
    if (a->rows <= 32) return start<4, 2>(q, a);
    return start<8, 2>(q, a);
}
