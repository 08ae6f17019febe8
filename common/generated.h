/* Elements by formula: the weights of a model without a checkpoint (--load-format dummy). C and CUDA compile this same text, and
 * get the same bits: integers, then one product and one sum, each rounded once. */
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define MOE_GENERATED static __host__ __device__ inline
#else
#define MOE_GENERATED static inline
#endif

/* Element i is uniform in [center - half_width, center + half_width), a function of (seed, first + i) alone. */
typedef struct moe_generator {
    uint64_t seed; /* 0: there is none */
    int64_t first;
    float center, half_width;
} moe_generator;

/* SplitMix64 (Steele, Lea, Flood 2014) at the counter, its top 24 bits as a float in [-1, 1). */
MOE_GENERATED float moe_generated_f32(const moe_generator *g, int64_t index) {
    uint64_t x = g->seed + (uint64_t)(g->first + index + 1) * UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    x ^= x >> 31;
    float unit = (float)((int32_t)(x >> 40) - (1 << 23)) * (1.0f / (1 << 23));
#ifdef __CUDA_ARCH__
    return __fadd_rn(g->center, __fmul_rn(g->half_width, unit)); /* never one fused multiply-add: C here has none either */
#else
    float scaled = g->half_width * unit;
    return g->center + scaled;
#endif
}
