#include "cpu/ffn.h"

#include "common/alloc.h"
#include "common/elements.h"
#include "cpu/matrix.h"

#define TASK_OUTPUTS 64 /* outputs of a task: its weights stay in the second-level cache while the task's rows pass */
#define TASK_ROWS 64

/* The rows or columns [lo, hi) of the intermediate width that a slice has. */
typedef struct slice {
    int32_t lo, hi;
    moe_tensor gate, up;
} slice;

static slice slice_of(const moe_cpu_ffn *ffn, const moe_ffn_weights *w) {
    int32_t lo = moe_ffn_block_start(ffn->intermediate, ffn->block_lo), hi = moe_ffn_block_start(ffn->intermediate, ffn->block_hi);
    slice s = {.lo = lo, .hi = hi, .up = moe_tensor_rows(&w->up, lo, hi)};
    if (ffn->gated) s.gate = moe_tensor_rows(&w->gate, lo, hi);
    return s;
}

moe_cpu_ffn moe_cpu_ffn_shape(const moe_cpu_kernels *kernels, const moe_ffn_weights *w, int32_t block_lo, int32_t block_hi) {
    MOE_ASSERT(moe_ffn_slice_legal(block_lo, block_hi));
    moe_cpu_ffn ffn = {.hidden = (int32_t)w->up.cols,
                       .intermediate = (int32_t)w->up.rows,
                       .block_lo = block_lo,
                       .block_hi = block_hi,
                       .gated = moe_ffn_gated(w)};
    slice s = slice_of(&ffn, w);
    if (ffn.gated) ffn.gate = moe_cpu_matrix_shape(kernels, &s.gate, 1, 0, s.gate.cols);
    ffn.up = moe_cpu_matrix_shape(kernels, &s.up, 1, 0, s.up.cols);
    ffn.down = moe_cpu_matrix_shape(kernels, &w->down, 1, s.lo, s.hi);
    return ffn;
}

static int64_t place_bytes(const moe_cpu_matrix *m) {
    return (moe_cpu_matrix_bytes(m) + MOE_ALIGNMENT_BYTES - 1) / MOE_ALIGNMENT_BYTES * MOE_ALIGNMENT_BYTES;
}

int64_t moe_cpu_ffn_bytes(const moe_cpu_ffn *ffn) {
    return place_bytes(&ffn->gate) + place_bytes(&ffn->up) + place_bytes(&ffn->down);
}

void moe_cpu_ffn_place(moe_cpu_ffn *ffn, void *memory) {
    moe_cpu_matrix *const matrices[] = {&ffn->gate, &ffn->up, &ffn->down};
    uint8_t *at = memory;
    for (int i = 0; i < 3; i++) {
        if (matrices[i]->n) matrices[i]->data = at;
        at += place_bytes(matrices[i]);
    }
}

void moe_cpu_ffn_fill(const moe_cpu_ffn *ffn, const moe_ffn_weights *w) {
    slice s = slice_of(ffn, w);
    if (ffn->gate.n) moe_cpu_matrix_fill(&ffn->gate, &s.gate, 1, 0);
    if (ffn->up.n) moe_cpu_matrix_fill(&ffn->up, &s.up, 1, 0);
    if (ffn->down.n) moe_cpu_matrix_fill(&ffn->down, &w->down, 1, s.lo);
}

moe_status moe_cpu_ffn_load(const moe_cpu_kernels *kernels, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi,
                            moe_cpu_ffn *out, moe_error *err) {
    *out = moe_cpu_ffn_shape(kernels, weights, block_lo, block_hi);
    int64_t bytes = moe_cpu_ffn_bytes(out);
    out->memory = moe_alloc_aligned((size_t)bytes, 1);
    if (!out->memory)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for %lld bytes of packed weights", (long long)bytes);
    moe_cpu_ffn_place(out, out->memory);
    moe_cpu_ffn_fill(out, weights);
    return MOE_OK;
}

void moe_cpu_ffn_free(moe_cpu_ffn *ffn) {
    moe_free(ffn->memory);
    *ffn = (moe_cpu_ffn){.memory = NULL};
}

/* Where block `block` begins in the columns of the slice. */
static int32_t slice_start(const moe_cpu_ffn *ffn, int32_t block) {
    return moe_ffn_block_start(ffn->intermediate, block) - moe_ffn_block_start(ffn->intermediate, ffn->block_lo);
}

/* The tasks of a part in one phase: tiles of rows × outputs. */
typedef struct grid {
    int32_t n_lo, n_hi, row_tasks, output_tasks;
} grid;

static grid grid_of(const moe_cpu_ffn_part *part, bool down) {
    grid g = {.n_hi = part->ffn->hidden, .row_tasks = (part->rows + TASK_ROWS - 1) / TASK_ROWS};
    if (!down) {
        g.n_lo = slice_start(part->ffn, part->block_lo) / MOE_CPU_LANES * MOE_CPU_LANES;
        g.n_hi = slice_start(part->ffn, part->block_hi);
    }
    g.output_tasks = (g.n_hi - g.n_lo + TASK_OUTPUTS - 1) / TASK_OUTPUTS;
    return g;
}

typedef struct phase {
    const moe_cpu_kernels *kernels;
    const moe_cpu_ffn_part *parts;
    bool down;
} phase;

static void product(const moe_cpu_kernels *kernels, const moe_cpu_linear *task) {
    (task->w->run ? kernels->linear_rows : kernels->linear)(task);
}

static void inner(const moe_cpu_kernels *kernels, const moe_cpu_ffn_part *part, moe_cpu_linear task, int32_t row) {
    int32_t k_bounds[2] = {0, part->ffn->hidden}, width = part->ffn->up.n;
    task.x = part->x + (int64_t)row * part->ffn->hidden;
    task.x_stride = part->ffn->hidden;
    task.y_stride = width;
    task.k_bounds = k_bounds;
    task.num_blocks = 1;
    task.w = part->ffn->gated ? &part->ffn->gate : &part->ffn->up;
    task.y = part->inner + (int64_t)row * width;
    product(kernels, &task);
    if (part->ffn->gated) {
        task.w = &part->ffn->up;
        task.y = part->up + (int64_t)row * width;
        product(kernels, &task);
    }
    for (int32_t r = 0; r < task.rows; r++) {
        int64_t at = (int64_t)(row + r) * width + task.n_lo;
        if (part->ffn->gated)
            kernels->silu_mul(part->inner + at, part->up + at, task.n_hi - task.n_lo);
        else
            kernels->relu(part->inner + at, task.n_hi - task.n_lo);
    }
}

static void down(const moe_cpu_kernels *kernels, const moe_cpu_ffn_part *part, moe_cpu_linear task, int32_t row) {
    int32_t k_bounds[MOE_FFN_BLOCKS + 1];
    task.num_blocks = part->block_hi - part->block_lo;
    for (int32_t b = 0; b <= task.num_blocks; b++) k_bounds[b] = slice_start(part->ffn, part->block_lo + b);
    task.k_bounds = k_bounds;
    task.w = &part->ffn->down;
    task.x = part->inner + (int64_t)row * part->ffn->down.k;
    task.x_stride = part->ffn->down.k;
    task.y = part->y + (int64_t)row * part->ffn->hidden;
    task.y_stride = part->ffn->hidden;
    product(kernels, &task);
}

static void phase_task(void *ctx, int32_t index, int32_t thread) {
    const phase *p = ctx;
    const moe_cpu_ffn_part *part = p->parts;
    grid g = grid_of(part, p->down);
    (void)thread;
    while (index >= g.row_tasks * g.output_tasks) {
        index -= g.row_tasks * g.output_tasks;
        g = grid_of(++part, p->down);
    }
    int32_t row = index / g.output_tasks * TASK_ROWS, n = g.n_lo + index % g.output_tasks * TASK_OUTPUTS;
    moe_cpu_linear task = {.n_lo = n, .n_hi = n + TASK_OUTPUTS < g.n_hi ? n + TASK_OUTPUTS : g.n_hi};
    task.rows = row + TASK_ROWS < part->rows ? TASK_ROWS : part->rows - row;
    (p->down ? down : inner)(p->kernels, part, task, row);
}

void moe_cpu_ffn_run(const moe_cpu_kernels *kernels, const moe_cpu_run *run, const moe_cpu_ffn_part *parts, int32_t num_parts) {
    for (int pass = 0; pass < 2; pass++) {
        phase p = {.kernels = kernels, .parts = parts, .down = pass == 1};
        int32_t tasks = 0;
        for (int32_t i = 0; i < num_parts; i++) {
            grid g = grid_of(&parts[i], p.down);
            tasks += g.row_tasks * g.output_tasks;
        }
        moe_cpu_parallel_for(run->pool, tasks, phase_task, &p, run->progress);
    }
}

/* ---- batches ---- */

typedef struct batch_memory {
    moe_cpu_ffn_part *parts;  /* [num_groups] */
    float *x, *inner, *up, *y; /* y: partial mode only */
    float *sums;               /* [num_rows, hidden]: of partial mode, before they are narrowed */
} batch_memory;

static int64_t batch_width(const moe_ffn_batch *batch) {
    int32_t width = 0;
    for (int32_t i = 0; i < batch->num_groups; i++)
        if (batch->groups[i].expert->ffn.up.n > width) width = batch->groups[i].expert->ffn.up.n;
    return width;
}

static moe_cpu_scratch *take_memory(moe_cpu_scratch_list *list, const moe_ffn_batch *batch, int64_t hidden, batch_memory *out) {
    size_t rows = (size_t)batch->num_assignments, width = (size_t)batch_width(batch), floats, bytes, parts_bytes;
    size_t row_floats = 2 * (size_t)hidden + 2 * width;
    size_t sums = batch->mode == MOE_COMBINE_PARTIAL ? (size_t)batch->num_rows * (size_t)hidden : 0;
    if (!moe_size_mul(rows, row_floats, &floats) || !moe_size_add(floats, sums, &floats)) return NULL;
    if (!moe_size_mul(floats, sizeof(float), &bytes)) return NULL;
    if (!moe_size_mul((size_t)batch->num_groups, sizeof *out->parts, &parts_bytes)) return NULL;
    parts_bytes = (parts_bytes / MOE_ALIGNMENT_BYTES + 1) * MOE_ALIGNMENT_BYTES;
    if (!moe_size_add(bytes, parts_bytes, &bytes)) return NULL;
    moe_cpu_scratch *scratch = moe_cpu_scratch_take(list, bytes);
    if (!scratch) return NULL;
    out->parts = scratch->data;
    out->x = (float *)(void *)((uint8_t *)scratch->data + parts_bytes);
    out->y = out->x + rows * (size_t)hidden;
    out->inner = out->y + rows * (size_t)hidden;
    out->up = out->inner + rows * width;
    out->sums = out->up + rows * width;
    return scratch;
}

static void fill_parts(const moe_ffn_batch *batch, moe_dtype dtype, int64_t hidden, const batch_memory *m) {
    int64_t width = batch_width(batch);
    const uint8_t *x = batch->x;
    float *y = batch->mode == MOE_COMBINE_EXACT ? batch->out : m->y;
    int64_t row_bytes = (int64_t)moe_row_bytes(dtype, (int32_t)hidden);
    for (int32_t a = 0; a < batch->num_assignments; a++) {
        int32_t row = batch->assignment_rows[a];
        MOE_ASSERT(row >= 0 && row < batch->num_rows);
        moe_elements_widen(x + row * row_bytes, dtype, (size_t)hidden, m->x + a * hidden);
    }
    for (int32_t i = 0; i < batch->num_groups; i++) {
        const moe_ffn_group *g = &batch->groups[i];
        const moe_cpu_ffn *ffn = &g->expert->ffn;
        MOE_ASSERT(g->count >= 0 && g->first >= 0 && g->first + g->count <= batch->num_assignments);
        MOE_ASSERT(batch->block_lo >= ffn->block_lo && batch->block_hi <= ffn->block_hi && ffn->hidden == hidden);
        m->parts[i] = (moe_cpu_ffn_part){.ffn = ffn,
                                         .x = m->x + g->first * hidden,
                                         .inner = m->inner + g->first * width,
                                         .up = m->up + g->first * width,
                                         .y = y + g->first * hidden,
                                         .rows = g->count,
                                         .block_lo = batch->block_lo,
                                         .block_hi = batch->block_hi};
    }
}

/* out[r] = the weighted sum of row r's assignments. */
static void add_up(const moe_cpu_kernels *kernels, moe_dtype dtype, const moe_ffn_batch *batch, int32_t hidden,
                   const batch_memory *m) {
    size_t count = (size_t)batch->num_rows * (size_t)hidden;
    float *sums = dtype == MOE_F32 ? batch->out : m->sums;
    memset(sums, 0, count * sizeof *sums);
    for (int64_t a = 0; a < batch->num_assignments; a++)
        kernels->accumulate(batch->assignment_weights[a], m->y + a * hidden, hidden,
                            sums + (int64_t)batch->assignment_rows[a] * hidden);
    if (dtype != MOE_F32) moe_elements_narrow(sums, dtype, count, batch->out);
}

int64_t moe_cpu_ffn_row_multiply_adds(const moe_cpu_ffn *ffn) {
    return (ffn->gated ? 3 : 2) * (int64_t)ffn->hidden * ffn->intermediate;
}

int64_t moe_cpu_ffn_multiply_adds(const moe_ffn_batch *batch) {
    if (batch->num_groups == 0) return 0;
    return batch->num_assignments * moe_cpu_ffn_row_multiply_adds(&batch->groups[0].expert->ffn);
}

moe_status moe_cpu_ffn_batch(const moe_cpu_kernels *kernels, moe_dtype dtype, moe_cpu_scratch_list *list, const moe_cpu_run *run,
                             const moe_ffn_batch *batch, moe_error *err) {
    MOE_ASSERT(moe_ffn_slice_legal(batch->block_lo, batch->block_hi));
    if (batch->num_groups == 0) return MOE_OK;
    int64_t hidden = batch->groups[0].expert->ffn.hidden;
    batch_memory m;
    moe_cpu_scratch *scratch = take_memory(list, batch, hidden, &m);
    if (!scratch) {
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a batch of %d expert rows", batch->num_assignments);
    }
    fill_parts(batch, dtype, hidden, &m);
    moe_cpu_ffn_run(kernels, run, m.parts, batch->num_groups);
    if (batch->mode == MOE_COMBINE_PARTIAL) add_up(kernels, dtype, batch, (int32_t)hidden, &m);
    moe_cpu_scratch_give_back(list, scratch);
    return MOE_OK;
}
