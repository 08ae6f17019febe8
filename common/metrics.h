/* The process's metrics: lock-free counters, gauges and histograms, rendered in Prometheus's text format.
 *
 * A metric is one row of MOE_METRICS: identifier, kind, name, labels (fixed text or ""), help. Rows that share a name
 * stand together and differ in their labels; those of expert workers come last, from WORKER_ROWS on. No label ever holds an expert
 * or a request. */
#pragma once
#include <stdint.h>

#include "common/buf.h"

typedef enum moe_metric_kind { MOE_COUNTER, MOE_GAUGE, MOE_HISTOGRAM_S /* seconds */, MOE_HISTOGRAM_COUNT } moe_metric_kind;

#define MOE_METRICS(X)                                                                                                           \
    X(REQUESTS_OK, COUNTER, "moesaic_requests_total", "status=\"ok\"", "Requests that ended, by outcome")                        \
    X(REQUESTS_CANCELLED, COUNTER, "moesaic_requests_total", "status=\"cancelled\"", "")                                         \
    X(REQUESTS_REJECTED, COUNTER, "moesaic_requests_total", "status=\"rejected\"", "")                                           \
    X(REQUESTS_FAILED, COUNTER, "moesaic_requests_total", "status=\"failed\"", "")                                               \
    X(REQUESTS_RUNNING, GAUGE, "moesaic_requests_running", "", "Requests that hold KV blocks")                                   \
    X(REQUESTS_WAITING, GAUGE, "moesaic_requests_waiting", "", "Requests queued for KV blocks")                                  \
    X(PREEMPTIONS, COUNTER, "moesaic_preemptions_total", "", "Sequences preempted for want of KV blocks and recomputed")         \
    X(PROMPT_TOKENS, COUNTER, "moesaic_prompt_tokens_total", "", "Prompt tokens prefilled")                                      \
    X(GENERATED_TOKENS, COUNTER, "moesaic_generation_tokens_total", "", "Tokens sampled")                                        \
    X(KV_BLOCKS_USED, GAUGE, "moesaic_kv_blocks_used", "", "KV blocks in use")                                                   \
    X(KV_BLOCKS_TOTAL, GAUGE, "moesaic_kv_blocks", "", "KV blocks in all")                                                       \
    X(TIME_TO_FIRST_TOKEN, HISTOGRAM_S, "moesaic_time_to_first_token_seconds", "", "From admission to the first token")          \
    X(INTER_TOKEN, HISTOGRAM_S, "moesaic_inter_token_seconds", "", "Between one token of a request and its next")                \
    X(REQUEST_SECONDS, HISTOGRAM_S, "moesaic_request_seconds", "", "From admission to the end of a request")                     \
    X(MICRO_BATCHES, GAUGE, "moesaic_micro_batches_in_flight", "", "Micro-batches in flight")                                    \
    X(STEP_TOKENS, HISTOGRAM_COUNT, "moesaic_step_tokens", "", "Tokens (rows) of a micro-batch")                                 \
    X(PIPELINE_DEGREE, HISTOGRAM_COUNT, "moesaic_pipeline_degree", "", "Chunks of a layer that go to the workers")              \
    X(LAYER_EXPERTS, HISTOGRAM_COUNT, "moesaic_layer_experts", "", "Distinct experts of one layer of one micro-batch")           \
    X(STAGE_ATTENTION, HISTOGRAM_S, "moesaic_stage_seconds", "stage=\"attention\"",                                              \
      "Time of one layer of one micro-batch, by stage")                                                                          \
    X(STAGE_HANDOFF, HISTOGRAM_S, "moesaic_stage_seconds", "stage=\"handoff\"", "")                                              \
    X(STAGE_PLAN, HISTOGRAM_S, "moesaic_stage_seconds", "stage=\"plan\"", "")                                                    \
    X(STAGE_WAIT, HISTOGRAM_S, "moesaic_stage_seconds", "stage=\"wait\"", "")                                                    \
    X(STAGE_EXPERT, HISTOGRAM_S, "moesaic_stage_seconds", "stage=\"expert\"", "")                                                \
    X(STAGE_COPY, HISTOGRAM_S, "moesaic_stage_seconds", "stage=\"copy\"", "")                                                    \
    X(STAGE_STALL, HISTOGRAM_S, "moesaic_stage_seconds", "stage=\"stall\"", "")                                                  \
    X(STAGE_HOST, HISTOGRAM_S, "moesaic_stage_seconds", "stage=\"host\"", "")                                                    \
    X(STAGE_COMBINE, HISTOGRAM_S, "moesaic_stage_seconds", "stage=\"combine\"", "")                                              \
    X(STAGE_LOGITS, HISTOGRAM_S, "moesaic_stage_seconds", "stage=\"logits\"", "")                                                \
    X(STAGE_SAMPLE, HISTOGRAM_S, "moesaic_stage_seconds", "stage=\"sample\"", "")                                                \
    X(STAGE_STEP, HISTOGRAM_S, "moesaic_stage_seconds", "stage=\"step\"", "")                                                    \
    X(EXPERT_CALLS, COUNTER, "moesaic_expert_calls_total", "", "Forward calls sent to expert workers")                           \
    X(EXPERT_CALL_BYTES_SENT, COUNTER, "moesaic_expert_call_bytes_total", "direction=\"sent\"",                                  \
      "Payload bytes of Forward calls")                                                                                          \
    X(EXPERT_CALL_BYTES_RECEIVED, COUNTER, "moesaic_expert_call_bytes_total", "direction=\"received\"", "")                      \
    X(EXPERT_RETRIES, COUNTER, "moesaic_expert_retries_total", "", "Forward calls sent again to another replica")                \
    X(STALE_REPLIES, COUNTER, "moesaic_stale_replies_total", "",                                                                 \
      "Replies that came too late, twice, or from an old incarnation")                                                           \
    X(BAD_MESSAGES, COUNTER, "moesaic_bad_messages_total", "", "Messages from peers that the validator refused")                 \
    X(REPLIES_DROPPED, COUNTER, "moesaic_rpc_replies_dropped_total", "", "Replies that found their peer gone or its queue full") \
    X(PEERS_SUSPECTED, COUNTER, "moesaic_peers_suspected_total", "", "Times a worker was suspected after missed progress")       \
    X(HEDGES, COUNTER, "moesaic_hedges_total", "", "Slow Forward calls for which other replicas were asked, too")                \
    X(HEDGES_WON, COUNTER, "moesaic_hedges_won_total", "", "Of those, calls that the other replicas answered first")             \
    X(POISON_REQUESTS, COUNTER, "moesaic_poison_requests_total", "", "Requests given up after two workers died over them")      \
    X(QUARANTINES, COUNTER, "moesaic_worker_quarantines_total", "", "Times a worker that kept failing was quarantined")         \
    X(WORKERS_QUARANTINED, GAUGE, "moesaic_workers_quarantined", "", "Expert workers in quarantine")                             \
    X(EPOCH, GAUGE, "moesaic_placement_epoch", "", "Epoch of the placement map in use")                                          \
    X(WORKERS_UP, GAUGE, "moesaic_workers_up", "", "Expert workers connected")                                                   \
    X(REDIS_UP, GAUGE, "moesaic_redis_up", "", "1 while the placement store answers")                                            \
    X(HINT_EXPERTS, COUNTER, "moesaic_hint_experts_total", "", "True experts of tokens for which a hint was made")               \
    X(HINT_EXPERTS_FOUND, COUNTER, "moesaic_hint_experts_found_total", "", "Of those, experts that the hint had named")          \
    X(EXPERT_HITS, COUNTER, "moesaic_expert_residency_total", "outcome=\"hit\"",                                                 \
      "Experts of calls to workers with tiers: in a device slot, on their way, or neither")                                      \
    X(EXPERT_LATE_HITS, COUNTER, "moesaic_expert_residency_total", "outcome=\"late_hit\"", "")                                    \
    X(EXPERT_MISSES, COUNTER, "moesaic_expert_residency_total", "outcome=\"miss\"", "")                                           \
    X(EXPERT_FIRST_MISSES, COUNTER, "moesaic_expert_first_layer_misses_total", "",                                               \
      "Of the misses: those at the first MoE layer, which nothing foretells")                                                    \
    X(FIRST_STALL, HISTOGRAM_S, "moesaic_first_layer_stall_seconds", "", "Of the stage stall: that of the first MoE layer")      \
    X(EXPERT_COPIED_BYTES, COUNTER, "moesaic_expert_copied_bytes_total", "", "Expert weights copied to workers' devices")        \
    X(EXPERT_WASTED_BYTES, COUNTER, "moesaic_expert_wasted_bytes_total", "", "Of those, of experts that left again unused")      \
    X(EXPERT_HOST, COUNTER, "moesaic_expert_host_total", "", "Cold experts of batches that workers' hosts computed")               \
    X(EXPERT_HOST_ROWS, COUNTER, "moesaic_expert_host_rows_total", "", "Rows of those")                                          \
    X(VIRTUAL_EXPERTS, GAUGE, "moesaic_virtual_experts", "",                                                                     \
      "Experts that tokens may be routed to under --expert-budget, of all layers; 0: there is no budget")                        \
    X(VIRTUAL_SWAPS, COUNTER, "moesaic_virtual_expert_swaps_total", "", "Experts that took another's place among those")         \
    X(GATE_CHOICES, COUNTER, "moesaic_gate_choices_total", "", "Under --expert-budget: what gates alone would have chosen")      \
    X(GATE_CHOICES_HELD, COUNTER, "moesaic_gate_choices_held_total", "", "Of those, experts that tokens could be routed to")     \
    X(GATE_WEIGHT, COUNTER, "moesaic_gate_weight_millionths_total", "", "As moesaic_gate_choices_total, by gate weight")         \
    X(GATE_WEIGHT_HELD, COUNTER, "moesaic_gate_weight_held_millionths_total", "", "Likewise of those that were held")            \
    X(PREFETCHES, COUNTER, "moesaic_prefetches_total", "", "Prefetch calls: hints to workers without tokens of a layer")         \
    X(WORKER_ROWS, COUNTER, "moesaic_worker_rows_total", "", "Expert rows computed (one token at one expert)")                   \
    X(WORKER_BATCH_ROWS, HISTOGRAM_COUNT, "moesaic_worker_batch_rows", "", "Expert rows of one batch")                           \
    X(WORKER_BATCH_EXPERTS, HISTOGRAM_COUNT, "moesaic_worker_batch_experts", "", "Distinct experts of one batch")                \
    X(WORKER_QUEUE, HISTOGRAM_S, "moesaic_worker_seconds", "stage=\"queue\"", "Time of one Forward call in a worker, by stage")  \
    X(WORKER_COMPUTE, HISTOGRAM_S, "moesaic_worker_seconds", "stage=\"compute\"", "")                                            \
    X(WORKER_COPY, HISTOGRAM_S, "moesaic_worker_seconds", "stage=\"copy\"", "")                                                  \
    X(WORKER_QUEUED, GAUGE, "moesaic_worker_queued_calls", "", "Forward calls queued in a worker")                               \
    X(WORKER_EXPERTS, GAUGE, "moesaic_worker_experts", "", "Expert replicas held")                                               \
    X(WORKER_WEIGHT_BYTES, GAUGE, "moesaic_worker_weight_bytes", "", "Bytes of the weights held")                                \
    X(WORKER_ROUTERS, GAUGE, "moesaic_worker_routers", "", "Routers connected to a worker")                                      \
    X(WORKER_EXPIRED, COUNTER, "moesaic_worker_expired_total", "", "Calls dropped because their deadline had passed")             \
    X(WORKER_DEFECTS, COUNTER, "moesaic_worker_defects_total", "", "Times this worker found itself defective")

/* The same numbers under vLLM's names: identifier, vLLM's name. vLLM labels them with the model's name. */
#define MOE_METRICS_VLLM(X)                                    \
    X(REQUESTS_RUNNING, "vllm:num_requests_running")           \
    X(REQUESTS_WAITING, "vllm:num_requests_waiting")           \
    X(PREEMPTIONS, "vllm:num_preemptions_total")               \
    X(PROMPT_TOKENS, "vllm:prompt_tokens_total")               \
    X(GENERATED_TOKENS, "vllm:generation_tokens_total")        \
    X(REQUESTS_OK, "vllm:request_success_total")               \
    X(TIME_TO_FIRST_TOKEN, "vllm:time_to_first_token_seconds") \
    X(INTER_TOKEN, "vllm:inter_token_latency_seconds")         \
    X(REQUEST_SECONDS, "vllm:e2e_request_latency_seconds")     \
    X(STEP_TOKENS, "vllm:iteration_tokens_total")

typedef enum moe_metric {
#define MOE_METRIC_ID(id, kind, name, labels, help) MOE_METRIC_##id,
    MOE_METRICS(MOE_METRIC_ID)
#undef MOE_METRIC_ID
        MOE_METRIC_COUNT
} moe_metric;

void moe_metric_add(moe_metric metric, int64_t amount);      /* counters and gauges */
void moe_metric_set(moe_metric metric, int64_t value);       /* gauges */
void moe_metric_observe_ns(moe_metric metric, int64_t ns);   /* histograms of seconds */
void moe_metric_observe_count(moe_metric metric, int64_t n); /* histograms of counts */
int64_t moe_metric_value(moe_metric metric);                 /* counter or gauge value; a histogram's count */
int64_t moe_metric_sum(moe_metric metric);                   /* of a histogram's observations: ns or counts */

/* Appends all metrics in Prometheus's text exposition format 0.0.4. */
void moe_metrics_render(moe_buf *out);

/* Appends those of a process that is an expert worker alone, in the same format: a router's would all be 0 there. */
void moe_metrics_render_worker(moe_buf *out);

/* Appends those that vLLM has too, once more under vLLM's names (--metrics-compat=vllm), so that its dashboards work. */
void moe_metrics_render_vllm(const char *model, moe_buf *out);
