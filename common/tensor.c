#include "common/tensor.h"

#include "common/status.h"

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

/* A generated element as it would be stored. */
static uint32_t generated_bits(const moe_tensor *t, int64_t index) {
    float value = moe_generated_f32(&t->generated, index);
    uint32_t bits;
    if (t->dtype == MOE_BF16) return moe_f32_to_bf16(value);
    if (t->dtype == MOE_F16) return moe_f32_to_f16(value);
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

void moe_tensor_read(const moe_tensor *t, int64_t first, int64_t count, void *out) {
    size_t size = moe_dtype_bytes(t->dtype);
    uint8_t *to = out;
    if (t->data) {
        memcpy(out, (const uint8_t *)t->data + (size_t)first * size, (size_t)count * size);
        return;
    }
    for (int64_t i = 0; i < count; i++, to += size) {
        uint32_t bits = generated_bits(t, first + i);
        uint16_t half = (uint16_t)bits;
        memcpy(to, size == 4 ? (const void *)&bits : &half, size);
    }
}

static float widen(moe_dtype dtype, uint16_t bits) { return dtype == MOE_BF16 ? moe_bf16_to_f32(bits) : moe_f16_to_f32(bits); }

void moe_tensor_read_f32(const moe_tensor *t, int64_t first, int64_t count, float *out) {
    const uint8_t *p = (const uint8_t *)t->data + (size_t)first * moe_dtype_bytes(t->dtype);
    if (t->dtype == MOE_F32) {
        moe_tensor_read(t, first, count, out);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        uint16_t bits;
        if (t->data)
            memcpy(&bits, p + 2 * i, sizeof bits);
        else
            bits = (uint16_t)generated_bits(t, first + i);
        out[i] = widen(t->dtype, bits);
    }
}

moe_tensor moe_tensor_rows(const moe_tensor *t, int64_t lo, int64_t hi) {
    moe_tensor rows = *t;
    if (t->data) rows.data = (const uint8_t *)t->data + (size_t)(lo * t->cols) * moe_dtype_bytes(t->dtype);
    rows.generated.first += lo * t->cols;
    rows.rows = hi - lo;
    return rows;
}
