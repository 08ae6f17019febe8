/* Where the weights of a shard are, when they do not all fit the device: in a slot of the backend, as an image in (pinned) host
 * memory, or in the checkpoint alone. Experts are wished for, more or less urgently; copies into slots happen beside the
 * computation, in pieces, the most urgent expert first. The loop's thread only; copies and packing end on other threads and wake
 * the transport. No memory is allocated for a wish, a copy or an eviction; images get theirs where they are packed. */
#pragma once
#include "common/timeline.h"
#include "expert-worker/cold.h"
#include "common/model/expert_budget.h"
#include "expert-worker/loader.h"

/* Pieces on their way to the device at once: enough to keep a link busy between two looks of the loop; a more urgent expert, and the
 * inputs of a batch, which share the link, wait for so much at most. Where the loop comes back to an idle link, it was not enough: one
 * more then, until so many have ended without that. An expert is copied in so many pieces, within bounds: each has a cost of its
 * own, of some microseconds. */
#define MOE_RESIDENCY_PIECES 3
#define MOE_RESIDENCY_MAX_PIECES 8
#define MOE_RESIDENCY_CALM_PIECES 256
#define MOE_RESIDENCY_EXPERT_PIECES 2
#define MOE_RESIDENCY_MIN_PIECE_BYTES ((int64_t)1 << 20)
#define MOE_RESIDENCY_MAX_PIECE_BYTES ((int64_t)16 << 20)
#define MOE_RESIDENCY_SPARE_SLOTS 1 /* above top-k: copies need a slot that no batch uses */
#define MOE_RESIDENCY_MIN_IMAGES 2  /* one is packed while another is copied */

typedef struct moe_residency moe_residency;

/* So much memory: bytes, or a part of what a share of experts takes. Both 0: no limit. */
typedef struct moe_memory_limit {
    int64_t bytes;
    double part; /* (0, 1] */
} moe_memory_limit;

static inline bool moe_memory_limited(moe_memory_limit limit) { return limit.bytes > 0 || limit.part > 0; }

/* What is asked of the tiers. Without a limit of the device there are none: every held expert is on the device. */
typedef struct moe_tier_options {
    moe_memory_limit device, host;
    moe_expert_budget budget; /* of the routers: where `device` is none, its part is the limit, and one more for a newcomer */
    double share;         /* part of the model's experts that limits may be a part of; 0: all */
    const char *eviction; /* a policy's name; borrowed */
    moe_cold_experts cold; /* anything but FETCH needs a host backend */
    moe_cold_costs costs;  /* for AUTO: as calibrated; what is 0 is learnt */
    bool threaded;        /* what is wanted from the checkpoint is packed in a thread of its own; the simulation has none */
    int64_t piece_bytes;  /* 0: by the expert's size; the simulation's experts are small */
} moe_tier_options;

/* Whether there are tiers, for a model. */
static inline bool moe_tiers_wanted(const moe_tier_options *tiers, const moe_model_config *model) {
    return moe_memory_limited(tiers->device) ||
           (moe_expert_budget_given(tiers->budget) && moe_expert_budget_part(tiers->budget, model) < 1);
}

typedef struct moe_residency_config {
    const moe_model *model;   /* borrowed, as all here; its experts are all of one shape and stored alike */
    moe_backend *backend;     /* */
    moe_backend *host;        /* computes cold experts from images; may be `backend`; NULL: nothing does */
    moe_transport *transport; /* woken when a copy or a packing has ended */
    _Atomic uint64_t *ended;  /* counts ended copies, for whoever polls the backend; may be NULL */
    moe_tier_options tiers;   /* that are wanted */
    moe_timeline *timeline;   /* copies are told it; NULL: there is none */
} moe_residency_config;

/* All since the start. An expert of a call counts once, however many rows it has. */
typedef struct moe_residency_counts {
    uint64_t hits;         /* experts of calls that were in a slot when the call arrived */
    uint64_t late_hits;    /* that were on their way, or announced */
    uint64_t misses;       /* that nobody had asked for */
    uint64_t copied_bytes; /* into slots */
    uint64_t wasted_bytes; /* of those, for experts that left again unused, or never came whole */
    uint64_t packed;       /* images made from the checkpoint because a call or hint wanted the expert */
    uint64_t host_experts; /* experts of batches that the host computed, */
    uint64_t host_rows;    /* and their rows */
} moe_residency_counts;

/* INVALID_ARGUMENT: a limit below the least that works (the message says what that is), an unknown policy, experts stored in
 * different types; RESOURCE_EXHAUSTED. */
moe_status moe_residency_new(const moe_residency_config *config, moe_residency **out, moe_error *err);
void moe_residency_free(moe_residency **residency); /* nothing is in use; waits for copies; NULLs; idempotent */

moe_cold_experts moe_residency_cold(const moe_residency *residency); /* as configured */
bool moe_residency_shares_processor(const moe_residency *residency); /* the host is the device */
/* What cold experts cost, by all that was measured. Copies are observed here, computation by whoever runs the jobs. */
moe_cold_costs *moe_residency_costs(moe_residency *residency);
int32_t moe_residency_slots(const moe_residency *residency);
int32_t moe_residency_resident(const moe_residency *residency); /* experts that are in a slot, whole */
int64_t moe_residency_device_bytes(const moe_residency *residency); /* of all slots, full or empty */
int64_t moe_residency_image_bytes(const moe_residency *residency);
moe_residency_counts moe_residency_counted(const moe_residency *residency);

/* Other slots, as many as `device` allows, filled with the first experts of each layer that have images; what was used before is
 * forgotten, so that a measurement under one limit says nothing of the one before. `cold` may change where it was not FETCH at the
 * start. No call has begun. Blocks; *copy_bytes_per_s
 * (may be NULL) receives the pace of the copies, each a whole expert. INVALID_ARGUMENT as above, and nothing has changed;
 * RESOURCE_EXHAUSTED, or what a copy failed with: then the residency is of no more use. */
moe_status moe_residency_resize(moe_residency *residency, moe_memory_limit device, moe_cold_experts cold, double *copy_bytes_per_s,
                                moe_error *err);

/* ---- what the shard holds ---- */

/* An image to pack a newly loaded expert into; NULL where host memory is used up (the checkpoint is read again then). It goes to
 * moe_residency_hold, or back. */
moe_image *moe_residency_take_image(moe_residency *residency);
void moe_residency_return_image(moe_image *image); /* NULL is ignored */
/* The shard holds the expert from now on; image: packed, or NULL. It comes into a slot where one is empty, unless its layer has had an
 * even part of the slots: experts come layer by layer, and the first layers would have them all. */
void moe_residency_hold(moe_residency *residency, int32_t layer, int32_t expert, moe_image *image);
/* No more are expected to come soon: slots that are still empty take what else is held. */
void moe_residency_held_all(moe_residency *residency);
void moe_residency_drop(moe_residency *residency, int32_t layer, int32_t expert); /* no longer; it is not in use */

/* ---- what calls want ---- */

/* `step`, a number that tells forward steps apart, will probably want the expert; layers are wanted in the order of the hints. */
void moe_residency_hint(moe_residency *residency, uint64_t step, int32_t layer, int32_t expert);
/* Nobody is going to want the expert soon: it is the first to make room. */
void moe_residency_retire(moe_residency *residency, int32_t layer, int32_t expert);
/* Whether the expert is in a slot, whole. */
bool moe_residency_has(const moe_residency *residency, int32_t layer, int32_t expert);
/* `step` has come to `layer`: what was announced of this layer and those before, and nobody wants any more, stays where it is; a
 * copy of it that is under way is given up. So moe_residency_expect comes first. */
void moe_residency_reached(moe_residency *residency, uint64_t step, int32_t layer);
/* A call that wants the expert was accepted: counts it as hit, late hit or miss. Until the call has ended the expert makes room
 * only for what a batch needs. */
void moe_residency_expect(moe_residency *residency, int32_t layer, int32_t expert);
void moe_residency_unexpect(moe_residency *residency, int32_t layer, int32_t expert);
/* A batch that has begun needs the expert, and then no longer. What is needed is not evicted. */
void moe_residency_need(moe_residency *residency, int32_t layer, int32_t expert);
void moe_residency_unneed(moe_residency *residency, int32_t layer, int32_t expert);
/* The needed expert, for a job; NULL while it is not here. What was acquired stays until it is released. */
moe_expert *moe_residency_acquire(moe_residency *residency, int32_t layer, int32_t expert);
void moe_residency_release(moe_residency *residency, int32_t layer, int32_t expert);

/* Where cold experts may be computed by the host: a batch that has begun needs the expert's image, and then no longer. An image that is
 * needed stays; where there is none, it is packed as urgently as what is needed in a slot is copied. */
void moe_residency_need_image(moe_residency *residency, int32_t layer, int32_t expert);
void moe_residency_unneed_image(moe_residency *residency, int32_t layer, int32_t expert);
/* Whether the expert has an image. */
bool moe_residency_has_image(moe_residency *residency, int32_t layer, int32_t expert);
/* Bytes of the expert that no copy has been submitted for; and for how long, by the costs, the copies will take that are on their way or
 * needed already. */
int64_t moe_residency_left_bytes(moe_residency *residency, int32_t layer, int32_t expert);
double moe_residency_link_ns(const moe_residency *residency);
/* As moe_eviction_rank. */
double moe_residency_rank(moe_residency *residency, int32_t layer, int32_t expert);
/* The host is going to compute the expert: its copy is not made that has not begun, that no hint announces, and that no more than one call
 * expects. */
void moe_residency_forgo(moe_residency *residency, int32_t layer, int32_t expert);
/* The expert whose needed image is there, for one job of the host with so many rows of it, until it is released. Counts as a use: an
 * expert that is used more than one in a slot takes its place, in the background. */
moe_expert *moe_residency_acquire_image(moe_residency *residency, int32_t layer, int32_t expert, int32_t rows);
void moe_residency_release_image(moe_residency *residency, int32_t layer, int32_t expert);

void moe_residency_batch_ended(moe_residency *residency); /* time goes by, for hints and uses */

/* Takes in what ended, starts what can start. */
void moe_residency_turn(moe_residency *residency);
/* Whether a turn would find something that ended. Of a polled backend's copies only polling tells. */
bool moe_residency_has_work(moe_residency *residency);
bool moe_residency_copying(const moe_residency *residency);
uint64_t moe_residency_progress(const moe_residency *residency); /* rises while anything is copied or packed */
/* A copy or an image failed for good: what is needed will never come. NULL while all is well. */
const moe_error *moe_residency_failure(const moe_residency *residency);
