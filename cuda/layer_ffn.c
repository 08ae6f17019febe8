#include "cuda/layer_ffn.h"

#define ADVICE "lower --max-num-batched-tokens"
#define HOST_SORT_ITEMS 4096 /* assignments; the host sorts so many about as fast as it launches kernels that do */

_Static_assert(MOE_MAX_EXPERTS <= MOE_CUDA_MAX_GROUPS, "a layer's experts are groups of one launch");

/* The experts of a job that have rows, ascending: its groups. */
typedef struct plan {
    int32_t num_groups;
    int32_t group_of[MOE_MAX_EXPERTS]; /* by expert; -1: not of this job */
    int32_t first[MOE_MAX_EXPERTS + 1];
    const moe_cuda_network *networks[MOE_MAX_EXPERTS];
} plan;

/* Device memory of a job, in rows->experts: jobs of a micro-batch run one after another. */
typedef struct scratch {
    uint8_t *parcel;
    int32_t *expert_first, *sorted_rows, *slot_of, *permute; /* where the device sorts */
    void *inner;
    size_t bytes;
} scratch;

typedef struct layer_run {
    moe_cuda *cuda;
    const moe_model_config *config;
    const moe_layer_ffn *ffn;
    plan *plan;
    int32_t num_items; /* of all experts */
    bool device_sorts;
    const float *given; /* pinned */
    moe_cuda_lane *lane;
    moe_cuda_job *slot;
    scratch scratch;
    moe_cuda_permute permute;
    moe_cuda_groups groups;
    const int32_t *given_slots; /* device */
    moe_status status;
    moe_error *err;
} layer_run;

static void did(layer_run *r, cudaError_t code, const char *what) {
    if (r->status == MOE_OK) r->status = moe_cuda_check(code, what, r->err);
}

/* ---- what is to be done ---- */

static void make_plan(const moe_layer_ffn *f, const moe_model_config *c, plan *out) {
    int32_t *count = out->group_of, total = 0;
    memset(count, 0, (size_t)c->num_experts * sizeof *count);
    for (int32_t i = 0; i < f->num_rows * c->top_k; i++) {
        MOE_ASSERT(f->experts[i] >= 0 && f->experts[i] < c->num_experts);
        count[f->experts[i]]++;
    }
    out->num_groups = 0;
    for (int32_t e = 0; e < c->num_experts; e++) {
        int32_t rows = count[e];
        out->group_of[e] = -1;
        if (!f->handles[e] || rows == 0) continue;
        out->networks[out->num_groups] = &f->handles[e]->network;
        out->first[out->num_groups] = total;
        out->group_of[e] = out->num_groups++;
        total += rows;
    }
    out->first[out->num_groups] = total;
}

static void check(const moe_layer_ffn *f, const moe_model_config *c, const plan *p) {
    for (int32_t g = 0; g < p->num_groups; g++) {
        const moe_cuda_network_shape *s = &p->networks[g]->shape;
        MOE_ASSERT(s->block_lo == 0 && s->block_hi == MOE_FFN_BLOCKS && s->hidden == c->hidden);
        MOE_ASSERT(moe_cuda_network_shape_equal(s, &p->networks[0]->shape));
    }
    for (int32_t i = 0; i < f->num_given; i++) MOE_ASSERT(f->given_slots[i] >= 0 && f->given_slots[i] < f->num_rows * c->top_k);
}

/* ---- memory ---- */

static size_t parcel_bytes(int32_t groups, int32_t items, int32_t given) {
    return 3 * moe_cuda_parcel_bytes((size_t)groups * sizeof(void *)) +
           moe_cuda_parcel_bytes(((size_t)groups + 1) * sizeof(int32_t)) +
           2 * moe_cuda_parcel_bytes((size_t)items * sizeof(int32_t)) + moe_cuda_parcel_bytes((size_t)given * sizeof(int32_t));
}

/* With room for every job of the micro-batch, so that none but the first one grows it. */
static void lay_out(const layer_run *r, void *memory, scratch *out) {
    const moe_model_config *c = r->config;
    moe_cuda_arena arena = {.memory = memory};
    int32_t rows = r->ffn->rows->max_rows, most = rows * c->top_k;
    size_t items = (size_t)most, padded = r->plan->num_groups ? (size_t)r->groups.shape->padded : 0;
    out->parcel = moe_cuda_arena_take(&arena, parcel_bytes(c->num_experts, most, most));
    out->expert_first = moe_cuda_arena_take(&arena, ((size_t)c->num_experts + 1) * sizeof(int32_t));
    out->sorted_rows = moe_cuda_arena_take(&arena, items * sizeof(int32_t));
    out->slot_of = moe_cuda_arena_take(&arena, items * sizeof(int32_t));
    out->permute = moe_cuda_arena_take(&arena, moe_cuda_permute_scratch_bytes(rows, c->top_k, c->num_experts));
    out->inner = moe_cuda_arena_take(&arena, items * padded * moe_dtype_bytes(r->groups.dtype));
    out->bytes = arena.used;
}

static void reserve(layer_run *r, moe_cuda_parcel *parcel) {
    moe_cuda_buffer *device = &r->ffn->rows->experts, *pinned = &r->lane->in;
    const void *before = device->memory;
    bool staged = r->ffn->num_given > 0 && !moe_cuda_is_pinned(r->ffn->given);
    size_t given_bytes = (size_t)r->ffn->num_given * (size_t)r->config->hidden * sizeof(float);
    parcel->capacity = parcel_bytes(r->plan->num_groups, r->num_items, r->ffn->num_given);
    lay_out(r, NULL, &r->scratch);
    r->status = moe_cuda_buffer_reserve(&r->cuda->device, device, r->scratch.bytes, "a micro-batch's experts", ADVICE, r->err);
    if (before && device->memory != before) moe_cuda_graphs_clear(&r->ffn->rows->graphs); /* those of local steps use it */
    if (r->status == MOE_OK)
        r->status = moe_cuda_buffer_reserve(&r->cuda->device, pinned, parcel->capacity + (staged ? given_bytes : 0),
                                            "staging for a micro-batch's experts", ADVICE, r->err);
    if (r->status != MOE_OK) return;
    lay_out(r, device->memory, &r->scratch);
    parcel->pinned = pinned->memory;
    parcel->device = r->scratch.parcel;
    r->given = r->ffn->given;
    if (staged) r->given = memcpy(parcel->pinned + parcel->capacity, r->ffn->given, given_bytes);
}

/* ---- the parcel ---- */

static void put_networks(layer_run *r, moe_cuda_parcel *parcel) {
    const plan *p = r->plan;
    size_t bytes = (size_t)p->num_groups * sizeof(void *);
    void *gate_up, *down, *maps;
    r->groups.gate_up = moe_cuda_parcel_take(parcel, bytes, &gate_up);
    r->groups.down = moe_cuda_parcel_take(parcel, bytes, &down);
    r->groups.maps = moe_cuda_parcel_take(parcel, bytes, &maps);
    for (int32_t g = 0; g < p->num_groups; g++) {
        ((const void **)gate_up)[g] = p->networks[g]->gate_up;
        ((const void **)down)[g] = p->networks[g]->down;
        ((const void **)maps)[g] = p->networks[g]->tail;
    }
}

/* Few assignments: sorted by the host. */
static void put_sorted(layer_run *r, moe_cuda_parcel *parcel) {
    plan *p = r->plan;
    const int32_t *experts = r->ffn->experts;
    size_t items = (size_t)p->first[p->num_groups];
    void *rows_memory, *slots_memory;
    r->groups.expert_first = moe_cuda_parcel_put(parcel, p->first, ((size_t)p->num_groups + 1) * sizeof(int32_t));
    r->groups.sorted_rows = moe_cuda_parcel_take(parcel, items * sizeof(int32_t), &rows_memory);
    r->groups.slot_of = moe_cuda_parcel_take(parcel, items * sizeof(int32_t), &slots_memory);
    int32_t *rows = rows_memory, *slots = slots_memory;
    for (int32_t row = 0, slot = 0; row < r->ffn->num_rows; row++) {
        for (int32_t j = 0; j < r->config->top_k; j++, slot++) {
            int32_t group = p->group_of[experts[slot]];
            if (group < 0) continue;
            int32_t at = p->first[group]++;
            rows[at] = row;
            slots[at] = slot;
        }
    }
}

/* Many: their groups, which the device sorts them by. */
static void put_unsorted(layer_run *r, moe_cuda_parcel *parcel) {
    const plan *p = r->plan;
    void *memory;
    r->permute = (moe_cuda_permute){.rows = r->ffn->num_rows,
                                    .top_k = r->config->top_k,
                                    .num_experts = p->num_groups,
                                    .expert_first = r->scratch.expert_first,
                                    .sorted_rows = r->scratch.sorted_rows,
                                    .slot_of = r->scratch.slot_of,
                                    .scratch = r->scratch.permute};
    r->permute.ids = moe_cuda_parcel_take(parcel, (size_t)r->num_items * sizeof(int32_t), &memory);
    for (int32_t i = 0; i < r->num_items; i++) ((int32_t *)memory)[i] = p->group_of[r->ffn->experts[i]];
    r->groups.expert_first = r->scratch.expert_first;
    r->groups.sorted_rows = r->scratch.sorted_rows;
    r->groups.slot_of = r->scratch.slot_of;
}

static void fill_parcel(layer_run *r, moe_cuda_parcel *parcel) {
    const moe_layer_ffn *f = r->ffn;
    if (f->num_given > 0) r->given_slots = moe_cuda_parcel_put(parcel, f->given_slots, (size_t)f->num_given * sizeof(int32_t));
    if (r->plan->num_groups == 0) return;
    put_networks(r, parcel);
    if (r->device_sorts)
        put_unsorted(r, parcel);
    else
        put_sorted(r, parcel);
}

/* ---- the job ---- */

static moe_status enqueue(void *ctx, moe_cuda_job *slot, moe_error *err) {
    layer_run *r = ctx;
    const moe_rows *rows = r->ffn->rows;
    cudaStream_t stream = rows->stream;
    moe_cuda_parcel parcel = {0};
    MOE_ASSERT(r->ffn->num_rows == rows->step.num_rows);
    r->slot = slot;
    r->err = err;
    r->status = moe_cuda_lane_take(r->cuda, slot, &r->lane, err);
    if (r->status == MOE_OK) reserve(r, &parcel);
    if (r->status != MOE_OK) return r->status;
    fill_parcel(r, &parcel);
    did(r, moe_cuda_job_mark(r->slot, MOE_CUDA_START, stream), "recording an event");
    did(r, moe_cuda_parcel_send(&parcel, stream), "copying the routing to the GPU");
    if (r->ffn->num_given > 0)
        did(r,
            moe_cuda_bring_to_places(rows->outputs, r->given, r->given_slots, (size_t)r->ffn->num_given,
                                     (size_t)r->config->hidden, stream),
            "copying expert outputs to the GPU");
    did(r, moe_cuda_job_mark(r->slot, MOE_CUDA_BEGIN, stream), "recording an event");
    if (r->plan->num_groups > 0) {
        if (r->device_sorts) did(r, moe_cuda_permute_run(&r->permute, stream), "sorting rows by expert");
        r->groups.inner = r->scratch.inner;
        did(r, moe_cuda_groups_run(&r->groups, stream), "experts");
    }
    did(r, moe_cuda_job_mark(r->slot, MOE_CUDA_END, stream), "recording an event");
    did(r, moe_cuda_job_mark(r->slot, MOE_CUDA_DONE, stream), "recording an event");
    return r->status;
}

static layer_run make_run(moe_cuda *cuda, const moe_model_config *c, const moe_layer_ffn *f, plan *p) {
    layer_run r = {.cuda = cuda, .config = c, .ffn = f, .plan = p, .num_items = f->num_rows * c->top_k};
    r.device_sorts = r.num_items > HOST_SORT_ITEMS && c->top_k <= MOE_CUDA_MAX_TOP_K;
    r.groups = (moe_cuda_groups){.device = &cuda->expert_device,
                                 .tune = &cuda->tune,
                                 .dtype = cuda->public.dtype,
                                 .block_hi = MOE_FFN_BLOCKS,
                                 .num_groups = p->num_groups,
                                 .num_assignments = p->first[p->num_groups],
                                 .x = f->rows->normed,
                                 .y = f->rows->outputs,
                                 .brought = true};
    if (p->num_groups > 0) r.groups.shape = &p->networks[0]->shape;
    return r;
}

void moe_cuda_layer_ffn_submit(moe_cuda *cuda, const moe_base *base, const moe_layer_ffn *ffn, moe_job *job) {
    const moe_model_config *c = &base->model->config;
    plan p;
    MOE_ASSERT(ffn->num_rows > 0 && ffn->num_rows <= ffn->rows->max_rows && ffn->num_given >= 0);
    make_plan(ffn, c, &p);
    check(ffn, c, &p);
    if (p.num_groups == 0 && ffn->num_given == 0) {
        job->status = MOE_OK;
        job->compute_ns = job->copy_ns = 0;
        job->done(job);
        return;
    }
    layer_run r = make_run(cuda, c, ffn, &p);
    moe_cuda_jobs_submit(&cuda->jobs, job, enqueue, &r);
}
