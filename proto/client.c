/* Calls of ours: outstanding ones, their replies, deadlines and cancellation. */
#include "common/alloc.h"
#include "common/metrics.h"
#include "proto/rpc_internal.h"

static moe_client_call *find_call(const moe_rpc *rpc, uint64_t call_id) {
    moe_map_node *node = moe_map_find(&rpc->calls_by_id, call_id, 0);
    return node ? MOE_CONTAINER_OF(node, moe_client_call, by_id) : NULL;
}

static void release_peer(moe_client_call *call) {
    if (call->entry) call->entry->outstanding--;
    call->entry = NULL;
}

static void forget(moe_rpc *rpc, moe_client_call *call) {
    release_peer(call);
    moe_map_remove(&rpc->calls_by_id, &call->by_id);
    moe_list_remove(&call->node);
}

/* The call is over; moe_client_report tells its owner. */
static void end_later(moe_rpc *rpc, moe_client_call *call, moe_status status, const char *message) {
    release_peer(call);
    call->end_status = status;
    call->end_message = message;
    moe_list_move(&rpc->ended, &call->node);
}

static void end_now(moe_rpc *rpc, moe_client_call *call, const moe_rpc_reply *reply) {
    forget(rpc, call);
    call->on_reply(call->ctx, reply);
    moe_free(call);
}

static void send_cancel(moe_rpc *rpc, moe_peer peer, uint64_t call_id) {
    Moesaic__V1__Envelope envelope = MOESAIC__V1__ENVELOPE__INIT;
    envelope.kind = MOESAIC__V1__MESSAGE_KIND__CANCEL;
    envelope.call_id = call_id;
    moe_rpc_send(rpc, peer, &envelope, NULL, NULL, 0, NULL); /* lost: the server's own deadline ends the call */
}

static moe_status send_request(moe_rpc *rpc, moe_client_call *call, const char *method, const ProtobufCMessage *request,
                               const moe_frame *payload, int num_payload, int64_t left_ns, moe_error *err) {
    Moesaic__V1__Envelope envelope = MOESAIC__V1__ENVELOPE__INIT;
    envelope.kind = MOESAIC__V1__MESSAGE_KIND__REQUEST;
    envelope.call_id = rpc->next_call_id;
    envelope.method = (char *)method;
    if (call->deadline_ns != INT64_MAX) envelope.timeout_us = (uint64_t)((left_ns + MOE_NS_PER_US - 1) / MOE_NS_PER_US);
    return moe_rpc_send(rpc, call->entry->view.peer, &envelope, request, payload, num_payload, err);
}

static void enter(moe_rpc *rpc, moe_client_call *call, int64_t now_ns) {
    moe_map_insert(&rpc->calls_by_id, &call->by_id, rpc->next_call_id++, 0);
    moe_list_append(&rpc->calls, &call->node);
    moe_rpc_entry *entry = call->entry;
    if (entry->outstanding++ == 0) entry->ping_due_ns = now_ns + MOE_RPC_PING_INTERVAL_NS;
    moe_rpc_due_at(rpc, entry->ping_due_ns);
    moe_rpc_due_at(rpc, call->deadline_ns);
}

static moe_status peer_for_call(const moe_rpc *rpc, moe_peer peer, moe_rpc_entry **out, moe_error *err) {
    *out = rpc->closing ? NULL : moe_peers_find(rpc, peer);
    if (!*out || (*out)->state == MOE_RPC_PEER_GREETED)
        return moe_fail(err, MOE_UNAVAILABLE, "peer %llu is not connected", (unsigned long long)peer);
    if ((*out)->state == MOE_RPC_PEER_REFUSED) return moe_fail(err, (*out)->refusal.code, "%s", (*out)->refusal.message);
    if (rpc->calls_by_id.count >= MOE_RPC_MAX_CALLS)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%d calls are outstanding, the most possible", MOE_RPC_MAX_CALLS);
    return MOE_OK;
}

moe_status moe_rpc_call_start(moe_rpc *rpc, moe_peer peer, const char *method, const ProtobufCMessage *request,
                              const moe_frame *payload, int num_payload, int64_t deadline_ns, moe_rpc_on_reply on_reply,
                              void *ctx, uint64_t *call_id, moe_error *err) {
    moe_rpc_entry *entry;
    moe_method found;
    if (!moe_method_find(method, &found)) return moe_fail(err, MOE_INVALID_ARGUMENT, "no method %s in moesaic.proto", method);
    MOE_ASSERT(request && request->descriptor == found.request);
    moe_status status = peer_for_call(rpc, peer, &entry, err);
    if (status != MOE_OK) return status;
    moe_client_call *call = moe_calloc(1, sizeof *call);
    if (!call) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a call");
    *call = (moe_client_call){.entry = entry, .method = found, .deadline_ns = deadline_ns, .on_reply = on_reply, .ctx = ctx};
    int64_t now_ns = moe_now_ns(rpc->config.clock);
    bool expired = deadline_ns <= now_ns;
    if (!expired) status = send_request(rpc, call, method, request, payload, num_payload, deadline_ns - now_ns, err);
    if (status != MOE_OK) {
        moe_free(call);
        return status;
    }
    if (call_id) *call_id = rpc->next_call_id;
    enter(rpc, call, now_ns);
    if (expired) end_later(rpc, call, MOE_DEADLINE_EXCEEDED, "the deadline had passed before the call was sent");
    return MOE_OK;
}

void moe_rpc_cancel(moe_rpc *rpc, uint64_t call_id) {
    moe_client_call *call = find_call(rpc, call_id);
    if (!call) return;
    moe_peer peer = call->entry ? call->entry->view.peer : 0;
    forget(rpc, call);
    moe_free(call);
    if (peer) send_cancel(rpc, peer, call_id);
}

/* The call that a message from `peer` speaks of; NULL where it is a late or second reply, which is counted. */
static moe_client_call *call_of_reply(const moe_rpc *rpc, moe_peer peer, uint64_t call_id) {
    moe_client_call *call = find_call(rpc, call_id);
    if (call && call->entry && call->entry->view.peer == peer) return call;
    moe_metric_add(MOE_METRIC_STALE_REPLIES, 1);
    return NULL;
}

static void fail_now(moe_rpc *rpc, moe_client_call *call, moe_status status, const char *message) {
    moe_rpc_reply reply = {.status = status, .message = message, .last = true};
    end_now(rpc, call, &reply);
}

void moe_client_on_bad_reply(moe_rpc *rpc, moe_peer peer, uint64_t call_id, moe_status status, const char *message) {
    moe_client_call *call = call_of_reply(rpc, peer, call_id);
    if (!call) return;
    send_cancel(rpc, peer, call_id);
    fail_now(rpc, call, status, message);
}

/* Stream items are numbered, so that a lost one is never passed over in silence. True where the message is to be delivered. */
static bool item_in_order(moe_rpc *rpc, moe_client_call *call, moe_peer peer, const Moesaic__V1__Envelope *envelope) {
    bool is_item = envelope->kind == MOESAIC__V1__MESSAGE_KIND__STREAM_ITEM;
    if (is_item && envelope->item < call->items) {
        moe_metric_add(MOE_METRIC_STALE_REPLIES, 1);
        return false;
    }
    if (is_item ? envelope->item == call->items && call->method.server_streaming
                : envelope->item == call->items || envelope->status != MOE_OK)
        return true;
    moe_metric_add(MOE_METRIC_BAD_MESSAGES, 1);
    moe_client_on_bad_reply(rpc, peer, envelope->call_id, MOE_DATA_LOSS, "items of the reply's stream were lost");
    return false;
}

void moe_client_on_reply(moe_rpc *rpc, const moe_event *event, const Moesaic__V1__Envelope *envelope) {
    moe_client_call *call = call_of_reply(rpc, event->peer, envelope->call_id);
    moe_rpc_entry *entry = call ? NULL : moe_peers_find(rpc, event->peer);
    if (entry) moe_peers_on_progress(rpc, entry, envelope->progress); /* late, but a sign of progress */
    if (!call || !item_in_order(rpc, call, event->peer, envelope)) return;
    moe_peers_on_progress(rpc, call->entry, envelope->progress);
    moe_rpc_reply reply = {
        .status = envelope->status < MOE_STATUS_COUNT ? (moe_status)envelope->status : MOE_UNKNOWN,
        .message = envelope->message,
        .last = envelope->kind == MOESAIC__V1__MESSAGE_KIND__RESPONSE,
        .payload = event->frames + 1,
        .num_payload = event->num_frames - 1,
    };
    ProtobufCMessage *body = NULL;
    moe_error err;
    if (reply.status == MOE_OK || envelope->body.len > 0) {
        moe_status status = moe_wire_unpack(call->method.response, envelope->body.data, envelope->body.len, &body, &err);
        if (status != MOE_OK) {
            moe_metric_add(MOE_METRIC_BAD_MESSAGES, 1);
            bool memory = status == MOE_RESOURCE_EXHAUSTED;
            moe_client_on_bad_reply(rpc, event->peer, envelope->call_id, memory ? status : MOE_DATA_LOSS,
                                    memory ? "no memory for the reply" : "the reply's body is malformed");
            return;
        }
    }
    reply.body = body;
    if (reply.last) {
        end_now(rpc, call, &reply);
    } else {
        call->items++;
        call->on_reply(call->ctx, &reply);
    }
    moe_wire_free(body);
}

void moe_client_end_peer(moe_rpc *rpc, const moe_rpc_entry *entry, const char *message) {
    for (moe_list *node = rpc->calls.next, *next; node != &rpc->calls; node = next) {
        next = node->next;
        moe_client_call *call = MOE_CONTAINER_OF(node, moe_client_call, node);
        if (call->entry == entry) end_later(rpc, call, MOE_UNAVAILABLE, message);
    }
}

void moe_client_expire(moe_rpc *rpc, int64_t now_ns) {
    for (moe_list *node = rpc->calls.next, *next; node != &rpc->calls; node = next) {
        next = node->next;
        moe_client_call *call = MOE_CONTAINER_OF(node, moe_client_call, node);
        if (call->deadline_ns <= now_ns)
            end_later(rpc, call, MOE_DEADLINE_EXCEEDED, "the deadline passed before the reply came");
        else
            moe_rpc_due_at(rpc, call->deadline_ns);
    }
}

/* Only what had ended when this began, so that a callback that starts hopeless calls cannot hold the step. */
void moe_client_report(moe_rpc *rpc) {
    moe_list_splice(&rpc->reporting, &rpc->ended);
    while (!moe_list_empty(&rpc->reporting)) {
        moe_client_call *call = MOE_CONTAINER_OF(rpc->reporting.next, moe_client_call, node);
        fail_now(rpc, call, call->end_status, call->end_message);
    }
}

void moe_client_free(moe_rpc *rpc) {
    while (!moe_list_empty(&rpc->calls))
        end_later(rpc, MOE_CONTAINER_OF(rpc->calls.next, moe_client_call, node), MOE_CANCELLED, "the caller shut down");
    moe_client_report(rpc);
}
