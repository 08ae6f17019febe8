/* Device-side element types, vector loads, and the one reduction order of the simple kernels. */
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>
#include <stdint.h>

#define MOE_WARP 32

typedef __nv_bfloat16 moe_bf16;

static __device__ __forceinline__ float moe_widen(float v) { return v; }
static __device__ __forceinline__ float moe_widen(moe_bf16 v) { return __bfloat162float(v); }
static __device__ __forceinline__ float moe_widen(__half v) { return __half2float(v); }

template <typename T>
static __device__ __forceinline__ T moe_narrow(float v);
template <>
__device__ __forceinline__ float moe_narrow<float>(float v) {
    return v;
}
template <>
__device__ __forceinline__ moe_bf16 moe_narrow<moe_bf16>(float v) {
    return __float2bfloat16_rn(v);
}

/* out[0..VEC) = p[0..VEC); with VEC = 8, p is 16-byte aligned. */
template <typename T, int VEC>
static __device__ __forceinline__ void moe_load(const T *p, float out[VEC]) {
    if constexpr (VEC == 1) {
        out[0] = moe_widen(p[0]);
    } else {
        constexpr int words = VEC * (int)sizeof(T) / 16;
        uint4 raw[words];
        for (int i = 0; i < words; i++) raw[i] = reinterpret_cast<const uint4 *>(p)[i];
        const T *values = reinterpret_cast<const T *>(raw);
        for (int i = 0; i < VEC; i++) out[i] = moe_widen(values[i]);
    }
}

/* The sum over the warp's lanes, in every lane: neighbours at distance 16, 8, 4, 2, 1. */
static __device__ __forceinline__ float moe_warp_sum(float v) {
    for (int offset = MOE_WARP / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

/* The largest value of the warp's lanes, NaN passed over. */
static __device__ __forceinline__ float moe_warp_max(float v) {
    for (int offset = MOE_WARP / 2; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
    return v;
}

static __device__ __forceinline__ float moe_silu(float x) { return x / (1.0f + expf(-x)); }

/* NaN stays. */
static __device__ __forceinline__ float moe_relu(float x) { return x < 0.0f ? 0.0f : x; }
