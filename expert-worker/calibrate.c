#include "expert-worker/calibrate.h"

#include <string.h>
#include <time.h>

#include "common/alloc.h"
#include "common/clock.h"
#include "expert-worker/host_experts.h"
#include "expert-worker/loader.h"

#define POLL_NS (20 * MOE_NS_PER_US)

typedef struct trial {
    moe_backend *backend;
    moe_expert *experts[MOE_CALIBRATE_EXPERTS];
    int32_t count;
    void *zeros; /* the weights, as stored: they take as long as any, and nothing of the checkpoint is read */
    void *x;     /* [MOE_CALIBRATE_ROWS, H]: zeros, too */
    float *out;  /* [MOE_CALIBRATE_ROWS, H] */
    int32_t rows[MOE_CALIBRATE_ROWS];
} trial;

static void on_done(moe_job *job) { atomic_store((_Atomic bool *)job->owner, true); }

static void wait_for(moe_backend *b, const _Atomic bool *done) {
    while (!atomic_load(done)) {
        if (b->ops->poll)
            b->ops->poll(b);
        else
            nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    }
}

/* One batch: `rows` rows, dealt out evenly to `num` experts from the first-th on. */
static moe_status run(const trial *t, int32_t first, int32_t num, int32_t rows, int64_t *ns, moe_error *err) {
    _Atomic bool done = false;
    moe_ffn_group groups[MOE_CALIBRATE_EXPERTS];
    for (int32_t i = 0; i < num; i++)
        groups[i] = (moe_ffn_group){.expert = t->experts[(first + i) % t->count], .first = i * (rows / num), .count = rows / num};
    const moe_ffn_batch batch = {.x = t->x,
                                 .num_rows = rows,
                                 .groups = groups,
                                 .num_groups = num,
                                 .assignment_rows = t->rows,
                                 .num_assignments = rows,
                                 .mode = MOE_COMBINE_EXACT,
                                 .block_hi = MOE_FFN_BLOCKS,
                                 .out = t->out};
    moe_job job = {.done = on_done, .owner = &done};
    t->backend->ops->ffn_submit(t->backend, &batch, &job);
    wait_for(t->backend, &done);
    *ns = job.compute_ns;
    return job.status == MOE_OK ? MOE_OK : moe_fail(err, job.status, "%s", job.message);
}

/* The fastest of several runs, each from another expert on, after one that warms up. */
static moe_status fastest(const trial *t, int32_t num, int32_t rows, int64_t *best, moe_error *err) {
    int64_t ns;
    moe_status status = run(t, 0, num, rows, best, err);
    for (int32_t i = 0; i < MOE_CALIBRATE_RUNS && status == MOE_OK; i++) {
        status = run(t, i + 1, num, rows, &ns, err);
        if (i == 0 || ns < *best) *best = ns;
    }
    return status;
}

/* From batches that differ in experts alone, and in rows alone. */
static moe_status measure(const trial *t, moe_calibration *out, moe_error *err) {
    int64_t all, one, rows;
    int32_t n = t->count;
    moe_status status = fastest(t, n, n, &all, err);
    if (status == MOE_OK) status = fastest(t, 1, n, &one, err);
    if (status == MOE_OK) status = fastest(t, 1, MOE_CALIBRATE_ROWS, &rows, err);
    if (status != MOE_OK) return status;
    out->row_ns = (rows - one) / (MOE_CALIBRATE_ROWS - n);
    if (out->row_ns < 1) out->row_ns = 1;
    out->expert_ns = n > 1 ? (all - one) / (n - 1) : one - out->row_ns;
    if (out->expert_ns < 0) out->expert_ns = 0;
    return MOE_OK;
}

static moe_tensor zeroed(const moe_tensor *like, const void *zeros) {
    if (!moe_tensor_present(like)) return *like;
    return (moe_tensor){.data = zeros, .dtype = like->dtype, .rows = like->rows, .cols = like->cols};
}

/* Makes the weights of zeros. The number of experts to measure with. */
static moe_status make_weights(trial *t, const moe_model *model, moe_ffn_weights *out, int32_t *count, moe_error *err) {
    const moe_ffn_weights *like = &model->experts[0];
    int64_t each = moe_expert_canonical_bytes(like);
    int64_t most =
        each > 0 && MOE_CALIBRATE_BYTES / each < MOE_CALIBRATE_EXPERTS ? MOE_CALIBRATE_BYTES / each : MOE_CALIBRATE_EXPERTS;
    if (most < 2) most = 2;
    *count = most < model->config.num_experts ? (int32_t)most : model->config.num_experts;
    t->zeros = moe_calloc((size_t)(like->up.rows * like->up.cols), sizeof(float)); /* enough for each matrix of any type */
    if (!t->zeros) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for calibration");
    *out = (moe_ffn_weights){zeroed(&like->gate, t->zeros), zeroed(&like->up, t->zeros), zeroed(&like->down, t->zeros)};
    return MOE_OK;
}

/* Rows of zeros, and the measurement of the loaded experts with them. */
static moe_status measure_rows(trial *t, const moe_model *model, moe_calibration *out, moe_error *err) {
    size_t elements = (size_t)MOE_CALIBRATE_ROWS * (size_t)model->config.hidden, bytes = elements * moe_dtype_bytes(t->backend->dtype);
    moe_status status = MOE_OK;
    t->x = t->backend->ops->host_alloc(t->backend, bytes);
    t->out = t->backend->ops->host_alloc(t->backend, elements * sizeof *t->out);
    if (t->x && t->out) {
        memset(t->x, 0, bytes);
        for (int32_t i = 0; i < MOE_CALIBRATE_ROWS; i++) t->rows[i] = i;
        status = measure(t, out, err);
    } else {
        status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for calibration");
    }
    t->backend->ops->host_free(t->backend, t->x);
    t->backend->ops->host_free(t->backend, t->out);
    return status;
}

moe_status moe_calibrate(moe_backend *backend, const moe_model *model, moe_calibration *out, moe_error *err) {
    trial t = {.backend = backend};
    moe_ffn_weights weights;
    int32_t most;
    moe_status status = make_weights(&t, model, &weights, &most, err);
    for (; status == MOE_OK && t.count < most; t.count += status == MOE_OK)
        status = backend->ops->expert_load(backend, &weights, 0, MOE_FFN_BLOCKS, &t.experts[t.count], err);
    if (status == MOE_OK) status = measure_rows(&t, model, out, err);
    for (int32_t i = 0; i < t.count; i++) backend->ops->expert_free(backend, t.experts[i]);
    moe_free(t.zeros);
    moe_alloc_give_back();
    return status;
}

/* ---- cold experts ---- */

/* The fastest of several copies into a slot, each of another image. */
static moe_status measure_copies(moe_backend *b, const moe_slots *slots, void *const *images, int32_t count, int64_t bytes, double *byte_ns,
                                 moe_error *err) {
    for (int32_t i = 0; i <= MOE_CALIBRATE_RUNS; i++) {
        _Atomic bool done = false;
        const moe_slot_fill fill = {b->ops->slot(slots, 0), images[i % count], 0, bytes};
        moe_job job = {.done = on_done, .owner = &done};
        b->ops->slot_fill_submit(b, &fill, &job);
        wait_for(b, &done);
        if (job.status != MOE_OK) return moe_fail(err, job.status, "%s", job.message);
        double ns = (double)job.copy_ns / (double)bytes;
        if (i <= 1 || ns < *byte_ns) *byte_ns = ns; /* the first warms up */
    }
    return MOE_OK;
}

/* Images of zeros, as `backend` packs them. */
static moe_status make_images(moe_backend *b, const moe_ffn_weights *weights, int64_t bytes, void **images, int32_t count, moe_error *err) {
    for (int32_t i = 0; i < count; i++) {
        images[i] = b->ops->host_alloc(b, (size_t)bytes);
        if (!images[i]) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for calibration");
        b->ops->expert_pack(b, weights, 0, MOE_FFN_BLOCKS, images[i]);
    }
    return MOE_OK;
}

moe_status moe_calibrate_cold(moe_backend *backend, moe_backend *host, const moe_model *model, moe_cold_costs *out, moe_error *err) {
    trial t = {.backend = host};
    moe_ffn_weights weights;
    moe_slots *slots = NULL;
    moe_host_experts *experts = NULL;
    void *images[MOE_CALIBRATE_EXPERTS] = {NULL};
    moe_calibration cost = {.expert_ns = 0};
    int64_t bytes = 0;
    int32_t count = 0;
    moe_status status = make_weights(&t, model, &weights, &count, err);
    if (status == MOE_OK) bytes = backend->ops->expert_size(backend, &weights, 0, MOE_FFN_BLOCKS).image_bytes;
    if (status == MOE_OK) status = make_images(backend, &weights, bytes, images, count, err);
    if (status == MOE_OK) status = backend->ops->slots_create(backend, &weights, 0, MOE_FFN_BLOCKS, 1, &slots, err);
    if (status == MOE_OK) status = measure_copies(backend, slots, images, count, bytes, &out->copy_byte_ns, err);
    if (status == MOE_OK) status = moe_host_experts_create(backend, host, &weights, count, &experts, err);
    for (; status == MOE_OK && t.count < count; t.count++) t.experts[t.count] = host->ops->host_expert(experts, t.count, images[t.count]);
    if (status == MOE_OK) status = measure_rows(&t, model, &cost, err);
    if (status == MOE_OK) out->host = (moe_cold_compute){(double)cost.expert_ns, (double)cost.row_ns};
    if (experts) host->ops->host_experts_free(host, experts);
    if (slots) backend->ops->slots_free(backend, slots);
    for (int32_t i = 0; i < count; i++) backend->ops->host_free(backend, images[i]);
    moe_free(t.zeros);
    moe_alloc_give_back();
    return status;
}
