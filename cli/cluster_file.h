/* cluster.json in a run folder: how processes on this machine find a cluster that `moesaic serve` started. */
#pragma once
#include <limits.h>
#include <stddef.h>

#include "cli/children.h"
#include "common/random.h"

#define MOE_CLUSTER_FILE "cluster.json"

typedef struct moe_cluster_file {
    char uuid[MOE_UUID_BYTES];
    char run_dir[PATH_MAX]; /* absolute; sockets live in it */
    char model[PATH_MAX];   /* absolute */
    char redis[PATH_MAX];   /* store address, "unix:/…" */
    char keys[PATH_MAX];    /* key folder; "" where it is all in the run folder */
    char listen[PATH_MAX];  /* endpoint pattern of workers: "shm", "ipc" or "tcp://host:0" */
    char url[256];          /* HTTP front */
    char router[PATH_MAX];  /* RPC endpoint of the router */
} moe_cluster_file;

/* Writes RUN_DIR/cluster.json (mode 0600, atomically), with the pids of `children` by name. */
moe_status moe_cluster_file_write(const moe_cluster_file *file, const moe_children *children, moe_error *err);

/* Reads DIR/cluster.json. *redis_pid (may be NULL) receives the Redis that serve started, 0 for none. */
moe_status moe_cluster_file_read(const char *dir, moe_cluster_file *out, pid_t *redis_pid, moe_error *err);

/* Makes the run folder: `wanted`, or with NULL a fresh one below $XDG_RUNTIME_DIR or /tmp. Mode 0700, owned by us, and not in use
 * by a living cluster; refused otherwise. `dir` (PATH_MAX) receives its absolute path. */
moe_status moe_run_dir_make(const char *wanted, char *dir, moe_error *err);

/* Removes a run folder that moe_run_dir_make made afresh, with all that is in it. What cannot be removed stays. */
void moe_run_dir_remove(const char *dir);
