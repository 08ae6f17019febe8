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

void moe_tensor_read_f32(const moe_tensor *t, int64_t first, int64_t count, float *out) {
    const uint8_t *p = (const uint8_t *)t->data + (size_t)first * moe_dtype_bytes(t->dtype);
    if (t->dtype == MOE_F32) {
        memcpy(out, p, (size_t)count * sizeof *out);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        uint16_t bits;
        memcpy(&bits, p + 2 * i, sizeof bits);
        out[i] = t->dtype == MOE_BF16 ? moe_bf16_to_f32(bits) : moe_f16_to_f32(bits);
    }
}
