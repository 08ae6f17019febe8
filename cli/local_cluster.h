/* The processes that stand beside a router on this machine: a private Redis and expert workers, with their run folder, keys and
 * cluster.json. Used by `moesaic serve` and `moesaic bench`. One thread; moe_signals_block was called. */
#pragma once
#include "cli/children.h"
#include "cli/cluster_file.h"
#include "common/options.h"

typedef struct moe_local_cluster {
    moe_cluster_file file;
    moe_children children;
    char self[PATH_MAX]; /* the moesaic program */
} moe_local_cluster;

typedef struct moe_local_cluster_config {
    const char *model_dir;
    const char *run_dir; /* NULL: a fresh one */
    const char *listen;  /* of the workers: "tcp://host:port"; NULL: endpoints in the run folder */
    bool ipc;            /* where those are ipc sockets; else shared memory */
    const char *keys;    /* key folder; NULL: over tcp, keys made in the run folder */
} moe_local_cluster_config;

/* Fills cluster->file but for url, and makes run folder and keys. INVALID_ARGUMENT, NOT_FOUND: what the config names;
 * otherwise as moe_run_dir_make. */
moe_status moe_local_cluster_prepare(const moe_local_cluster_config *config, moe_local_cluster *cluster, moe_error *err);

/* Starts Redis and waits until its socket is there. CANCELLED: a termination signal came. */
moe_status moe_local_cluster_start_redis(moe_local_cluster *cluster, bool restart, moe_error *err);

/* Starts worker w<index> of `workers` with its share of this machine, on the index-th of --devices (in turn), and what `options`
 * say of workers; it is to hold share_of_experts of the model's. It finds the cluster by cluster.json, which must have been written. */
moe_status moe_local_cluster_start_worker(moe_local_cluster *cluster, const moe_options *options, int index, int workers,
                                          double share_of_experts, bool restart, moe_error *err);
