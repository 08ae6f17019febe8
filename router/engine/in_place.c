/* MoE layers whose experts this process computes on the micro-batch where it is: between segments its rows stay in the backend. Under
 * pre-gates a layer's routing is known before its segment runs; its experts then begin right behind that segment's submission, so that the
 * backend goes on without waiting for the engine. */
#include <string.h>

#include "common/backend_poll.h"
#include "common/metrics.h"
#include "router/engine/internal.h"

static moe_layer_call *call_of(micro_batch *b, int32_t layer) { return &b->layer_calls[layer % 2]; }
static bool known_early(const micro_batch *b, int32_t layer) { return b->engine->config.gating == MOE_GATING_PRE_GATE && layer > 0; }

bool in_place_ready(const moe_engine *e) {
    const moe_layer_experts *x = &e->config.layer_experts;
    bool looked_at = e->config.on_layer || e->virtual; /* what layers are given, what experts give */
    return x->ops && e->map && e->model->num_moe_layers > 0 && !looked_at && x->ops->ready(x->ctx);
}

void in_place_describe(micro_batch *b) {
    const moe_layer_experts *x = &b->engine->config.layer_experts;
    for (int32_t row = 0; row < b->num_rows; row++) b->combine_counts[row] = b->engine->model->top_k;
    b->segment.combine.outputs = NULL;
    b->segment.combine.dtype = MOE_F32;
    if (!x->ops->wants_activations(x->ctx)) b->segment.activations = NULL;
    b->layer_calls[0] = b->layer_calls[1] = (moe_layer_call){.ended = true};
}

static void count_rows(micro_batch *b, int32_t layer, const int32_t *experts) {
    const moe_model_config *model = b->engine->model;
    int32_t *rows = b->engine->scratch.rows_of_expert;
    memset(rows, 0, (size_t)model->num_experts * sizeof *rows);
    for (int64_t i = 0; i < (int64_t)b->num_rows * model->top_k; i++) rows[experts[i]]++;
    local_step_count_rows(b, layer, rows);
}

/* given_ns: 0 where the layer's segment has not ended yet. */
static void begin_call(micro_batch *b, int32_t layer, const moe_route *route, int64_t given_ns) {
    moe_engine *e = b->engine;
    moe_layer_call *call = call_of(b, layer);
    MOE_ASSERT(call->ended);
    *call = (moe_layer_call){.base = e->base,
                             .step = b->step,
                             .layer = layer,
                             .num_rows = b->num_rows,
                             .rows = b->segment.rows,
                             .experts = route->experts,
                             .activations = given_ns ? b->segment.activations : NULL,
                             .given_ns = given_ns};
    e->config.layer_experts.ops->begin(e->config.layer_experts.ctx, call);
    count_rows(b, layer, route->experts);
}

static void foretell(const micro_batch *b, int32_t layer) {
    const moe_engine *e = b->engine;
    plan_scratch *s = &b->engine->scratch;
    int32_t count = 0;
    memset(s->hinted, 0, (size_t)e->model->num_experts * sizeof *s->hinted);
    for (int64_t i = 0; i < (int64_t)b->num_rows * e->model->top_k; i++) s->hinted[b->next_route.experts[i]] = true;
    for (int32_t x = 0; x < e->model->num_experts; x++)
        if (s->hinted[x]) s->hints[count++] = (uint32_t)x;
    e->config.layer_experts.ops->foretell(e->config.layer_experts.ctx, b->step, layer, s->hints, count);
}

void in_place_segment_submitted(micro_batch *b) {
    int32_t layer = b->segment.index;
    if (known_early(b, layer) && layer < b->engine->model->num_moe_layers) begin_call(b, layer, &b->next_route, 0);
}

void in_place_segment_ended(micro_batch *b) {
    int32_t layer = b->segment.index;
    moe_layer_call *call = call_of(b, layer);
    b->stage_began_ns = engine_now(b->engine);
    b->state = BATCH_IN_PLACE;
    if (known_early(b, layer)) {
        call->activations = b->segment.activations;
        call->given_ns = b->stage_began_ns;
    } else {
        begin_call(b, layer, &b->route, b->stage_began_ns);
    }
    if (b->have_next_route && layer + 1 < b->engine->model->num_moe_layers) foretell(b, layer + 1);
}

bool in_place_before_ended(const micro_batch *b) {
    return b->segment.index == 0 || b->layer_calls[(b->segment.index - 1) % 2].ended;
}

static void observe(const moe_layer_call *call) {
    moe_metric_observe_ns(MOE_METRIC_STAGE_EXPERT, call->expert_ns);
    moe_metric_observe_ns(MOE_METRIC_STAGE_STALL, call->stall_ns);
    moe_metric_observe_ns(MOE_METRIC_STAGE_HOST, call->host_ns);
    if (call->layer == 0) moe_metric_observe_ns(MOE_METRIC_FIRST_STALL, call->stall_ns);
}

static void end_sequences(micro_batch *b, const moe_layer_call *failed) {
    for (int32_t i = 0; i < b->num_seqs; i++) scheduler_end(b->engine, b->seqs[i].seq, failed->status, failed->message);
}

bool in_place_settled(micro_batch *b) {
    const moe_layer_experts *x = &b->engine->config.layer_experts;
    if (b->segment.index == 0) return true;
    const moe_layer_call *before = call_of(b, b->segment.index - 1);
    if (!before->ended) x->ops->turn(x->ctx);
    if (!in_place_before_ended(b)) return false;
    observe(before);
    if (before->status != MOE_OK) end_sequences(b, before);
    return true;
}

bool in_place_submitted(const micro_batch *b) {
    const moe_layer_call *call = &b->layer_calls[b->segment.index % 2], *other = &b->layer_calls[1 - b->segment.index % 2];
    return other->ended && (call->submitted || call->status != MOE_OK);
}

void in_place_fail(micro_batch *b) {
    const moe_layer_call *call = call_of(b, b->segment.index);
    if (call->status != MOE_OK) end_sequences(b, call);
}

int64_t in_place_before_ns(const micro_batch *b) {
    return b->segment.index > 0 ? b->layer_calls[(b->segment.index - 1) % 2].expert_ns : 0;
}

bool in_place_ended(const micro_batch *b) { return b->layer_calls[0].ended && b->layer_calls[1].ended; }

void in_place_leave(micro_batch *b) {
    for (int i = 0; i < 2; i++)
        if (!b->layer_calls[i].ended && !b->layer_calls[i].activations) b->layer_calls[i].activations = b->segment.activations;
}

void in_place_await(micro_batch *b) {
    moe_engine *e = b->engine;
    const moe_layer_experts *x = &e->config.layer_experts;
    while (b->in_place && !in_place_ended(b)) {
        in_place_leave(b);
        moe_backend_poll(e->config.backend, &e->jobs_ended);
        if (x->ops->turn(x->ctx)) continue;
        if (moe_rpc_step(e->channels[0].rpc, engine_now(e) + MOE_ENGINE_IDLE_NS, NULL) != MOE_OK) return;
    }
}
