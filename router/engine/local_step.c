/* Whole forward steps in one job of the backend, where every expert is in this process: no messages, no plan. */
#include "common/log.h"
#include "common/metrics.h"
#include "router/engine/internal.h"

bool local_step_ready(moe_engine *e) {
    moe_backend *backend = e->config.backend;
    bool possible = e->config.local_experts && backend->ops->local_submit && !e->local_refused && e->map;
    /* What is routed, and how good hints are, is only seen, and changed, between segments. */
    bool between = e->config.gating == MOE_GATING_HINT || e->config.on_layer || e->dummy_routing || e->virtual;
    if (!possible || between) return false;
    moe_expert *const *experts = e->config.local_experts(e->config.local_worker);
    if (!experts || e->local) return experts != NULL;
    moe_error err;
    if (backend->ops->local_create(backend, e->base, experts, &e->local, &err) == MOE_OK) return true;
    moe_warn("no local steps, layers are computed one by one: %s", err.message);
    e->local_refused = true;
    return false;
}

/* The map's only worker computes all experts. */
void local_step_count_rows(micro_batch *b, int32_t layer, const int32_t *rows) {
    moe_engine *e = b->engine;
    int32_t *chosen = e->scratch.chosen, distinct = 0;
    for (int32_t x = 0; x < e->model->num_experts; x++) {
        chosen[x] = MOE_PLAN_NO_WORKER;
        if (rows[x] == 0) continue;
        distinct++;
        int32_t placed = moe_placement_at(b->map->placement, layer, x)->replicas[0].worker;
        if (b->map->worker[placed] >= 0) chosen[x] = placed;
    }
    moe_metric_observe_count(MOE_METRIC_LAYER_EXPERTS, distinct);
    view_add_loads(e, layer, b->map, rows, chosen);
}

/* Hand-off is the time beside the job. What the job tells of its parts counts as a mean over the layers. */
void local_step_observe(micro_batch *b) {
    const moe_engine *e = b->engine;
    const moe_job *job = &b->job;
    int64_t layers = e->model->num_moe_layers;
    moe_metric_observe_ns(MOE_METRIC_STAGE_STEP, job->compute_ns);
    moe_metric_observe_ns(MOE_METRIC_STAGE_HANDOFF, engine_now(e) - b->stage_began_ns - job->compute_ns);
    if (job->status != MOE_OK) return;
    moe_metric_add(MOE_METRIC_WORKER_ROWS, b->num_rows * layers * e->model->top_k);
    for (int32_t layer = 0; layer < layers; layer++)
        local_step_count_rows(b, layer, b->expert_rows + (int64_t)layer * e->model->num_experts);
    if (job->expert_ns == 0) return;
    int64_t attention_ns = job->compute_ns - job->expert_ns - job->combine_ns - job->logits_ns;
    moe_metric_observe_ns(MOE_METRIC_STAGE_ATTENTION, attention_ns / layers);
    moe_metric_observe_ns(MOE_METRIC_STAGE_EXPERT, job->expert_ns / layers);
    moe_metric_observe_ns(MOE_METRIC_STAGE_COMBINE, job->combine_ns / layers);
    moe_metric_observe_ns(MOE_METRIC_STAGE_LOGITS, job->logits_ns);
}
