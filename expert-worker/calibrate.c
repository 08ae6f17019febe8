#include "expert-worker/calibrate.h"

#include <string.h>
#include <time.h>

#include "common/alloc.h"
#include "common/clock.h"
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
    while (!atomic_load(&done)) {
        if (t->backend->ops->poll)
            t->backend->ops->poll(t->backend);
        else
            nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    }
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

static moe_status load(trial *t, const moe_model *model, moe_error *err) {
    int64_t each = moe_expert_canonical_bytes(&model->experts[0]);
    int64_t most =
        each > 0 && MOE_CALIBRATE_BYTES / each < MOE_CALIBRATE_EXPERTS ? MOE_CALIBRATE_BYTES / each : MOE_CALIBRATE_EXPERTS;
    if (most < 2) most = 2;
    const moe_ffn_weights *like = &model->experts[0];
    t->zeros = moe_calloc((size_t)(like->up.rows * like->up.cols), sizeof(float)); /* enough for each matrix of any type */
    if (!t->zeros) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for calibration");
    const moe_ffn_weights weights = {zeroed(&like->gate, t->zeros), zeroed(&like->up, t->zeros), zeroed(&like->down, t->zeros)};
    moe_status status = MOE_OK;
    for (; t->count < most && t->count < model->config.num_experts && status == MOE_OK; t->count += status == MOE_OK)
        status = t->backend->ops->expert_load(t->backend, &weights, 0, MOE_FFN_BLOCKS, &t->experts[t->count], err);
    return status;
}

moe_status moe_calibrate(moe_backend *backend, const moe_model *model, moe_calibration *out, moe_error *err) {
    trial t = {.backend = backend};
    size_t elements = (size_t)MOE_CALIBRATE_ROWS * (size_t)model->config.hidden;
    t.x = backend->ops->host_alloc(backend, elements * moe_dtype_bytes(backend->dtype));
    t.out = backend->ops->host_alloc(backend, elements * sizeof *t.out);
    moe_status status =
        t.x && t.out ? load(&t, model, err) : moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for calibration");
    if (status == MOE_OK) {
        memset(t.x, 0, elements * moe_dtype_bytes(backend->dtype));
        for (int32_t i = 0; i < MOE_CALIBRATE_ROWS; i++) t.rows[i] = i;
        status = measure(&t, out, err);
    }
    for (int32_t i = 0; i < t.count; i++) backend->ops->expert_free(backend, t.experts[i]);
    backend->ops->host_free(backend, t.x);
    backend->ops->host_free(backend, t.out);
    moe_free(t.zeros);
    moe_alloc_give_back();
    return status;
}
