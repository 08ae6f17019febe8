#include "common/elements.h"

#include <math.h>

/* A value is finite where its exponent is not all ones: where its bits without the sign are less than those of infinity. One maximum
 * over all of them and no way out sooner, so that the loop is of vectors; elements may lie anywhere. */
#define F32_INFINITY UINT32_C(0x7f800000)
#define BF16_INFINITY UINT16_C(0x7f80)

static inline __attribute__((always_inline)) bool f32_finite(const uint8_t *elements, size_t count) {
    uint32_t most = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, elements + i * sizeof bits, sizeof bits);
        bits &= INT32_MAX;
        most = bits > most ? bits : most;
    }
    return most < F32_INFINITY;
}

static inline __attribute__((always_inline)) bool bf16_finite(const uint8_t *elements, size_t count) {
    uint16_t most = 0;
    for (size_t i = 0; i < count; i++) {
        uint16_t bits;
        memcpy(&bits, elements + i * sizeof bits, sizeof bits);
        bits &= INT16_MAX;
        most = bits > most ? bits : most;
    }
    return most < BF16_INFINITY;
}

static inline __attribute__((always_inline)) bool all_finite(const void *elements, moe_dtype dtype, size_t count) {
    return dtype == MOE_BF16 ? bf16_finite(elements, count) : f32_finite(elements, count);
}

#if defined(__x86_64__)
__attribute__((target("avx2"), optimize("O3"))) static bool all_finite_avx2(const void *elements, moe_dtype dtype, size_t count) {
    return all_finite(elements, dtype, count);
}
#endif

bool moe_elements_finite(const void *elements, moe_dtype dtype, size_t count) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) return all_finite_avx2(elements, dtype, count);
#endif
    return all_finite(elements, dtype, count);
}

void moe_elements_narrow(const float *x, moe_dtype dtype, size_t count, void *out) {
    if (dtype == MOE_F32) {
        memcpy(out, x, count * sizeof *x);
        return;
    }
    uint16_t *narrow = out;
    for (size_t i = 0; i < count; i++) narrow[i] = moe_f32_to_bf16(x[i]);
}

void moe_elements_widen(const void *x, moe_dtype dtype, size_t count, float *out) {
    moe_tensor_read_f32(&(moe_tensor){.data = x, .dtype = dtype}, 0, (int64_t)count, out);
}

void moe_elements_round(float *x, moe_dtype dtype, size_t count) {
    if (dtype == MOE_F32) return;
    for (size_t i = 0; i < count; i++) x[i] = moe_bf16_to_f32(moe_f32_to_bf16(x[i]));
}

#if defined(__x86_64__)
/* The same bits as fmaf of the library, which a processor without the instruction computes in software. */
__attribute__((target("avx2,fma"), optimize("O3"))) static void accumulate_fma(float weight, const float *x, size_t count, float *sum) {
    for (size_t i = 0; i < count; i++) sum[i] = __builtin_fmaf(weight, x[i], sum[i]);
}
#endif

void moe_elements_accumulate(float weight, const float *x, size_t count, float *sum) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2")) {
        accumulate_fma(weight, x, count, sum);
        return;
    }
#endif
    for (size_t i = 0; i < count; i++) sum[i] = fmaf(weight, x[i], sum[i]);
}

/* The text between the second '/' and the next; its length in *length. */
static const char *dtype_of(const char *profile, size_t *length) {
    for (int i = 0; i < 2 && profile; i++) {
        profile = strchr(profile, '/');
        if (profile) profile++;
    }
    *length = profile ? strcspn(profile, "/") : 0;
    return profile;
}

bool moe_profiles_share_dtype(const char *a, const char *b) {
    size_t a_length, b_length;
    const char *a_dtype = dtype_of(a, &a_length), *b_dtype = dtype_of(b, &b_length);
    return !a_dtype || !b_dtype || (a_length == b_length && memcmp(a_dtype, b_dtype, a_length) == 0);
}
