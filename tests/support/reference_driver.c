#include "tests/support/reference_driver.h"

#include <math.h>
#include <semaphore.h>

#include "common/alloc.h"
#include "common/elements.h"
#include "common/model/gate.h"

struct moe_driver {
    moe_backend *backend;
    const moe_model *model;
    moe_driver_options options;
    moe_base *base;
    moe_expert **experts; /* [num_moe_layers, num_experts] */
    moe_kv *kv;
    moe_rows *rows;
    int32_t *lengths; /* [num_sequences] */
    moe_kv_view *views;
    /* one micro-batch: [max_rows, …] */
    int32_t *positions, *logit_rows, *counts;
    moe_route route, next;
    float *gate_logits, *next_logits; /* [max_rows, num_experts] */
    void *activations, *outputs; /* [max_rows, H] of the backend's dtype, [max_rows, top_k, H] of out_dtype */
    moe_dtype out_dtype;
    float *combine_weights;
    /* the expert batch of one layer: [max_rows · top_k] */
    int32_t *assignment_rows, *slots;
    float *assignment_weights;
    void *ffn_out;         /* of out_dtype */
    moe_ffn_group *groups; /* [num_experts] */
    moe_local *local;      /* options.local */
};

static void *allocate(int64_t count, size_t size) {
    void *memory = moe_alloc_aligned((size_t)(count > 0 ? count : 1), size);
    MOE_ASSERT(memory);
    return memory;
}

static void post(moe_job *job) { sem_post(job->owner); }

static void wait_for(moe_backend *backend, sem_t *done, const moe_job *job) {
    while (backend->ops->poll ? sem_trywait(done) != 0 : sem_wait(done) != 0)
        if (backend->ops->poll) backend->ops->poll(backend);
    sem_destroy(done);
    MOE_ASSERT(job->status == MOE_OK);
}

void moe_driver_run_segment(moe_backend *backend, moe_base *base, const moe_segment *segment) {
    sem_t done;
    sem_init(&done, 0, 0);
    moe_job job = {.done = post, .owner = &done};
    backend->ops->segment_submit(backend, base, segment, &job);
    wait_for(backend, &done, &job);
}

static void run_local(moe_driver *d, const moe_local_step *step) {
    sem_t done;
    sem_init(&done, 0, 0);
    moe_job job = {.done = post, .owner = &done};
    d->backend->ops->local_submit(d->backend, d->base, d->local, step, &job);
    wait_for(d->backend, &done, &job);
}

void moe_driver_run_ffn(moe_backend *backend, const moe_ffn_batch *batch) {
    sem_t done;
    sem_init(&done, 0, 0);
    moe_job job = {.done = post, .owner = &done};
    backend->ops->ffn_submit(backend, batch, &job);
    wait_for(backend, &done, &job);
}

static void load(moe_driver *d) {
    const moe_model_config *c = &d->model->config;
    const moe_backend_ops *ops = d->backend->ops;
    int32_t blocks = (d->options.max_tokens + MOE_KV_BLOCK_TOKENS - 1) / MOE_KV_BLOCK_TOKENS,
            sequences = d->options.num_sequences;
    MOE_ASSERT(ops->base_load(d->backend, d->model, NULL, NULL, &d->base, NULL) == MOE_OK);
    MOE_ASSERT(ops->kv_create(d->backend, d->base, blocks * sequences, &d->kv, NULL) == MOE_OK);
    MOE_ASSERT(ops->rows_create(d->backend, d->base, d->options.max_rows, &d->rows, NULL) == MOE_OK);
    d->experts = allocate((int64_t)c->num_moe_layers * c->num_experts, sizeof(moe_expert *));
    for (int32_t i = 0; i < c->num_moe_layers * c->num_experts; i++)
        MOE_ASSERT(ops->expert_load(d->backend, &d->model->experts[i], 0, MOE_FFN_BLOCKS, &d->experts[i], NULL) == MOE_OK);
    if (d->options.local) MOE_ASSERT(ops->local_create(d->backend, d->base, d->experts, &d->local, NULL) == MOE_OK);
    d->lengths = allocate(sequences, sizeof(int32_t));
    d->views = allocate(sequences, sizeof(moe_kv_view));
    for (int32_t s = 0; s < sequences; s++) {
        int32_t *table = allocate(blocks, sizeof(int32_t));
        for (int32_t b = 0; b < blocks; b++) table[b] = (blocks - 1 - b) * sequences + s; /* scattered, as in a used pool */
        d->views[s] = (moe_kv_view){.blocks = table, .num_blocks = blocks};
    }
}

moe_driver *moe_driver_open(moe_backend *backend, const moe_model *model, const moe_driver_options *options) {
    const moe_model_config *c = &model->config;
    moe_driver *d = allocate(1, sizeof *d);
    int64_t rows = options->max_rows, slots = rows * c->top_k;
    d->backend = backend;
    d->model = model;
    d->options = *options;
    load(d);
    d->positions = allocate(rows, sizeof(int32_t));
    d->logit_rows = allocate(rows, sizeof(int32_t));
    d->counts = allocate(rows, sizeof(int32_t));
    d->route = (moe_route){allocate(slots, sizeof(int32_t)), allocate(slots, sizeof(float))};
    d->next = (moe_route){allocate(slots, sizeof(int32_t)), allocate(slots, sizeof(float))};
    d->gate_logits = allocate(rows * c->num_experts, sizeof(float));
    d->next_logits = allocate(rows * c->num_experts, sizeof(float));
    d->out_dtype = moe_expert_output_dtype(options->combine, backend->dtype);
    d->activations = allocate(rows, moe_row_bytes(backend->dtype, c->hidden));
    d->outputs = allocate(slots, moe_row_bytes(d->out_dtype, c->hidden));
    d->combine_weights = allocate(slots, sizeof(float));
    d->assignment_rows = allocate(slots, sizeof(int32_t));
    d->slots = allocate(slots, sizeof(int32_t));
    d->assignment_weights = allocate(slots, sizeof(float));
    d->ffn_out = allocate(slots, moe_row_bytes(d->out_dtype, c->hidden));
    d->groups = allocate(c->num_experts, sizeof(moe_ffn_group));
    return d;
}

void moe_driver_close(moe_driver *d) {
    const moe_model_config *c = &d->model->config;
    const moe_backend_ops *ops = d->backend->ops;
    if (d->local) ops->local_free(d->backend, d->local);
    for (int32_t i = 0; i < c->num_moe_layers * c->num_experts; i++) ops->expert_free(d->backend, d->experts[i]);
    for (int32_t s = 0; s < d->options.num_sequences; s++) moe_free((void *)(uintptr_t)d->views[s].blocks);
    ops->rows_free(d->backend, d->rows);
    ops->kv_free(d->backend, d->kv);
    ops->base_free(d->backend, d->base);
    void *const owned[] = {
        d->experts,         d->lengths,         d->views,        d->positions,          d->logit_rows,  d->counts,
        d->route.experts,   d->route.weights,   d->next.experts, d->next.weights,       d->activations, d->outputs,
        d->combine_weights, d->assignment_rows, d->slots,        d->assignment_weights, d->ffn_out,     d->groups,
        d->gate_logits,     d->next_logits};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) moe_free(owned[i]);
    moe_free(d);
}

void moe_driver_truncate(moe_driver *driver, int32_t sequence, int32_t length) {
    MOE_ASSERT(length <= driver->lengths[sequence]);
    driver->lengths[sequence] = length;
}

/* Groups the (row, slot) pairs of the route by expert, computes them, and leaves one output a slot, or a sum a row. */
static void run_experts(moe_driver *d, int32_t layer, const moe_route *route, int32_t rows) {
    const moe_model_config *c = &d->model->config;
    moe_ffn_batch batch = {.x = d->activations,
                           .num_rows = rows,
                           .groups = d->groups,
                           .mode = d->options.combine,
                           .assignment_rows = d->assignment_rows,
                           .assignment_weights = d->assignment_weights,
                           .block_hi = MOE_FFN_BLOCKS,
                           .out = d->ffn_out};
    for (int32_t e = 0; e < c->num_experts; e++) {
        int32_t first = batch.num_assignments;
        for (int32_t slot = 0; slot < rows * c->top_k; slot++) {
            if (route->experts[slot] != e) continue;
            d->assignment_rows[batch.num_assignments] = slot / c->top_k;
            d->assignment_weights[batch.num_assignments] = route->weights[slot];
            d->slots[batch.num_assignments++] = slot;
        }
        if (batch.num_assignments == first) continue;
        d->groups[batch.num_groups++] = (moe_ffn_group){
            .expert = d->experts[layer * c->num_experts + e], .first = first, .count = batch.num_assignments - first};
    }
    moe_driver_run_ffn(d->backend, &batch);
    bool exact = batch.mode == MOE_COMBINE_EXACT;
    for (int32_t i = 0; i < (exact ? batch.num_assignments : rows); i++) {
        int64_t slot = exact ? d->slots[i] : i * c->top_k;
        memcpy(moe_row_at(d->outputs, d->out_dtype, c->hidden, slot), moe_row_at(d->ffn_out, d->out_dtype, c->hidden, i),
               moe_row_bytes(d->out_dtype, c->hidden));
        d->combine_weights[slot] = exact ? route->weights[slot] : 1.0f;
    }
    for (int32_t row = 0; row < rows; row++) d->counts[row] = exact ? c->top_k : 1;
}

/* The router logits that a segment tells are those which its routing comes from. */
static void check_route(const moe_driver *d, const moe_route *route, const float *logits, int32_t rows) {
    const moe_model_config *c = &d->model->config;
    int32_t experts[MOE_MAX_TOP_K];
    float weights[MOE_MAX_TOP_K];
    for (int64_t row = 0; row < rows; row++) {
        moe_gate_topk(moe_gate_softmax, logits + row * c->num_experts, c->num_experts, c->top_k, c->norm_topk, experts, weights);
        for (int64_t j = 0; j < c->top_k; j++) {
            MOE_ASSERT(route->experts[row * c->top_k + j] == experts[j]);
            MOE_ASSERT(fabsf(route->weights[row * c->top_k + j] - weights[j]) < 1e-5f);
        }
    }
}

static void run_segments(moe_driver *d, moe_segment s) {
    const moe_model_config *c = &d->model->config;
    for (s.index = 0; s.index < c->num_moe_layers; s.index++) {
        bool more = s.index + 1 < c->num_moe_layers;
        s.want_gate = !d->options.pre_gate || s.index == 0;
        s.want_next = d->options.pre_gate && more ? MOE_ROUTE_PRE_GATE : MOE_ROUTE_NONE;
        if (!s.want_gate) { /* what the layer before has decided */
            moe_route decided = d->next;
            d->next = d->route;
            d->route = decided;
        }
        s.route = d->route;
        s.next = d->next;
        s.gate_logits = d->gate_logits;
        s.next_logits = d->next_logits;
        moe_driver_run_segment(d->backend, d->base, &s);
        if (s.want_gate) check_route(d, &d->route, d->gate_logits, s.num_rows);
        if (s.want_next) check_route(d, &d->next, d->next_logits, s.num_rows);
        run_experts(d, s.index, &d->route, s.num_rows);
    }
    moe_driver_run_segment(d->backend, d->base, &s);
}

void moe_driver_step_for(moe_driver *d, const int32_t *ids, const int32_t *sequences, int32_t rows,
                         const moe_driver_wanted *want) {
    moe_segment s = {.num_rows = rows,
                     .rows = d->rows,
                     .kv = d->kv,
                     .token_ids = ids,
                     .positions = d->positions,
                     .sequences = sequences,
                     .views = d->views,
                     .num_views = d->options.num_sequences,
                     .logit_rows = d->logit_rows,
                     .num_logit_rows = rows,
                     .logits = want->logits,
                     .num_top = want->num_top,
                     .top_ids = want->top_ids,
                     .top_logits = want->top_logits};
    MOE_ASSERT(rows <= d->options.max_rows);
    for (int32_t i = 0; i < rows; i++) {
        d->positions[i] = d->lengths[sequences[i]]++;
        d->logit_rows[i] = i;
        MOE_ASSERT(d->positions[i] < d->options.max_tokens);
    }
    if (d->local) {
        run_local(d, &(moe_local_step){.segment = s, .pre_gate = d->options.pre_gate, .expert_rows = want->expert_rows});
        return;
    }
    s.combine = (moe_combine){d->outputs, d->out_dtype, d->combine_weights, d->counts};
    s.activations = d->activations;
    run_segments(d, s);
}

void moe_driver_step(moe_driver *d, const int32_t *ids, const int32_t *sequences, int32_t rows, float *logits) {
    moe_driver_step_for(d, ids, sequences, rows, &(moe_driver_wanted){.logits = logits});
}

void moe_driver_prefill(moe_driver *d, const int32_t *ids, int32_t count, int32_t chunk, float *logits) {
    int32_t *sequences = allocate(chunk, sizeof(int32_t));
    for (int32_t done = 0, rows; done < count; done += rows) {
        rows = count - done < chunk ? count - done : chunk;
        moe_driver_step(d, ids + done, sequences, rows, logits + (int64_t)done * d->model->config.vocab);
    }
    moe_free(sequences);
}

int32_t moe_driver_argmax(const float *logits, int32_t vocab) {
    int32_t best = 0;
    for (int32_t i = 1; i < vocab; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}
