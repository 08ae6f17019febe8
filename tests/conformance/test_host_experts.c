/* Experts that the `cpu` backends compute from images of another layout, where these lie: against double-precision mathematics within the
 * op table's bound for cpu-ref, on every instruction set; the same bits for a row in every batch, on any number of threads. The layouts
 * are one made here and the GPU's, which the host packs without one. Where there is a GPU, its own results for the same expert, too. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/alloc.h"
#include "common/elements.h"
#include "common/random.h"
#include "tests/support/cpu_backends.h"
#include "tests/support/cuda_backends.h"
#include "tests/support/test.h"
#ifdef MOESAIC_HAS_CUDA
#include "cuda/fill.h"
#endif

enum { ROWS = 11 };
#define BOUND_RELATIVE 1e-6 /* as test_backend_ops holds ffn: of the result and of the sum of the terms' sizes */
#define BOUND_TERMS 3e-7
#define POLL_NS (50 * INT64_C(1000))

typedef struct shape {
    int32_t hidden, intermediate, lo, hi;
    moe_dtype stored;
    bool gated;
} shape;

static const shape shapes[] = {
    {64, 128, 0, 8, MOE_BF16, true}, {48, 88, 0, 8, MOE_BF16, true},  {40, 100, 4, 8, MOE_F32, true},
    {33, 72, 2, 4, MOE_F16, true},   {96, 512, 0, 8, MOE_BF16, false}, {24, 88, 3, 4, MOE_F32, false},
};

static moe_tensor random_matrix(moe_random *random, moe_dtype dtype, int64_t rows, int64_t cols) {
    uint8_t *data = malloc((size_t)(rows * cols) * sizeof(float));
    assert_non_null(data);
    for (int64_t i = 0; i < rows * cols; i++) {
        float value = (float)(2 * moe_random_unit(random) - 1) / 8;
        uint16_t half = dtype == MOE_BF16 ? moe_f32_to_bf16(value) : (uint16_t)(0x2800 + moe_random_below(random, 0x800) + (moe_random_below(random, 2) << 15));
        if (dtype == MOE_F32)
            memcpy(data + i * 4, &value, sizeof value);
        else
            memcpy(data + i * 2, &half, sizeof half);
    }
    return (moe_tensor){.data = data, .dtype = dtype, .rows = rows, .cols = cols};
}

/* The widest type, no interleaving: up, then down, then gate, each row with room behind it. */
static int64_t pack_plain(const moe_ffn_weights *w, const shape *s, moe_dtype profile, void *image, moe_image_layout *layout) {
    int32_t first = moe_ffn_block_start(s->intermediate, s->lo), width = moe_ffn_block_start(s->intermediate, s->hi) - first;
    const moe_tensor *tensors[] = {&w->up, &w->down, &w->gate};
    moe_image_matrix *matrices[] = {&layout->up, &layout->down, &layout->gate};
    int64_t at = 0;
    (void)profile;
    *layout = (moe_image_layout){.up = {.rows = 0}};
    for (int i = 0; i < (s->gated ? 3 : 2); i++) {
        bool down = i == 1;
        moe_image_matrix m = {.offset = at, .rows = down ? s->hidden : width, .cols = down ? width : s->hidden, .run = 3, .dtype = MOE_F32};
        m.row_bytes = m.cols * 4 + 20;
        m.run_bytes = 3 * m.row_bytes + 12;
        for (int32_t row = 0; image && row < m.rows; row++) {
            int64_t from = down ? (int64_t)row * s->intermediate + first : (int64_t)(first + row) * s->hidden;
            uint8_t *to = (uint8_t *)image + m.offset + row / m.run * m.run_bytes + row % m.run * m.row_bytes;
            moe_tensor_read_f32(tensors[i], from, m.cols, (float *)(void *)to);
        }
        *matrices[i] = m;
        at += (m.rows + 2) / 3 * m.run_bytes;
    }
    return at;
}

#ifdef MOESAIC_HAS_CUDA
static int64_t pack_cuda(const moe_ffn_weights *w, const shape *s, moe_dtype profile, void *image, moe_image_layout *layout) {
    if (image) moe_cuda_expert_pack(w, s->lo, s->hi, profile, image);
    moe_cuda_expert_layout(w, s->lo, s->hi, profile, layout);
    return moe_cuda_expert_size(w, s->lo, s->hi, profile).image_bytes;
}
#endif

/* Fills an image, where there is one, and its layout; returns its size. */
typedef int64_t (*pack_fn)(const moe_ffn_weights *w, const shape *s, moe_dtype profile, void *image, moe_image_layout *layout);
static const pack_fn packers[] = {
    pack_plain,
#ifdef MOESAIC_HAS_CUDA
    pack_cuda,
#endif
};

static double at(const moe_tensor *t, int64_t index) {
    float value;
    moe_tensor_read_f32(t, index, 1, &value);
    return value;
}

static double dot(const moe_tensor *t, int64_t first, const float *x, int32_t count, double *terms) {
    double sum = 0;
    for (int32_t k = 0; k < count; k++) {
        sum += at(t, first + k) * x[k];
        *terms += fabs(at(t, first + k) * x[k]);
    }
    return sum;
}

/* One row, and the sum of the sizes of the terms of each output. */
static void truth(const shape *s, const moe_ffn_weights *w, const float *x, double *y, double *terms) {
    int32_t lo = moe_ffn_block_start(s->intermediate, s->lo), hi = moe_ffn_block_start(s->intermediate, s->hi);
    for (int32_t h = 0; h < s->hidden; h++) y[h] = terms[h] = 0;
    for (int32_t i = lo; i < hi; i++) {
        double gate_terms = 0, up_terms = 0, up = dot(&w->up, (int64_t)i * s->hidden, x, s->hidden, &up_terms), size = up_terms;
        double act = up > 0 ? up : 0;
        if (s->gated) {
            double gate = dot(&w->gate, (int64_t)i * s->hidden, x, s->hidden, &gate_terms);
            act = gate / (1 + exp(-gate)) * up;
            size = (1 + gate_terms) * (1 + up_terms);
        }
        for (int32_t h = 0; h < s->hidden; h++) {
            double weight = at(&w->down, (int64_t)h * s->intermediate + i);
            y[h] += weight * act;
            terms[h] += fabs(weight) * size;
        }
    }
}

/* Weights as the image has them, where it rounds them. */
static void round_to_image(moe_tensor *t, moe_dtype dtype) {
    size_t count = (size_t)(t->rows * t->cols);
    if (!moe_tensor_present(t) || dtype != MOE_BF16 || t->dtype == MOE_BF16) return;
    float *wide = malloc(count * sizeof *wide);
    assert_non_null(wide);
    moe_tensor_read_f32(t, 0, (int64_t)count, wide);
    for (size_t i = 0; i < count; i++) wide[i] = moe_bf16_to_f32(moe_f32_to_bf16(wide[i]));
    free((void *)(uintptr_t)t->data);
    *t = (moe_tensor){.data = wide, .dtype = MOE_F32, .rows = t->rows, .cols = t->cols};
}

static void on_done(moe_job *job) { atomic_store((_Atomic bool *)job->owner, true); }

/* Rows [first, first + count) of x through the expert. */
static void compute(moe_backend *b, moe_expert *expert, const shape *s, const void *x, int32_t first, int32_t count, float *out) {
    int32_t rows[ROWS];
    for (int32_t i = 0; i < count; i++) rows[i] = first + i;
    const moe_ffn_group group = {.expert = expert, .count = count};
    const moe_ffn_batch batch = {.x = x,
                                 .num_rows = ROWS,
                                 .groups = &group,
                                 .num_groups = 1,
                                 .assignment_rows = rows,
                                 .num_assignments = count,
                                 .mode = MOE_COMBINE_EXACT,
                                 .block_lo = s->lo,
                                 .block_hi = s->hi,
                                 .out = out};
    _Atomic bool ended = false;
    moe_job job = {.done = on_done, .owner = &ended, .status = MOE_INTERNAL};
    b->ops->ffn_submit(b, &batch, &job);
    while (!atomic_load(&ended)) {
        if (b->ops->poll) b->ops->poll(b);
        nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    }
    assert_int_equal(job.status, MOE_OK);
}

/* One expert of that shape on one backend: *bits (NULL before the first) are those of every instruction set but cpu-ref's. */
static void check_expert(moe_backend *b, const shape *s, pack_fn pack, float **bits) {
    moe_random random = {(uint64_t)(s->hidden * 1000 + s->intermediate)};
    moe_ffn_weights w = {.up = random_matrix(&random, s->stored, s->intermediate, s->hidden),
                         .down = random_matrix(&random, s->stored, s->hidden, s->intermediate)};
    if (s->gated) w.gate = random_matrix(&random, s->stored, s->intermediate, s->hidden);
    moe_image_layout layout;
    moe_host_experts *experts;
    size_t count = (size_t)ROWS * (size_t)s->hidden;
    int64_t bytes = pack(&w, s, b->dtype, NULL, &layout);
    void *image = moe_alloc_aligned((size_t)bytes, 1), *x = moe_alloc_aligned(count, moe_dtype_bytes(b->dtype));
    float *wide = malloc(count * sizeof *wide), *out = moe_alloc_aligned(count, sizeof *out), *again = moe_alloc_aligned(count, sizeof *again);
    double *want = malloc((size_t)s->hidden * sizeof *want), *terms = malloc((size_t)s->hidden * sizeof *terms);
    assert_true(image && x && wide && out && again && want && terms);
    memset(image, 0xff, (size_t)bytes);
    pack(&w, s, b->dtype, image, &layout);
    for (size_t i = 0; i < count; i++) wide[i] = (float)(2 * moe_random_unit(&random) - 1);
    moe_elements_narrow(wide, b->dtype, count, x);
    moe_elements_widen(x, b->dtype, count, wide);
    assert_int_equal(b->ops->host_experts_create(b, &w, s->lo, s->hi, &layout, 2, &experts, NULL), MOE_OK);
    moe_expert *expert = b->ops->host_expert(experts, 1, image);
    round_to_image(&w.gate, layout.up.dtype);
    round_to_image(&w.up, layout.up.dtype);
    round_to_image(&w.down, layout.down.dtype);
    compute(b, expert, s, x, 0, ROWS, out);
    for (int32_t r = 0; r < ROWS; r++) {
        truth(s, &w, wide + (int64_t)r * s->hidden, want, terms);
        for (int32_t h = 0; h < s->hidden; h++) {
            double error = fabs(out[r * s->hidden + h] - want[h]), bound = BOUND_RELATIVE * fabs(want[h]) + BOUND_TERMS * terms[h];
            if (!(error <= bound))
                fail_msg("%s, hidden %d, width %d: row %d output %d is %g, not %g", b->ops->profile(b), s->hidden, s->intermediate, r, h,
                         (double)out[r * s->hidden + h], want[h]);
        }
    }
    for (int32_t first = 0, n = 1; first < ROWS; first += n, n = n % 4 + 1) {
        if (n > ROWS - first) n = ROWS - first;
        compute(b, expert, s, x, first, n, again + first * s->hidden);
    }
    assert_memory_equal(again, out, count * sizeof *out);
    if (*bits) assert_memory_equal(out, *bits, count * sizeof *out);
    if (!*bits && strcmp(b->ops->name, "cpu-ref") != 0) {
        *bits = malloc(count * sizeof **bits);
        memcpy(*bits, out, count * sizeof **bits);
    }
    b->ops->host_experts_free(b, experts);
    for (int i = 0; i < 3; i++) free((void *)(uintptr_t)(const void *[]){w.up.data, w.down.data, w.gate.data}[i]);
    moe_free(image);
    moe_free(x);
    moe_free(out);
    moe_free(again);
    free(wide);
    free(want);
    free(terms);
}

static void other_layouts(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (size_t p = 0; p < sizeof packers / sizeof *packers; p++)
            for (int bf16 = 0; bf16 <= 1; bf16++) {
                float *bits = NULL;
                for (int index = MOE_TEST_CPU_BACKENDS - 1; index >= 0; index--)
                    for (int32_t threads = 0; threads <= 2; threads += 2) {
                        moe_backend *b = moe_test_cpu_open_dtype(index, threads, bf16 ? MOE_BF16 : MOE_F32);
                        if (!b) continue;
                        float *none = NULL;
                        bool ref = strcmp(b->ops->name, "cpu-ref") == 0;
                        check_expert(b, &shapes[i], packers[p], ref ? &none : &bits);
                        b->ops->close(b);
                    }
                free(bits);
            }
}

/* The bounds of docs/architecture.md, of the largest output: bfloat16 kernels round the inner activations. */
static void same_as_device(moe_backend *device, moe_backend *host, const shape *s) {
    moe_random random = {9};
    moe_ffn_weights w = {.up = random_matrix(&random, s->stored, s->intermediate, s->hidden),
                         .down = random_matrix(&random, s->stored, s->hidden, s->intermediate)};
    if (s->gated) w.gate = random_matrix(&random, s->stored, s->intermediate, s->hidden);
    size_t count = (size_t)ROWS * (size_t)s->hidden;
    moe_expert_size size = device->ops->expert_size(device, &w, s->lo, s->hi);
    void *image = device->ops->host_alloc(device, (size_t)size.image_bytes);
    void *x = device->ops->host_alloc(device, count * moe_dtype_bytes(device->dtype));
    float *want = device->ops->host_alloc(device, count * sizeof *want), *got = device->ops->host_alloc(device, count * sizeof *got);
    moe_image_layout layout;
    moe_host_experts *experts;
    moe_expert *loaded;
    assert_true(image && x && want && got);
    for (size_t i = 0; i < count; i++) {
        float value = (float)(2 * moe_random_unit(&random) - 1);
        moe_elements_narrow(&value, device->dtype, 1, (uint8_t *)x + i * moe_dtype_bytes(device->dtype));
    }
    device->ops->expert_pack(device, &w, s->lo, s->hi, image);
    device->ops->expert_layout(device, &w, s->lo, s->hi, &layout);
    assert_int_equal(device->ops->expert_load(device, &w, s->lo, s->hi, &loaded, NULL), MOE_OK);
    assert_int_equal(host->ops->host_experts_create(host, &w, s->lo, s->hi, &layout, 1, &experts, NULL), MOE_OK);
    compute(device, loaded, s, x, 0, ROWS, want);
    compute(host, host->ops->host_expert(experts, 0, image), s, x, 0, ROWS, got);
    float most = 0, bound = device->dtype == MOE_F32 ? 1e-3f : 3e-2f;
    for (size_t i = 0; i < count; i++) most = fabsf(want[i]) > most ? fabsf(want[i]) : most;
    for (size_t i = 0; i < count; i++) assert_true(fabsf(want[i] - got[i]) <= bound * most);
    host->ops->host_experts_free(host, experts);
    device->ops->expert_free(device, loaded);
    device->ops->host_free(device, image);
    device->ops->host_free(device, x);
    device->ops->host_free(device, want);
    device->ops->host_free(device, got);
    for (int i = 0; i < 3; i++) free((void *)(uintptr_t)(const void *[]){w.up.data, w.down.data, w.gate.data}[i]);
}

static void beside_cuda(void **state) {
    (void)state;
    for (int bf16 = 0; bf16 <= 1; bf16++) {
        moe_backend *device = moe_test_cuda_open(bf16 ? MOE_BF16 : MOE_F32, false), *host;
        if (!device) skip();
        moe_cpu_config config = {.threads = 2, .dtype = device->dtype, .background = true};
        assert_int_equal(moe_cpu_open(&config, &host, NULL), MOE_OK);
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) same_as_device(device, host, &shapes[i]);
        host->ops->close(host);
        device->ops->close(device);
    }
}

/* A layout of another shape is refused, and so is a lack of memory. */
static void refusals(void **state) {
    (void)state;
    const shape *s = &shapes[0];
    moe_random random = {1};
    moe_ffn_weights w = {.gate = random_matrix(&random, s->stored, s->intermediate, s->hidden),
                         .up = random_matrix(&random, s->stored, s->intermediate, s->hidden),
                         .down = random_matrix(&random, s->stored, s->hidden, s->intermediate)};
    moe_backend *b = moe_test_cpu_open(1, 0);
    moe_image_layout layout;
    moe_host_experts *experts;
    moe_error err;
    pack_plain(&w, s, MOE_F32, NULL, &layout);
    layout.down.cols--;
    assert_int_equal(b->ops->host_experts_create(b, &w, 0, MOE_FFN_BLOCKS, &layout, 4, &experts, &err), MOE_INVALID_ARGUMENT);
    assert_null(experts);
    layout.down.cols++;
    for (int64_t nth = 1;; nth++) {
        moe_alloc_fail_after(nth);
        moe_status status = b->ops->host_experts_create(b, &w, 0, MOE_FFN_BLOCKS, &layout, 4, &experts, &err);
        moe_alloc_fail_after(0);
        if (status == MOE_OK) {
            assert_true(nth > 2);
            break;
        }
        assert_int_equal(status, MOE_RESOURCE_EXHAUSTED);
        assert_null(experts);
    }
    b->ops->host_experts_free(b, experts);
    b->ops->host_experts_free(b, NULL);
    b->ops->close(b);
    for (int i = 0; i < 3; i++) free((void *)(uintptr_t)(const void *[]){w.up.data, w.down.data, w.gate.data}[i]);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(other_layouts), cmocka_unit_test(refusals), cmocka_unit_test(beside_cuda)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
