#include "cli/trace_timeline.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "cli/bench.h"
#include "cli/node_options.h"
#include "cli/signals.h"
#include "cli/timeline_svg.h"

#define MAX_EVENTS (1 << 16)
#define PROMPT_TOKENS 16
#define OUTPUT_TOKENS 32
#define READY_POLL_NS (10 * MOE_NS_PER_MS)

static moe_status await_ready(moe_router_node *node, moe_error *err) {
    while (!moe_router_node_ready(node))
        if (moe_signals_wait(READY_POLL_NS)) return moe_fail(err, MOE_CANCELLED, "interrupted");
    return MOE_OK;
}

static moe_status generate(const moe_router_node_config *config, int32_t requests, moe_timeline_picture *picture, moe_error *err) {
    const moe_bench_case generation = {.requests = requests, .prompt_tokens = PROMPT_TOKENS, .output_tokens = OUTPUT_TOKENS, .seed = 1};
    moe_bench_sample sample;
    moe_router_node *node;
    moe_status status = moe_router_node_open(config, &node, err);
    if (status != MOE_OK) return status;
    picture->num_moe_layers = moe_router_node_model(node)->config.num_moe_layers;
    status = await_ready(node, err);
    if (status == MOE_OK) status = moe_bench_run(moe_router_node_inference(node), &generation, &sample, err);
    moe_router_node_close(&node); /* its thread has ended: the events are ours */
    return status;
}

static moe_status draw(const char *file, const moe_timeline_picture *picture, moe_error *err) {
    FILE *out = fopen(file, "w");
    if (!out) return moe_fail(err, MOE_PERMISSION_DENIED, "cannot write %s: %s", file, strerror(errno));
    moe_timeline_draw(out, picture);
    if (fclose(out) != 0) return moe_fail(err, MOE_DATA_LOSS, "cannot write %s: %s", file, strerror(errno));
    return MOE_OK;
}

/* Of all that was recorded, beside what the metrics say. */
static void print_sums(const moe_timeline *t) {
    int64_t stall_ns = 0, copies[3] = {0};
    for (int32_t i = 0; i < moe_timeline_count(t); i++) {
        const moe_timeline_event *e = moe_timeline_at(t, i);
        if (e->kind == MOE_TIMELINE_STALL) stall_ns += e->end_ns - e->begin_ns;
        if (e->kind >= MOE_TIMELINE_AHEAD) copies[e->kind - MOE_TIMELINE_AHEAD]++;
    }
    printf("copies ahead %lld, on demand %lld, given up %lld; waiting %.3f ms; by the metrics: %lld bytes copied, waiting %.3f ms\n",
           (long long)copies[0], (long long)copies[1], (long long)copies[2], (double)stall_ns / 1e6,
           (long long)moe_metric_value(MOE_METRIC_EXPERT_COPIED_BYTES), (double)moe_metric_sum(MOE_METRIC_STAGE_STALL) / 1e6);
}

int moe_trace_timeline(const moe_options *o) {
    const char *device = moe_option_text(o, "device-memory"), *dummy = moe_option_text(o, "dummy-routing");
    moe_router_node_config config = {.embedded = true, .id = "trace"};
    moe_timeline *timeline = NULL;
    moe_error err;
    char title[256];
    moe_signals_block();
    moe_status status = moe_engine_options(o, &config, &err);
    if (status == MOE_OK) status = moe_dummy_routing_option(o, &config.dummy_routing, &err);
    if (status == MOE_OK) status = moe_timeline_new(moe_clock_real(), MAX_EVENTS, &timeline, &err);
    config.gating = moe_gating_option(o);
    config.skip_tokenizer = true;
    config.local_steps = device != NULL; /* in place then; inside one job of the backend there is nothing to see */
    config.micro_batches = 1;
    config.timeline = timeline;
    const char *slash = strrchr(config.source.dir, '/'), *name = slash && slash[1] ? slash + 1 : config.source.dir;
    snprintf(title, sizeof title, "%s, --gating %s%s%s%s%s", name, moe_option_text(o, "gating"), device ? " --device-memory " : "",
             device ? device : "", dummy ? " --dummy-routing " : "", dummy ? dummy : "");
    moe_timeline_picture picture = {.timeline = timeline, .title = title};
    if (status == MOE_OK) status = generate(&config, (int32_t)moe_option_int(o, "requests"), &picture, &err);
    if (status == MOE_OK) status = draw(moe_option_text(o, "timeline"), &picture, &err);
    if (status == MOE_OK) print_sums(timeline);
    moe_timeline_free(&timeline);
    return status == MOE_OK ? 0 : moe_command_failed(&err);
}
