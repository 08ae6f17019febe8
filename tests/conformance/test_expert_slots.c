/* Experts in slots: filled from images in pieces, overwritten, used by batches: the same bits as experts of their own, on every
 * backend; and experts computed from images where they lie. */
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

enum { SLOTS = 3, EXPERTS = 7, PIECES = 5, ROWS = 9, PIECE_ALIGNMENT = 64 };
#define MAX_WAIT_NS (10 * INT64_C(1000000000))
#define POLL_NS (100 * INT64_C(1000))

typedef struct piece {
    moe_slot_fill fill;
    moe_job job;
    _Atomic bool ended;
} piece;

static void on_done(moe_job *job) { atomic_store((_Atomic bool *)job->owner, true); }

static void wait_for(moe_backend *b, const _Atomic bool *ended) {
    for (int64_t waited = 0; !atomic_load(ended) && waited < MAX_WAIT_NS; waited += POLL_NS) {
        if (b->ops->poll) b->ops->poll(b);
        nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    }
    assert_true(atomic_load(ended));
}

/* Cuts the image into PIECES, last piece first: order is free. */
static void fill(moe_backend *b, moe_expert *slot, const void *image, int64_t image_bytes) {
    piece pieces[PIECES];
    int64_t each = (image_bytes / PIECES + PIECE_ALIGNMENT - 1) / PIECE_ALIGNMENT * PIECE_ALIGNMENT;
    memset(pieces, 0, sizeof pieces);
    for (int i = PIECES - 1; i >= 0; i--) {
        piece *p = &pieces[i];
        int64_t offset = i * each, left = image_bytes - offset;
        atomic_store(&p->ended, left <= 0);
        if (left <= 0) continue;
        p->fill = (moe_slot_fill){slot, image, offset, left < each ? left : each};
        p->job = (moe_job){.done = on_done, .owner = &p->ended, .status = MOE_INTERNAL};
        b->ops->slot_fill_submit(b, &p->fill, &p->job);
    }
    for (int i = 0; i < PIECES; i++) {
        wait_for(b, &pieces[i].ended);
        if (pieces[i].fill.bytes) assert_int_equal(pieces[i].job.status, MOE_OK);
    }
}

typedef struct rows {
    void *x, *out;
    int32_t row_of[ROWS];
    size_t out_bytes;
} rows;

/* ROWS rows through one expert; what comes out is in r->out. */
static void compute(moe_backend *b, moe_expert *expert, int32_t lo, int32_t hi, rows *r) {
    const moe_ffn_group group = {.expert = expert, .count = ROWS};
    const moe_ffn_batch batch = {.x = r->x,
                                 .num_rows = ROWS,
                                 .groups = &group,
                                 .num_groups = 1,
                                 .assignment_rows = r->row_of,
                                 .num_assignments = ROWS,
                                 .mode = MOE_COMBINE_EXACT,
                                 .block_lo = lo,
                                 .block_hi = hi,
                                 .out = r->out};
    _Atomic bool ended = false;
    moe_job job = {.done = on_done, .owner = &ended, .status = MOE_INTERNAL};
    memset(r->out, 0xff, r->out_bytes);
    b->ops->ffn_submit(b, &batch, &job);
    wait_for(b, &ended);
    assert_int_equal(job.status, MOE_OK);
}

static rows make_rows(moe_backend *b, int32_t hidden) {
    rows r = {.out_bytes = ROWS * (size_t)hidden * sizeof(float)};
    moe_random random = {5};
    r.x = b->ops->host_alloc(b, ROWS * moe_row_bytes(b->dtype, hidden));
    r.out = b->ops->host_alloc(b, r.out_bytes);
    assert_true(r.x && r.out);
    for (int32_t i = 0; i < ROWS; i++) r.row_of[i] = i;
    for (int64_t i = 0; i < (int64_t)ROWS * hidden; i++) {
        float value = (float)(2 * moe_random_unit(&random) - 1);
        moe_elements_narrow(&value, b->dtype, 1, (uint8_t *)r.x + (size_t)i * moe_dtype_bytes(b->dtype));
    }
    return r;
}

/* An expert of two matrices takes no memory for a third. */
static void no_room_for_a_gate(moe_backend *b, const moe_ffn_weights *two, int32_t lo, int32_t hi) {
    moe_ffn_weights three = *two;
    three.gate = three.up;
    moe_expert_size small = b->ops->expert_size(b, two, lo, hi), large = b->ops->expert_size(b, &three, lo, hi);
    int64_t each = two->up.rows * (hi - lo) / MOE_FFN_BLOCKS * two->up.cols * (int64_t)moe_dtype_bytes(two->up.dtype);
    assert_true(small.image_bytes <= large.image_bytes - each && small.slot_bytes <= large.slot_bytes - each);
}

static void same_bits(moe_backend *b, const moe_model *model, int32_t lo, int32_t hi) {
    const moe_backend_ops *ops = b->ops;
    const moe_ffn_weights *weights = model->experts;
    moe_expert_size size = ops->expert_size(b, &weights[0], lo, hi);
    rows r = make_rows(b, model->config.hidden);
    uint8_t *image = ops->host_alloc(b, (size_t)size.image_bytes), *want = malloc(r.out_bytes);
    moe_slots *slots;
    moe_host_experts *host = NULL;
    if (ops->host_experts_create) assert_int_equal(ops->host_experts_create(b, &weights[0], lo, hi, NULL, SLOTS, &host, NULL), MOE_OK);
    assert_true(image && want && size.image_bytes > 0 && size.slot_bytes >= size.image_bytes);
    if (!moe_ffn_gated(&weights[0])) no_room_for_a_gate(b, &weights[0], lo, hi);
    assert_int_equal(ops->slots_create(b, &weights[0], lo, hi, SLOTS, &slots, NULL), MOE_OK);
    for (int e = 0; e < EXPERTS; e++) {
        moe_expert *own, *slot = ops->slot(slots, e % SLOTS);
        assert_int_equal(ops->expert_load(b, &weights[e], lo, hi, &own, NULL), MOE_OK);
        compute(b, own, lo, hi, &r);
        memcpy(want, r.out, r.out_bytes);
        ops->expert_free(b, own);
        memset(image, 0xff, (size_t)size.image_bytes);
        ops->expert_pack(b, &weights[e], lo, hi, image);
        fill(b, slot, image, size.image_bytes);
        assert_int_equal(ops->expert_bytes(slot), size.slot_bytes);
        compute(b, slot, lo, hi, &r);
        assert_memory_equal(r.out, want, r.out_bytes);
        if (host) compute(b, ops->host_expert(host, e % SLOTS, image), lo, hi, &r);
        assert_memory_equal(r.out, want, r.out_bytes);
        if (e == 0) continue; /* and its neighbour was not touched */
        assert_int_equal(ops->expert_load(b, &weights[e - 1], lo, hi, &own, NULL), MOE_OK);
        compute(b, own, lo, hi, &r);
        memcpy(want, r.out, r.out_bytes);
        ops->expert_free(b, own);
        compute(b, ops->slot(slots, (e - 1) % SLOTS), lo, hi, &r);
        assert_memory_equal(r.out, want, r.out_bytes);
    }
    if (host) ops->host_experts_free(b, host);
    ops->slots_free(b, slots);
    ops->host_free(b, image);
    ops->host_free(b, r.x);
    ops->host_free(b, r.out);
    free(want);
}

static void on_backend(moe_backend *b) {
    static const char *const fixtures[] = {"qwen3_moe", "olmoe", "mixtral", "switch_decoder"};
    for (size_t i = 0; i < sizeof fixtures / sizeof *fixtures; i++) {
        char dir[512];
        moe_model *model;
        snprintf(dir, sizeof dir, SOURCE_DIR "/tests/data/checkpoints/%s", fixtures[i]);
        assert_int_equal(moe_model_open(dir, &model, NULL), MOE_OK);
        same_bits(b, model, 0, MOE_FFN_BLOCKS);
        same_bits(b, model, 4, MOE_FFN_BLOCKS);
        moe_model_close(&model);
    }
    b->ops->close(b);
}

static void on_cpu(void **state) {
    (void)state;
    for (int index = 0; index < MOE_TEST_CPU_BACKENDS; index++)
        for (int32_t threads = 0; threads <= 2; threads += 2) {
            moe_backend *b = moe_test_cpu_open(index, threads);
            if (b) on_backend(b);
        }
    moe_backend *b = moe_test_cpu_open_dtype(0, 1, MOE_BF16);
    if (b) on_backend(b);
}

static void on_cuda(void **state) {
    (void)state;
    for (int bf16 = 0; bf16 <= 1; bf16++) {
        moe_backend *b = moe_test_cuda_open(bf16 ? MOE_BF16 : MOE_F32, true);
        if (!b) skip();
        on_backend(b);
    }
}

/* Generated weights have no bytes in the checkpoint: images of them are packed from the generator. */
static void generated(moe_backend *b) {
    moe_model *model;
    moe_dummy_options options = {.seed = 3, .num_layers = 1};
    assert_int_equal(moe_model_open_dummy(SOURCE_DIR "/tests/data/checkpoints/qwen3_moe", &options, &model, NULL), MOE_OK);
    same_bits(b, model, 0, MOE_FFN_BLOCKS);
    moe_model_close(&model);
    b->ops->close(b);
}

static void generated_on_cpu(void **state) {
    (void)state;
    moe_backend *b = moe_test_cpu_open(1, 0);
    if (b) generated(b);
}

static void generated_on_cuda(void **state) {
    (void)state;
    moe_backend *b = moe_test_cuda_open(MOE_BF16, true);
    if (!b) skip();
    generated(b);
}

static void out_of_memory(void **state) {
    (void)state;
    moe_backend *b = moe_test_cpu_open(1, 1);
    moe_model *model;
    moe_error err;
    assert_int_equal(moe_model_open(SOURCE_DIR "/tests/data/checkpoints/qwen3_moe", &model, NULL), MOE_OK);
    for (int64_t nth = 1;; nth++) {
        moe_slots *slots;
        moe_alloc_fail_after(nth);
        moe_status status = b->ops->slots_create(b, model->experts, 0, MOE_FFN_BLOCKS, SLOTS, &slots, &err);
        moe_alloc_fail_after(0);
        if (status == MOE_OK) {
            assert_true(nth > 3);
            b->ops->slots_free(b, slots);
            break;
        }
        assert_int_equal(status, MOE_RESOURCE_EXHAUSTED);
        assert_null(slots);
    }
    moe_model_close(&model);
    b->ops->close(b);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(on_cpu),          cmocka_unit_test(generated_on_cpu), cmocka_unit_test(out_of_memory),
        cmocka_unit_test(on_cuda), cmocka_unit_test(generated_on_cuda),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
