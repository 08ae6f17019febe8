#include "common/elements.h"

#include <math.h>

#define WORDS_PER_BLOCK 64
#define F32_EXPONENT UINT32_C(0x7f800000)
#define LOW_BF16_EXPONENT UINT32_C(0x00007f80) /* of the first of two in a word; that of the second is where an f32 has it */

static inline __attribute__((always_inline)) bool words_finite(const uint8_t *at, size_t bytes, uint32_t low) {
    while (bytes > 0) {
        uint32_t words[WORDS_PER_BLOCK], bad = 0;
        size_t n = bytes < sizeof words ? bytes : sizeof words;
        if (n < sizeof words) memset(words, 0, sizeof words);
        memcpy(words, at, n);
        for (int i = 0; i < WORDS_PER_BLOCK; i++) bad |= ((words[i] & F32_EXPONENT) == F32_EXPONENT) | ((words[i] & low) == low);
        if (bad) return false;
        at += n;
        bytes -= n;
    }
    return true;
}

#if defined(__x86_64__)
__attribute__((target("avx2"), optimize("O3"))) static bool words_finite_avx2(const uint8_t *at, size_t bytes, uint32_t low) {
    return words_finite(at, bytes, low);
}
#endif

bool moe_elements_finite(const void *elements, moe_dtype dtype, size_t count) {
    size_t bytes = count * moe_dtype_bytes(dtype);
    /* an exponent of ones in the low half of a word means something in bfloat16 alone */
    uint32_t low = dtype == MOE_BF16 ? LOW_BF16_EXPONENT : UINT32_MAX;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) return words_finite_avx2(elements, bytes, low);
#endif
    return words_finite(elements, bytes, low);
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
