/* Rows of elements: rounding, finiteness, profiles. */
#include <math.h>

#include "common/elements.h"
#include "common/random.h"
#include "tests/support/test.h"

#define COUNT 301 /* many vectors, and odd */

static void narrow_and_widen(void **state) {
    moe_random r = {.state = 1};
    float x[COUNT], rounded[COUNT], wide[COUNT];
    uint16_t narrow[COUNT];
    (void)state;
    for (int i = 0; i < COUNT; i++) rounded[i] = x[i] = (float)ldexp(2 * moe_random_unit(&r) - 1, i % 60 - 30);
    moe_elements_narrow(x, MOE_BF16, COUNT, narrow);
    moe_elements_widen(narrow, MOE_BF16, COUNT, wide);
    moe_elements_round(rounded, MOE_BF16, COUNT);
    for (int i = 0; i < COUNT; i++) {
        assert_true(fabsf(wide[i] - x[i]) <= 0x1p-8f * fabsf(x[i])); /* 8 bits of mantissa, the first not stored */
        assert_true(wide[i] == rounded[i]);
    }
    moe_elements_narrow(x, MOE_F32, COUNT, wide);
    assert_memory_equal(x, wide, sizeof x);
    moe_elements_round(x, MOE_F32, COUNT);
    assert_memory_equal(x, wide, sizeof x);
}

static void ties_go_to_even(void **state) {
    float x[] = {0x1.01p0f, 0x1.03p0f, 0x1.010002p0f, INFINITY, 0x1.fffffep127f};
    const float want[] = {0x1.00p0f, 0x1.04p0f, 0x1.02p0f, INFINITY, INFINITY};
    (void)state;
    moe_elements_round(x, MOE_BF16, 5);
    for (int i = 0; i < 5; i++) assert_true(x[i] == want[i]);
}

/* At every place and address, in both types. */
static void finiteness(void **state) {
    static const uint32_t bad[] = {0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001};
    uint8_t memory[4 * COUNT + 3];
    (void)state;
    for (int offset = 0; offset < 3; offset++)
        for (int type = 0; type < 2; type++) {
            moe_dtype dtype = type ? MOE_BF16 : MOE_F32;
            size_t bytes = moe_dtype_bytes(dtype);
            memset(memory, 0x7f, sizeof memory); /* large, and finite in both types */
            assert_true(moe_elements_finite(memory + offset, dtype, COUNT));
            for (size_t i = 0; i < COUNT; i++)
                for (int b = 0; b < (type ? 3 : 4); b++) {
                    uint8_t kept[4];
                    memcpy(kept, memory + offset + i * bytes, bytes);
                    memcpy(memory + offset + i * bytes, (const uint8_t *)&bad[b] + (type ? 2 : 0), bytes);
                    assert_false(moe_elements_finite(memory + offset, dtype, COUNT));
                    assert_true(moe_elements_finite(memory + offset, dtype, i));
                    memcpy(memory + offset + i * bytes, kept, bytes);
                }
        }
    const float low_half[] = {0x1.00ffp0f}; /* its lower half alone would be an infinity of bfloat16 */
    assert_true(moe_elements_finite(low_half, MOE_F32, 1));
    assert_true(moe_elements_finite(memory, MOE_F32, 0));
}

static void profiles(void **state) {
    (void)state;
    assert_true(moe_profiles_share_dtype("cpu/avx512/float32", "cpu-ref/ref/float32"));
    assert_true(moe_profiles_share_dtype("cuda/sm90/bfloat16/deterministic", "cpu/avx2/bfloat16"));
    assert_false(moe_profiles_share_dtype("cuda/sm90/bfloat16", "cpu/avx2/float32"));
    assert_false(moe_profiles_share_dtype("cuda/sm90/float3", "cpu/avx2/float32"));
    assert_true(moe_profiles_share_dtype("", "cpu/avx2/float32"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(narrow_and_widen),
        cmocka_unit_test(ties_go_to_even),
        cmocka_unit_test(finiteness),
        cmocka_unit_test(profiles),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
