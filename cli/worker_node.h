/* An expert worker with all that it stands on: its loop, its registration. Used by `moesaic worker` with a process of its own,
 * and by a router that keeps the experts in its own process. */
#pragma once
#include "common/backend.h"
#include "common/clock.h"
#include "common/layer_experts.h"
#include "common/store.h"
#include "common/transport.h"
#include "expert-worker/residency.h"

typedef struct moe_worker_node moe_worker_node;

typedef struct moe_worker_node_config {
    const moe_model *model;   /* borrowed */
    moe_backend *backend;     /* borrowed */
    moe_backend *host;        /* borrowed; as in moe_worker_config */
    moe_transport *transport; /* taken over, also when open fails: closed with the node */
    moe_store *store;         /* likewise */
    const char *listen;       /* endpoint to listen at */
    const char *advertise;    /* endpoint to register; NULL: the one listened at, or this host's address */
    const char *public_key;   /* CURVE, or "" */
    const char *id, *cluster_uuid;
    const char *state_dir; /* the highest epoch and fence seen are kept there; NULL: nowhere */
    int32_t max_queued_calls, max_batch_rows;
    int64_t capacity_experts;  /* held at once; 0: no limit */
    int64_t copy_bytes_per_s;  /* of what it copies from other workers; 0: no limit */
    moe_tier_options tiers;
    int32_t threads;           /* this worker's share of the machine's, by which its first experts are packed */
    const moe_ops *reference;  /* cpu-ref's operations, for known-answer batches; NULL: none */
    moe_timeline *timeline;   /* borrowed; of a `stepped` worker; NULL: none is kept */
    bool stepped;             /* no thread of its own: moe_worker_node_step is called instead */
} moe_worker_node_config;

/* Listens, starts the worker's thread and the registration's. Strings are copied. */
moe_status moe_worker_node_open(const moe_worker_node_config *config, moe_worker_node **out, moe_error *err);
/* Of a `stepped` worker, always from one thread: handles what arrived and computes what is brief; never waits. True when it has
 * more to do at once. */
bool moe_worker_node_step(moe_worker_node *node);
/* Of a `stepped` worker: as moe_worker_lend_experts. */
moe_expert *const *moe_worker_node_lend_experts(moe_worker_node *node);
/* Of a `stepped` worker: as moe_worker_layer_experts. */
moe_layer_experts moe_worker_node_layer_experts(moe_worker_node *node);
/* Of a `stepped` worker with tiers, between two steps without a call: as moe_residency_resize. */
moe_status moe_worker_node_resize(moe_worker_node *node, moe_memory_limit device, moe_cold_experts cold, double *copy_bytes_per_s,
                                  moe_error *err);
/* The experts are to go elsewhere, since the worker is about to stop. */
void moe_worker_node_leave(moe_worker_node *node);
/* Nothing is left to do for it: it holds no expert and no call, or no router is connected. */
bool moe_worker_node_left(moe_worker_node *node);
int32_t moe_worker_node_experts(moe_worker_node *node); /* that it holds */
/* What its experts take, packed, and what there is for them on the device. */
void moe_worker_node_memory(moe_worker_node *node, int64_t *weight_bytes, int64_t *device_bytes);
/* Writes epoch and fence into the state folder where they have risen. Blocks for the disk; not on the worker's own thread. */
void moe_worker_node_remember(moe_worker_node *node);
/* True, with the reason, once the worker found itself defective: it refuses all work and is to be closed. */
bool moe_worker_node_defective(moe_worker_node *node, char *reason, size_t size);
/* The address that was registered is no longer this host's: routers cannot reach the worker until it starts anew. May block on a
 * look-up of the host's name. */
bool moe_worker_node_moved(const moe_worker_node *node);
/* Leaves the registry, then stops. NULLs; idempotent. */
void moe_worker_node_close(moe_worker_node **node);

/* A name for this process where none was given: host and process id. */
void moe_default_id(const char *prefix, char *id, size_t size);
void moe_host_name(char *host, size_t size);
