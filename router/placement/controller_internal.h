/* The controller's insides, shared by its files:
 *   controller.c  life, step, thread       meta.c        the `meta` key as text
 *   follow.c      reads meta and maps      membership.c  leases, control connections
 *   leader.c      lease, fence             assign.c      who loads what: bootstrap and takeover
 *   load.c        Load calls, digests      publish.c     writes a map
 *   rejoin.c      restarts while the store is down       view.c  what status shows
 *   snapshot.c    the newest map on disk
 * All of it runs on the controller's thread, but for the view. */
#pragma once
#include <pthread.h>

#include "common/buf.h"
#include "common/clock.h"
#include "proto/rpc.h"
#include "router/placement/controller.h"

#define MOE_POLL_META_NS (100 * MOE_NS_PER_MS)
#define MOE_POLL_LEASES_NS (200 * MOE_NS_PER_MS)
#define MOE_RENEW_NS (500 * MOE_NS_PER_MS)
#define MOE_RECONNECT_NS (3 * MOE_NS_PER_S) /* a connection without an accepted hello for so long is made anew */
#define MOE_BOOTSTRAP_QUIET_NS (2 * MOE_NS_PER_S)
/* A first map waits so long after the store began to answer: routers that know a map, and saw the store fail, have by then tried
 * it again (they back off for up to a second) and told what they know. */
#define MOE_BOOTSTRAP_LISTEN_NS (1500 * MOE_NS_PER_MS)
#define MOE_KEPT_MAPS 8 /* older ones are deleted at publishing */
#define MOE_LOAD_CHUNK_EXPERTS 32
#define MOE_LOAD_TIMEOUT_NS (120 * MOE_NS_PER_S) /* of one chunk, read from a slow disk */
#define MOE_LOAD_FIRST_BACKOFF_NS (100 * MOE_NS_PER_MS)
#define MOE_LOAD_MAX_BACKOFF_NS (2 * MOE_NS_PER_S)
#define MOE_LOAD_MAX_REFUSALS 5 /* by a worker that answers; then its incarnation gets no work */
#define MOE_LEADER_BYTES 96
#define MOE_MAX_LEASE_BYTES 4096

/* ---- meta.c ---- */

typedef struct moe_meta {
    char uuid[MOE_UUID_BYTES];
    uint64_t epoch, fence;
    char leader[MOE_LEADER_BYTES]; /* the value of the leader lease under that fence */
    uint64_t map_digest;           /* of the text of map:<epoch>; 0 while epoch is 0 */
    uint64_t model_digest;
    int32_t replicas;
} moe_meta;

moe_status moe_meta_to_json(const moe_meta *meta, moe_buf *out, moe_error *err);
moe_status moe_meta_from_json(const char *text, size_t size, moe_meta *out, moe_error *err);
uint64_t moe_text_digest(const char *text, size_t size); /* SHA-256, first 8 bytes; 0 when out of memory */

/* ---- state ---- */

typedef struct moe_member { /* a worker that is registered or in the map */
    moe_placement_worker identity;
    char host[MOE_HOST_BYTES], profile[MOE_PROFILE_BYTES];
    int64_t pid, capacity_experts;
    uint64_t model_digest;
    bool registered;              /* its lease is there, as this incarnation */
    bool seen;                    /* by the listing under way */
    uint64_t refused_incarnation; /* gets no work; 0: none */
    uint64_t link;                /* the control connection; 0 for none */
    int64_t linked_ns;            /* when it was made, or its hello last seen accepted */
} moe_member;

typedef struct moe_load_job { /* one worker loading a share */
    struct moe_controller *controller;
    char id[MOE_WORKER_ID_BYTES];
    uint64_t incarnation;
    int32_t worker;                  /* its index in the plan, or of the map's worker that it replaces */
    int32_t num_experts, num_loaded; /* loaded in order */
    int32_t *experts;                /* [num_experts]: layer * E + expert */
    uint64_t *digests;               /* [num_experts]: as reported */
    bool calling;
    uint64_t call_id;
    uint64_t epoch, fence; /* sent with Load */
    int32_t refusals;
    int64_t retry_at_ns, backoff_ns;
} moe_load_job;

typedef struct moe_jobs {
    moe_load_job *items[MOE_PLACEMENT_MAX_WORKERS];
    int32_t count;
} moe_jobs;

struct moe_controller {
    moe_controller_config config; /* strings owned */
    char cluster_uuid[MOE_UUID_BYTES];
    char lease_value[MOE_LEADER_BYTES]; /* of the leader lease, when we hold it */
    moe_rpc *rpc;
    int64_t next_meta_ns, next_leases_ns, next_renew_ns;

    /* the store, as last seen */
    bool store_up, store_known; /* known: some call has ended */
    int64_t contact_ns;         /* since when the store has answered without a break or loss; INT64_MAX while it is down */
    bool meta_found, meta_foreign;
    moe_buf meta_text; /* exactly as stored: what a write must expect */
    moe_meta meta;
    bool map_examined; /* the map that meta names was adopted, or can't or mustn't be */

    /* the map */
    moe_placement *map; /* newest published, NULL before the first */
    uint64_t map_digest;
    moe_placement *served;                 /* map, or with workers that rejoined while the store is down */
    uint64_t highest_epoch, highest_fence; /* that anyone was heard to know */

    /* membership */
    moe_member members[MOE_PLACEMENT_MAX_WORKERS]; /* by id */
    int32_t num_members;
    int64_t last_join_ns;
    moe_controller_router_view routers[MOE_MAX_ROUTERS];
    int32_t num_routers;
    bool map_disputed; /* a router has another map under our map's epoch and fence */

    /* leading */
    bool leading;
    uint64_t fence; /* ours, while leading */
    int64_t lease_until_ns;
    moe_placement *plan; /* of the bootstrap under way */
    moe_jobs jobs;       /* of the plan, or takeovers */
    moe_jobs rejoins;    /* while the store is down */
    char waiting_for[256];

    pthread_mutex_t view_mutex;
    moe_controller_view view;

    pthread_t thread;
    bool running, started;
    _Atomic bool stopping;
};

/* ---- between the files ---- */

static inline moe_store *moe_controller_store(const moe_controller *c) { return c->config.store; }
/* From then on a missing lease means a dead process: whoever lives has had a whole term to renew. */
static inline int64_t moe_controller_trusted_at(const moe_controller *c) {
    return c->contact_ns == INT64_MAX ? INT64_MAX : c->contact_ns + MOE_ROUTER_LEASE_TTL_MS * MOE_NS_PER_MS;
}
static inline int64_t moe_controller_now(const moe_controller *c) { return moe_now_ns(c->config.clock); }

/* follow.c */
void moe_controller_follow(moe_controller *c); /* reads meta and adopts a newer map */
void moe_controller_store_answered(moe_controller *c, moe_status status, const moe_error *err); /* after every store call */
/* Takes over the caller's reference; calls on_map. */
void moe_controller_adopt(moe_controller *c, moe_placement *map, uint64_t digest);
void moe_controller_serve(moe_controller *c, moe_placement *map);             /* hands a map to on_map; borrows it */
void moe_controller_learn(moe_controller *c, uint64_t epoch, uint64_t fence); /* raises the highest known */
/* Keeps `meta` and its text as what the store now has. */
moe_status moe_controller_set_meta(moe_controller *c, const char *text, size_t size, moe_error *err);

/* membership.c */
void moe_controller_list_workers(moe_controller *c);
void moe_controller_list_routers(moe_controller *c);
void moe_controller_sync_members(moe_controller *c); /* after the map or a listing changed: who stays, who is connected */
moe_member *moe_controller_member(moe_controller *c, const char *id);
/* The accepted peer behind a member's control connection when it is the incarnation of the registry or map; else NULL. */
const moe_rpc_peer *moe_controller_peer_of(const moe_controller *c, const moe_member *m, uint64_t incarnation);
/* Registered as that very incarnation. */
bool moe_member_alive(const moe_member *m, uint64_t incarnation);
void moe_member_refuse(moe_member *m, uint64_t incarnation, const char *why);
static inline bool moe_member_refused(const moe_member *m) { return m->refused_incarnation == m->identity.incarnation; }

/* leader.c */
void moe_controller_renew(moe_controller *c);           /* our router lease; the leader lease where it is free or ours */
bool moe_controller_may_write(const moe_controller *c); /* leads, as far as it can tell */
void moe_controller_lost_lead(moe_controller *c, const char *why);

/* assign.c */
void moe_controller_assign(moe_controller *c); /* the leader's work, one pass */

/* load.c */
/* A job for worker `id` to load every expert of which `worker` of `map` has a replica; false: out of memory. */
bool moe_jobs_add_share(moe_jobs *jobs, moe_controller *c, const moe_placement *map, int32_t worker, const char *id,
                        uint64_t incarnation);
void moe_jobs_step(moe_jobs *jobs, moe_controller *c); /* starts the calls that are due */
void moe_jobs_remove(moe_jobs *jobs, int32_t index);   /* cancels its call */
void moe_jobs_clear(moe_jobs *jobs);
/* Whether the digests it reported are the map's; where the map has none yet, they become it. */
bool moe_job_agrees(const moe_load_job *job, moe_placement *map);
static inline bool moe_load_job_done(const moe_load_job *job) { return job->num_loaded == job->num_experts; }

/* publish.c: publishes `next` (borrowed; its epoch and fence are set here) as the newest map and adopts it. */
moe_status moe_controller_publish(moe_controller *c, moe_placement *next, moe_error *err);

/* rejoin.c */
void moe_controller_rejoin(moe_controller *c);

/* snapshot.c: nothing without a state folder; failures are logged */
void moe_controller_save_map(moe_controller *c);
void moe_controller_load_map(moe_controller *c); /* adopts the map on disk where it is of this cluster and model */

/* controller.c: what a router writes into the leader lease and meta */
void moe_controller_lease_value(char out[MOE_LEADER_BYTES], const char *id, uint64_t incarnation);

/* view.c */
void moe_controller_update_view(moe_controller *c);
