/* The distinct experts of a batch, or of a layer of a micro-batch, that are not all on the device: which of them the device computes, as
 * soon as they are in slots, and which the host computes, from images. Tells the residency what is needed, and lets go of it. Who makes
 * jobs of them assembles these: passes.h, layer_run.h. The loop's thread only; nothing is allocated. */
#pragma once
#include "common/backend.h"
#include "expert-worker/residency.h"

typedef enum moe_pass_place { MOE_PASS_DEVICE, MOE_PASS_HOST, MOE_PASS_PLACES } moe_pass_place;

typedef struct moe_groups {
    moe_residency *residency; /* borrowed, as all here. NULL: every expert has its handle in `groups` */
    int32_t layer, count;
    const int32_t *experts;      /* [count] */
    const moe_ffn_group *groups; /* [count]; of these, rows are counted */
    uint8_t *states;             /* [count], for this alone */
    moe_cold_group *cold;        /* [count], likewise. NULL: the host computes none of them */
    int32_t num_left;            /* that no job has taken; set by begin */
    int32_t num_undecided;       /* of those: it is open where they are computed; set by begin */
    bool wants_copies;           /* more are to be copied than before: for whoever turns the residency, who clears it */
} moe_groups;

/* All of them are needed from now on, in slots or as images. */
void moe_groups_begin(moe_groups *groups);
/* Chooses where those are computed that have an image and are in no slot: once the host could begin with them. */
void moe_groups_decide(moe_groups *groups);
/* The group's handle for a job there, which has it from now on; NULL: not now. What was meant for the host may have come into a slot. */
moe_expert *moe_groups_take(moe_groups *groups, int32_t index, moe_pass_place place);
/* Rows that the host computes, or may compute. */
int32_t moe_groups_host_rows(const moe_groups *groups);
/* The host is not to compute any of those that no job has taken; they are copied. */
void moe_groups_copy_all(moe_groups *groups);
/* How many of those that no job has taken could go to the device now. */
int32_t moe_groups_ready(const moe_groups *groups);
/* Whether a job there has the group. */
bool moe_groups_taken(const moe_groups *groups, int32_t index, moe_pass_place place);
/* The job that had the group has ended, or nobody wants it any more. Nothing the second time. */
void moe_groups_let_go(moe_groups *groups, int32_t index);
