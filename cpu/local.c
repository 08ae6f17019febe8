#include "cpu/local.h"

#include "common/alloc.h"
#include "common/clock.h"
#include "common/elements.h"

moe_status moe_cpu_local_create(const moe_base *base, moe_expert *const *experts, moe_local **out, moe_error *err) {
    const moe_model_config *c = &base->model->config;
    size_t count = (size_t)c->num_moe_layers * (size_t)c->num_experts;
    moe_local *local = *out = moe_calloc(1, sizeof *local);
    if (local) local->experts = moe_calloc(count, sizeof(moe_expert *));
    if (!local || !local->experts) {
        moe_cpu_local_free(local);
        *out = NULL;
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the table of %zu experts", count);
    }
    local->base = base;
    memcpy(local->experts, experts, count * sizeof(moe_expert *));
    return MOE_OK;
}

void moe_cpu_local_free(moe_local *local) {
    if (local) moe_free(local->experts);
    moe_free(local);
}

/* Of one step; slots are (row, j-th expert) pairs. */
typedef struct local_memory {
    void *activations;     /* [rows, H] of the backend's dtype */
    float *ffn_out;        /* [slots, H]: by expert */
    float *outputs;        /* [slots, H]: by slot */
    moe_route routes[2];   /* [slots] each: of this layer and, where pre-gates decide, of the next */
    int32_t *counts;       /* [rows] */
    int32_t *slots, *rows; /* [slots]: of the assignments, by expert */
    int32_t *first_of;     /* [num_experts + 1] */
    moe_ffn_group *groups; /* [num_experts] */
} local_memory;

/* Two passes over the same parts: sizes first, then addresses; each part begins on a cache line. */
static void *part(uint8_t *block, size_t *at, size_t count, size_t size) {
    void *here = block ? block + *at : NULL;
    *at += (count * size + MOE_ALIGNMENT_BYTES - 1) / MOE_ALIGNMENT_BYTES * MOE_ALIGNMENT_BYTES;
    return here;
}

static size_t lay_out(const moe_model_config *c, moe_dtype dtype, int32_t num_rows, uint8_t *block, local_memory *m) {
    size_t at = 0, rows = (size_t)num_rows, slots = rows * (size_t)c->top_k, experts = (size_t)c->num_experts;
    m->activations = part(block, &at, rows, moe_row_bytes(dtype, c->hidden));
    m->ffn_out = part(block, &at, slots, moe_row_bytes(MOE_F32, c->hidden));
    m->outputs = part(block, &at, slots, moe_row_bytes(MOE_F32, c->hidden));
    for (int i = 0; i < 2; i++) {
        m->routes[i].experts = part(block, &at, slots, sizeof(int32_t));
        m->routes[i].weights = part(block, &at, slots, sizeof(float));
    }
    m->counts = part(block, &at, rows, sizeof(int32_t));
    m->slots = part(block, &at, slots, sizeof(int32_t));
    m->rows = part(block, &at, slots, sizeof(int32_t));
    m->first_of = part(block, &at, experts + 1, sizeof(int32_t));
    m->groups = part(block, &at, experts, sizeof *m->groups);
    return at;
}

/* The layer's assignments by expert, within one by row, as a dispatch orders them. */
static moe_ffn_batch make_batch(const moe_model_config *c, moe_expert *const *experts, int32_t num_rows, const local_memory *m) {
    int32_t num_slots = num_rows * c->top_k;
    const int32_t *chosen = m->routes[0].experts;
    moe_ffn_batch batch = {.x = m->activations,
                           .num_rows = num_rows,
                           .groups = m->groups,
                           .assignment_rows = m->rows,
                           .num_assignments = num_slots,
                           .mode = MOE_COMBINE_EXACT,
                           .block_hi = MOE_FFN_BLOCKS,
                           .out = m->ffn_out};
    memset(m->first_of, 0, ((size_t)c->num_experts + 1) * sizeof *m->first_of);
    for (int32_t s = 0; s < num_slots; s++) m->first_of[chosen[s] + 1]++;
    for (int32_t e = 0; e < c->num_experts; e++) {
        int32_t first = m->first_of[e], count = m->first_of[e + 1];
        m->first_of[e + 1] += first;
        if (count > 0) m->groups[batch.num_groups++] = (moe_ffn_group){.expert = experts[e], .first = first, .count = count};
    }
    for (int32_t s = 0; s < num_slots; s++) { /* first_of is used up */
        int32_t at = m->first_of[chosen[s]]++;
        m->slots[at] = s;
        m->rows[at] = s / c->top_k;
    }
    return batch;
}

static moe_status run_experts(const moe_cpu_local_run *l, const moe_cpu_run *run, const moe_local_step *step, int32_t layer,
                              const local_memory *m, moe_error *err) {
    const moe_model_config *c = &l->local->base->model->config;
    int64_t start_ns = moe_now_ns(moe_clock_real());
    moe_ffn_batch batch = make_batch(c, l->local->experts + (int64_t)layer * c->num_experts, step->segment.num_rows, m);
    moe_status status = moe_cpu_ffn_batch(l->kernels, l->dtype, l->scratch, run, &batch, err);
    for (int32_t a = 0; a < batch.num_assignments && status == MOE_OK; a++)
        memcpy(m->outputs + (int64_t)m->slots[a] * c->hidden, m->ffn_out + (int64_t)a * c->hidden,
               (size_t)c->hidden * sizeof(float));
    for (int32_t e = 0; step->expert_rows && e < c->num_experts; e++) /* first_of[e] is now where e's assignments end */
        step->expert_rows[(int64_t)layer * c->num_experts + e] = m->first_of[e] - (e > 0 ? m->first_of[e - 1] : 0);
    run->job->expert_ns += moe_now_ns(moe_clock_real()) - start_ns;
    return status;
}

static void swap_routes(local_memory *m) {
    moe_route kept = m->routes[0];
    m->routes[0] = m->routes[1];
    m->routes[1] = kept;
}

static moe_status run_layers(const moe_cpu_local_run *l, const moe_cpu_run *run, const moe_local_step *step, local_memory *m,
                             moe_error *err) {
    const moe_model_config *c = &l->local->base->model->config;
    moe_segment s = step->segment;
    moe_status status = MOE_OK;
    s.activations = m->activations;
    for (s.index = 0; s.index < c->num_moe_layers && status == MOE_OK; s.index++) {
        s.combine = (moe_combine){m->outputs, MOE_F32, m->routes[0].weights, m->counts};
        if (step->pre_gate && s.index > 0) swap_routes(m); /* what the layer before has decided */
        s.want_gate = !step->pre_gate || s.index == 0;
        s.want_next = step->pre_gate && s.index + 1 < c->num_moe_layers ? MOE_ROUTE_PRE_GATE : MOE_ROUTE_NONE;
        s.route = m->routes[0];
        s.next = m->routes[1];
        status = moe_cpu_segment_run(l->kernels, l->dtype, run, l->local->base, &s, err);
        if (status == MOE_OK) status = run_experts(l, run, step, s.index, m, err);
    }
    if (status != MOE_OK) return status;
    s.combine = (moe_combine){m->outputs, MOE_F32, m->routes[0].weights, m->counts};
    return moe_cpu_segment_run(l->kernels, l->dtype, run, l->local->base, &s, err);
}

moe_status moe_cpu_local_step(const moe_cpu_local_run *l, const moe_cpu_run *run, const moe_local_step *step, moe_error *err) {
    const moe_model_config *c = &l->local->base->model->config;
    int32_t rows = step->segment.num_rows;
    local_memory m;
    moe_cpu_scratch *scratch = moe_cpu_scratch_take(l->scratch, lay_out(c, l->dtype, rows, NULL, &m));
    if (!scratch) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a step of %d rows", rows);
    lay_out(c, l->dtype, rows, scratch->data, &m);
    for (int32_t row = 0; row < rows; row++) m.counts[row] = c->top_k;
    moe_status status = run_layers(l, run, step, &m, err);
    moe_cpu_scratch_give_back(l->scratch, scratch);
    return status;
}

int64_t moe_cpu_local_multiply_adds(const moe_local *local, const moe_local_step *step) {
    const moe_model_config *c = &local->base->model->config;
    moe_segment s = step->segment;
    int64_t sum = 0;
    for (s.index = 0; s.index <= c->num_moe_layers; s.index++) sum += moe_cpu_segment_multiply_adds(local->base, &s);
    if (c->num_moe_layers == 0) return sum;
    return sum + (int64_t)c->num_moe_layers * s.num_rows * c->top_k * moe_cpu_ffn_row_multiply_adds(&local->experts[0]->ffn);
}
