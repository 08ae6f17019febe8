/* Sixteen lanes as one AVX-512 register; see kernels_lanes.h for the contract of a lanes header. */
#pragma once
#include <immintrin.h>
#include <stdint.h>

#define LANES_TARGET __attribute__((target("avx512f,avx2,fma")))
#define LANES_ISA "avx512"
#define LANES_OP static inline __attribute__((always_inline)) LANES_TARGET

/* 32 registers */
#define TILE_ROWS_MAX 8
#define TILE_PANELS(r) ((r) <= 2 ? 8 : (r) <= 6 ? 4 : 2)

typedef __m512 lanes;

LANES_OP __mmask16 first_mask(int32_t count) { return (__mmask16)((1u << count) - 1); }

LANES_OP lanes lanes_set(float value) { return _mm512_set1_ps(value); }
LANES_OP lanes lanes_load(const float *p) { return _mm512_loadu_ps(p); }
LANES_OP lanes lanes_load_first(const float *p, int32_t count) { return _mm512_maskz_loadu_ps(first_mask(count), p); }

LANES_OP lanes lanes_load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

LANES_OP lanes lanes_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
LANES_OP void lanes_store(float *p, lanes a) { _mm512_storeu_ps(p, a); }
LANES_OP void lanes_store_first(float *p, lanes a, int32_t count) { _mm512_mask_storeu_ps(p, first_mask(count), a); }
LANES_OP lanes lanes_fma(lanes a, lanes b, lanes c) { return _mm512_fmadd_ps(a, b, c); }
LANES_OP lanes lanes_add(lanes a, lanes b) { return _mm512_add_ps(a, b); }
LANES_OP lanes lanes_sub(lanes a, lanes b) { return _mm512_sub_ps(a, b); }
LANES_OP lanes lanes_mul(lanes a, lanes b) { return _mm512_mul_ps(a, b); }
LANES_OP lanes lanes_div(lanes a, lanes b) { return _mm512_div_ps(a, b); }
LANES_OP lanes lanes_max(lanes a, lanes b) { return _mm512_max_ps(a, b); }
LANES_OP lanes lanes_min(lanes a, lanes b) { return _mm512_min_ps(a, b); }

LANES_OP lanes lanes_power_of_two(lanes exponent) {
    __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(exponent), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
