#include "router/engine/pipeline.h"

#define AVERAGE_OVER 4    /* layers */
#define MUST_GAIN 0.97    /* of the time, before the degree moves */
#define MOST_OF_AVERAGE 2 /* what took longer was held up by something else */

static int32_t log2_of(int64_t value) { return 63 - __builtin_clzll((uint64_t)value); }

/* Of layers of that size; -1: smaller than a chunk may be. */
static int32_t bucket_of(int64_t bytes) {
    if (bytes < MOE_PIPELINE_MIN_CHUNK_BYTES) return -1;
    int32_t bucket = log2_of(bytes / MOE_PIPELINE_MIN_CHUNK_BYTES);
    return bucket < MOE_PIPELINE_BUCKETS ? bucket : MOE_PIPELINE_BUCKETS - 1;
}

static void schedule_trial(moe_pipeline_bucket *b, int32_t interval) {
    b->interval = interval < MOE_PIPELINE_TRIAL_SELDOM ? interval : MOE_PIPELINE_TRIAL_SELDOM;
    b->until_trial = b->interval;
}

void moe_pipeline_init(moe_pipeline *p) {
    const int32_t whole = log2_of(MOE_PIPELINE_FIRST_CHUNK_BYTES / MOE_PIPELINE_MIN_CHUNK_BYTES); /* up to this bucket */
    *p = (moe_pipeline){0};
    for (int32_t i = 0; i < MOE_PIPELINE_BUCKETS; i++) {
        p->buckets[i].best = i < whole ? 0 : i - whole < MOE_PIPELINE_DEGREES ? i - whole : MOE_PIPELINE_DEGREES - 1;
        p->buckets[i].direction = 1;
        schedule_trial(&p->buckets[i], MOE_PIPELINE_TRIAL_EVERY);
    }
}

int32_t moe_pipeline_degree(const moe_pipeline *p, int64_t bytes) {
    int32_t bucket = bucket_of(bytes), most = bucket < MOE_PIPELINE_DEGREES ? bucket : MOE_PIPELINE_DEGREES - 1;
    if (most <= 0) return 1;
    const moe_pipeline_bucket *b = &p->buckets[bucket];
    if (b->until_trial > 0) return 1 << b->best;
    int32_t trial = b->best + b->direction;
    return 1 << (trial < 0 || trial > most ? b->best - b->direction : trial);
}

void moe_pipeline_observe(moe_pipeline *p, int64_t bytes, int32_t degree, int64_t ns) {
    int32_t bucket = bucket_of(bytes), at = log2_of(degree);
    if (bucket < 0) return;
    moe_pipeline_bucket *b = &p->buckets[bucket];
    double cost = (double)ns / (double)bytes, *mean = &b->cost[at];
    if (at == b->best) {
        double most = MOST_OF_AVERAGE * *mean;
        *mean = *mean == 0 ? cost : *mean + ((cost < most ? cost : most) - *mean) / AVERAGE_OVER;
        if (b->until_trial > 0) b->until_trial--;
    } else if (cost < MUST_GAIN * b->cost[b->best]) {
        *mean = cost;
        b->direction = at > b->best ? 1 : -1;
        b->best = at;
        schedule_trial(b, MOE_PIPELINE_TRIAL_EVERY);
    } else {
        b->direction = -b->direction;
        schedule_trial(b, 2 * b->interval);
    }
}
