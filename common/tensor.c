#include "common/tensor.h"

#include "common/status.h"

#define GENERATED_AT_ONCE 1024 /* elements on their way from one type to another */

const char *moe_dtype_name(moe_dtype dtype) {
    static const char *const names[MOE_DTYPE_COUNT] = {"float32", "bfloat16", "float16"};
    MOE_ASSERT((unsigned)dtype < MOE_DTYPE_COUNT);
    return names[dtype];
}

float moe_f16_to_f32(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, exponent = (bits >> 10) & 0x1f, mantissa = bits & 0x3ffu, wide;
    float value;
    if (exponent == 0) { /* zero or subnormal: mantissa × 2^-24 */
        value = (float)mantissa * 0x1.0p-24f;
        return sign ? -value : value;
    }
    wide = exponent == 31 ? sign | 0x7f800000u | mantissa << 13 : sign | (exponent + 112) << 23 | mantissa << 13;
    memcpy(&value, &wide, sizeof value);
    return value;
}

uint16_t moe_f32_to_f16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (bits >> 13 & 0x1ffu));
    if (bits >= 0x477ff000u) return sign | 0x7c00u; /* 65520, halfway to the first number that is out of range, and beyond */
    if (bits < 0x38800000u) {                       /* below 2^-14: a multiple of 2^-24, which adding 0.5 rounds to */
        float magnitude, shifted;
        memcpy(&magnitude, &bits, sizeof magnitude);
        shifted = magnitude + 0.5f;
        memcpy(&bits, &shifted, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    return (uint16_t)(sign | ((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1)) >> 13));
}

/* ---- generated elements, a loop for each type, so that the compiler makes vectors of them ---- */

/* Elements of memory that may be unaligned. */
typedef float loose_f32 __attribute__((aligned(1), may_alias));
typedef uint16_t loose_u16 __attribute__((aligned(1), may_alias));

/* The loops of one instruction set; all give the same bits, since nothing but integers, one product and one sum is in them. */
typedef struct generators {
    void (*f32)(const moe_generator *g, int64_t first, int64_t count, loose_f32 *out);
    void (*bf16)(const moe_generator *g, int64_t first, int64_t count, loose_u16 *out);
} generators;

#define GENERATORS(name, ...)                                                                                                     \
    __VA_ARGS__ static void f32_##name(const moe_generator *g, int64_t first, int64_t count, loose_f32 *out) {                    \
        const moe_generator generator = *g;                                                                                       \
        for (int64_t i = 0; i < count; i++) out[i] = moe_generated_f32(&generator, first + i);                                    \
    }                                                                                                                             \
    __VA_ARGS__ static void bf16_##name(const moe_generator *g, int64_t first, int64_t count, loose_u16 *out) {                   \
        const moe_generator generator = *g;                                                                                       \
        for (int64_t i = 0; i < count; i++) out[i] = moe_f32_to_bf16(moe_generated_f32(&generator, first + i));                   \
    }                                                                                                                             \
    static const generators generators_##name = {f32_##name, bf16_##name}

GENERATORS(any, __attribute__((optimize("O3"))));
#if defined(__x86_64__)
GENERATORS(avx2, __attribute__((target("avx2"), optimize("O3"))));
GENERATORS(avx512, __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512"), optimize("O3"))));
#endif

static const generators *widest_generators(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return &generators_avx512;
    if (__builtin_cpu_supports("avx2")) return &generators_avx2;
#endif
    return &generators_any;
}

/* ---- reading ---- */

static void generate(const moe_tensor *t, int64_t first, int64_t count, void *out) {
    const generators *use = widest_generators();
    if (t->dtype == MOE_F32) {
        use->f32(&t->generated, first, count, out);
    } else if (t->dtype == MOE_BF16) {
        use->bf16(&t->generated, first, count, out);
    } else {
        loose_u16 *half = out;
        for (int64_t i = 0; i < count; i++) half[i] = moe_f32_to_f16(moe_generated_f32(&t->generated, first + i));
    }
}

void moe_tensor_read(const moe_tensor *t, int64_t first, int64_t count, void *out) {
    size_t size = moe_dtype_bytes(t->dtype);
    if (t->data)
        memcpy(out, (const uint8_t *)t->data + (size_t)first * size, (size_t)count * size);
    else
        generate(t, first, count, out);
}

__attribute__((optimize("O3"))) static void widen_bf16(const loose_u16 *x, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i++) out[i] = moe_bf16_to_f32(x[i]);
}

static void widen_f16(const loose_u16 *x, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i++) out[i] = moe_f16_to_f32(x[i]);
}

void moe_tensor_read_f32(const moe_tensor *t, int64_t first, int64_t count, float *out) {
    uint16_t narrow[GENERATED_AT_ONCE];
    if (t->dtype == MOE_F32) {
        moe_tensor_read(t, first, count, out);
        return;
    }
    void (*widen)(const loose_u16 *, int64_t, float *) = t->dtype == MOE_BF16 ? widen_bf16 : widen_f16;
    if (t->data) {
        widen((const loose_u16 *)t->data + first, count, out);
        return;
    }
    for (int64_t at = 0, part; at < count; at += part) {
        part = count - at < GENERATED_AT_ONCE ? count - at : GENERATED_AT_ONCE;
        generate(t, first + at, part, narrow);
        widen(narrow, part, out + at);
    }
}

moe_tensor moe_tensor_rows(const moe_tensor *t, int64_t lo, int64_t hi) {
    moe_tensor rows = *t;
    if (t->data) rows.data = (const uint8_t *)t->data + (size_t)(lo * t->cols) * moe_dtype_bytes(t->dtype);
    rows.generated.first += lo * t->cols;
    rows.rows = hi - lo;
    return rows;
}
