/* The step: expiry, events, and what they call. */
#include "proto/rpc.h"

#include <stdio.h>

#include "common/alloc.h"
#include "common/log.h"
#include "common/metrics.h"
#include "common/random.h"
#include "proto/rpc_internal.h"

moe_status moe_rpc_send(moe_rpc *rpc, moe_peer peer, Moesaic__V1__Envelope *envelope, const ProtobufCMessage *body,
                        const moe_frame *payload, int num_payload, moe_error *err) {
    moe_frame frames[MOE_MAX_FRAMES];
    moe_status status = moe_envelope_pack(&rpc->buffers, envelope, body, payload, num_payload, frames, err);
    moe_transport *transport = rpc->config.transport;
    return status == MOE_OK ? transport->ops->send(transport, peer, frames, num_payload + 1, err) : status;
}

void moe_rpc_due_at(moe_rpc *rpc, int64_t ns) {
    if (ns < rpc->due_ns) rpc->due_ns = ns;
}

uint64_t moe_rpc_progress(const moe_rpc *rpc) { return rpc->config.progress ? rpc->config.progress(rpc->config.ctx) : 0; }

void moe_rpc_report(moe_rpc *rpc) {
    moe_client_report(rpc);
    moe_server_report(rpc);
}

static moe_status check_config(const moe_rpc_config *config, moe_error *err) {
    MOE_ASSERT(config->transport && config->clock);
    moe_method method;
    for (const moe_rpc_method *row = config->methods; row && row->method; row++) {
        if (!moe_method_find(row->method, &method))
            return moe_fail(err, MOE_INVALID_ARGUMENT, "no method %s in moesaic.proto", row->method);
    }
    return MOE_OK;
}

static void init_lists(moe_rpc *rpc) {
    moe_list *const lists[] = {&rpc->peers,     &rpc->gone,   &rpc->calls,      &rpc->ended,
                               &rpc->reporting, &rpc->served, &rpc->cancelling, &rpc->cancelled};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) moe_list_init(lists[i]);
}

static void free_tables(moe_rpc *rpc) {
    moe_map_free(&rpc->by_peer);
    moe_map_free(&rpc->by_link);
    moe_map_free(&rpc->calls_by_id);
    moe_map_free(&rpc->served_by_id);
    moe_envelope_buffers_free(&rpc->buffers);
}

moe_status moe_rpc_new(const moe_rpc_config *config, moe_rpc **out, moe_error *err) {
    *out = NULL;
    moe_status status = check_config(config, err);
    if (status != MOE_OK) return status;
    moe_rpc *rpc = moe_calloc(1, sizeof *rpc);
    if (!rpc) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the RPC");
    rpc->config = *config;
    rpc->due_ns = INT64_MAX;
    /* Call ids start where no earlier process of this name started, so a reply meant for one of them finds no call. */
    rpc->next_call_id = moe_mix64(config->hello.incarnation) >> 16 | 1;
    init_lists(rpc);
    moe_map *const maps[] = {&rpc->by_peer, &rpc->by_link, &rpc->calls_by_id, &rpc->served_by_id};
    for (size_t i = 0; i < sizeof maps / sizeof *maps && status == MOE_OK; i++) status = moe_map_init(maps[i], err);
    if (status == MOE_OK) {
        *out = rpc;
    } else {
        free_tables(rpc);
        moe_free(rpc);
    }
    return status;
}

void moe_rpc_free(moe_rpc **rpc_pointer) {
    moe_rpc *rpc = *rpc_pointer;
    if (!rpc) return;
    MOE_ASSERT(!rpc->in_step);
    rpc->closing = true;
    moe_client_free(rpc);
    moe_server_free(rpc);
    moe_peers_free(rpc);
    free_tables(rpc);
    moe_free(rpc);
    *rpc_pointer = NULL;
}

void moe_rpc_set_known(moe_rpc *rpc, uint64_t epoch, uint64_t fence) {
    moe_rpc_hello *hello = &rpc->config.hello;
    if (epoch > hello->epoch) hello->epoch = epoch;
    if (fence > hello->fence) hello->fence = fence;
}

moe_status moe_rpc_connect(moe_rpc *rpc, const char *endpoint, uint64_t *link, moe_error *err) {
    return rpc->config.transport->ops->connect(rpc->config.transport, endpoint, link, err);
}

void moe_rpc_cork(moe_rpc *rpc) { rpc->config.transport->corked = true; }

void moe_rpc_uncork(moe_rpc *rpc) {
    moe_transport *transport = rpc->config.transport;
    transport->corked = false;
    if (transport->ops->flush) transport->ops->flush(transport);
}

void moe_rpc_wake(moe_rpc *rpc) { rpc->config.transport->ops->wake(rpc->config.transport); }

static bool to_report(const moe_rpc *rpc) { return !moe_list_empty(&rpc->ended) || !moe_list_empty(&rpc->cancelling); }

int64_t moe_rpc_next_deadline_ns(const moe_rpc *rpc) {
    if (to_report(rpc)) return moe_now_ns(rpc->config.clock);
    bool idle = moe_list_empty(&rpc->calls) && moe_list_empty(&rpc->served) && rpc->num_greeted == 0;
    return idle ? INT64_MAX : rpc->due_ns;
}

/* True where it called back, so that the step returns without waiting. */
static bool run_due(moe_rpc *rpc) {
    int64_t now_ns = moe_now_ns(rpc->config.clock);
    if (rpc->due_ns <= now_ns) {
        rpc->due_ns = INT64_MAX;
        moe_client_expire(rpc, now_ns);
        moe_server_expire(rpc, now_ns);
        moe_peers_expire(rpc, now_ns);
    }
    bool called = to_report(rpc);
    moe_rpc_report(rpc);
    return called;
}

static void on_bad_message(moe_rpc *rpc, const moe_event *event, const moe_error *err) {
    Moesaic__V1__MessageKind kind;
    uint64_t call_id;
    moe_metric_add(MOE_METRIC_BAD_MESSAGES, 1);
    moe_debug("a bad message from peer %llu: %s", (unsigned long long)event->peer, err->message);
    moe_envelope_peek(event->frames, event->num_frames, &kind, &call_id);
    if (kind == MOESAIC__V1__MESSAGE_KIND__REQUEST)
        moe_server_refuse(rpc, event->peer, call_id, err->code, err->message);
    else if (kind == MOESAIC__V1__MESSAGE_KIND__RESPONSE || kind == MOESAIC__V1__MESSAGE_KIND__STREAM_ITEM)
        moe_client_on_bad_reply(rpc, event->peer, call_id, MOE_DATA_LOSS, "the reply was damaged on its way");
}

static void send_pong(moe_rpc *rpc, moe_peer peer) {
    Moesaic__V1__Envelope envelope = MOESAIC__V1__ENVELOPE__INIT;
    envelope.kind = MOESAIC__V1__MESSAGE_KIND__PONG;
    envelope.progress = moe_rpc_progress(rpc);
    moe_rpc_send(rpc, peer, &envelope, NULL, NULL, 0, NULL); /* lost: the next ping asks again */
}

static void on_message(moe_rpc *rpc, const moe_event *event) {
    moe_error err;
    Moesaic__V1__Envelope *envelope;
    moe_rpc_entry *entry = moe_peers_find(rpc, event->peer);
    if (entry) entry->view.heard_at_ns = moe_now_ns(rpc->config.clock);
    if (moe_envelope_open(event->frames, event->num_frames, &envelope, &err) != MOE_OK) {
        on_bad_message(rpc, event, &err);
        return;
    }
    switch (envelope->kind) {
        case MOESAIC__V1__MESSAGE_KIND__HELLO:
            moe_peers_on_hello(rpc, event, envelope);
            break;
        case MOESAIC__V1__MESSAGE_KIND__REQUEST:
            moe_server_on_request(rpc, event, envelope);
            break;
        case MOESAIC__V1__MESSAGE_KIND__RESPONSE:
        case MOESAIC__V1__MESSAGE_KIND__STREAM_ITEM:
            moe_client_on_reply(rpc, event, envelope);
            break;
        case MOESAIC__V1__MESSAGE_KIND__CANCEL:
            moe_server_on_cancel(rpc, event->peer, envelope->call_id);
            break;
        case MOESAIC__V1__MESSAGE_KIND__PING:
            if (entry) send_pong(rpc, event->peer);
            break;
        default: /* PONG: moe_envelope_open lets no other kind pass */
            if (entry) moe_peers_on_progress(rpc, entry, envelope->progress);
    }
    moe_envelope_free(envelope);
}

static void on_event(moe_rpc *rpc, const moe_event *event) {
    if (event->kind == MOE_EVENT_PEER_UP)
        moe_peers_on_up(rpc, event);
    else if (event->kind == MOE_EVENT_PEER_DOWN)
        moe_peers_on_down(rpc, event);
    else
        on_message(rpc, event);
    moe_rpc_report(rpc);
}

moe_status moe_rpc_step(moe_rpc *rpc, int64_t deadline_ns, moe_error *err) {
    MOE_ASSERT(!rpc->in_step);
    rpc->in_step = true;
    moe_transport *transport = rpc->config.transport;
    moe_status status = MOE_OK;
    bool called = run_due(rpc);
    int64_t due_ns = moe_rpc_next_deadline_ns(rpc);
    int64_t wait_until_ns = called ? 0 : due_ns < deadline_ns ? due_ns : deadline_ns;
    for (int i = 0; i < MOE_RPC_MAX_EVENTS_PER_STEP; i++) {
        moe_event event;
        status = transport->ops->poll(transport, wait_until_ns, &event, err);
        if (status != MOE_OK || event.kind == MOE_EVENT_NONE) break;
        on_event(rpc, &event);
        wait_until_ns = 0;
    }
    run_due(rpc);
    moe_peers_free_gone(rpc);
    rpc->in_step = false;
    return status;
}
