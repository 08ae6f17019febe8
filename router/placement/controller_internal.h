/* The controller's insides, shared by its files:
 *   controller.c  life, step, thread       meta.c        the `meta` key as text
 *   follow.c      reads meta and maps      membership.c  leases, control connections
 *   leader.c      lease, fence             assign.c      who loads what: bootstrap and takeover
 *   load.c        Load calls, digests      publish.c     writes a map
 *   rejoin.c      restarts while the store is down       view.c  what status shows
 *   snapshot.c    the newest map on disk                 stats.c what workers hold and compute
 *   balance.c     asks the policy                        migrate.c   the moves under way
 *   leftovers.c   drops what no map names                operations.c  what operators ask for
 *   gossip.c      maps by way of the workers
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
#define MOE_LOAD_SILENCE_NS (5 * MOE_NS_PER_S)   /* without progress, then the call is made again */
#define MOE_LOAD_FIRST_BACKOFF_NS (100 * MOE_NS_PER_MS)
#define MOE_LOAD_MAX_BACKOFF_NS (2 * MOE_NS_PER_S)
#define MOE_LOAD_MAX_REFUSALS 5 /* by a worker that answers; then its incarnation gets no work */
#define MOE_POLL_STATS_NS (500 * MOE_NS_PER_MS)
#define MOE_POLL_BUSY_NS (50 * MOE_NS_PER_MS) /* of leases and stats, while experts move */
#define MOE_MIGRATION_PASS_NS (10 * MOE_NS_PER_MS) /* between two passes of the leader while experts move */
#define MOE_STATS_TIMEOUT_NS (2 * MOE_NS_PER_S)
#define MOE_PLAN_NS (1 * MOE_NS_PER_S)        /* between two plans for the view */
#define MOE_SECURE_NS (250 * MOE_NS_PER_MS)   /* between two looks at what safety asks */
/* After a router vanished that may route on by an older map, without the store: it hears of newer ones from workers. */
#define MOE_ROUTER_GRACE_NS (2 * MOE_NS_PER_S)
#define MOE_DROP_PATIENCE_NS (10 * MOE_NS_PER_S) /* a migration ends after so long, dropped or not; what is left goes later */
#define MOE_MIGRATION_MAX_MOVES 64
#define MOE_POLICY_MIN_ROWS 1000
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

typedef struct moe_worker_stats { /* what a worker last told of itself */
    struct moe_controller *controller;
    char id[MOE_WORKER_ID_BYTES];
    uint64_t incarnation;    /* of what follows */
    bool calling, dropping;  /* Stats, Drop */
    uint64_t call_id, drop_id;
    int64_t next_ns;         /* when to ask again */
    int64_t asked_ns, as_of_ns; /* when the call under way, and the one that brought what follows, was made */
    uint64_t holdings;       /* 0: what it holds is not known */
    bool leaving;
    int32_t num_held;
    int32_t *held;           /* [layers · experts]: layer · E + expert, ascending */
    uint64_t *rows, *calls;  /* [layers · experts]: its counters */
    uint64_t map_epoch, map_fence;   /* of the map that it keeps; 0: none */
    bool exchanging;                 /* SetMap or GetMap, */
    uint64_t exchange_id, sent_epoch, sent_fence; /* with that map */
    int64_t exchange_at_ns;          /* not before */
} moe_worker_stats;

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
    moe_worker_stats *stats;      /* owned; NULL before the first */
    int64_t gone_ns;              /* in the map, but away since then; 0: not so */
} moe_member;

typedef struct moe_load_job { /* one worker loading a share */
    struct moe_controller *controller;
    char id[MOE_WORKER_ID_BYTES];
    uint64_t incarnation;
    int32_t worker;                  /* its index in the plan, or of the map's worker that it replaces */
    int32_t num_experts, num_loaded; /* loaded in order */
    int32_t *experts;                /* [num_experts]: layer * E + expert */
    uint64_t *digests;               /* [num_experts]: as reported */
    int32_t *sources;                /* of a migration, [num_experts]: index in the map's workers to copy from, or -1; else NULL */
    int32_t chunk;                   /* experts of the call under way */
    bool calling;
    uint64_t call_id;
    int64_t called_ns;
    uint64_t epoch, fence; /* sent with Load */
    int32_t refusals;
    int64_t retry_at_ns, backoff_ns;
} moe_load_job;

typedef struct moe_jobs {
    moe_load_job *items[MOE_PLACEMENT_MAX_WORKERS];
    int32_t count;
} moe_jobs;

typedef struct moe_move {
    int32_t layer, expert;
    char to[MOE_WORKER_ID_BYTES], from[MOE_WORKER_ID_BYTES]; /* "": none */
    bool abandoned;
} moe_move;

typedef enum moe_migration_phase {
    MOE_MIGRATION_NONE,
    MOE_MIGRATION_COPY, /* and verify */
    MOE_MIGRATION_PUBLISH,
    MOE_MIGRATION_SWITCH,
    MOE_MIGRATION_DRAIN,
    MOE_MIGRATION_REMOVE,
    MOE_MIGRATION_DROP
} moe_migration_phase;

/* Moves of one layer, under way together. Every phase looks at the map and the workers and does what is missing, so that a next
 * leader begins at COPY and passes quickly over what is done. */
typedef struct moe_migration {
    moe_migration_phase phase;
    char id[MOE_OPERATION_ID_BYTES]; /* of the operation, or "auto" */
    moe_move moves[MOE_MIGRATION_MAX_MOVES];
    int32_t count;
    bool copying;     /* `copies` was made */
    moe_jobs copies;
    int64_t phase_ns; /* since when it is in the phase */
    char error[MOE_OPERATION_ERROR_BYTES];
} moe_migration;

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
    moe_buf map_text;                      /* of `map`, as it is handed to workers, where it has these: */
    uint64_t map_text_epoch, map_text_fence;
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

    /* moving */
    moe_policy_load *loads; /* [layers, experts], decayed up to loads_ns */
    int64_t loads_ns;
    int64_t *changed_ns; /* [layers, experts]: when the expert's replicas changed last, as seen here */
    moe_migration migration;
    bool migration_known; /* since it leads: the store was asked for one under way */
    uint64_t moves;       /* brought to an end */
    int64_t next_plan_ns, next_secure_ns, next_balance_ns;
    int64_t router_lost_ns; /* when a router vanished that had not acknowledged the map; INT64_MIN: never */
    uint64_t leased_epoch;  /* the routing epoch in our lease */
    moe_operation operations[MOE_MAX_OPERATIONS]; /* as last listed, oldest first */
    int32_t num_operations;
    moe_policy_step *steps; /* [MOE_VIEW_MAX_STEPS], scratch */

    pthread_mutex_t view_mutex;
    moe_controller_view view;
    moe_operation submitted[MOE_MAX_OPERATIONS]; /* not in the store yet; guarded by view_mutex */
    int32_t num_submitted;

    pthread_t thread;
    bool running, started;
    _Atomic bool stopping, hurried;
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
/* DATA_LOSS: of another model, or of other weights than the manifest names; such a map is left for the leader to publish over. */
moe_status moe_controller_check_map(const moe_controller *c, const moe_placement *map, moe_error *err);
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
/* A worker that can be given work now: registered, not refused, connected. */
bool moe_member_available(const moe_controller *c, const moe_member *m);
void moe_member_refuse(moe_member *m, uint64_t incarnation, const char *why);
static inline bool moe_member_refused(const moe_member *m) { return m->refused_incarnation == m->identity.incarnation; }

/* The worker of the map serves: available as the map's incarnation. */
bool moe_controller_serves(moe_controller *c, const moe_placement *map, int32_t worker);
/* Every live router routes by the map or a newer one, and those that vanished have had time to end. */
bool moe_controller_acknowledged(const moe_controller *c);
uint64_t moe_controller_routing_epoch(const moe_controller *c); /* our own */

/* leader.c */
void moe_controller_renew(moe_controller *c);           /* our router lease; the leader lease where it is free or ours */
bool moe_controller_may_write(const moe_controller *c); /* leads, as far as it can tell */
void moe_controller_lost_lead(moe_controller *c, const char *why);

/* assign.c */
void moe_controller_assign(moe_controller *c); /* the leader's work, one pass */

/* assign.c */
int64_t moe_member_capacity(const moe_controller *c, const moe_member *m); /* experts; all of the model's where it has no limit */
bool moe_member_profile_fits(moe_controller *c, const moe_member *newcomer);
bool moe_jobs_has(const moe_jobs *jobs, const char *id, int32_t worker); /* a job of that worker, or for that worker of the map */

/* load.c */
/* A job of a migration: those experts, copied as `from` says from the holders in the map. */
bool moe_jobs_add_experts(moe_jobs *jobs, moe_controller *c, const moe_member *to, const int32_t *experts, int32_t count);
/* Whether the job has every expert of which the map has a replica at the job's worker. */
bool moe_job_covers_share(const moe_load_job *job, const moe_placement *map);
/* A job for worker `id` to load every expert of which `worker` of `map` has a replica; false: out of memory. */
bool moe_jobs_add_share(moe_jobs *jobs, moe_controller *c, const moe_placement *map, int32_t worker, const char *id,
                        uint64_t incarnation);
void moe_jobs_step(moe_jobs *jobs, moe_controller *c); /* starts the calls that are due */
void moe_jobs_remove(moe_jobs *jobs, int32_t index);   /* cancels its call */
void moe_jobs_clear(moe_jobs *jobs);
/* Whether the digests it reported are the map's; where the map has none yet, they become it. */
bool moe_job_agrees(const moe_load_job *job, moe_placement *map);
static inline bool moe_load_job_done(const moe_load_job *job) { return job->num_loaded == job->num_experts; }

/* stats.c */
void moe_controller_poll_stats(moe_controller *c);
void moe_worker_stats_free(moe_worker_stats **stats);
/* What the member's present incarnation told, or NULL. */
const moe_worker_stats *moe_member_stats(const moe_member *m);
bool moe_stats_holds(const moe_worker_stats *stats, int32_t expert);

/* balance.c */
typedef enum moe_plan_scope { MOE_PLAN_SAFETY, MOE_PLAN_BALANCE, MOE_PLAN_NOW /* balance without dwell */ } moe_plan_scope;
typedef struct moe_plan_workers { /* the policy's workers: the map's, then newcomers */
    int32_t count;
    moe_policy_worker states[MOE_PLACEMENT_MAX_WORKERS];
    const char *ids[MOE_PLACEMENT_MAX_WORKERS]; /* borrowed from map and members */
} moe_plan_workers;
/* Plans into c->steps; 0 where nothing is to do or too little is known. */
int32_t moe_controller_plan(moe_controller *c, moe_plan_scope scope, moe_plan_workers *workers);
void moe_controller_plan_view(moe_controller *c);                                   /* for the view, now and then */
void moe_controller_note_changes(moe_controller *c, const moe_placement *next); /* before `next` replaces c->map */
bool moe_member_leaves(const moe_controller *c, const moe_member *m);           /* told to stop, or drained */

/* migrate.c */
void moe_controller_migrate(moe_controller *c); /* the leader's work on moves, one pass; publishes at most once */
/* Begins the moves of one layer. False: it could not be noted in the store. */
bool moe_migration_begin(moe_controller *c, const char *id, const moe_move *moves, int32_t count);
void moe_migration_forget(moe_controller *c); /* what is in memory; the store keeps it for the next leader */
const char *moe_migration_phase_name(moe_migration_phase phase);
bool moe_migration_wants(const moe_controller *c, const char *worker, int32_t expert); /* it is being copied there */

/* leftovers.c */
void moe_controller_drop_leftovers(moe_controller *c);

/* gossip.c */
void moe_controller_exchange_maps(moe_controller *c);
void moe_controller_take_hurry(moe_controller *c); /* what moe_controller_hurry asked for */
bool moe_worker_knows_map(const moe_controller *c, const moe_worker_stats *stats); /* it keeps our map, or a newer one */

/* operations.c */
void moe_controller_list_operations(moe_controller *c);
void moe_controller_store_submitted(moe_controller *c);
/* The oldest unfinished one, or NULL. */
moe_operation *moe_controller_current_operation(moe_controller *c);
void moe_operation_save(moe_controller *c, const moe_operation *op); /* as the leader */
void moe_controller_cancel_drains(moe_controller *c);                /* as undrains ask */
void moe_controller_forget_operations(moe_controller *c);            /* deletes the oldest finished ones, as the leader */

/* publish.c */
/* Writes as the leader: in one transaction, only while `meta` is as we know it. */
moe_status moe_controller_write(moe_controller *c, const moe_store_write *writes, int count, moe_error *err);
/* publishes `next` (borrowed; its epoch and fence are set here) as the newest map and adopts it. */
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
