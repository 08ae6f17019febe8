/* Expert batches from the host: routing and rows in, expert outputs or their sums out. */
#include "cuda/backend.h"

#define ADVICE "send fewer rows at once (--max-num-batched-tokens), or hold fewer experts here"

typedef struct ffn_run {
    moe_cuda *cuda;
    const moe_ffn_batch *batch;
    moe_cuda_lane *lane;
    moe_cuda_job *slot;
    int32_t hidden, padded; /* padded: the widest of the groups */
    bool partial, pinned_x, pinned_out;
    size_t x_bytes, out_bytes;
    void *x, *inner, *out; /* device; out is y in exact mode */
    float *y;
    const int32_t *expert_first, *sorted_rows, *row_first, *row_items;
    const float *weights;
    const void *const *gate_up, *const *down, *const *maps;
    moe_status status;
    moe_error *err;
} ffn_run;

static void did(ffn_run *r, cudaError_t code, const char *what) {
    if (r->status == MOE_OK) r->status = moe_cuda_check(code, what, r->err);
}

static void check_batch(const moe_ffn_batch *b) {
    const moe_cuda_network_shape *first = &b->groups[0].expert->network.shape;
    MOE_ASSERT(moe_ffn_slice_legal(b->block_lo, b->block_hi));
    for (int32_t g = 0, next = 0; g < b->num_groups; g++) {
        const moe_cuda_network_shape *s = &b->groups[g].expert->network.shape;
        MOE_ASSERT(b->groups[g].first == next && b->groups[g].count >= 0);
        MOE_ASSERT(b->block_lo >= s->block_lo && b->block_hi <= s->block_hi && s->hidden == first->hidden);
        next += b->groups[g].count;
        MOE_ASSERT(g + 1 < b->num_groups || next == b->num_assignments);
    }
    for (int32_t a = 0; a < b->num_assignments; a++)
        MOE_ASSERT(b->assignment_rows[a] >= 0 && b->assignment_rows[a] < b->num_rows);
}

/* Device memory: rows, inner products, outputs, and behind them what the parcel brings. Pinned memory: the parcel, pageable rows.
 */
static void reserve(ffn_run *r, moe_cuda_parcel *parcel) {
    const moe_ffn_batch *b = r->batch;
    size_t element = moe_dtype_bytes(r->cuda->public.dtype), rows = (size_t)b->num_rows, items = (size_t)b->num_assignments;
    size_t groups = (size_t)b->num_groups, y_bytes = items * (size_t)r->hidden * sizeof(float);
    size_t inner_bytes = items * (size_t)r->padded * element;
    parcel->capacity = 3 * moe_cuda_parcel_bytes(items * 4) + moe_cuda_parcel_bytes((groups + 1) * 4) +
                       moe_cuda_parcel_bytes((rows + 1) * 4) + 3 * moe_cuda_parcel_bytes(groups * sizeof(void *));
    r->x_bytes = rows * (size_t)r->hidden * element;
    r->out_bytes = r->partial ? rows * (size_t)r->hidden * element : y_bytes;
    for (int pass = 0; pass < 2 && r->status == MOE_OK; pass++) {
        moe_cuda_arena arena = {.memory = pass ? r->lane->device.memory : NULL};
        r->x = moe_cuda_arena_take(&arena, r->x_bytes);
        r->inner = moe_cuda_arena_take(&arena, inner_bytes);
        r->y = moe_cuda_arena_take(&arena, y_bytes);
        r->out = r->partial ? moe_cuda_arena_take(&arena, r->out_bytes) : r->y;
        parcel->device = moe_cuda_arena_take(&arena, parcel->capacity);
        if (pass == 0)
            r->status =
                moe_cuda_buffer_reserve(&r->cuda->device, &r->lane->device, arena.used, "an expert batch", ADVICE, r->err);
    }
    size_t in_bytes = parcel->capacity + (r->pinned_x ? 0 : r->x_bytes);
    if (r->status == MOE_OK)
        r->status =
            moe_cuda_buffer_reserve(&r->cuda->device, &r->lane->in, in_bytes, "staging for an expert batch", ADVICE, r->err);
    if (r->status == MOE_OK && !r->pinned_out)
        r->status =
            moe_cuda_buffer_reserve(&r->cuda->device, &r->lane->out, r->out_bytes, "staging for an expert batch", ADVICE, r->err);
    parcel->pinned = r->lane->in.memory;
}

/* For each row its assignments in order: row_items[row_first[row] … row_first[row + 1]). */
static void invert_rows(ffn_run *r, moe_cuda_parcel *parcel) {
    const moe_ffn_batch *b = r->batch;
    void *first_memory, *items_memory;
    r->row_first = moe_cuda_parcel_take(parcel, ((size_t)b->num_rows + 1) * sizeof(int32_t), &first_memory);
    r->row_items = moe_cuda_parcel_take(parcel, (size_t)b->num_assignments * sizeof(int32_t), &items_memory);
    int32_t *first = first_memory, *items = items_memory, total = 0;
    memset(first, 0, ((size_t)b->num_rows + 1) * sizeof *first);
    for (int32_t a = 0; a < b->num_assignments; a++) first[b->assignment_rows[a]]++;
    for (int32_t row = 0; row <= b->num_rows; row++) {
        int32_t count = first[row];
        first[row] = total;
        total += count;
    }
    for (int32_t a = 0; a < b->num_assignments; a++) items[first[b->assignment_rows[a]]++] = a;
    for (int32_t row = b->num_rows; row > 0; row--) first[row] = first[row - 1]; /* each had moved on to the next row's */
    first[0] = 0;
}

static void fill_parcel(ffn_run *r, moe_cuda_parcel *parcel) {
    const moe_ffn_batch *b = r->batch;
    void *memory;
    r->gate_up = moe_cuda_parcel_take(parcel, (size_t)b->num_groups * sizeof(void *), &memory);
    for (int32_t g = 0; g < b->num_groups; g++) ((const void **)memory)[g] = b->groups[g].expert->network.gate_up;
    r->down = moe_cuda_parcel_take(parcel, (size_t)b->num_groups * sizeof(void *), &memory);
    for (int32_t g = 0; g < b->num_groups; g++) ((const void **)memory)[g] = b->groups[g].expert->network.down;
    r->maps = moe_cuda_parcel_take(parcel, (size_t)b->num_groups * sizeof(void *), &memory);
    for (int32_t g = 0; g < b->num_groups; g++) ((const void **)memory)[g] = b->groups[g].expert->network.tail;
    r->expert_first = moe_cuda_parcel_take(parcel, ((size_t)b->num_groups + 1) * sizeof(int32_t), &memory);
    for (int32_t g = 0; g < b->num_groups; g++) ((int32_t *)memory)[g] = b->groups[g].first;
    ((int32_t *)memory)[b->num_groups] = b->num_assignments;
    r->sorted_rows = moe_cuda_parcel_put(parcel, b->assignment_rows, (size_t)b->num_assignments * sizeof(int32_t));
    if (!r->partial) return;
    r->weights = moe_cuda_parcel_put(parcel, b->assignment_weights, (size_t)b->num_assignments * sizeof(float));
    invert_rows(r, parcel);
}

/* Groups of one shape go together: the experts of a model differ only where some are slices. */
static void compute(ffn_run *r) {
    const moe_ffn_batch *b = r->batch;
    for (int32_t g = 0, end; g < b->num_groups; g = end) {
        const moe_cuda_network_shape *s = &b->groups[g].expert->network.shape;
        int32_t count = 0;
        for (end = g; end < b->num_groups && end - g < MOE_CUDA_MAX_GROUPS; end++) {
            if (!moe_cuda_network_shape_equal(s, &b->groups[end].expert->network.shape)) break;
            count += b->groups[end].count;
        }
        moe_cuda_groups groups = {.device = &r->cuda->expert_device,
                                  .tune = &r->cuda->tune,
                                  .shape = s,
                                  .dtype = r->cuda->public.dtype,
                                  .block_lo = b->block_lo,
                                  .block_hi = b->block_hi,
                                  .num_groups = end - g,
                                  .num_assignments = count,
                                  .expert_first = r->expert_first + g,
                                  .sorted_rows = r->sorted_rows,
                                  .gate_up = r->gate_up + g,
                                  .down = r->down + g,
                                  .maps = r->maps + g,
                                  .x = r->x,
                                  .inner = r->inner,
                                  .y = r->y};
        did(r, moe_cuda_groups_run(&groups, r->lane->stream), "expert FFN");
    }
    if (!r->partial) return;
    moe_simple_sum_args sum = {.y = r->y, .weights = r->weights, .row_first = r->row_first, .row_items = r->row_items};
    sum.out = r->out;
    sum.dtype = r->cuda->public.dtype;
    sum.rows = b->num_rows;
    sum.width = r->hidden;
    did(r, moe_simple_sum_rows(&sum, r->lane->stream), "summing expert outputs");
}

static moe_status enqueue(void *ctx, moe_cuda_job *slot, moe_error *err) {
    ffn_run *r = ctx;
    const moe_ffn_batch *b = r->batch;
    moe_cuda_parcel parcel = {0};
    r->slot = slot;
    r->err = err;
    r->status = moe_cuda_lane_take(r->cuda, slot, &r->lane, err);
    if (r->status == MOE_OK) reserve(r, &parcel);
    if (r->status != MOE_OK) return r->status;
    cudaStream_t stream = r->lane->stream;
    const void *x = b->x;
    fill_parcel(r, &parcel);
    if (!r->pinned_x) x = memcpy(parcel.pinned + parcel.capacity, b->x, r->x_bytes);
    did(r, moe_cuda_job_mark(r->slot, MOE_CUDA_START, stream), "recording an event");
    did(r, moe_cuda_parcel_send(&parcel, stream), "copying the routing to the GPU");
    did(r, moe_cuda_bring(r->x, x, r->x_bytes, stream), "copying expert inputs to the GPU"); /* last: no launch reads it too early */
    did(r, moe_cuda_job_mark(r->slot, MOE_CUDA_BEGIN, stream), "recording an event");
    compute(r);
    did(r, moe_cuda_job_mark(r->slot, MOE_CUDA_END, stream), "recording an event");
    void *out = r->pinned_out ? b->out : r->lane->out.memory;
    did(r, cudaMemcpyAsync(out, r->out, r->out_bytes, cudaMemcpyDeviceToHost, stream), "copying expert outputs from the GPU");
    if (!r->pinned_out) moe_cuda_job_deliver(r->slot, b->out, out, r->out_bytes);
    did(r, moe_cuda_job_mark(r->slot, MOE_CUDA_DONE, stream), "recording an event");
    return r->status;
}

void moe_cuda_ffn_submit(moe_cuda *cuda, const moe_ffn_batch *batch, moe_job *job) {
    ffn_run r = {.cuda = cuda, .batch = batch, .partial = batch->mode == MOE_COMBINE_PARTIAL};
    if (batch->num_groups == 0) {
        job->status = MOE_OK;
        job->done(job);
        return;
    }
    check_batch(batch);
    r.hidden = batch->groups[0].expert->network.shape.hidden;
    for (int32_t g = 0; g < batch->num_groups; g++) {
        int32_t padded = batch->groups[g].expert->network.shape.padded;
        r.padded = padded > r.padded ? padded : r.padded;
    }
    r.pinned_x = moe_cuda_is_pinned(batch->x);
    r.pinned_out = moe_cuda_is_pinned(batch->out);
    moe_cuda_jobs_submit(&cuda->jobs, job, enqueue, &r);
}
