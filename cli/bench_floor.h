/* The least time that a forward step can take on a machine: what it must read and compute, by the machine's measured bounds. */
#pragma once
#include "common/model/model.h"

typedef struct moe_bench_bounds {
    double bytes_per_second; /* of a device-to-device copy, read and written bytes counted; 0: not known */
    double flop_per_second;  /* of a large matrix product; 0: not known */
} moe_bench_bounds;

typedef struct moe_bench_step {
    double rows;          /* tokens computed */
    double logit_rows;    /* of those, rows with logits */
    double attended;      /* positions that the rows attend to, summed over rows */
    double kv_tokens;     /* tokens whose keys and values are read, summed over sequences */
    double layer_experts; /* distinct experts of a MoE layer */
} moe_bench_step;

typedef struct moe_bench_work {
    double weight_bytes, kv_bytes, flop;
    double seconds; /* Σ over the step's products of max(bytes / bandwidth, FLOP / rate); 0 where a bound is not known */
} moe_bench_work;

/* Weights as stored, each read once; activations are taken to stay in caches. */
moe_bench_work moe_bench_floor(const moe_model *model, int64_t kv_token_bytes, const moe_bench_step *step,
                               const moe_bench_bounds *bounds);
