/* What becomes of a cold expert, one that a batch wants and that is in no slot: it is copied into one, or the host computes it from its
 * image; and the cost model that chooses between the two. Plain functions of their arguments. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

typedef enum moe_cold_experts {
    MOE_COLD_FETCH, /* copy, then compute on the device */
    MOE_COLD_HOST,  /* compute on the host, beside the device */
    MOE_COLD_AUTO   /* whichever of the two is expected to end first */
} moe_cold_experts;
#define MOE_COLD_EXPERTS_CHOICES "fetch|host|auto" /* as the choices of an option, in that order */

/* So much for an expert, whose weights are read once, and so much for each of its rows. All 0: not known yet. */
typedef struct moe_cold_compute {
    double expert_ns, row_ns;
} moe_cold_compute;

typedef struct moe_cold_costs {
    double copy_byte_ns; /* from an image into a slot */
    moe_cold_compute device, host;
    double host_job_ns;  /* of a job of the host, beside what it computes: until it begins, and until its end is seen */
    double host_rows_ns; /* of a pass of the device that adds the host's rows alone */
} moe_cold_costs;

/* For how long the copies, the device and the host have other work. */
typedef struct moe_cold_queues {
    double link_ns, device_ns, host_ns;
    bool one_processor; /* device and host are the same, and take turns; copies are its work, too */
} moe_cold_queues;

/* A cold expert of a batch. */
typedef struct moe_cold_group {
    int64_t left_bytes; /* that are still to be copied, of its image */
    int32_t rows;
    int32_t index; /* the caller's */
    double rank;   /* higher: sooner wanted again, by all that is known */
    bool host;     /* the outcome */
} moe_cold_group;

/* Divides the groups between copying and the host so that the batch ends early. They are sorted by the host's time for them as a multiple
 * of that of their copies, and of equal ones by rank, the highest first; then the two sides take in turn, copies from the front and the
 * host from the back, and the next one is always taken by the side that would end it earlier (the device, where both would at once). Where
 * the batch would end hardly earlier (by 4 %) than with all of them copied, they are: what was copied may be wanted again. `groups` stay in
 * that order, in which copies are to be made. */
void moe_cold_split(const moe_cold_costs *costs, moe_cold_queues queues, moe_cold_group *groups, int32_t count);

static inline double moe_cold_compute_ns(const moe_cold_compute *c, int32_t experts, int32_t rows) {
    return c->expert_ns * experts + c->row_ns * rows;
}

/* Moves the costs a sixteenth of the way towards what a job took, of which three times as long as expected counts at most: one that was
 * held up changes them by an eighth. */
void moe_cold_observe_compute(moe_cold_compute *cost, int32_t experts, int32_t rows, int64_t ns);
void moe_cold_observe_copy(double *byte_ns, int64_t bytes, int64_t ns);
/* Likewise a cost that every job has, of which 0 is an ordinary value. */
void moe_cold_observe_fixed(double *cost_ns, int64_t ns);
/* The host was not chosen. What it costs is not measured then, so it is taken for a 4096th less, until it is tried again. */
void moe_cold_host_unused(moe_cold_costs *costs);
