/* In how many chunks a layer's rows go to the workers: the pipeline degree (Tutel). While one chunk is planned and packed, those before it
 * are on the wire, computed and placed; a chunk fits caches and rings that the whole would not. But each chunk reads its experts'
 * weights anew and is a message of its own. What pays is found while serving: every now and then a layer goes out in twice or half as
 * many chunks, and the degree moves there if that was faster. Pure, for one thread. */
#pragma once
#include <stdint.h>

#define MOE_PIPELINE_MAX_DEGREE 128
#define MOE_PIPELINE_MIN_CHUNK_BYTES (INT64_C(256) << 10) /* smaller chunks are not tried */
#define MOE_PIPELINE_FIRST_CHUNK_BYTES (INT64_C(4) << 20)  /* before anything is known */

enum {
    MOE_PIPELINE_DEGREES = 8,      /* 1, 2, 4, … MOE_PIPELINE_MAX_DEGREE */
    MOE_PIPELINE_BUCKETS = 16,     /* of layers by their size: 1, 2, 4, … smallest chunks */
    MOE_PIPELINE_TRIAL_EVERY = 2,  /* layers; doubled after each trial that did not pay, */
    MOE_PIPELINE_TRIAL_SELDOM = 64 /* up to this */
};

typedef struct moe_pipeline_bucket {
    double cost[MOE_PIPELINE_DEGREES]; /* ns per byte, exponential average; 0: unknown */
    int32_t best;                      /* log2 of the degree in use */
    int32_t until_trial, interval;     /* layers */
    int32_t direction;                 /* of the next trial: 1 or -1 */
} moe_pipeline_bucket;

typedef struct moe_pipeline {
    moe_pipeline_bucket buckets[MOE_PIPELINE_BUCKETS];
} moe_pipeline;

void moe_pipeline_init(moe_pipeline *p);
/* The degree of the next layer, whose rows and outputs are so many bytes: a power of two. */
int32_t moe_pipeline_degree(const moe_pipeline *p, int64_t bytes);
/* Such a layer took so long from its plan to its last answer. */
void moe_pipeline_observe(moe_pipeline *p, int64_t bytes, int32_t degree, int64_t ns);
