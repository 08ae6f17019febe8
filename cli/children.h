/* Child processes of `moesaic serve`: started, watched, restarted with back-off, stopped. One thread. */
#pragma once
#include <stdbool.h>
#include <sys/types.h>

#include "common/clock.h"
#include "common/status.h"

#define MOE_MAX_CHILDREN 64
#define MOE_CHILD_MAX_ARGS 128
#define MOE_CHILD_BACKOFF_FIRST_NS (100 * MOE_NS_PER_MS) /* doubles with each quick death, up to: */
#define MOE_CHILD_BACKOFF_MAX_NS (10 * MOE_NS_PER_S)
#define MOE_CHILD_STABLE_NS (10 * MOE_NS_PER_S) /* a child that lived that long begins again at the first back-off */

typedef struct moe_child {
    const char *name; /* owned */
    char **argv;      /* owned, NULL-terminated; argv[0] is the program's path */
    bool restart;     /* start it again when it dies */
    pid_t pid;        /* 0: not running */
    int exit_status;  /* of waitpid, when it died */
    int64_t started_ns, restart_at_ns, backoff_ns;
} moe_child;

typedef struct moe_children {
    moe_child items[MOE_MAX_CHILDREN];
    int count;
} moe_children;

/* Adds a child (argv is copied, NULL-terminated) and starts it. RESOURCE_EXHAUSTED or UNAVAILABLE with the reason. */
moe_status moe_children_start(moe_children *children, const char *name, const char *const *argv, bool restart, moe_error *err);

/* Reaps what died and starts again what is due. Returns a child that died for good since the last call, or NULL.
 * *changed is set when a pid changed. */
const moe_child *moe_children_tick(moe_children *children, int64_t now_ns, bool *changed);

/* SIGTERM to all in reverse order of start, one after the other, each given until deadline_ns (SIGKILL then); frees the table. A
 * termination signal that arrives meanwhile (moe_signals_block was called) is passed on to the one that is being stopped. */
void moe_children_stop(moe_children *children, int64_t deadline_ns);

/* "exit status 1", "signal 9 (Killed)". */
void moe_child_describe_exit(const moe_child *child, char *text, size_t size);
