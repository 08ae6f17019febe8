/* Sixteen lanes in plain C; see kernels_lanes.h for the contract of a lanes header. */
#pragma once
#include <math.h>

#include "common/tensor.h"

#define LANES_TARGET
#define LANES_ISA "scalar"
#define LANES_IN_MEMORY

#if defined(__SANITIZE_ADDRESS__)
#define SCALAR_OP static __attribute__((noinline)) /* inlined, with every access checked, gcc takes minutes */
#else
#define SCALAR_OP static inline
#endif

#define TILE_ROWS_MAX 2
#define TILE_PANELS(r) ((r) == 1 ? 2 : 1)

typedef struct lanes {
    float v[16];
} lanes;

#define LANES_EACH(i) for (int i = 0; i < 16; i++)

SCALAR_OP lanes lanes_set(float value) {
    lanes a;
    LANES_EACH(i) a.v[i] = value;
    return a;
}

SCALAR_OP lanes lanes_load(const float *p) {
    lanes a;
    memcpy(a.v, p, sizeof a.v);
    return a;
}

SCALAR_OP lanes lanes_load_first(const float *p, int32_t count) {
    lanes a = {{0}};
    memcpy(a.v, p, (size_t)count * sizeof(float));
    return a;
}

SCALAR_OP lanes lanes_load_bf16(const uint16_t *p) {
    lanes a;
    LANES_EACH(i) a.v[i] = moe_bf16_to_f32(p[i]);
    return a;
}

SCALAR_OP lanes lanes_load_f16(const uint16_t *p) {
    lanes a;
    LANES_EACH(i) a.v[i] = moe_f16_to_f32(p[i]);
    return a;
}

SCALAR_OP void lanes_store(float *p, lanes a) { memcpy(p, a.v, sizeof a.v); }
SCALAR_OP void lanes_store_first(float *p, lanes a, int32_t count) { memcpy(p, a.v, (size_t)count * sizeof(float)); }

SCALAR_OP lanes lanes_fma(lanes a, lanes b, lanes c) {
    LANES_EACH(i) c.v[i] = fmaf(a.v[i], b.v[i], c.v[i]);
    return c;
}

SCALAR_OP lanes lanes_add(lanes a, lanes b) {
    LANES_EACH(i) a.v[i] += b.v[i];
    return a;
}

SCALAR_OP lanes lanes_sub(lanes a, lanes b) {
    LANES_EACH(i) a.v[i] -= b.v[i];
    return a;
}

SCALAR_OP lanes lanes_mul(lanes a, lanes b) {
    LANES_EACH(i) a.v[i] *= b.v[i];
    return a;
}

SCALAR_OP lanes lanes_div(lanes a, lanes b) {
    LANES_EACH(i) a.v[i] /= b.v[i];
    return a;
}

SCALAR_OP lanes lanes_max(lanes a, lanes b) {
    LANES_EACH(i) b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return b;
}

SCALAR_OP lanes lanes_min(lanes a, lanes b) {
    LANES_EACH(i) b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return b;
}

SCALAR_OP lanes lanes_power_of_two(lanes exponent) {
    LANES_EACH(i) {
        int32_t whole = exponent.v[i] == exponent.v[i] ? (int32_t)exponent.v[i] : 0;
        uint32_t bits = (uint32_t)(whole + 127) << 23;
        memcpy(&exponent.v[i], &bits, sizeof bits);
    }
    return exponent;
}
