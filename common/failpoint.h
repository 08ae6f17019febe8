/* Failpoints, for tests alone: named places at which a test kills or stops a process, or holds back its work.
 *
 * With MOESAIC_FAILPOINTS=DIR in its environment, a process that passes the place NAME takes the file DIR/ID.NAME (ID: the
 * router's or worker's id), where there is one, and sends a signal as its text "PID SIGNAL" says: to itself, or to another process
 * of the cluster at that very moment. Each file works once. At a place that holds (moe_failpoint_holds), work waits while the file
 * is there. Without the variable a place costs one test of a flag. */
#pragma once
#include <stdbool.h>

#define MOE_FAILPOINTS(X)                                                                                          \
    X(MIGRATE_PLAN, "migrate-plan")       /* the leader chose moves; nothing of them is in the store */            \
    X(MIGRATE_COPY, "migrate-copy")       /* it enters a phase of router/placement/migrate.c, from here on */      \
    X(MIGRATE_PUBLISH, "migrate-publish")                                                                          \
    X(MIGRATE_SWITCH, "migrate-switch")                                                                            \
    X(MIGRATE_DRAIN, "migrate-drain")                                                                              \
    X(MIGRATE_REMOVE, "migrate-remove")                                                                            \
    X(MIGRATE_DROP, "migrate-drop")                                                                                \
    X(MIGRATE_END, "migrate-end")         /* all is done but for the record, which is still in the store */        \
    X(MAP_WRITTEN, "map-written")         /* a map is in the store, and no router serves from it yet */            \
    X(LOAD_BEGIN, "load-begin")           /* a worker accepted a Load */                                           \
    X(LOAD_COPY, "load-copy")             /* it begins to copy an expert from a peer, */                           \
    X(LOAD_PACK, "load-pack")             /* has an expert's bytes and begins to check and pack them, */           \
    X(LOAD_CHECK, "load-check")           /* begins the known-answer batch, */                                     \
    X(LOAD_END, "load-end")               /* holds all and answers */                                              \
    X(DROP, "drop")                       /* a worker accepted a Drop and still holds the experts */               \
    X(COMPUTE, "compute")                 /* holds: a worker begins no batch, and answers everything else */

typedef enum moe_failpoint_id {
#define X(id, name) MOE_FAILPOINT_##id,
    MOE_FAILPOINTS(X)
#undef X
} moe_failpoint_id;

extern bool moe_failpoints_on; /* set by moe_failpoints_open alone */

/* Before other threads start: reads the variable; this process is known as `id` from now on. */
void moe_failpoints_open(const char *id);

void moe_failpoint_pass(moe_failpoint_id id);
bool moe_failpoint_is_held(moe_failpoint_id id);

/* Any thread. */
static inline void moe_failpoint(moe_failpoint_id id) {
    if (moe_failpoints_on) moe_failpoint_pass(id);
}
static inline bool moe_failpoint_holds(moe_failpoint_id id) { return moe_failpoints_on && moe_failpoint_is_held(id); }
