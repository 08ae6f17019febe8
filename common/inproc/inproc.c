/* The transport operations of the in-process transport. */
#include "common/inproc/inproc.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#include "common/alloc.h"
#include "common/inproc/inproc_internal.h"

static inproc_transport *self(moe_transport *t) { return (inproc_transport *)t; }

static bool inproc_can_reach(const moe_transport *t, const char *endpoint) {
    (void)t;
    return strncmp(endpoint, "inproc:", strlen("inproc:")) == 0;
}

static moe_status check_endpoint(const char *endpoint, moe_error *err) {
    if (!inproc_can_reach(NULL, endpoint) || strlen(endpoint) >= MOE_ENDPOINT_BYTES) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "endpoint \"%.64s\": want \"inproc:NAME\" of less than %d bytes", endpoint,
                        MOE_ENDPOINT_BYTES);
    }
    return MOE_OK;
}

static void free_link(inproc_transport *self_, uint64_t number) {
    inproc_link **at = &self_->links;
    while (*at && (*at)->number != number) at = &(*at)->next;
    inproc_link *link = *at;
    if (!link) return;
    inproc_session *next;
    for (inproc_session *session = self_->sessions[INPROC_CONNECTOR]; session; session = next) {
        next = session->ends[INPROC_CONNECTOR].next;
        if (session->link == number) moe_inproc_end_close(session, INPROC_CONNECTOR);
    }
    *at = link->next;
    moe_free(link);
}

static void inproc_close(moe_transport *t) {
    inproc_transport *transport = self(t);
    moe_inproc_hub *hub = transport->hub;
    pthread_mutex_lock(&hub->mutex);
    moe_inproc_delivery_free(transport->current);
    transport->listening[0] = '\0';
    while (transport->links) free_link(transport, transport->links->number);
    while (transport->sessions[INPROC_LISTENER]) {
        moe_inproc_end_close(transport->sessions[INPROC_LISTENER], INPROC_LISTENER);
    }
    MOE_ASSERT(!transport->first);
    inproc_transport **at = &hub->transports;
    while (*at != transport) at = &(*at)->next;
    *at = transport->next;
    pthread_mutex_unlock(&hub->mutex);
    pthread_cond_destroy(&transport->changed);
    moe_free(transport);
}

static moe_status inproc_listen(moe_transport *t, const char *endpoint, char *bound, moe_error *err) {
    inproc_transport *transport = self(t);
    moe_inproc_hub *hub = transport->hub;
    moe_status status = check_endpoint(endpoint, err);
    if (status != MOE_OK) return status;
    pthread_mutex_lock(&hub->mutex);
    const inproc_transport *other = hub->transports;
    while (other && strcmp(other->listening, endpoint) != 0) other = other->next;
    if (transport->listening[0]) {
        status =
            moe_fail(err, MOE_FAILED_PRECONDITION, "%s: this transport already listens at %.64s", endpoint, transport->listening);
    } else if (other) {
        status = moe_fail(err, MOE_ALREADY_EXISTS, "%s: another transport of this process listens there", endpoint);
    } else {
        snprintf(transport->listening, sizeof transport->listening, "%s", endpoint);
        if (bound) snprintf(bound, MOE_ENDPOINT_BYTES, "%s", endpoint);
        moe_inproc_topology_changed(hub);
    }
    pthread_mutex_unlock(&hub->mutex);
    return status;
}

static moe_status inproc_connect(moe_transport *t, const char *endpoint, uint64_t *number, moe_error *err) {
    inproc_transport *transport = self(t);
    moe_status status = check_endpoint(endpoint, err);
    if (status != MOE_OK) return status;
    inproc_link *link = moe_calloc(1, sizeof *link);
    if (!link) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%s: out of memory", endpoint);
    snprintf(link->endpoint, sizeof link->endpoint, "%s", endpoint);
    pthread_mutex_lock(&transport->hub->mutex);
    link->number = ++transport->hub->last_number;
    link->next = transport->links;
    transport->links = link;
    status = moe_inproc_link_connect(transport, link, err);
    *number = link->number;
    if (status != MOE_OK) free_link(transport, link->number);
    pthread_mutex_unlock(&transport->hub->mutex);
    return status;
}

static void inproc_disconnect(moe_transport *t, uint64_t link) {
    inproc_transport *transport = self(t);
    pthread_mutex_lock(&transport->hub->mutex);
    free_link(transport, link);
    pthread_mutex_unlock(&transport->hub->mutex);
}

/* Takes `message` to where `peer` is, if there is room on the way. */
static moe_status send_locked(inproc_transport *transport, moe_peer peer, inproc_delivery *message, moe_error *err) {
    int side;
    inproc_session *session = moe_inproc_find_session(transport, peer, &side);
    moe_status status = MOE_OK;
    int64_t queued_bytes = session ? session->ends[!side].queued_bytes : 0, limit = transport->hub->queue_limit_bytes;
    if (!session || !session->alive) {
        status = moe_fail(err, MOE_UNAVAILABLE, "peer %llu is gone", (unsigned long long)peer);
    } else if (queued_bytes > 0 && message->cost_bytes > limit - queued_bytes) {
        status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "the queue of peer %llu is full (%lld of %lld bytes)",
                          (unsigned long long)peer, (long long)queued_bytes, (long long)limit);
    }
    if (status == MOE_OK) {
        moe_inproc_inject(session, !side, message);
    } else {
        moe_inproc_delivery_free(message);
    }
    return status;
}

static moe_status check_frames(moe_inproc_hub *hub, const moe_frame *frames, int num_frames, moe_error *err) {
    if (num_frames < 1 || num_frames > MOE_MAX_FRAMES) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "a message has 1 to %d frames, not %d", MOE_MAX_FRAMES, num_frames);
    }
    int64_t total = 0, limit = atomic_load(&hub->queue_limit_bytes);
    for (int i = 0; i < num_frames; i++) {
        if (frames[i].size > (size_t)MOE_MAX_MESSAGE_BYTES) {
            return moe_fail(err, MOE_INVALID_ARGUMENT, "frame %d of %zu bytes is larger than the limit of %lld", i,
                            frames[i].size, (long long)MOE_MAX_MESSAGE_BYTES);
        }
        total += (int64_t)frames[i].size;
    }
    if (total <= limit) return MOE_OK;
    return moe_fail(err, MOE_INVALID_ARGUMENT, "a message of %lld bytes is larger than a peer's queue of %lld", (long long)total,
                    (long long)limit);
}

static moe_status inproc_send(moe_transport *t, moe_peer peer, const moe_frame *frames, int num_frames, moe_error *err) {
    inproc_transport *transport = self(t);
    moe_status checked = check_frames(transport->hub, frames, num_frames, err);
    if (checked != MOE_OK) return checked;
    /* Copied before the mutex is taken: a large payload must not hold up the other transports. */
    inproc_delivery *message = moe_inproc_message_new(frames, num_frames, atomic_load(&transport->hub->misalign));
    if (!message) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a message");
    pthread_mutex_lock(&transport->hub->mutex);
    moe_status status = send_locked(transport, peer, message, err);
    pthread_mutex_unlock(&transport->hub->mutex);
    return status;
}

/* Connects the links whose listener has appeared since the last poll. */
static moe_status connect_links(inproc_transport *transport, moe_error *err) {
    if (transport->seen_topology == transport->hub->topology) return MOE_OK;
    for (inproc_link *link = transport->links; link; link = link->next) {
        if (link->session) continue;
        moe_status status = moe_inproc_link_connect(transport, link, err);
        if (status != MOE_OK) return status;
    }
    transport->seen_topology = transport->hub->topology;
    return MOE_OK;
}

/* Takes the first delivery that is due into *event; false when none is. */
static bool take_due(inproc_transport *transport, int64_t now_ns, moe_event *event) {
    while (transport->first && transport->first->due_ns <= now_ns) {
        inproc_delivery *delivery = transport->first;
        inproc_session *session = delivery->session;
        inproc_end *end = &session->ends[delivery->side];
        *event = (moe_event){.kind = delivery->kind, .peer = end->peer, .role = MOE_ROLE_LOCAL};
        event->link = delivery->side == INPROC_CONNECTOR ? session->link : 0;
        event->num_frames = delivery->num_frames;
        memcpy(event->frames, delivery->frames, sizeof event->frames);
        bool tell = delivery->kind != MOE_EVENT_PEER_DOWN || end->known;
        end->known = true;
        moe_inproc_inbox_remove(transport, delivery);
        transport->current = delivery;
        if (delivery->kind == MOE_EVENT_PEER_DOWN) moe_inproc_end_close(session, delivery->side);
        if (tell) return true;
        moe_inproc_delivery_free(delivery);
        transport->current = NULL;
    }
    return false;
}

static void sleep_until(inproc_transport *transport, int64_t deadline_ns) {
    if (transport->first && transport->first->due_ns < deadline_ns) deadline_ns = transport->first->due_ns;
    struct timespec until = {.tv_sec = deadline_ns / MOE_NS_PER_S, .tv_nsec = deadline_ns % MOE_NS_PER_S};
    pthread_cond_timedwait(&transport->changed, &transport->hub->mutex, &until);
}

static moe_status poll_locked(inproc_transport *transport, int64_t deadline_ns, moe_event *event, moe_error *err) {
    for (;;) {
        moe_status status = connect_links(transport, err);
        if (status != MOE_OK) return status;
        int64_t now_ns = moe_now_ns(transport->hub->clock);
        bool woken = transport->woken;
        transport->woken = false;
        if (take_due(transport, now_ns, event) || woken || !transport->hub->sleeps || now_ns >= deadline_ns) return MOE_OK;
        sleep_until(transport, deadline_ns);
    }
}

static moe_status inproc_poll(moe_transport *t, int64_t deadline_ns, moe_event *event, moe_error *err) {
    inproc_transport *transport = self(t);
    *event = (moe_event){.kind = MOE_EVENT_NONE};
    pthread_mutex_lock(&transport->hub->mutex);
    moe_inproc_delivery_free(transport->current);
    transport->current = NULL;
    moe_status status = poll_locked(transport, deadline_ns, event, err);
    pthread_mutex_unlock(&transport->hub->mutex);
    return status;
}

static void inproc_wake(moe_transport *t) {
    inproc_transport *transport = self(t);
    pthread_mutex_lock(&transport->hub->mutex);
    transport->woken = true;
    moe_inproc_signal(transport);
    pthread_mutex_unlock(&transport->hub->mutex);
}

static const moe_transport_ops inproc_ops = {
    .name = "inproc",
    .close = inproc_close,
    .can_reach = inproc_can_reach,
    .listen = inproc_listen,
    .connect = inproc_connect,
    .disconnect = inproc_disconnect,
    .send = inproc_send,
    .poll = inproc_poll,
    .wake = inproc_wake,
};

moe_status moe_inproc_open(moe_inproc_hub *hub, moe_transport **out, moe_error *err) {
    *out = NULL;
    inproc_transport *transport = moe_calloc(1, sizeof *transport);
    if (!transport) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "inproc transport: out of memory");
    transport->base.ops = &inproc_ops;
    transport->hub = hub;
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&transport->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_lock(&hub->mutex);
    transport->next = hub->transports;
    hub->transports = transport;
    pthread_mutex_unlock(&hub->mutex);
    *out = &transport->base;
    return MOE_OK;
}

moe_status moe_inproc_open_beside(moe_transport *sibling, moe_transport **out, moe_error *err) {
    moe_status status = moe_inproc_open(self(sibling)->hub, out, err);
    if (status == MOE_OK) self(*out)->sibling = self(sibling);
    return status;
}
