/* The hub: who listens where, faults, partitions. */
#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "common/inproc/inproc_internal.h"

moe_status moe_inproc_hub_new(const moe_clock *clock, uint64_t seed, moe_inproc_hub **out, moe_error *err) {
    *out = NULL;
    moe_inproc_hub *hub = moe_calloc(1, sizeof *hub);
    if (!hub) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "inproc hub: out of memory");
    hub->clock = clock;
    hub->sleeps = clock->now_ns == moe_clock_real()->now_ns;
    hub->random.state = seed;
    hub->queue_limit_bytes = MOE_MAX_PEER_QUEUED_BYTES;
    pthread_mutex_init(&hub->mutex, NULL);
    *out = hub;
    return MOE_OK;
}

void moe_inproc_hub_free(moe_inproc_hub **hub) {
    if (!*hub) return;
    MOE_ASSERT(!(*hub)->transports);
    pthread_mutex_destroy(&(*hub)->mutex);
    moe_free(*hub);
    *hub = NULL;
}

void moe_inproc_set_faults(moe_inproc_hub *hub, const moe_inproc_faults *faults) {
    MOE_ASSERT(faults->delay_min_ns >= 0 && faults->delay_max_ns >= faults->delay_min_ns);
    pthread_mutex_lock(&hub->mutex);
    hub->faults = *faults;
    hub->misalign = faults->drop > 0 || faults->duplicate > 0 || faults->reorder > 0 || faults->delay_max_ns > 0;
    pthread_mutex_unlock(&hub->mutex);
}

void moe_inproc_set_queue_limit(moe_inproc_hub *hub, int64_t limit_bytes) {
    pthread_mutex_lock(&hub->mutex);
    hub->queue_limit_bytes = limit_bytes;
    pthread_mutex_unlock(&hub->mutex);
}

static char *find_cut(moe_inproc_hub *hub, const char *endpoint) {
    for (int i = 0; i < MOE_INPROC_MAX_CUTS; i++) {
        if (strcmp(hub->cuts[i], endpoint) == 0) return hub->cuts[i];
    }
    return NULL;
}

bool moe_inproc_is_cut(moe_inproc_hub *hub, const char *endpoint) { return find_cut(hub, endpoint) != NULL; }

static inproc_transport *listener_of(const moe_inproc_hub *hub, const char *endpoint) {
    inproc_transport *t = hub->transports;
    while (t && strcmp(t->listening, endpoint) != 0) t = t->next;
    return t;
}

inproc_transport *moe_inproc_find_listener(moe_inproc_hub *hub, const char *endpoint) {
    return moe_inproc_is_cut(hub, endpoint) ? NULL : listener_of(hub, endpoint);
}

void moe_inproc_topology_changed(moe_inproc_hub *hub) {
    hub->topology++;
    for (inproc_transport *t = hub->transports; t; t = t->next) moe_inproc_signal(t);
}

/* Loses what is on the way in a session that goes on. */
static void lose_messages(inproc_session *session) {
    for (int side = 0; side < INPROC_SIDES; side++) {
        inproc_transport *to = session->ends[side].transport;
        inproc_delivery *next;
        for (inproc_delivery *delivery = to ? to->first : NULL; delivery; delivery = next) {
            next = delivery->next;
            if (delivery->session != session || delivery->side != side || delivery->kind != MOE_EVENT_MESSAGE) continue;
            moe_inproc_inbox_remove(to, delivery);
            moe_inproc_delivery_free(delivery);
        }
    }
}

static void partition_sessions(inproc_transport *listener, bool cut, bool reset) {
    inproc_session *next;
    for (inproc_session *session = listener->sessions[INPROC_LISTENER]; session; session = next) {
        next = session->ends[INPROC_LISTENER].next;
        if (cut) lose_messages(session);
        if (reset) moe_inproc_session_end(session, true);
    }
}

void moe_inproc_partition(moe_inproc_hub *hub, const char *endpoint, bool cut, bool reset) {
    MOE_ASSERT(strlen(endpoint) < MOE_ENDPOINT_BYTES);
    pthread_mutex_lock(&hub->mutex);
    char *entry = find_cut(hub, endpoint);
    if (cut && !entry) {
        entry = find_cut(hub, "");
        MOE_ASSERT(entry);
        snprintf(entry, MOE_ENDPOINT_BYTES, "%s", endpoint);
    } else if (!cut && entry) {
        entry[0] = '\0';
    }
    inproc_transport *listener = listener_of(hub, endpoint);
    if (listener) partition_sessions(listener, cut, reset);
    moe_inproc_topology_changed(hub);
    pthread_mutex_unlock(&hub->mutex);
}

int64_t moe_inproc_next_due_ns(moe_inproc_hub *hub) {
    pthread_mutex_lock(&hub->mutex);
    int64_t due_ns = INT64_MAX;
    for (const inproc_transport *t = hub->transports; t; t = t->next) {
        if (t->first && t->first->due_ns < due_ns) due_ns = t->first->due_ns;
        for (const inproc_link *link = t->links; link; link = link->next) {
            bool can_connect = !link->session && moe_inproc_find_listener(hub, link->endpoint);
            if (can_connect && link->last_due_ns < due_ns) due_ns = link->last_due_ns;
        }
    }
    pthread_mutex_unlock(&hub->mutex);
    return due_ns;
}
