#include "cli/bench.h"

#include <stdatomic.h>
#include <string.h>

#include "cli/signals.h"
#include "common/alloc.h"
#include "common/clock.h"
#include "common/random.h"

#define END_POLL_NS (20 * MOE_NS_PER_MS) /* how often the end of a measurement is looked for; it does not enter the result */

const char *const moe_bench_stage_names[MOE_BENCH_STAGES] = {"attention", "handoff", "plan",   "wait",   "copy",   "stall",
                                                             "host",      "expert",    "combine", "logits", "sample", "step"};

static const moe_metric stage_metrics[MOE_BENCH_STAGES] = {
    MOE_METRIC_STAGE_ATTENTION, MOE_METRIC_STAGE_HANDOFF, MOE_METRIC_STAGE_PLAN,    MOE_METRIC_STAGE_WAIT,
    MOE_METRIC_STAGE_COPY,      MOE_METRIC_STAGE_STALL,   MOE_METRIC_STAGE_HOST,    MOE_METRIC_STAGE_EXPERT,  MOE_METRIC_STAGE_COMBINE,
    MOE_METRIC_STAGE_LOGITS,    MOE_METRIC_STAGE_SAMPLE,  MOE_METRIC_STAGE_STEP};

typedef struct reading {
    int64_t at_ns, tokens, sum_ns[MOE_BENCH_STAGES], count[MOE_BENCH_STAGES];
    int64_t steps, layers, layer_experts, call_bytes;
    int64_t dispatched, degrees; /* layers that went to workers, and the chunks of all of them */
    int64_t swaps, hits, late_hits, misses, first_misses, copied_bytes, wasted_bytes;
    int64_t first_stall_ns, first_stalls;
    int64_t host_experts, host_rows;
    int32_t leader_tokens; /* of the first request */
} reading;

/* All but `ended` belongs to the engine's thread between the first submission and the last end. */
typedef struct measurement {
    const moe_bench_case *c;
    reading first, last;             /* first: when all had their first token */
    reading begin, end;              /* tokens of the first request while all decoded; at_ns 0: none yet */
    int32_t requests, started, done; /* requests: that were submitted */
    int32_t leader_tokens;
    int64_t tokens;
    moe_status status;
    moe_error error;
    _Atomic int32_t ended;
} measurement;

/* One of the requests. */
typedef struct member {
    measurement *m;
    bool leader; /* the first: its tokens mark the steps */
} member;

static void take_reading(const measurement *m, reading *out) {
    out->at_ns = moe_now_ns(moe_clock_real());
    out->tokens = m->tokens;
    out->steps = moe_metric_value(MOE_METRIC_STEP_TOKENS);
    out->layers = moe_metric_value(MOE_METRIC_LAYER_EXPERTS);
    out->layer_experts = moe_metric_sum(MOE_METRIC_LAYER_EXPERTS);
    out->degrees = moe_metric_sum(MOE_METRIC_PIPELINE_DEGREE);
    out->dispatched = moe_metric_value(MOE_METRIC_PIPELINE_DEGREE);
    out->call_bytes =
        moe_metric_value(MOE_METRIC_EXPERT_CALL_BYTES_SENT) + moe_metric_value(MOE_METRIC_EXPERT_CALL_BYTES_RECEIVED);
    out->swaps = moe_metric_value(MOE_METRIC_VIRTUAL_SWAPS);
    out->hits = moe_metric_value(MOE_METRIC_EXPERT_HITS);
    out->late_hits = moe_metric_value(MOE_METRIC_EXPERT_LATE_HITS);
    out->misses = moe_metric_value(MOE_METRIC_EXPERT_MISSES);
    out->first_misses = moe_metric_value(MOE_METRIC_EXPERT_FIRST_MISSES);
    out->first_stall_ns = moe_metric_sum(MOE_METRIC_FIRST_STALL);
    out->first_stalls = moe_metric_value(MOE_METRIC_FIRST_STALL);
    out->copied_bytes = moe_metric_value(MOE_METRIC_EXPERT_COPIED_BYTES);
    out->wasted_bytes = moe_metric_value(MOE_METRIC_EXPERT_WASTED_BYTES);
    out->host_experts = moe_metric_value(MOE_METRIC_EXPERT_HOST);
    out->host_rows = moe_metric_value(MOE_METRIC_EXPERT_HOST_ROWS);
    out->leader_tokens = m->leader_tokens;
    for (int s = 0; s < MOE_BENCH_STAGES; s++) {
        out->sum_ns[s] = moe_metric_sum(stage_metrics[s]);
        out->count[s] = moe_metric_value(stage_metrics[s]);
    }
}

static void on_output(void *ctx, const moe_output *output) {
    const member *one = ctx;
    measurement *m = one->m;
    bool decode = m->c->output_tokens > 1, first = output->num_tokens > 0 && output->completion_tokens == output->num_tokens;
    m->tokens += output->num_tokens;
    m->started += first;
    if (one->leader) m->leader_tokens = output->completion_tokens;
    if (first && m->started == m->c->requests && decode) take_reading(m, &m->first);
    if (one->leader && output->num_tokens > 0 && m->started == m->c->requests && decode)
        take_reading(m, m->begin.at_ns ? &m->end : &m->begin);
    if (output->finish == MOE_FINISH_NONE) return;
    if (output->finish == MOE_FINISH_ERROR && m->status == MOE_OK)
        m->status = moe_fail(&m->error, output->status, "%s", output->message);
    if (++m->done == m->c->requests) take_reading(m, &m->last);
    atomic_fetch_add(&m->ended, 1);
}

static moe_status submit(measurement *m, const moe_inference *inference, int32_t *prompt, member *one, uint64_t *id,
                         moe_error *err) {
    moe_random random = {moe_mix64(m->c->seed * MOE_BENCH_MAX_REQUESTS + (uint64_t)m->requests)};
    for (int32_t i = 0; i < m->c->prompt_tokens; i++) prompt[i] = (int32_t)moe_random_below(&random, (uint64_t)inference->vocab);
    moe_request request = {.id = "bench", .prompt = prompt, .prompt_tokens = m->c->prompt_tokens};
    moe_inference_default_sampling(inference, &request.sampling);
    request.sampling.temperature = 0;
    request.sampling.repetition_penalty = 1;
    request.sampling.max_tokens = m->c->output_tokens;
    request.sampling.ignore_eos = true;
    request.sampling.logprobs = request.sampling.prompt_logprobs = -1;
    *one = (member){.m = m, .leader = m->requests == 0};
    return inference->ops->submit(inference->ctx, &request, on_output, one, id, err);
}

/* Until every submitted request has ended, because their last events write into the measurement. */
static bool await_end(measurement *m, const moe_inference *inference, const uint64_t *ids) {
    bool interrupted = false;
    while (atomic_load(&m->ended) < m->requests) {
        if (!moe_signals_wait(END_POLL_NS)) continue;
        for (int32_t i = 0; i < m->requests; i++) inference->ops->cancel(inference->ctx, ids[i]);
        interrupted = true;
    }
    return interrupted;
}

static void subtract(const measurement *m, moe_bench_sample *out) {
    bool prefill = m->c->output_tokens == 1, steady = m->end.at_ns != 0;
    const reading *from = steady ? &m->begin : &m->first, *to = steady ? &m->end : &m->last;
    int64_t layers = to->layers - from->layers;
    out->tokens = prefill ? (int64_t)m->c->requests * m->c->prompt_tokens : to->tokens - from->tokens;
    out->time_ns = to->at_ns - from->at_ns;
    out->steps = to->steps - from->steps;
    int64_t dispatched = to->dispatched - from->dispatched;
    out->pipeline_degree = dispatched > 0 ? (double)(to->degrees - from->degrees) / (double)dispatched : 0;
    out->layer_experts = layers > 0 ? (double)(to->layer_experts - from->layer_experts) / (double)layers : 0;
    out->context = m->c->prompt_tokens + (from->leader_tokens + to->leader_tokens) / 2.0;
    out->call_bytes = to->call_bytes - from->call_bytes;
    out->swaps = to->swaps - from->swaps;
    out->hits = to->hits - from->hits;
    out->late_hits = to->late_hits - from->late_hits;
    out->misses = to->misses - from->misses;
    out->first_misses = to->first_misses - from->first_misses;
    int64_t first_stalls = to->first_stalls - from->first_stalls;
    out->first_stall_ns = first_stalls > 0 ? (double)(to->first_stall_ns - from->first_stall_ns) / (double)first_stalls : 0;
    out->copied_bytes = to->copied_bytes - from->copied_bytes;
    out->wasted_bytes = to->wasted_bytes - from->wasted_bytes;
    out->host_experts = to->host_experts - from->host_experts;
    out->host_rows = to->host_rows - from->host_rows;
    for (int s = 0; s < MOE_BENCH_STAGES; s++) {
        int64_t count = to->count[s] - from->count[s];
        out->stage_ns[s] = count > 0 ? (double)(to->sum_ns[s] - from->sum_ns[s]) / (double)count : 0;
    }
}

moe_status moe_bench_run(const moe_inference *inference, const moe_bench_case *c, moe_bench_sample *out, moe_error *err) {
    measurement m = {.c = c};
    MOE_ASSERT(c->requests >= 1 && c->requests <= MOE_BENCH_MAX_REQUESTS);
    uint64_t ids[MOE_BENCH_MAX_REQUESTS];
    member members[MOE_BENCH_MAX_REQUESTS];
    int32_t *prompt = moe_calloc((size_t)c->prompt_tokens, sizeof *prompt);
    if (!prompt) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    take_reading(&m, &m.first);
    moe_status status = MOE_OK;
    while (m.requests < c->requests && status == MOE_OK) {
        status = submit(&m, inference, prompt, &members[m.requests], &ids[m.requests], err);
        if (status == MOE_OK) m.requests++;
    }
    bool interrupted = await_end(&m, inference, ids);
    moe_free(prompt);
    if (interrupted) return moe_fail(err, MOE_CANCELLED, "interrupted");
    if (status == MOE_OK && m.status != MOE_OK) status = moe_fail(err, m.status, "%s", m.error.message);
    if (status == MOE_OK) subtract(&m, out);
    return status;
}
