#include "cuda/local.h"

#include "common/alloc.h"
#include "cuda/groups.h"

#define ADVICE "lower --max-num-batched-tokens"

struct moe_local {
    moe_cuda_network_shape shape; /* of every expert */
    const void **tables;          /* device, [num_moe_layers, 3, num_experts]: addresses of gate_up, down, tail */
};

/* Of a micro-batch, in rows->experts: the assignments of one layer at a time, and the counters of all. */
typedef struct scratch {
    int32_t *expert_first, *sorted_rows, *slot_of, *permute, *expert_rows;
    uint64_t (*spans)[2]; /* [num_moe_layers]: when the gate's input was due, and when the experts' outputs were there */
    void *inner;
    size_t bytes;
} scratch;

typedef struct local_pass {
    moe_cuda_pass pass;
    const moe_local *local;
    const moe_local_step *step;
    scratch scratch;
} local_pass;

/* ---- the experts' tables ---- */

static moe_status fill_tables(const moe_model_config *c, moe_expert *const *experts, const void **tables,
                              moe_cuda_network_shape *shape, moe_error *err) {
    size_t num_experts = (size_t)c->num_experts;
    for (size_t i = 0; i < (size_t)c->num_moe_layers * num_experts; i++) {
        const moe_cuda_network *n = &experts[i]->network;
        const void **layer = tables + i / num_experts * 3 * num_experts + i % num_experts;
        if (i == 0) *shape = n->shape;
        if (!moe_cuda_network_shape_equal(shape, &n->shape) || n->shape.block_lo != 0 || n->shape.block_hi != MOE_FFN_BLOCKS)
            return moe_fail(err, MOE_INVALID_ARGUMENT,
                            "expert %zu of MoE layer %zu is a slice, or has another shape than expert 0", i % num_experts,
                            i / num_experts);
        layer[0] = n->gate_up;
        layer[num_experts] = n->down;
        layer[2 * num_experts] = n->tail;
    }
    return MOE_OK;
}

moe_status moe_cuda_local_create(moe_cuda *cuda, const moe_base *base, moe_expert *const *experts, moe_local **out,
                                 moe_error *err) {
    const moe_model_config *c = &base->model->config;
    size_t count = (size_t)c->num_moe_layers * 3 * (size_t)c->num_experts;
    *out = NULL;
    if (c->top_k > MOE_CUDA_MAX_TOP_K || c->num_experts > MOE_CUDA_MAX_GROUPS || c->num_moe_layers == 0)
        return moe_fail(err, MOE_UNIMPLEMENTED, "steps on the GPU alone take 1 to %d experts a row of at most %d, not %d of %d",
                        MOE_CUDA_MAX_TOP_K, MOE_CUDA_MAX_GROUPS, c->top_k, c->num_experts);
    moe_local *local = moe_calloc(1, sizeof *local);
    const void **tables = moe_calloc(count, sizeof *tables);
    void *device = NULL;
    moe_status status = MOE_OK;
    if (!local || !tables) status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the experts' tables");
    if (status == MOE_OK) status = fill_tables(c, experts, tables, &local->shape, err);
    if (status == MOE_OK)
        status = moe_cuda_device_alloc(&cuda->device, count * sizeof *tables, "the experts' tables", "lower --kv-cache-memory",
                                       &device, err);
    if (status == MOE_OK)
        status = moe_cuda_check(cudaMemcpy(device, tables, count * sizeof *tables, cudaMemcpyHostToDevice),
                                "copying the experts' tables", err);
    if (status == MOE_OK)
        status = moe_cuda_check(cudaStreamSynchronize(0), "copying the experts' tables", err); /* for all streams */
    moe_free(tables);
    if (local) local->tables = device;
    if (status == MOE_OK)
        *out = local;
    else
        moe_cuda_local_free(local);
    return status;
}

void moe_cuda_local_free(moe_local *local) {
    if (!local) return;
    moe_cuda_device_free(local->tables);
    moe_free(local);
}

/* ---- a step ---- */

static size_t spans_bytes(const local_pass *l) { return (size_t)l->pass.config->num_moe_layers * 2 * sizeof(uint64_t); }

static void lay_out(const local_pass *l, void *memory, scratch *out) {
    const moe_model_config *c = l->pass.config;
    moe_cuda_arena arena = {.memory = memory};
    size_t experts = (size_t)c->num_experts, items = (size_t)l->pass.rows->room * (size_t)c->top_k;
    out->expert_first = moe_cuda_arena_take(&arena, (experts + 1) * sizeof(int32_t));
    out->sorted_rows = moe_cuda_arena_take(&arena, items * sizeof(int32_t));
    out->slot_of = moe_cuda_arena_take(&arena, items * sizeof(int32_t));
    out->permute = moe_cuda_arena_take(&arena, moe_cuda_permute_scratch_bytes(l->pass.rows->room, c->top_k, c->num_experts));
    out->expert_rows = moe_cuda_arena_take(&arena, (size_t)c->num_moe_layers * experts * sizeof(int32_t));
    out->spans = moe_cuda_arena_take(&arena, spans_bytes(l));
    out->inner =
        moe_cuda_arena_take(&arena, items * (size_t)l->local->shape.padded * moe_dtype_bytes(l->pass.cuda->public.dtype));
    out->bytes = arena.used;
}

/* outputs = what the chosen experts of a MoE layer make of `normed`, by slot; pending. */
static void run_experts(local_pass *l, int32_t moe_layer, const moe_route *route, const moe_cuda_route_few *places, bool sorted) {
    moe_cuda_pass *p = &l->pass;
    const moe_model_config *c = p->config;
    const void *const *tables = l->local->tables + (size_t)moe_layer * 3 * (size_t)c->num_experts;
    moe_cuda_permute permute = {
        .rows = p->rows->step.launch_rows, .top_k = c->top_k, .num_experts = c->num_experts, .ids = route->experts};
    permute.expert_first = places->expert_first;
    permute.sorted_rows = places->sorted_rows;
    permute.slot_of = places->slot_of;
    permute.expert_rows = places->expert_rows;
    permute.scratch = l->scratch.permute;
    if (!sorted) moe_cuda_pass_did(p, moe_cuda_permute_run(&permute, p->queue.stream), "sorting rows by expert");
    moe_cuda_groups groups = {.device = &p->cuda->expert_device,
                              .tune = &p->cuda->tune,
                              .shape = &l->local->shape,
                              .dtype = p->cuda->public.dtype,
                              .block_hi = MOE_FFN_BLOCKS,
                              .num_groups = c->num_experts,
                              .num_assignments = p->rows->step.launch_rows * c->top_k,
                              .expert_first = places->expert_first,
                              .sorted_rows = places->sorted_rows,
                              .slot_of = places->slot_of,
                              .gate_up = tables,
                              .down = tables + c->num_experts,
                              .maps = tables + 2 * c->num_experts,
                              .x = p->rows->normed,
                              .inner = l->scratch.inner,
                              .y = p->rows->outputs};
    moe_cuda_pass_did(p, moe_cuda_groups_run(&groups, p->queue.stream), "experts");
    p->pending.outputs = p->rows->outputs;
    p->pending.outputs_dtype = MOE_F32;
    p->pending.weights = route->weights;
    p->pending.counts = p->rows->fast ? NULL : p->rows->all_slots;
    p->pending.top_k = c->top_k;
}

/* Routes, experts and shared expert of the MoE layer. With pre-gates its routing was found one MoE layer earlier. */
static void moe_layer(local_pass *l, const moe_cuda_layer *layer, int32_t index) {
    moe_cuda_pass *p = &l->pass;
    const moe_model_config *c = p->config;
    bool last = index + 1 == c->num_moe_layers;
    moe_cuda_route_few places = {
        .expert_first = l->scratch.expert_first, .sorted_rows = l->scratch.sorted_rows, .slot_of = l->scratch.slot_of};
    bool sorted = false;
    if (l->step->expert_rows) places.expert_rows = l->scratch.expert_rows + (size_t)index * (size_t)c->num_experts;
    if (!l->step->pre_gate || index == 0) sorted = moe_cuda_pass_route(p, &layer->gate, index % 2, &places);
    if (l->step->pre_gate && !last) moe_cuda_pass_route(p, &layer->pre_gate, (index + 1) % 2, NULL);
    run_experts(l, index, &p->rows->routes[index % 2], &places, sorted);
    moe_cuda_pass_shared(p, layer);
}

static moe_status record(void *ctx, moe_error *err) {
    local_pass *l = ctx;
    moe_cuda_pass *p = &l->pass;
    const moe_model_config *c = p->config;
    int32_t moe_index = 0;
    p->err = err;
    if (l->step->expert_rows)
        moe_cuda_pass_did(p,
                          cudaMemsetAsync(l->scratch.expert_rows, 0,
                                          (size_t)c->num_moe_layers * (size_t)c->num_experts * sizeof(int32_t), p->queue.stream),
                          "clearing counters");
    moe_cuda_pass_embed(p);
    moe_cuda_pass_norm(p, p->base->layers[0].input_norm);
    for (int32_t i = 0; i < c->num_layers; i++) {
        const moe_cuda_layer *layer = &p->base->layers[i];
        moe_cuda_pass_attention(p, i);
        if (c->layer_is_moe[i]) p->pending.began = &l->scratch.spans[moe_index][0];
        moe_cuda_pass_norm(p, layer->post_norm);
        if (c->layer_is_moe[i]) {
            moe_layer(l, layer, moe_index);
            p->pending.began = &l->scratch.spans[moe_index++][1];
        } else {
            moe_cuda_pass_network(p, &layer->dense);
        }
        moe_cuda_pass_norm(p, i + 1 < c->num_layers ? p->base->layers[i + 1].input_norm : NULL);
    }
    return p->status;
}

/* All buffers grow before anything is enqueued that uses them. */
static void reserve_all(local_pass *l, moe_cuda_parcel *brought) {
    moe_cuda_pass *p = &l->pass;
    moe_rows *r = p->rows;
    const moe_segment *g = p->segment;
    const void *before = r->experts.memory;
    size_t counters = (size_t)p->config->num_moe_layers * (size_t)p->config->num_experts * sizeof(int32_t);
    p->direct = g->logits && moe_cuda_is_pinned(g->logits);
    moe_cuda_pass_reserve_out(p, moe_cuda_pass_logits_bytes(p) + moe_cuda_parcel_bytes(spans_bytes(l)) +
                                     (l->step->expert_rows ? moe_cuda_parcel_bytes(counters) : 0));
    brought->capacity = moe_cuda_parcel_bytes((size_t)g->num_logit_rows * sizeof(int32_t));
    lay_out(l, NULL, &l->scratch);
    const struct {
        moe_cuda_buffer *buffer;
        size_t bytes;
    } all[] = {{&r->segment_in, brought->capacity}, {&r->segment_device, brought->capacity}, {&r->experts, l->scratch.bytes}};
    for (size_t i = 0; i < sizeof all / sizeof *all && p->status == MOE_OK; i++)
        p->status =
            moe_cuda_buffer_reserve(&p->cuda->device, all[i].buffer, all[i].bytes, "a micro-batch's experts", ADVICE, p->err);
    if (r->experts.memory != before) moe_cuda_graphs_clear(&r->graphs);
    lay_out(l, r->experts.memory, &l->scratch);
    brought->pinned = r->segment_in.memory;
    brought->device = r->segment_device.memory;
}

static moe_status enqueue(void *ctx, moe_cuda_job *slot, moe_error *err) {
    local_pass *l = ctx;
    moe_cuda_pass *p = &l->pass;
    const moe_segment *g = p->segment;
    const int32_t *logit_rows = NULL;
    moe_cuda_parcel brought = {0};
    p->slot = slot;
    p->err = err;
    reserve_all(l, &brought);
    if (p->status == MOE_OK) moe_cuda_pass_begin_step(p);
    if (p->status != MOE_OK) return p->status;
    for (int32_t i = 0; i < g->num_logit_rows; i++) MOE_ASSERT(g->logit_rows[i] >= 0 && g->logit_rows[i] < g->num_rows);
    if (g->num_logit_rows > 0) {
        logit_rows = moe_cuda_parcel_put(&brought, g->logit_rows, (size_t)g->num_logit_rows * sizeof(int32_t));
        moe_cuda_pass_did(p, moe_cuda_parcel_send(&brought, p->queue.stream), "copying a step's inputs to the GPU");
    }
    moe_cuda_pass_mark(p, MOE_CUDA_BEGIN);
    moe_cuda_pass_run(p, l->local->tables, -1, (l->step->pre_gate ? 1u : 0) | (l->step->expert_rows ? 2u : 0), record, l);
    moe_cuda_pass_logits(p, logit_rows);
    if (l->step->expert_rows)
        moe_cuda_pass_give(p, l->step->expert_rows, l->scratch.expert_rows,
                           (size_t)p->config->num_moe_layers * (size_t)p->config->num_experts * sizeof(int32_t), false);
    if (p->rows->fast) { /* the other kernels do not look at the clock */
        p->slot->expert_spans = (const uint64_t(*)[2])moe_cuda_pass_keep(p, l->scratch.spans, spans_bytes(l));
        p->slot->num_expert_spans = p->config->num_moe_layers;
    }
    moe_cuda_pass_mark(p, MOE_CUDA_DONE);
    return p->status;
}

void moe_cuda_local_submit(moe_cuda *cuda, const moe_base *base, const moe_local *local, const moe_local_step *step,
                           moe_job *job) {
    const moe_segment *g = &step->segment;
    local_pass l = {.local = local, .step = step};
    l.pass = (moe_cuda_pass){.cuda = cuda, .base = base, .config = &base->model->config, .segment = g, .rows = g->rows};
    l.pass.queue = moe_cuda_rows_queue(cuda, g->rows);
    MOE_ASSERT(g->num_rows > 0 && g->num_rows <= g->rows->max_rows && g->num_top <= MOE_MAX_TOP_LOGITS);
    MOE_ASSERT(!step->pre_gate || base->model->has_pre_gates);
    moe_cuda_jobs_submit(&cuda->jobs, job, enqueue, &l);
}
