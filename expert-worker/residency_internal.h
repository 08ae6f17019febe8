/* What the files of the residency share. */
#pragma once
#include <sys/queue.h>

#include "expert-worker/eviction.h"
#include "expert-worker/residency.h"

/* How urgently an expert is wanted, the most urgent first. */
typedef enum residency_wish {
    WISH_NEEDED,   /* by a batch that has begun */
    WISH_EXPECTED, /* by a call that has not ended */
    WISH_HINTED,   /* by a layer to come */
    WISH_HOTTER,   /* by nobody, but it is used more than an expert in a slot */
    WISH_SPARE,    /* by nobody, while slots are empty */
    WISH_NONE
} residency_wish;

typedef struct residency_entry {
    TAILQ_ENTRY(residency_entry) link; /* in wishes[wish] */
    bool held;
    uint8_t wish;     /* residency_wish; NONE from when its last piece was submitted */
    int32_t slot;     /* -1: in none */
    int32_t needed;   /* by so many batches and checks */
    int32_t expected; /* by so many calls that have not ended */
    int32_t imaged;   /* its image is needed by so many batches */
    moe_image *image; /* NULL: in the checkpoint alone */
} residency_entry;

TAILQ_HEAD(residency_wishes, residency_entry);

typedef enum residency_slot_state { SLOT_EMPTY, SLOT_FILLING, SLOT_READY } residency_slot_state;

typedef struct residency_slot {
    moe_expert *expert;         /* the backend's */
    residency_slot_state state; /* FILLING without an entry: pieces of a copy that was given up are still on their way */
    int32_t entry;              /* -1: none */
    int32_t users;              /* jobs that read it */
    int32_t pieces;             /* on their way */
    int64_t submitted_bytes;
    bool used; /* since it was filled */
    bool ahead;       /* it was announced alone when its copy began */
    int64_t began_ns; /* its copy; where there is a timeline */
} residency_slot;

typedef struct residency_piece {
    moe_slot_fill fill;
    moe_job job;
    struct moe_residency *residency;
    residency_slot *slot;
    moe_image *image;
    bool busy;         /* the loop's */
    _Atomic bool done; /* set by the job */
} residency_piece;

struct moe_residency {
    moe_residency_config config;
    moe_expert_size size; /* of any expert */
    int32_t num_entries;
    residency_entry *entries; /* [num_moe_layers, num_experts] */
    struct residency_wishes wishes[WISH_NONE];
    moe_slots *slots;
    residency_slot *slot; /* [num_slots] */
    int32_t *ready_entry; /* [num_slots]: its entry, -1: it is not READY */
    int32_t num_slots, num_empty, num_ready;
    int32_t first_empty;  /* none before it is EMPTY */
    int32_t *held;        /* [num_moe_layers]: entries */
    moe_image *images; /* [num_images] */
    moe_host_experts *host_experts; /* of the images, by index; NULL: the host computes none */
    int32_t num_images;
    moe_image_pool pool;
    uint64_t use; /* of images, counted */
    pthread_mutex_t mutex; /* of the pieces' ends */
    residency_piece pieces[MOE_RESIDENCY_MAX_PIECES];
    int32_t pieces_out, most_out; /* most_out: as many may be */
    int32_t calm;                 /* pieces that have ended since most_out was changed */
    uint64_t pieces_ended;
    moe_loader packer;
    moe_eviction *eviction;
    int64_t batches; /* the eviction policies' time */
    moe_residency_counts counts;
    int32_t needs; /* of all experts, in slots or as images: not 0 while a batch or check is under way */
    moe_error failure; /* code not OK: see moe_residency_failure */
};

static inline int32_t residency_number(const moe_residency *r, const residency_entry *e) { return (int32_t)(e - r->entries); }
static inline residency_entry *residency_at(moe_residency *r, int32_t layer, int32_t expert) {
    return &r->entries[(int64_t)layer * r->config.model->config.num_experts + expert];
}
static inline bool residency_ready(const moe_residency *r, const residency_entry *e) {
    return e->slot >= 0 && r->slot[e->slot].state == SLOT_READY;
}

/* residency.c */
moe_status residency_count_places(moe_residency *r, moe_error *err); /* sets num_slots, num_images */
moe_status residency_open_slots(moe_residency *r, moe_error *err);   /* num_slots of them, and the policy that goes with them */
void residency_close_slots(moe_residency *r);                        /* nothing is in them or on its way to them; idempotent */
void residency_await_pieces(moe_residency *r);                       /* until none is on its way */

/* residency_copy.c */
void residency_set_wish(moe_residency *r, residency_entry *e, residency_wish wish); /* replaces the one there was */
void residency_give_up(moe_residency *r, residency_entry *e); /* its copy, if one is under way; the wish stays */
void residency_slot_ready(moe_residency *r, int32_t slot, int32_t entry);
void residency_empty_slot(moe_residency *r, residency_entry *e); /* it is READY and nobody uses it */
void residency_copy(moe_residency *r);                           /* submits what is most urgent */
void residency_collect(moe_residency *r);                        /* takes in ended pieces and packings */
void residency_fail(moe_residency *r, const moe_error *why);

/* residency.c */
void residency_weaken(moe_residency *r, residency_entry *e); /* a need, call or hint has ended: leaves the wish that is left */
