/* The placement policy: a pure function from loads, workers and the map to an ordered list of steps, each of which leaves the map
 * valid. It is incremental: it starts from where the replicas are and moves as little as brings the aim nearer.
 *
 *   1. What safety asks, at once: a first replica on a worker that stays for experts without one; then min(R, workers that
 *      accept) of every expert; nothing on workers that leave or are dead once that is so. Packed into the least loaded worker
 *      with room.
 *   2. Balance, layer by layer, the worst first: while the busiest worker's cost is above the mean by more than `hysteresis`, the
 *      step that helps most moves an expert of the busiest worker to the least loaded one with room, or gives the expert that is
 *      hottest by load per replica another replica there. It goes on down to half the hysteresis, so that a layer which was
 *      balanced stays alone until it is well out of balance. An expert whose replicas changed less than dwell_ns ago stays,
 *      unless it goes to a worker that has less than half of its share of the layer's replicas, as one that has just joined. A
 *      layer without enough load to judge by is spread by number of experts, and only where a worker has none of it, or
 *      `even_idle`.
 *
 * Cost of an expert = alpha · calls + beta · rows (a call is one batch in which it was active: its weights are read once), shared
 * evenly by its replicas; a small part of the layer's mean is added, so that experts without load are spread, too. */
#pragma once
#include "router/placement/placement.h"

typedef enum moe_policy_worker_state {
    MOE_POLICY_ACCEPTS, /* serves, and may be given replicas */
    MOE_POLICY_AWAY,    /* gone for a short while, or not to be touched: its replicas count, nothing changes there */
    MOE_POLICY_LEAVES,  /* serves, but its replicas must go elsewhere */
    MOE_POLICY_DEAD     /* its replicas are lost */
} moe_policy_worker_state;

typedef struct moe_policy_worker {
    moe_policy_worker_state state;
    int32_t room; /* replicas that fit in its memory, over all layers; INT32_MAX: no limit */
} moe_policy_worker;

typedef struct moe_policy_load { /* of one (layer, expert), decayed */
    double rows, calls;
} moe_policy_load;

typedef struct moe_policy_config {
    int32_t replicas;   /* R: the least of every expert */
    int32_t redundant;  /* replicas above R in one layer at most */
    double alpha, beta; /* of the cost */
    double hysteresis;  /* (max - mean) / mean of a layer's cost by worker above which it is balanced; above 0 */
    int64_t dwell_ns;
    double min_rows; /* decayed rows of a layer below which its loads say nothing */
} moe_policy_config;

typedef struct moe_policy_input {
    const moe_placement *map;
    int32_t num_workers;              /* the map's, and behind them those that joined */
    const moe_policy_worker *workers; /* [num_workers] */
    const moe_policy_load *loads;     /* [num_layers, num_experts] */
    const int64_t *changed_ns;        /* [num_layers, num_experts]: when the expert's replicas changed last */
    int64_t now_ns;
    bool balance;   /* false: only what safety asks */
    bool even_idle; /* layers without load are spread, too */
} moe_policy_input;

typedef enum moe_policy_reason {
    MOE_POLICY_TOO_FEW,  /* fewer than R replicas */
    MOE_POLICY_WORKER_LEAVES,
    MOE_POLICY_WORKER_DEAD,
    MOE_POLICY_BUSY, /* its worker is the busiest of the layer */
    MOE_POLICY_HOT,  /* the expert alone is too much for its workers */
    MOE_POLICY_COLD  /* a replica above R gives way to a hotter expert's */
} moe_policy_reason;

#define MOE_POLICY_NOBODY (-1)

/* Adds a replica at `to` and then drops the one at `from`; either may be NOBODY. */
typedef struct moe_policy_step {
    int32_t layer, expert, to, from; /* workers as in the input */
    moe_policy_reason reason;
    double before, after; /* max over mean of the layer's cost by worker */
} moe_policy_step;

/* Plans at most max_steps steps; the same input gives the same steps. RESOURCE_EXHAUSTED. */
moe_status moe_policy_plan(const moe_policy_config *config, const moe_policy_input *input, moe_policy_step *steps,
                           int32_t max_steps, int32_t *num_steps, moe_error *err);

/* max over mean of a layer's cost by accepting worker; 1 where there is none. [num_workers] `cost` may be NULL. RESOURCE_EXHAUSTED
 * is told as 0. */
double moe_policy_imbalance(const moe_policy_config *config, const moe_policy_input *input, int32_t layer, double *cost);

/* "expert 3 of layer 1: w0 → w2, since …"; ids [num_workers]. */
void moe_policy_step_text(const moe_policy_step *step, const char *const *ids, char *text, size_t size);
