/* `moesaic trace`: records which experts texts are routed to. `moesaic trace replay`: simulates a worker whose experts do not all
 * fit, with each of its eviction policies. */
#include <inttypes.h>
#include <stdio.h>

#include "cli/commands.h"
#include "cli/evaluate.h"
#include "cli/node_options.h"
#include "cli/trace_record.h"
#include "cli/trace_replay.h"
#include "cli/trace_timeline.h"
#include "common/log.h"
#include "expert-worker/eviction.h"

static const double parts[] = {0.10, 0.25, 0.50, 0.75}; /* of the experts that have a slot */
#define NUM_PARTS ((int)(sizeof parts / sizeof *parts))

/* ---- record ---- */

static moe_status describe(const moe_router_node_config *node, moe_trace *trace, moe_error *err) {
    moe_model *m;
    moe_status status = moe_model_source_open(&node->source, &m, err);
    if (status != MOE_OK) return status;
    const moe_model_config *c = &m->config;
    *trace = (moe_trace){.num_layers = c->num_moe_layers,
                         .num_experts = c->num_experts,
                         .top_k = c->top_k,
                         .num_planes = m->has_pre_gates ? MOE_TRACE_PLANES : MOE_TRACE_PRE_GATE};
    if (c->num_moe_layers == 0) {
        status = moe_fail(err, MOE_FAILED_PRECONDITION, "%s has no experts", m->dir);
    } else {
        const moe_ffn_weights *w = moe_model_expert(m, 0, 0);
        trace->expert_bytes = (int64_t)(moe_tensor_bytes(&w->gate) + moe_tensor_bytes(&w->up) + moe_tensor_bytes(&w->down));
    }
    moe_model_close(&m);
    return status;
}

static moe_status record_pass(moe_router_node_config node, moe_trace_recorder *recorder, const json_t *texts, moe_error *err) {
    moe_evaluation evaluation = {.texts = texts, .what = recorder->pre_gate ? "by pre-gates" : "by gates"};
    node.gating = recorder->pre_gate ? MOE_GATING_PRE_GATE : MOE_GATING_HINT;
    node.micro_batches = 1;
    node.on_layer = moe_trace_on_layer;
    node.on_layer_ctx = recorder;
    moe_status status = moe_evaluate(&node, &evaluation, NULL, err);
    return status == MOE_OK && recorder->status != MOE_OK ? moe_fail(err, recorder->status, "%s", recorder->error.message)
                                                          : status;
}

static moe_status record(const moe_options *o, moe_trace *trace, moe_error *err) {
    moe_router_node_config node = {.embedded = true, .id = "trace"};
    moe_trace_recorder recorder = {.trace = trace};
    json_t *texts = NULL;
    moe_status status = moe_engine_options(o, &node, err);
    if (status == MOE_OK) status = moe_dummy_routing_option(o, &node.dummy_routing, err);
    if (status == MOE_OK) status = moe_texts_read(moe_option_text(o, "data"), (int32_t)moe_option_int(o, "limit"), &texts, err);
    if (status == MOE_OK) status = describe(&node, trace, err);
    if (status == MOE_OK) status = record_pass(node, &recorder, texts, err);
    recorder.pre_gate = true;
    if (status == MOE_OK && trace->num_planes > MOE_TRACE_PRE_GATE) status = record_pass(node, &recorder, texts, err);
    if (status == MOE_OK) status = moe_trace_write(trace, moe_option_text(o, "output"), err);
    json_decref(texts);
    return status;
}

int moe_command_trace(const moe_options *o) {
    moe_trace trace = {0};
    moe_error err;
    if (!moe_option_given(o, "log-level")) moe_log_init(MOE_LOG_WARN, "trace");
    bool drawn = moe_option_text(o, "timeline") != NULL;
    if (!drawn && (!moe_option_text(o, "data") || !moe_option_text(o, "output"))) {
        fprintf(stderr, "moesaic: trace needs --data FILE and -o FILE, or --timeline FILE\n");
        return 2;
    }
    if (!drawn && moe_option_given(o, "gating")) {
        fprintf(stderr, "moesaic: trace records every gating; --gating goes with --timeline\n");
        return 2;
    }
    if (drawn) return moe_trace_timeline(o);
    moe_status status = record(o, &trace, &err);
    moe_trace_free(&trace);
    return status == MOE_OK ? 0 : moe_command_failed(&err);
}

/* ---- replay ---- */

static void print_heading(const moe_trace *t, int32_t requests) {
    int64_t tokens = 0;
    for (int32_t i = 0; i < t->num_texts; i++) tokens += t->texts[i].num_tokens;
    printf("%" PRId64 " tokens, %d at once; %d layers of %d experts, top %d, %.3f MB each\n", tokens, requests, t->num_layers,
           t->num_experts, t->top_k, (double)t->expert_bytes / 1e6);
    printf("%-9s %-10s", "slots", "");
    for (int i = 0; i < NUM_PARTS; i++) printf("  %13.0f %% = %3d", 100 * parts[i], moe_replay_slots(t, parts[i]));
    printf("\n%-9s %-10s", "gating", "eviction");
    for (int i = 0; i < NUM_PARTS; i++) printf("  %6s %6s %7s", "hits", "MB/tok", "wasted");
    printf("\n");
}

static moe_status print_row(const moe_trace *t, moe_replay_config *config, const char *gating, moe_error *err) {
    printf("%-9s %-10s", gating, config->policy);
    for (int i = 0; i < NUM_PARTS; i++) {
        moe_replay_result r;
        config->part = parts[i];
        moe_status status = moe_replay(t, config, &r, err);
        if (status != MOE_OK) return status;
        printf("  %4.1f %% %6.3f %5.1f %%", r.uses ? 100.0 * (double)r.hits / (double)r.uses : 0,
               r.tokens ? (double)(r.copies * t->expert_bytes) / 1e6 / (double)r.tokens : 0,
               r.copies ? 100.0 * (double)r.wasted_copies / (double)r.copies : 0);
        fflush(stdout);
    }
    printf("\n");
    return MOE_OK;
}

static moe_status replay(const moe_options *o, const moe_trace *t, moe_error *err) {
    static const char *const gatings[] = {"gate", "hint", "pre-gate"};
    moe_replay_config config = {.requests = (int32_t)moe_option_int(o, "requests")};
    moe_status status = MOE_OK;
    print_heading(t, config.requests);
    for (int gating = MOE_GATING_GATE; gating < t->num_planes && status == MOE_OK; gating++)
        for (int32_t i = 0; moe_eviction_policy_name(i) && status == MOE_OK; i++) {
            config.gating = (moe_gating)gating;
            config.policy = moe_eviction_policy_name(i);
            status = print_row(t, &config, gatings[gating], err);
        }
    return status;
}

int moe_command_trace_replay(const moe_options *o) {
    moe_trace trace;
    moe_error err;
    moe_status status = moe_trace_read(moe_options_positional(o), &trace, &err);
    if (status == MOE_OK) status = replay(o, &trace, &err);
    moe_trace_free(&trace);
    return status == MOE_OK ? 0 : moe_command_failed(&err);
}
