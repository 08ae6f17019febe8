/* What the files of the RPC share. Not for users of rpc.h.
 *
 * Callbacks may start, answer and cancel calls and disconnect, so no loop here holds an element across a callback: what is to be
 * reported moves to a list, and the loop takes the head of that list until it is empty. */
#pragma once
#include "proto/envelope.h"
#include "proto/list.h"
#include "proto/map.h"
#include "proto/methods.h"
#include "proto/rpc.h"

typedef enum moe_rpc_peer_state {
    MOE_RPC_PEER_GREETED,  /* our connection: hello sent, none came yet */
    MOE_RPC_PEER_ACCEPTED, /* calls are possible */
    MOE_RPC_PEER_REFUSED,  /* by us or by the peer; `refusal` says why */
    MOE_RPC_PEER_GONE      /* in no map; freed at the end of the step */
} moe_rpc_peer_state;

typedef struct moe_rpc_entry {
    moe_map_node by_peer, by_link; /* by_link only where view.link is not 0 */
    moe_list node;                 /* in rpc->peers or rpc->gone */
    moe_rpc_peer view;             /* its strings point into hello */
    Moesaic__V1__Hello *hello;     /* owned; NULL until it came */
    moe_rpc_peer_state state;
    moe_error refusal;
    int32_t outstanding;  /* calls of ours to it */
    int64_t ping_due_ns;  /* while outstanding > 0 */
    int64_t hello_due_ns; /* while GREETED */
} moe_rpc_entry;

/* A call of ours. */
typedef struct moe_client_call {
    moe_map_node by_id;
    moe_list node;        /* in rpc->calls, or rpc->ended / rpc->reporting once it is decided how it ends */
    moe_rpc_entry *entry; /* NULL once it is decided */
    moe_method method;
    int64_t deadline_ns;
    uint32_t items; /* stream items received */
    moe_rpc_on_reply on_reply;
    void *ctx;
    moe_status end_status;
    const char *end_message; /* a literal */
} moe_client_call;

/* A call that we serve. */
typedef struct moe_served_call {
    moe_rpc_call call; /* first, so that the handler's pointer is ours */
    moe_map_node by_peer_and_id;
    moe_list node; /* in rpc->served, rpc->cancelling (on_cancel is still to be called) or rpc->cancelled */
    moe_method method;
    uint32_t items; /* stream items sent */
    bool item_lost; /* an item found the queue full: the stream must not look whole */
} moe_served_call;

struct moe_rpc {
    moe_rpc_config config;
    moe_envelope_buffers buffers;
    moe_map by_peer, by_link; /* moe_rpc_entry */
    moe_list peers, gone;
    int32_t num_greeted;
    moe_map calls_by_id; /* moe_client_call */
    moe_list calls, ended, reporting;
    uint64_t next_call_id;
    moe_map served_by_id; /* moe_served_call by (peer, call id) */
    moe_list served, cancelling, cancelled;
    int64_t due_ns; /* nothing expires before; may be too early, never too late */
    bool in_step, closing;
};

/* rpc.c */
moe_status moe_rpc_send(moe_rpc *rpc, moe_peer peer, Moesaic__V1__Envelope *envelope, const ProtobufCMessage *body,
                        const moe_frame *payload, int num_payload, moe_error *err);
void moe_rpc_due_at(moe_rpc *rpc, int64_t ns); /* something expires then */
uint64_t moe_rpc_progress(const moe_rpc *rpc);
void moe_rpc_report(moe_rpc *rpc); /* calls on_reply for calls that ended and on_cancel for calls that were cancelled */

/* peers.c */
moe_rpc_entry *moe_peers_find(const moe_rpc *rpc, moe_peer peer); /* NULL: no hello yet, or none of ours */
void moe_peers_on_up(moe_rpc *rpc, const moe_event *event);
void moe_peers_on_down(moe_rpc *rpc, const moe_event *event);
void moe_peers_on_hello(moe_rpc *rpc, const moe_event *event, const Moesaic__V1__Envelope *envelope);
void moe_peers_on_progress(moe_rpc *rpc, moe_rpc_entry *entry, uint64_t progress);
void moe_peers_expire(moe_rpc *rpc, int64_t now_ns); /* repeats hellos, sends pings */
void moe_peers_free_gone(moe_rpc *rpc);
void moe_peers_free(moe_rpc *rpc);

/* client.c */
void moe_client_on_reply(moe_rpc *rpc, const moe_event *event, const Moesaic__V1__Envelope *envelope);
/* A reply to call_id that could not be understood: the call ends with `status` and the literal `message`. */
void moe_client_on_bad_reply(moe_rpc *rpc, moe_peer peer, uint64_t call_id, moe_status status, const char *message);
void moe_client_end_peer(moe_rpc *rpc, const moe_rpc_entry *entry, const char *message); /* all calls to it: UNAVAILABLE */
void moe_client_expire(moe_rpc *rpc, int64_t now_ns);
void moe_client_report(moe_rpc *rpc);
void moe_client_free(moe_rpc *rpc); /* calls end with CANCELLED */

/* server.c */
void moe_server_on_request(moe_rpc *rpc, const moe_event *event, const Moesaic__V1__Envelope *envelope);
void moe_server_on_cancel(moe_rpc *rpc, moe_peer peer, uint64_t call_id);
void moe_server_refuse(moe_rpc *rpc, moe_peer peer, uint64_t call_id, moe_status status, const char *message);
void moe_server_cancel_peer(moe_rpc *rpc, moe_peer peer);
void moe_server_expire(moe_rpc *rpc, int64_t now_ns);
void moe_server_report(moe_rpc *rpc);
void moe_server_free(moe_rpc *rpc);
