/* Sixteen lanes as two AVX2 registers; see kernels_lanes.h for the contract of a lanes header. */
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define LANES_TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES_ISA "avx2"
#define LANES_OP static inline __attribute__((always_inline)) LANES_TARGET

/* 16 registers: two a lanes value */
#define TILE_ROWS_MAX 6
#define TILE_PANELS(r) ((r) == 1 ? 4 : (r) <= 3 ? 2 : 1)

typedef struct lanes {
    __m256 lo, hi;
} lanes;

LANES_OP lanes lanes_set(float value) { return (lanes){_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
LANES_OP lanes lanes_load(const float *p) { return (lanes){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

LANES_OP lanes lanes_load_first(const float *p, int32_t count) {
    float padded[16] = {0};
    memcpy(padded, p, (size_t)count * sizeof(float));
    return lanes_load(padded);
}

LANES_OP __m256 half_load_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

LANES_OP lanes lanes_load_bf16(const uint16_t *p) { return (lanes){half_load_bf16(p), half_load_bf16(p + 8)}; }

LANES_OP lanes lanes_load_f16(const uint16_t *p) {
    return (lanes){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                   _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}

LANES_OP void lanes_store(float *p, lanes a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}

LANES_OP void lanes_store_first(float *p, lanes a, int32_t count) {
    float whole[16];
    lanes_store(whole, a);
    memcpy(p, whole, (size_t)count * sizeof(float));
}

LANES_OP lanes lanes_fma(lanes a, lanes b, lanes c) {
    return (lanes){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}

LANES_OP lanes lanes_add(lanes a, lanes b) { return (lanes){_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
LANES_OP lanes lanes_sub(lanes a, lanes b) { return (lanes){_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
LANES_OP lanes lanes_mul(lanes a, lanes b) { return (lanes){_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
LANES_OP lanes lanes_div(lanes a, lanes b) { return (lanes){_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
LANES_OP lanes lanes_max(lanes a, lanes b) { return (lanes){_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
LANES_OP lanes lanes_min(lanes a, lanes b) { return (lanes){_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }

LANES_OP __m256 half_power_of_two(__m256 exponent) {
    __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

LANES_OP lanes lanes_power_of_two(lanes exponent) {
    return (lanes){half_power_of_two(exponent.lo), half_power_of_two(exponent.hi)};
}
