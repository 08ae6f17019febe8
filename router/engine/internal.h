/* The engine's own structures. A token's way through these files:
 *   inbox.c → scheduler.c → micro_batch.c (segments) → dispatch.c (chunks, plan, retry), expert_call.c → micro_batch.c → sequence.c
 * or, with every expert in this process, scheduler.c → micro_batch.c (one local step, local_step.c) → sequence.c, or, where not all are on
 * the device, or routing is looked at, micro_batch.c (segments) → in_place.c → micro_batch.c → sequence.c. */
#pragma once
#include <pthread.h>
#include <stdatomic.h>

#include "router/engine/engine.h"
#include "router/engine/kv_blocks.h"
#include "router/engine/output.h"
#include "router/engine/pipeline.h"
#include "router/engine/plan.h"
#include "router/engine/quarantine.h"
#include "router/engine/sampler.h"

#define MOE_ENGINE_LOGITS_BYTES (INT64_C(64) << 20) /* of one micro-batch; bounds how many rows may ask for logits at once */
#define MOE_ENGINE_VIEW_INTERVAL_NS (20 * MOE_NS_PER_MS)
#define MOE_ENGINE_IDLE_NS (100 * MOE_NS_PER_MS) /* longest sleep of a step while work is outstanding */
#define MOE_LOAD_HALF_LIFE_S 60.0
#define MOE_SUSPECT_JOB_FACTOR 5               /* a worker may be silent for this many times its usual call time */
#define MOE_SLOW_WIRE_BYTES_PER_S 2e8          /* and while its rows may be on the way at this pace, there and back */
#define MOE_SUSPECT_HOLD_NS (1 * MOE_NS_PER_S) /* a suspect is tried again after this, doubled each time it does no better: */
#define MOE_SUSPECT_HOLD_MAX_NS (30 * MOE_NS_PER_S)
#define MOE_POISON_WORKERS 2                   /* a request in whose step so many workers died is not tried on another */
#define MOE_HEDGE_FACTOR 4                     /* a call is hedged after so many times the usual time of its size, */
#define MOE_HEDGE_AFTER_NS (25 * MOE_NS_PER_MS) /* and not before this */
#define MOE_HEDGE_BUDGET 0.1                   /* rows of hedges for each row of ordinary calls, */
#define MOE_HEDGE_BURST_ROWS 4096              /* saved up to this */
#define MOE_LATE_HOLD_NS (50 * MOE_NS_PER_MS) /* a worker that a hedge beat without a sign of progress gets no work for so long */
#define MOE_OWING_GAP_NS (100 * MOE_NS_PER_MS) /* silence is counted over calls that follow each other this closely */
#define MOE_CHUNKS_IN_FLIGHT 4                 /* of a layer, at most: calls to every worker of the map */
#define MOE_ORPHAN_RETRY_NS (50 * MOE_NS_PER_MS) /* between tries while an expert has no usable replica */

typedef struct micro_batch micro_batch;
typedef struct virtual_experts virtual_experts;

/* ---- sequences ---- */

typedef enum sequence_state { SEQUENCE_WAITING, SEQUENCE_RUNNING } sequence_state;

/* One request on its way. Made by submit on the caller's thread, from then on the engine's. */
typedef struct sequence {
    struct sequence *next; /* inbox */
    uint64_t id;
    char *name; /* the request's id, for logs */
    moe_on_output on_output;
    void *ctx;
    moe_sampling_params sampling;
    moe_logit_bias *logit_bias;
    int32_t num_logit_bias;
    moe_output_processor *output;

    int32_t *tokens; /* prompt, then output; room for max_tokens more */
    int32_t num_prompt, num_tokens;
    int32_t num_computed; /* tokens whose keys and values are in the cache */
    int32_t *blocks;
    int32_t num_blocks;

    sequence_state state;
    micro_batch *in_flight;
    moe_status ended; /* not OK: cancelled or failed, to be closed when no micro-batch holds it */
    char message[MOE_ERROR_MESSAGE_BYTES];

    moe_token_logprobs *prompt_logprobs; /* [num_prompt - 1] where asked for */
    int32_t num_prompt_logprobs;
    uint64_t death_step; /* the last step in which a worker died over this request */
    int32_t num_dead, dead_workers[MOE_POISON_WORKERS]; /* in that step; indices into engine->workers */
    int64_t submitted_ns, last_token_ns;
    uint64_t routing_key; /* moe_dummy_routing_sequence of the prompt, where that is used */
} sequence;

typedef struct sequence_list { /* in admission order */
    sequence **items;
    int32_t count, capacity;
} sequence_list;

/* ---- workers ---- */

/* A worker as the engine reaches it, by endpoint. A restart under the same endpoint is the same entry, another incarnation. */
typedef struct engine_worker {
    char id[MOE_WORKER_ID_BYTES];
    char endpoint[MOE_ENDPOINT_BYTES];
    int32_t transport; /* index into engine->channels */
    uint64_t link;
    bool up, suspect;
    int64_t suspected_ns; /* since when, or when it last was */
    int64_t hold_ns;      /* how long it stays so at most */
    uint64_t incarnation; /* while up */
    moe_peer peer;        /* while up */
    int64_t owing_ns;     /* when the first call was sent that it has been silent about since, though hedges may have answered it */
    int64_t owed_ns;      /* when it was last seen to owe an answer */
    int64_t late_until_ns;
    int64_t call_ns;      /* exponential average of a call's time */
    double call_rows;     /* and of its assignments */
    bool quarantined;
    bool has_tiers;       /* its answers tell of experts that are not on its device: hints are of use to it */
    bool in_use;          /* some map names it */
} engine_worker;

/* A placement map with the engine's workers looked up. Engine thread only. */
typedef struct placed_map {
    int32_t references;
    moe_placement *placement;
    moe_placement_cost cost; /* of the placement's workers */
    int32_t *worker; /* [placement->num_workers]: index into engine->workers, or -1 where none of our transports reaches it */
} placed_map;

/* ---- dispatch ---- */

/* One Forward call of a micro-batch. */
typedef struct expert_call {
    micro_batch *batch;
    bool active;
    int32_t worker; /* index into engine->workers */
    uint64_t rpc_call, incarnation;
    uint64_t digest; /* exclusive or of its experts' digests; 0 while one is unknown */
    int64_t sent_ns;
    bool blamed; /* made its worker suspect: goes to other replicas as soon as they can take it */
    bool hedged; /* a hedge was begun, or found impossible */
    int32_t hedge_parts, parts_answered; /* of its hedge; 0: there is none under way */
    struct expert_call *primary;         /* of a part of a hedge: the slow call; else NULL */
    bool answered;                       /* a part whose result is in place */
    int32_t num_rows, num_assignments;
    moe_assignment *assignments; /* [capacity]; sorted by (expert, row) */
    int32_t *rows;               /* [capacity]; the first num_rows: rows of the micro-batch in message order */
    int32_t *row_slots;          /* [capacity]; the slot of each row's weighted sum: its lowest slot in this call */
    int32_t capacity;
} expert_call;

/* ---- micro-batches ---- */

typedef enum micro_batch_state {
    BATCH_IDLE,
    BATCH_SEGMENT,
    BATCH_EXPERTS,  /* dispatched */
    BATCH_LOCAL,    /* a whole step */
    BATCH_IN_PLACE, /* experts of this process */
    BATCH_LEAVING,  /* failed or cancelled; calls in place have not ended */
} micro_batch_state;

typedef struct batch_sequence {
    sequence *seq;
    int32_t first_row, num_rows;
    int32_t first_logit, num_logits; /* rows of logits */
} batch_sequence;

struct micro_batch {
    moe_engine *engine;
    int32_t index;
    micro_batch_state state;
    uint64_t step;
    placed_map *map;

    batch_sequence *seqs;  /* [max_num_seqs] */
    uint64_t *request_ids; /* [max_num_seqs]; filled for on_layer alone */
    int32_t num_seqs, num_rows;
    int32_t *token_ids, *positions, *row_seq; /* [max rows] */
    moe_kv_view *views;                       /* [max_num_seqs] */
    int32_t *logit_rows;
    int32_t num_logit_rows;

    moe_segment segment;
    moe_local_step local; /* of a step that is one job */
    int32_t *expert_rows; /* [num_moe_layers, num_experts] of that step; NULL where there are no local experts */
    bool in_place;                  /* layers of this step are computed where they are */
    moe_layer_call layer_calls[2];  /* of even and of odd MoE layers */
    moe_job job;
    _Atomic bool job_done;
    pthread_t submitter;                      /* of the job: needs no wake for what is done inside the submission */
    moe_route route, next_route, spare_route; /* [max rows, top_k] each */
    bool have_next_route;                     /* next_route predicts or decides the layer to come */
    float *gate_logits, *next_logits;         /* [max rows, num_experts] under an expert budget, else NULL */
    void *activations;                        /* [max rows, H] of engine->dtype */
    void *expert_out;                         /* [max rows, top_k, H] of engine->out_dtype */
    float *combine_weights;                   /* [max rows, top_k] */
    int32_t *combine_counts;                  /* [max rows] */
    float *logits;                            /* [max logit rows, V] */
    int32_t num_top;                          /* how many of a row's highest logits suffice; 0: all are needed */
    int32_t *top_ids;                         /* [max logit rows, MOE_MAX_TOP_LOGITS], as is the next: of num_top each */
    float *top_logits;

    expert_call *calls; /* [max_calls] */
    int32_t max_calls, calls_outstanding;
    uint32_t attempts;       /* calls of this layer that failed */
    bool tuned;              /* as the pipeline says, */
    int32_t degree;          /* this layer goes out in so many chunks at most, */
    int32_t chunk_rows;      /* each of so many rows; */
    int32_t next_row;        /* the next one begins here; num_rows: all are sent */
    int64_t plan_ns;         /* what the chunks sent so far took to plan and pack */
    int64_t expert_ns[MOE_PLACEMENT_MAX_WORKERS]; /* computation that an engine worker's replies of this layer told of */
    int64_t copy_ns[MOE_PLACEMENT_MAX_WORKERS];   /* copies between host and device, likewise */
    int64_t stall_ns;        /* longest wait of a worker's computation for experts */
    int64_t host_ns;         /* longest computation of cold experts by a worker's host */
    bool has_tiers;          /* a reply of this layer came from a worker with tiers */
    moe_assignment *orphans; /* [max rows × top_k]: assignments without a usable replica */
    int32_t num_orphans;
    int64_t orphaned_ns;                      /* when the first of them became one */
    int64_t orphans_tried_ns;                 /* 0: they are new, try at once */
    uint64_t orphan_version;                  /* engine->topology_version when they were last tried */
    bool excluded[MOE_PLACEMENT_MAX_WORKERS]; /* engine workers that failed a call in this layer */
    char last_failure[MOE_ERROR_MESSAGE_BYTES];
    int64_t stage_began_ns;
};

/* ---- the engine ---- */

typedef struct channel { /* one transport and the RPC on it */
    moe_engine *engine;
    moe_transport *transport;
    moe_rpc *rpc;
} channel;

/* Scratch of planning, sized once. */
typedef struct plan_scratch {
    moe_assignment *assignments, *sorted; /* [max rows × top_k] */
    int32_t *counts;                      /* [num_experts + 1] */
    int32_t *rows_of_expert, *chosen;     /* [num_experts] */
    int32_t *order;                       /* [2 · num_experts] */
    moe_plan_worker *workers;             /* [MOE_PLACEMENT_MAX_WORKERS] */
    int32_t *local_row;                   /* [max rows]: row of the message, or -1 */
    uint32_t *message_rows, *message_experts;
    float *message_weights; /* [max rows × top_k] each */
    uint32_t *hints;        /* [num_experts] */
    bool *hinted;           /* [num_experts] */
} plan_scratch;

struct moe_engine {
    moe_engine_config config;
    _Atomic uint64_t routing_epoch; /* the oldest of the maps in use */
    const moe_model_config *model;
    moe_dtype dtype, out_dtype; /* of activations and of expert outputs */
    moe_base *base;
    moe_local *local;   /* NULL until the first local step */
    bool local_refused; /* it could not be made */
    moe_dummy_routing *dummy_routing; /* NULL: gates choose */
    moe_kv *kv;
    moe_kv_blocks blocks;
    moe_sampler *sampler;
    channel *channels;

    sequence_list running, waiting;
    micro_batch *batches;
    int32_t max_logit_rows;
    uint64_t next_step;
    plan_scratch scratch;

    engine_worker workers[MOE_PLACEMENT_MAX_WORKERS];
    int32_t num_workers;
    placed_map *map;           /* newest; NULL before the first */
    moe_quarantine quarantine;
    double hedge_rows;         /* what hedges may still cost */
    virtual_experts *virtual;  /* NULL: no expert budget */
    moe_pipeline pipeline;
    _Atomic int64_t *hints_made, *hints_found; /* [num_moe_layers]: experts; see moe_engine_hint_recall */
    uint64_t topology_version; /* counts changes of map and workers, so that orphans know when to try again */

    pthread_mutex_t lock; /* guards what follows */
    sequence *inbox, **inbox_tail;
    uint64_t *cancels;
    int32_t num_cancels, max_cancels;
    moe_placement *new_placement;
    bool draining;
    int32_t num_queued; /* submitted and not yet running */
    uint64_t next_id;
    moe_engine_view view;
    double *loads;        /* [num_moe_layers, num_experts]; see view.c */
    double *worker_loads; /* [MOE_PLACEMENT_MAX_WORKERS] */
    int64_t load_epoch_ns;

    int64_t viewed_ns;
    bool view_dirty;
    _Atomic uint64_t jobs_ended;
    bool local_work; /* the local worker has more to do at once */
    pthread_t thread;
    bool started;
    _Atomic bool stopping;
};

static inline sequence *micro_batch_sequence(const micro_batch *b, int32_t row) { return b->seqs[b->row_seq[row]].seq; }
/* What is sent now is of the layer's first chunk; later ones bring no hints. */
static inline bool micro_batch_first_chunk(const micro_batch *b) { return b->next_row <= b->chunk_rows; }
static inline int64_t engine_now(const moe_engine *e) { return moe_now_ns(e->config.clock); }

/* sequence.c */
moe_status sequence_new(moe_engine *e, const moe_request *request, sequence **out, moe_error *err);
void sequence_free(sequence **seq);
void sequence_release_blocks(moe_engine *e, sequence *seq);
/* Ends a sequence with an error event (status not OK) and frees it. It must be in no list and no micro-batch. */
void sequence_close(moe_engine *e, sequence *seq, moe_status status, const char *message);
/* What a micro-batch computed for one sequence: rows of logits, or of the highest alone, as in moe_segment. */
typedef struct logit_rows {
    int32_t count;
    const float *logits; /* [count, V]; NULL where num_top > 0 */
    int32_t num_top;
    const int32_t *top_ids;  /* [count, num_top] */
    const float *top_logits; /* [count, num_top] */
} logit_rows;

/* Takes what was computed of num_rows tokens: records prompt logprobs, samples, emits. True when the sequence ended. */
bool sequence_advance(moe_engine *e, sequence *seq, int32_t num_rows, const logit_rows *computed);
/* How many of the highest logits its next token takes; 0: all are needed. */
int32_t sequence_num_top(const moe_engine *e, const sequence *seq);
void sequence_list_push(sequence_list *list, sequence *seq, bool front);
void sequence_list_remove(sequence_list *list, const sequence *seq);

/* inbox.c */
void inbox_take(moe_engine *e);

/* scheduler.c */
/* Marks a sequence as ended; it is closed when no micro-batch holds it. */
void scheduler_end(moe_engine *e, sequence *seq, moe_status status, const char *message);
void scheduler_reap(moe_engine *e);
/* Fills an idle micro-batch with rows; false when there is nothing to do. */
bool scheduler_fill(moe_engine *e, micro_batch *b);

/* micro_batch.c */
moe_status micro_batch_init(moe_engine *e, micro_batch *b, int32_t index, moe_error *err);
void micro_batch_destroy(micro_batch *b);
void micro_batch_begin(micro_batch *b);
bool micro_batch_advance(micro_batch *b); /* true when it moved */
bool micro_batch_can_advance(const micro_batch *b); /* what the worker of this process has ended, or its poll, lets it move */

/* dummy_routing.c */
/* Replaces what the segment that has ended routed: this layer's experts, and those foretold of the next. */
void dummy_routing_apply(const micro_batch *b);

/* local_step.c */
bool local_step_ready(moe_engine *e);    /* the next step can be one job */
void local_step_observe(micro_batch *b); /* after that job: metrics and loads */
/* Experts of this process alone computed a layer: rows [num_experts] is their load. */
void local_step_count_rows(micro_batch *b, int32_t layer, const int32_t *rows);

/* in_place.c */
bool in_place_ready(const moe_engine *e); /* the layers of the next step can be computed where they are */
void in_place_describe(micro_batch *b);   /* what is special to the segments of such a step */
void in_place_segment_submitted(micro_batch *b);
/* Whether the experts before the segment that has ended are over too, so that it can be taken in. Where they failed, so have the
 * sequences. */
bool in_place_settled(micro_batch *b);
void in_place_segment_ended(micro_batch *b);   /* its route is known: the layer's experts begin */
bool in_place_submitted(const micro_batch *b); /* the next segment may be submitted behind the layer's experts, or never will be */
void in_place_fail(micro_batch *b);            /* where the layer's experts have failed, so have the sequences */
bool in_place_before_ended(const micro_batch *b);  /* the experts that the segment was submitted behind are over */
int64_t in_place_before_ns(const micro_batch *b); /* computation of the experts that the segment was submitted behind */
bool in_place_ended(const micro_batch *b);     /* no call is under way */
void in_place_await(micro_batch *b);           /* until none is */
void in_place_leave(micro_batch *b);           /* what is under way comes to its end though nobody wants it */

/* dispatch.c */
void dispatch_begin(micro_batch *b);             /* plans and sends this layer's calls, or those of its first chunk */
bool dispatch_can_send(const micro_batch *b);    /* another chunk may go out */
bool dispatch_done(const micro_batch *b);        /* all results are in place */
void dispatch_tick(micro_batch *b, int64_t now); /* suspicion, orphans, deadlines, the next chunk */
void dispatch_observe(const micro_batch *b);     /* after that: the layer's metrics */
void dispatch_cancel(micro_batch *b);
/* Chooses a replica for each expert of `count` assignments: scratch->rows_of_expert, scratch->chosen. Of the map's workers only
 * those count that `fitness` says. */
void dispatch_choose(const micro_batch *b, const moe_assignment *assignments, int32_t count,
                     moe_plan_fitness (*fitness)(const void *ctx, int32_t placed), const void *ctx);

/* expert_call.c */
/* Sends assignments, sorted by (expert, row), to a worker of the map. As a part of the hedge of `primary`, else NULL: then what
 * cannot be sent becomes orphans. False where no call began. */
bool expert_call_start(micro_batch *b, int32_t placed, const moe_assignment *assignments, int32_t count, expert_call *primary);
void expert_call_tick(expert_call *call, int64_t now); /* a worker silent for too long is suspect, and loses the call */
void expert_call_release(expert_call *call);
void expert_call_orphan(micro_batch *b, const moe_assignment *assignments, int32_t count); /* there is no call for them */
/* Experts of the next MoE layer that the micro-batch will probably want and that the worker holds, into scratch->hints; how many. */
int32_t expert_call_hints(const micro_batch *b, int32_t placed, int32_t next_layer);

/* virtual_experts.c */
moe_status virtual_experts_new(moe_engine *e, virtual_experts **out, moe_error *err); /* *out NULL without a budget */
void virtual_experts_free(virtual_experts **pointer);                                 /* after the channels; NULLs */
void virtual_experts_settle(micro_batch *b); /* after a segment: its routes come to keep to the sets */
/* Exact rows of a call, in its order, perhaps not aligned. */
void virtual_experts_answered(const expert_call *call, const void *rows);

/* hedge.c */
void hedge_earn(moe_engine *e, int32_t rows);     /* an ordinary call with so many rows was sent */
void hedge_tick(expert_call *call, int64_t now);  /* begins the call's hedge where it is due and affordable */
int64_t hedge_next_ns(const micro_batch *b);      /* when the next one is due; INT64_MAX: none */
void hedge_drop(expert_call *call);               /* the call ends, or a part of its hedge failed: the call stands alone */
void hedge_answered(expert_call *part);           /* its result is in place; the last one ends the slow call */

/* workers.c */
moe_status workers_on_peer_up(void *ctx, const moe_rpc_peer *peer, moe_error *err);
void workers_on_peer_down(void *ctx, const moe_rpc_peer *peer);
void workers_adopt(moe_engine *e, moe_placement *placement); /* takes the reference */
placed_map *placed_map_ref(placed_map *map);
void placed_map_unref(moe_engine *e, placed_map **map);
/* Connected, in the incarnation that the map names. */
bool workers_up(const moe_engine *e, const placed_map *map, int32_t placed);
moe_plan_distance workers_distance(const moe_engine *e, const placed_map *map, int32_t placed);
moe_plan_fitness workers_fitness(const moe_engine *e, const placed_map *map, int32_t placed);
const moe_rpc_peer *workers_peer(const moe_engine *e, int32_t worker);
void workers_note_call(moe_engine *e, int32_t worker); /* one is about to be sent */
/* Since when the worker gives no sign of progress, of a call sent at sent_ns that it owes. */
int64_t workers_silent_since(moe_engine *e, int32_t worker, int64_t sent_ns);
void workers_note_late(moe_engine *e, int32_t worker, int64_t sent_ns); /* a hedge was faster than the call sent at sent_ns */
void workers_suspect(moe_engine *e, int32_t worker);
/* Ends suspicions of workers that advance again, or whose time is over, and quarantines whose time is over. */
void workers_forgive(moe_engine *e, int64_t now);

/* view.c */
void view_refresh(moe_engine *e, int64_t now);
/* rows_of_expert, chosen [num_experts]: what a plan sends where; chosen counts in the map's workers, -1 for none. */
void view_add_loads(moe_engine *e, int32_t layer, const placed_map *map, const int32_t *rows_of_expert, const int32_t *chosen);
