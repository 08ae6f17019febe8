/* An expert's image for the GPU, which the host packs: where cuda/expert.h says that each element is, of networks with a gate matrix
 * and without, of a slice, and with padding. Needs no GPU. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/test.h"

#ifdef MOESAIC_HAS_CUDA
#include "cuda/fill.h"

enum { HIDDEN = 24, WIDTH = 88 }; /* 8 blocks of 11 */

/* Element i of `which` matrix is a number that no other element has; exact in float32. */
static float element(int which, int64_t i) { return (float)(which * 100000 + i + 1); }

static moe_tensor matrix(int which, int64_t rows, int64_t cols) {
    float *data = malloc((size_t)(rows * cols) * sizeof *data);
    assert_non_null(data);
    for (int64_t i = 0; i < rows * cols; i++) data[i] = element(which, i);
    return (moe_tensor){.data = data, .dtype = MOE_F32, .rows = rows, .cols = cols};
}

static int64_t up_to_256(int64_t bytes) { return (bytes + 255) / 256 * 256; }

static void check_image(const moe_ffn_weights *w, int32_t lo, int32_t hi) {
    bool gated = moe_ffn_gated(w);
    int32_t first = WIDTH / 8 * lo, width = WIDTH / 8 * (hi - lo), padded = (width + 7) / 8 * 8;
    int64_t down_at = up_to_256((gated ? 2 : 1) * (int64_t)padded * HIDDEN * 4);
    moe_expert_size size = moe_cuda_expert_size(w, lo, hi, MOE_F32);
    assert_int_equal(size.image_bytes, down_at + up_to_256((int64_t)HIDDEN * padded * 4));
    float *image = aligned_alloc(256, (size_t)size.image_bytes);
    assert_non_null(image);
    memset(image, 0xff, (size_t)size.image_bytes);
    moe_cuda_expert_pack(w, lo, hi, MOE_F32, image);
    for (int32_t i = 0; i < padded; i++)
        for (int32_t k = 0; k < HIDDEN; k++) {
            int64_t from = (int64_t)(first + i) * HIDDEN + k, up_row = gated ? i / 8 * 16 + 8 + i % 8 : i;
            assert_true(image[up_row * HIDDEN + k] == (i < width ? element(1, from) : 0));
            if (gated) assert_true(image[(up_row - 8) * HIDDEN + k] == (i < width ? element(0, from) : 0));
            float down = image[down_at / 4 + (int64_t)k * padded + i];
            assert_true(down == (i < width ? element(2, (int64_t)k * WIDTH + first + i) : 0));
        }
    free(image);
}

static void test_image(void **state) {
    (void)state;
    moe_ffn_weights three = {.gate = matrix(0, WIDTH, HIDDEN), .up = matrix(1, WIDTH, HIDDEN), .down = matrix(2, HIDDEN, WIDTH)};
    const moe_ffn_weights two = {.up = three.up, .down = three.down};
    for (int32_t length = 1; length <= MOE_FFN_BLOCKS; length *= 2)
        for (int32_t lo = 0; lo < MOE_FFN_BLOCKS; lo += length) {
            check_image(&three, lo, lo + length);
            check_image(&two, lo, lo + length);
        }
    free((void *)(uintptr_t)three.gate.data);
    free((void *)(uintptr_t)three.up.data);
    free((void *)(uintptr_t)three.down.data);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_image)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
#else
int main(void) {
    printf("skipped: built without CUDA\n");
    return 77;
}
#endif
