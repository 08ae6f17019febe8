/* Calls that we serve: admission, answers, cancellation. */
#include <string.h>

#include "common/alloc.h"
#include "common/log.h"
#include "common/metrics.h"
#include "proto/rpc_internal.h"

static moe_served_call *find_served(const moe_rpc *rpc, moe_peer peer, uint64_t call_id) {
    moe_map_node *node = moe_map_find(&rpc->served_by_id, peer, call_id);
    return node ? MOE_CONTAINER_OF(node, moe_served_call, by_peer_and_id) : NULL;
}

static void cancel_later(moe_rpc *rpc, moe_served_call *served) {
    if (served->call.cancelled) return;
    served->call.cancelled = true;
    moe_list_move(&rpc->cancelling, &served->node);
}

static void free_served(moe_rpc *rpc, moe_served_call *served) {
    moe_map_remove(&rpc->served_by_id, &served->by_peer_and_id);
    moe_list_remove(&served->node);
    moe_free(served);
}

static Moesaic__V1__Envelope response_envelope(const moe_rpc *rpc, uint64_t call_id, moe_status status, const char *message) {
    Moesaic__V1__Envelope envelope = MOESAIC__V1__ENVELOPE__INIT;
    envelope.kind = MOESAIC__V1__MESSAGE_KIND__RESPONSE;
    envelope.call_id = call_id;
    envelope.status = (uint32_t)status;
    envelope.message = (char *)message;
    envelope.progress = moe_rpc_progress(rpc);
    return envelope;
}

void moe_server_refuse(moe_rpc *rpc, moe_peer peer, uint64_t call_id, moe_status status, const char *message) {
    moe_error err;
    Moesaic__V1__Envelope envelope = response_envelope(rpc, call_id, status, message);
    if (moe_rpc_send(rpc, peer, &envelope, NULL, NULL, 0, &err) == MOE_OK) return;
    moe_metric_add(MOE_METRIC_REPLIES_DROPPED, 1);
    moe_debug("a reply to peer %llu was dropped: %s", (unsigned long long)peer, err.message);
}

static void send_response(moe_rpc *rpc, const moe_served_call *served, moe_status status, const char *message,
                          const ProtobufCMessage *body, const moe_frame *payload, int num_payload) {
    moe_error err;
    const moe_rpc_call *call = &served->call;
    Moesaic__V1__Envelope envelope = response_envelope(rpc, call->call_id, status, message);
    envelope.item = served->items;
    moe_status sent = moe_rpc_send(rpc, call->peer, &envelope, body, payload, num_payload, &err);
    if (sent == MOE_OK) return;
    if (sent == MOE_INVALID_ARGUMENT)
        moe_server_refuse(rpc, call->peer, call->call_id, MOE_RESOURCE_EXHAUSTED, err.message);
    else
        moe_metric_add(MOE_METRIC_REPLIES_DROPPED, 1);
    moe_debug("a reply to peer %llu failed: %s", (unsigned long long)call->peer, err.message);
}

static void answer(moe_rpc_call *call, moe_status status, const char *message, const ProtobufCMessage *body,
                   const moe_frame *payload, int num_payload) {
    moe_served_call *served = (moe_served_call *)call;
    moe_rpc *rpc = call->rpc;
    MOE_ASSERT(!body || body->descriptor == served->method.response);
    if (!call->cancelled && served->item_lost)
        moe_server_refuse(rpc, call->peer, call->call_id, MOE_RESOURCE_EXHAUSTED,
                          "the caller's queue was full, an item was lost");
    else if (!call->cancelled)
        send_response(rpc, served, status, message, body, payload, num_payload);
    free_served(rpc, served);
}

void moe_rpc_respond(moe_rpc_call *call, const ProtobufCMessage *body, const moe_frame *payload, int num_payload) {
    MOE_ASSERT(body);
    answer(call, MOE_OK, "", body, payload, num_payload);
}

void moe_rpc_fail(moe_rpc_call *call, moe_status status, const char *message, const ProtobufCMessage *body) {
    MOE_ASSERT(status > MOE_OK && status < MOE_STATUS_COUNT);
    answer(call, status, message, body, NULL, 0);
}

void moe_rpc_stream(moe_rpc_call *call, const ProtobufCMessage *item) {
    moe_served_call *served = (moe_served_call *)call;
    moe_rpc *rpc = call->rpc;
    MOE_ASSERT(served->method.server_streaming && item && item->descriptor == served->method.response);
    if (call->cancelled || served->item_lost) return;
    Moesaic__V1__Envelope envelope = response_envelope(rpc, call->call_id, MOE_OK, "");
    envelope.kind = MOESAIC__V1__MESSAGE_KIND__STREAM_ITEM;
    envelope.item = served->items;
    served->item_lost = moe_rpc_send(rpc, call->peer, &envelope, item, NULL, 0, NULL) != MOE_OK;
    if (served->item_lost)
        moe_metric_add(MOE_METRIC_REPLIES_DROPPED, 1);
    else
        served->items++;
}

static int64_t deadline_of(const moe_rpc *rpc, uint64_t timeout_us) {
    int64_t now_ns = moe_now_ns(rpc->config.clock), deadline_ns;
    if (timeout_us == 0 || timeout_us > INT64_MAX / MOE_NS_PER_US) return INT64_MAX;
    return __builtin_add_overflow(now_ns, (int64_t)timeout_us * MOE_NS_PER_US, &deadline_ns) ? INT64_MAX : deadline_ns;
}

static const moe_rpc_method *find_row(const moe_rpc *rpc, const char *method) {
    for (const moe_rpc_method *row = rpc->config.methods; row && row->method; row++)
        if (strcmp(row->method, method) == 0) return row;
    return NULL;
}

/* Whether the peer may call this now; *row is the method's row in the table. */
static moe_status admit(const moe_rpc *rpc, const moe_event *event, const char *method, const moe_rpc_method **row,
                        moe_error *err) {
    const moe_rpc_entry *entry = moe_peers_find(rpc, event->peer);
    if (!entry || entry->state == MOE_RPC_PEER_GREETED)
        return moe_fail(err, MOE_UNAUTHENTICATED, "a call before the hello; a client sends HELLO first on each connection");
    if (entry->state == MOE_RPC_PEER_REFUSED) return moe_fail(err, entry->refusal.code, "%s", entry->refusal.message);
    *row = find_row(rpc, method);
    if (!*row) return moe_fail(err, MOE_UNIMPLEMENTED, "this process does not serve %.200s", method);
    if (event->role != MOE_ROLE_LOCAL && !((*row)->roles & 1u << event->role))
        return moe_fail(err, MOE_PERMISSION_DENIED, "the caller's role may not call %s", (*row)->method);
    if (rpc->served_by_id.count >= MOE_RPC_MAX_CALLS)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%d calls are being served, the most possible", MOE_RPC_MAX_CALLS);
    return MOE_OK;
}

static moe_served_call *enter(moe_rpc *rpc, const moe_event *event, const Moesaic__V1__Envelope *envelope,
                              const moe_method *method) {
    moe_served_call *served = moe_calloc(1, sizeof *served);
    if (!served) return NULL;
    *served = (moe_served_call){
        .call = {.rpc = rpc,
                 .peer = event->peer,
                 .call_id = envelope->call_id,
                 .role = event->role,
                 .deadline_ns = deadline_of(rpc, envelope->timeout_us)},
        .method = *method,
    };
    moe_map_insert(&rpc->served_by_id, &served->by_peer_and_id, event->peer, envelope->call_id);
    moe_list_append(&rpc->served, &served->node);
    moe_rpc_due_at(rpc, served->call.deadline_ns);
    return served;
}

void moe_server_on_request(moe_rpc *rpc, const moe_event *event, const Moesaic__V1__Envelope *envelope) {
    if (find_served(rpc, event->peer, envelope->call_id)) return; /* a duplicate of what is being served */
    moe_error err;
    const moe_rpc_method *row = NULL;
    moe_method method;
    ProtobufCMessage *request = NULL;
    moe_status status = admit(rpc, event, envelope->method, &row, &err);
    if (status == MOE_OK) {
        bool known = moe_method_find(row->method, &method);
        MOE_ASSERT(known); /* moe_rpc_new checked the table */
        status = moe_wire_unpack(method.request, envelope->body.data, envelope->body.len, &request, &err);
        if (status != MOE_OK) moe_metric_add(MOE_METRIC_BAD_MESSAGES, 1);
    }
    moe_served_call *served = status == MOE_OK ? enter(rpc, event, envelope, &method) : NULL;
    if (served)
        row->handler(rpc->config.ctx, &served->call, request, event->frames + 1, event->num_frames - 1);
    else if (status == MOE_OK)
        moe_server_refuse(rpc, event->peer, envelope->call_id, MOE_RESOURCE_EXHAUSTED, "out of memory");
    else
        moe_server_refuse(rpc, event->peer, envelope->call_id, status, err.message);
    moe_wire_free(request);
}

void moe_server_on_cancel(moe_rpc *rpc, moe_peer peer, uint64_t call_id) {
    moe_served_call *served = find_served(rpc, peer, call_id);
    if (served) cancel_later(rpc, served);
}

void moe_server_cancel_peer(moe_rpc *rpc, moe_peer peer) {
    for (moe_list *node = rpc->served.next, *next; node != &rpc->served; node = next) {
        next = node->next;
        moe_served_call *served = MOE_CONTAINER_OF(node, moe_served_call, node);
        if (served->call.peer == peer) cancel_later(rpc, served);
    }
}

void moe_server_expire(moe_rpc *rpc, int64_t now_ns) {
    for (moe_list *node = rpc->served.next, *next; node != &rpc->served; node = next) {
        next = node->next;
        moe_served_call *served = MOE_CONTAINER_OF(node, moe_served_call, node);
        if (served->call.deadline_ns <= now_ns)
            cancel_later(rpc, served);
        else
            moe_rpc_due_at(rpc, served->call.deadline_ns);
    }
}

void moe_server_report(moe_rpc *rpc) {
    while (!moe_list_empty(&rpc->cancelling)) {
        moe_served_call *served = MOE_CONTAINER_OF(rpc->cancelling.next, moe_served_call, node);
        moe_list_move(&rpc->cancelled, &served->node);
        if (served->call.on_cancel) served->call.on_cancel(&served->call);
    }
}

void moe_server_free(moe_rpc *rpc) {
    while (!moe_list_empty(&rpc->served)) cancel_later(rpc, MOE_CONTAINER_OF(rpc->served.next, moe_served_call, node));
    moe_server_report(rpc);
    while (!moe_list_empty(&rpc->cancelled)) free_served(rpc, MOE_CONTAINER_OF(rpc->cancelled.next, moe_served_call, node));
}
