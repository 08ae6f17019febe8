#include "cpu/local.h"

#include "common/alloc.h"
#include "common/clock.h"
#include "cpu/layer_ffn.h"

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

/* Of one step. */
typedef struct local_memory {
    moe_route routes[2]; /* [rows, top_k] each: of this layer and, where pre-gates decide, of the next */
    int32_t *counts;     /* [rows] */
} local_memory;

static size_t lay_out(const moe_model_config *c, int32_t num_rows, void *block, local_memory *m) {
    size_t at = 0, rows = (size_t)num_rows, slots = rows * (size_t)c->top_k;
    for (int i = 0; i < 2; i++) {
        m->routes[i].experts = moe_cpu_scratch_part(block, &at, slots, sizeof(int32_t));
        m->routes[i].weights = moe_cpu_scratch_part(block, &at, slots, sizeof(float));
    }
    m->counts = moe_cpu_scratch_part(block, &at, rows, sizeof(int32_t));
    return at;
}

static void count_expert_rows(const moe_model_config *c, const int32_t *chosen, int32_t num_rows, int32_t *out) {
    memset(out, 0, (size_t)c->num_experts * sizeof *out);
    for (int32_t s = 0; s < num_rows * c->top_k; s++) out[chosen[s]]++;
}

static moe_status run_experts(const moe_cpu_local_run *l, const moe_cpu_run *run, const moe_local_step *step, int32_t layer,
                              const local_memory *m, moe_error *err) {
    const moe_model_config *c = &l->local->base->model->config;
    int64_t start_ns = moe_now_ns(moe_clock_real()), experts = (int64_t)layer * c->num_experts;
    const moe_layer_ffn ffn = {.rows = step->segment.rows,
                               .num_rows = step->segment.num_rows,
                               .experts = m->routes[0].experts,
                               .handles = l->local->experts + experts};
    moe_status status = moe_cpu_layer_ffn(l->kernels, l->scratch, run, c, &ffn, err);
    if (step->expert_rows) count_expert_rows(c, ffn.experts, ffn.num_rows, step->expert_rows + experts);
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
    s.activations = NULL;
    for (s.index = 0; s.index < c->num_moe_layers && status == MOE_OK; s.index++) {
        s.combine = (moe_combine){NULL, MOE_F32, m->routes[0].weights, m->counts};
        if (step->pre_gate && s.index > 0) swap_routes(m); /* what the layer before has decided */
        s.want_gate = !step->pre_gate || s.index == 0;
        s.want_next = step->pre_gate && s.index + 1 < c->num_moe_layers ? MOE_ROUTE_PRE_GATE : MOE_ROUTE_NONE;
        s.route = m->routes[0];
        s.next = m->routes[1];
        status = moe_cpu_segment_run(l->kernels, l->dtype, run, l->local->base, &s, err);
        if (status == MOE_OK) status = run_experts(l, run, step, s.index, m, err);
    }
    if (status != MOE_OK) return status;
    s.combine = (moe_combine){NULL, MOE_F32, m->routes[0].weights, m->counts};
    return moe_cpu_segment_run(l->kernels, l->dtype, run, l->local->base, &s, err);
}

moe_status moe_cpu_local_step(const moe_cpu_local_run *l, const moe_cpu_run *run, const moe_local_step *step, moe_error *err) {
    const moe_model_config *c = &l->local->base->model->config;
    int32_t rows = step->segment.num_rows;
    local_memory m;
    moe_cpu_scratch *scratch = moe_cpu_scratch_take(l->scratch, lay_out(c, rows, NULL, &m));
    if (!scratch) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a step of %d rows", rows);
    lay_out(c, rows, scratch->data, &m);
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
