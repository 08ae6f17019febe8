/* RPC in the manner of gRPC over a moe_transport: services from moesaic.proto, full method names, unary and
 * server-streaming calls, deadlines, cancellation, status codes, metadata, and raw payload frames for tensors.
 *
 * One moe_rpc owns one transport and belongs to the transport's thread (only moe_rpc_wake may be called from others). It is
 * client and server at once. Whatever comes from a peer is validated before it is used: a bad message gets a typed error
 * reply where it names a call, adds to the metric BAD_MESSAGES, and the connection is kept.
 *
 * Messages are protobuf-c's generated structs (moesaic.pb-c.h): plain C; handlers read requests and fill responses, only
 * this folder packs and unpacks. */
#pragma once
#include "common/clock.h"
#include "common/transport.h"
#include "moesaic.pb-c.h"

#define MOE_PROTOCOL_VERSION 1
#define MOE_RPC_MAX_HEADER_BYTES (64 * 1024)      /* frame 0 of a data call (one with payload frames) */
#define MOE_RPC_MAX_CONTROL_BYTES (4 * 1024 * 1024) /* frame 0 of a call without payload */
#define MOE_RPC_MAX_CALLS 65536                   /* outstanding, each direction */
#define MOE_RPC_PING_INTERVAL_NS (100 * MOE_NS_PER_MS)
#define MOE_RPC_HELLO_INTERVAL_NS (1 * MOE_NS_PER_S) /* until a hello of ours is answered */
#define MOE_RPC_MAX_HELLO_TEXT_BYTES 256          /* each text of a hello */
#define MOE_RPC_MAX_PEERS 4096                    /* known at a time; then a silent one gives way to a newcomer */
#define MOE_RPC_PEER_IDLE_NS (60 * MOE_NS_PER_S)  /* how silent */
#define MOE_RPC_MAX_EVENTS_PER_STEP 256           /* handled before step returns to its owner */

typedef struct moe_rpc moe_rpc;

/* A peer as its hello described it. Strings are owned by the rpc and live until PEER_DOWN was reported. */
typedef struct moe_rpc_peer {
    moe_peer peer;
    uint64_t link; /* our connection's number, or 0 where the peer connected to us */
    moe_role role; /* proved by the transport */
    const char *cluster_uuid, *claimed_role, *id, *profile;
    uint64_t incarnation, model_digest, epoch, fence;
    uint64_t progress;        /* newest progress counter received */
    int64_t progress_at_ns;   /* when the counter last *changed* */
    int64_t heard_at_ns;      /* when anything last came from it */
} moe_rpc_peer;

typedef struct moe_rpc_hello {
    const char *cluster_uuid, *role, *id, *profile; /* borrowed for the rpc's life; "" for none, never NULL */
    uint64_t incarnation, model_digest, epoch, fence;
} moe_rpc_hello;

/* A reply, or one stream item; borrowed for the callback. */
typedef struct moe_rpc_reply {
    moe_status status;             /* also DEADLINE_EXCEEDED, UNAVAILABLE, CANCELLED made here */
    const char *message;           /* never NULL */
    bool last;                     /* false for stream items that are followed by more */
    const ProtobufCMessage *body;  /* the method's response type; NULL when status is not OK and it carried none */
    const moe_frame *payload;
    int num_payload;
} moe_rpc_reply;
typedef void (*moe_rpc_on_reply)(void *ctx, const moe_rpc_reply *reply);

/* A call being served. Owned by the rpc until it was answered. */
typedef struct moe_rpc_call {
    moe_rpc *rpc;
    moe_peer peer;
    uint64_t call_id;
    moe_role role;
    int64_t deadline_ns; /* on the rpc's clock; INT64_MAX for none */
    bool cancelled;      /* the caller cancelled, went away, or the deadline passed: answering is harmless and does nothing */
    void *owner;         /* the handler's */
    void (*on_cancel)(struct moe_rpc_call *call); /* the handler's; may be NULL; called once. The call stays until the handler
                                                     answers it, in on_cancel or later; moe_rpc_free frees what is left */
} moe_rpc_call;

/* A handler answers now or later, on the rpc's thread, with moe_rpc_respond or moe_rpc_fail, exactly once.
 * `request` and `payload` are borrowed for the call of the handler. */
typedef void (*moe_rpc_handler)(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                                int num_payload);

/* One row per method that this process serves; terminated by a row with method NULL. */
typedef struct moe_rpc_method {
    const char *method; /* "/moesaic.v1.ExpertService/Forward" */
    moe_rpc_handler handler;
    uint32_t roles; /* bit set of 1 << moe_role that may call; LOCAL always may */
} moe_rpc_method;

typedef struct moe_rpc_config {
    moe_transport *transport; /* borrowed; outlives the rpc */
    const moe_clock *clock;
    moe_rpc_hello hello;
    const moe_rpc_method *methods; /* borrowed; may be NULL */
    void *ctx;                     /* for handlers and callbacks */
    uint64_t (*progress)(void *ctx); /* our progress counter for PONG; may be NULL */
    /* A peer's hello arrived: OK accepts it; anything else refuses it (its calls get that status, *err's message). Calls to the
     * peer are possible once this has returned. May be NULL. */
    moe_status (*on_peer_up)(void *ctx, const moe_rpc_peer *peer, moe_error *err);
    void (*on_peer_down)(void *ctx, const moe_rpc_peer *peer); /* after all its outstanding calls ended with UNAVAILABLE */
} moe_rpc_config;

moe_status moe_rpc_new(const moe_rpc_config *config, moe_rpc **out, moe_error *err);
/* Outstanding calls of ours end with CANCELLED first, calls being served are cancelled; NULLs the pointer; idempotent. Not from
 * inside a callback. */
void moe_rpc_free(moe_rpc **rpc);

/* The newest epoch and fence that this process knows, for the hellos from now on: how a leader after a loss of the store learns
 * what had been published. Never lowered. */
void moe_rpc_set_known(moe_rpc *rpc, uint64_t epoch, uint64_t fence);

/* While corked, peers that sleep may be left asleep by what is sent to them; uncorking wakes them, and so does a step. */
void moe_rpc_cork(moe_rpc *rpc);
void moe_rpc_uncork(moe_rpc *rpc);

/* Connections, as in moe_transport; the hello is sent by itself. */
moe_status moe_rpc_connect(moe_rpc *rpc, const char *endpoint, uint64_t *link, moe_error *err);
void moe_rpc_disconnect(moe_rpc *rpc, uint64_t link); /* outstanding calls to it end with UNAVAILABLE; no on_peer_down */
/* The accepted peer behind a link, or NULL while there is none. */
const moe_rpc_peer *moe_rpc_peer_of_link(const moe_rpc *rpc, uint64_t link);
const moe_rpc_peer *moe_rpc_peer_of(const moe_rpc *rpc, moe_peer peer);

/* Starts a call. `on_reply` is called from moe_rpc_step (never from inside this function), for each stream item and once with
 * `last`. Payload frames are copied before return. *call_id may be NULL. Fails at once with UNAVAILABLE (no such peer),
 * RESOURCE_EXHAUSTED (queue full, table full, out of memory), INVALID_ARGUMENT (too large, no such method) or, for a peer
 * that was refused, with the refusal's status; on_reply is not called then. A reply may come twice from a transport that
 * duplicates; on_reply gets the first. */
moe_status moe_rpc_call_start(moe_rpc *rpc, moe_peer peer, const char *method, const ProtobufCMessage *request,
                              const moe_frame *payload, int num_payload, int64_t deadline_ns, moe_rpc_on_reply on_reply, void *ctx,
                              uint64_t *call_id, moe_error *err);
/* Tells the server that the caller no longer wants it; on_reply is not called any more. Unknown ids are ignored. */
void moe_rpc_cancel(moe_rpc *rpc, uint64_t call_id);

/* Answers. `body` may be NULL only with an error. The call is gone afterwards. */
void moe_rpc_respond(moe_rpc_call *call, const ProtobufCMessage *body, const moe_frame *payload, int num_payload);
void moe_rpc_fail(moe_rpc_call *call, moe_status status, const char *message, const ProtobufCMessage *body);
/* One more item; the call stays. Where the caller's queue is full the item is dropped, and so are all later ones: the call then
 * ends with RESOURCE_EXHAUSTED whatever its answer is. */
void moe_rpc_stream(moe_rpc_call *call, const ProtobufCMessage *item);

/* Handles what has arrived and what has expired, waiting for the first event at most until deadline_ns (0: not at all). */
moe_status moe_rpc_step(moe_rpc *rpc, int64_t deadline_ns, moe_error *err);
void moe_rpc_wake(moe_rpc *rpc);
/* No later than the earliest time at which step has something to do by itself (a deadline, a ping, a hello to repeat); INT64_MAX
 * for none. */
int64_t moe_rpc_next_deadline_ns(const moe_rpc *rpc);
