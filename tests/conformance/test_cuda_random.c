/* Generated weights made on a GPU beside those that C makes: the same bits, in every type, through slices, padding and runs; and
 * a model of them computes on a GPU what it computes on the CPU. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "cpu/cpu.h"
#include "tests/support/cuda_backends.h"
#include "tests/support/reference_driver.h"
#include "tests/support/test.h"

#ifdef MOESAIC_HAS_CUDA
#include "cuda/random.h"

#define TOKENS 24
#define ROWS 37
#define COLS 301
#define POISON 0xa5

/* `value`, an element of a tensor as stored, as an element of another type. */
static void store(uint8_t *to, moe_dtype dtype, float value) {
    uint16_t half = dtype == MOE_BF16 ? moe_f32_to_bf16(value) : moe_f32_to_f16(value);
    memcpy(to, dtype == MOE_F32 ? (const void *)&value : &half, moe_dtype_bytes(dtype));
}

static void check_plane(const moe_tensor *t, moe_cuda_random a, size_t places) {
    size_t size = moe_dtype_bytes(a.dtype), bytes = places * (size_t)a.stride * size;
    uint8_t *want = malloc(bytes), *got = malloc(bytes);
    assert_true(want && got);
    memset(want, POISON, bytes);
    for (int64_t row = 0; row < a.rows; row++)
        for (int64_t col = 0; col < a.stride; col++) {
            float value = 0;
            if (col < a.width) moe_tensor_read_f32(t, (a.row_lo + row) * t->cols + a.col_lo + col, 1, &value);
            store(want + (size_t)((row / a.run * a.run_stride + row % a.run) * a.stride + col) * size, a.dtype, value);
        }
    assert_int_equal(cudaMalloc(&a.to, bytes), cudaSuccess);
    assert_int_equal(cudaMemset(a.to, POISON, bytes), cudaSuccess);
    assert_int_equal(moe_cuda_random_fill(&a, 0), cudaSuccess);
    assert_int_equal(cudaMemcpy(got, a.to, bytes, cudaMemcpyDeviceToHost), cudaSuccess);
    assert_memory_equal(got, want, bytes);
    cudaFree(a.to);
    free(want);
    free(got);
}

static void same_bits_as_c(void **state) {
    static const moe_generator generators[] = {
        {.seed = 3, .half_width = 0.0346410162f},
        {.seed = UINT64_C(0xf00dfeed12345678), .first = INT64_C(5) << 32, .center = 0.25f, .half_width = 3},
        {.seed = 9, .center = 1}};
    (void)state;
    for (size_t g = 0; g < sizeof generators / sizeof *generators; g++)
        for (moe_dtype stored = 0; stored < MOE_DTYPE_COUNT; stored++)
            for (moe_dtype dtype = 0; dtype < MOE_DTYPE_COUNT; dtype++) {
                moe_tensor t = {.dtype = stored, .rows = ROWS, .cols = COLS, .generated = generators[g]};
                moe_cuda_random whole = {.generator = t.generated, .stored = stored, .dtype = dtype, .cols = COLS};
                whole.rows = ROWS;
                whole.width = whole.stride = COLS;
                whole.run = whole.run_stride = 1;
                check_plane(&t, whole, ROWS);
                moe_cuda_random slice = whole; /* as the gate rows of a slice lie among the up rows, padded */
                slice.row_lo = 11;
                slice.rows = 24;
                slice.col_lo = 7;
                slice.width = 290;
                slice.stride = 296;
                slice.run = 8;
                slice.run_stride = 16;
                check_plane(&t, slice, 48);
            }
}
/* ---- models ---- */

static float *logits_of(moe_backend *backend, const moe_model *model) {
    moe_driver_options options = {.num_sequences = 1, .max_tokens = TOKENS, .max_rows = 8, .combine = MOE_COMBINE_EXACT};
    moe_driver *driver = moe_driver_open(backend, model, &options);
    float *logits = malloc((size_t)TOKENS * (size_t)model->config.vocab * sizeof *logits);
    int32_t ids[TOKENS];
    assert_non_null(logits);
    for (int32_t i = 0; i < TOKENS; i++) ids[i] = i * 13 % model->config.vocab;
    moe_driver_prefill(driver, ids, TOKENS, 8, logits);
    moe_driver_close(driver);
    backend->ops->close(backend);
    return logits;
}

static void models_agree_with_the_cpu(void **state) {
    static const char *const fixtures[] = {"qwen3_moe", "qwen2_moe", "mixtral", "llama_dense"};
    (void)state;
    for (size_t f = 0; f < sizeof fixtures / sizeof *fixtures; f++) {
        char path[256];
        moe_model *model;
        moe_backend *reference;
        double most = 0, error = 0;
        snprintf(path, sizeof path, "%s/tests/data/checkpoints/%s", SOURCE_DIR, fixtures[f]);
        assert_int_equal(moe_model_open_dummy(path, &(moe_dummy_options){.seed = 9}, &model, NULL), MOE_OK);
        assert_int_equal(moe_cpu_ref_open(&(moe_cpu_config){.threads = 1}, &reference, NULL), MOE_OK);
        float *want = logits_of(reference, model), *got = logits_of(moe_test_cuda_open(MOE_F32, false), model);
        for (int64_t i = 0; i < (int64_t)TOKENS * model->config.vocab; i++) {
            most = fmax(most, fabs((double)want[i]));
            error = fmax(error, fabs((double)want[i] - got[i]));
        }
        if (!(error <= 1e-4 * most)) fail_msg("%s: logits up to %g, apart by %g", fixtures[f], most, error);
        free(want);
        free(got);
        moe_model_close(&model);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(same_bits_as_c), cmocka_unit_test(models_agree_with_the_cpu)};
    int count = 0;
    cudaError_t code = cudaGetDeviceCount(&count);
    if (code != cudaSuccess || count == 0) {
        printf("skipped: no GPU here (%s)\n", cudaGetErrorString(code));
        return 77;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
#else
int main(void) {
    printf("skipped: built without CUDA\n");
    return 77;
}
#endif
