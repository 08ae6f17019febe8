/* One measurement of the engine, without HTTP: what `moesaic bench` repeats. */
#pragma once
#include "common/metrics.h"
#include "router/inference.h"

#define MOE_BENCH_MAX_REQUESTS 1024

typedef enum moe_bench_stage {
    MOE_BENCH_ATTENTION,
    MOE_BENCH_HANDOFF,
    MOE_BENCH_PLAN,
    MOE_BENCH_WAIT,
    MOE_BENCH_COPY,
    MOE_BENCH_STALL, /* of workers' computation, for experts on their way to the device */
    MOE_BENCH_HOST,  /* cold experts on workers' hosts, part of the next or beside it */
    MOE_BENCH_EXPERT,
    MOE_BENCH_COMBINE,
    MOE_BENCH_LOGITS,
    MOE_BENCH_SAMPLE,
    MOE_BENCH_STEP, /* a whole forward step in one job */
    MOE_BENCH_STAGES
} moe_bench_stage;

extern const char *const moe_bench_stage_names[MOE_BENCH_STAGES];

/* With output_tokens of 1 the prefill is measured: from submission to the first token. Otherwise the decode: the steps in which
 * all requests decode, from one token of the first request to another, so that each of them counts one token of every request.
 * (Where the first request ends before the last has its first token there are none: then from that token to the last token of
 * all.) */
typedef struct moe_bench_case {
    int32_t requests; /* at once; 1 … MOE_BENCH_MAX_REQUESTS */
    int32_t prompt_tokens, output_tokens;
    uint64_t seed; /* of the prompts' token ids */
} moe_bench_case;

typedef struct moe_bench_sample {
    int64_t tokens; /* prefilled or decoded in that time */
    int64_t time_ns;
    int64_t steps;                     /* micro-batches in that time */
    double layer_experts;              /* mean number of distinct experts of a MoE layer of a micro-batch */
    double context;                    /* of a decode: mean number of tokens of a sequence in the KV cache */
    int64_t swaps; /* of experts, under an expert budget */
    int64_t hits, late_hits, misses, copied_bytes, wasted_bytes; /* of workers with tiers; see moe_residency_counts */
    int64_t first_misses;              /* of these, at the first MoE layer */
    double first_stall_ns;             /* mean stall of the first MoE layer of one micro-batch */
    int64_t host_experts, host_rows;   /* of batches, see moe_residency_counts */
    double pipeline_degree;            /* mean number of chunks of a layer that went to workers */
    int64_t call_bytes;                /* payloads of the calls to expert workers, both ways */
    double stage_ns[MOE_BENCH_STAGES]; /* mean of one layer of one micro-batch; logits, sample, step: of one micro-batch */
} moe_bench_sample;

/* Greedy, eos ignored. Blocks until all requests have ended; one measurement at a time in a process, because stage times are
 * differences of its metrics. CANCELLED: a termination signal came (moe_signals_block was called); otherwise the first error of a
 * request. */
moe_status moe_bench_run(const moe_inference *inference, const moe_bench_case *c, moe_bench_sample *out, moe_error *err);
