/* What a worker remembers of its cluster from one start to the next: the highest epoch and fence that it saw, so that a leader
 * which learns from hellos never publishes below them. One line in STATE_DIR/worker-ID.state, replaced in one step. */
#pragma once
#include <stdint.h>

#include "common/status.h"

typedef struct moe_worker_memory {
    uint64_t epoch, fence;
} moe_worker_memory;

/* Zero where there is no file, or one of another cluster or that is damaged (a warning tells). */
moe_worker_memory moe_worker_state_read(const char *dir, const char *id, const char *cluster_uuid);
/* UNAVAILABLE with the reason; the old file stays then. Blocks until the disk has it. */
moe_status moe_worker_state_write(const char *dir, const char *id, const char *cluster_uuid, moe_worker_memory state,
                                  moe_error *err);
