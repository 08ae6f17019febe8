/* Sessions: one connection between a link and a listener, from PEER_UP to PEER_DOWN. */
#include "common/alloc.h"
#include "common/inproc/inproc_internal.h"

static void attach(inproc_session *session, int side, inproc_transport *transport) {
    inproc_end *end = &session->ends[side];
    end->transport = transport;
    end->peer = ++transport->hub->last_number;
    end->next = transport->sessions[side];
    transport->sessions[side] = session;
    session->references++;
}

/* The end gets nothing more, and its transport forgets the session. */
static void detach(inproc_session *session, int side) {
    inproc_end *end = &session->ends[side];
    if (!end->transport) return;
    moe_inproc_inbox_purge(session, side);
    inproc_session **at = &end->transport->sessions[side];
    while (*at != session) at = &(*at)->ends[side].next;
    *at = end->next;
    end->transport = NULL;
    moe_inproc_session_release(session);
}

static inproc_delivery *event_new(moe_event_kind kind) {
    inproc_delivery *delivery = moe_calloc(1, sizeof *delivery);
    if (delivery) delivery->kind = kind;
    return delivery;
}

moe_status moe_inproc_link_connect(inproc_transport *transport, inproc_link *link, moe_error *err) {
    inproc_transport *listener = moe_inproc_find_listener(transport->hub, link->endpoint);
    if (!listener) return MOE_OK;
    inproc_session *session = moe_calloc(1, sizeof *session);
    inproc_delivery *up = event_new(MOE_EVENT_PEER_UP), *downs[INPROC_SIDES];
    for (int side = 0; side < INPROC_SIDES; side++) downs[side] = event_new(MOE_EVENT_PEER_DOWN);
    if (!session || !up || !downs[INPROC_CONNECTOR] || !downs[INPROC_LISTENER]) {
        moe_free(session);
        moe_free(up);
        for (int side = 0; side < INPROC_SIDES; side++) moe_free(downs[side]);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%s: out of memory while connecting", link->endpoint);
    }
    for (int side = 0; side < INPROC_SIDES; side++) session->ends[side].down_delivery = downs[side];
    session->alive = true;
    session->link = link->number;
    attach(session, INPROC_CONNECTOR, transport);
    attach(session, INPROC_LISTENER, listener);
    session->ends[INPROC_CONNECTOR].last_due_ns = link->last_due_ns;
    link->session = session;
    moe_inproc_inbox_put(session, INPROC_CONNECTOR, up, moe_now_ns(transport->hub->clock));
    return MOE_OK;
}

/* The link of a session that still has its connector. */
static inproc_link *link_of(const inproc_session *session) {
    inproc_link *link = session->ends[INPROC_CONNECTOR].transport->links;
    while (link->session != session) link = link->next;
    return link;
}

void moe_inproc_session_end(inproc_session *session, bool drop) {
    if (!session->alive) return;
    session->alive = false;
    session->references++;
    for (int side = 0; side < INPROC_SIDES; side++) {
        inproc_end *end = &session->ends[side];
        if (!end->transport) continue;
        if (drop) moe_inproc_inbox_purge(session, side);
        moe_inproc_inbox_put(session, side, end->down_delivery, moe_now_ns(end->transport->hub->clock));
        end->down_delivery = NULL;
        if (side != INPROC_CONNECTOR) continue;
        inproc_link *link = link_of(session);
        if (end->last_due_ns > link->last_due_ns) link->last_due_ns = end->last_due_ns;
        link->session = NULL;
        moe_inproc_topology_changed(end->transport->hub);
    }
    moe_inproc_session_release(session);
}

void moe_inproc_end_close(inproc_session *session, int side) {
    session->references++;
    if (side == INPROC_CONNECTOR && session->alive) link_of(session)->session = NULL;
    detach(session, side);
    moe_inproc_session_end(session, false);
    moe_inproc_session_release(session);
}

inproc_session *moe_inproc_find_session(const inproc_transport *transport, moe_peer peer, int *side) {
    for (*side = 0; *side < INPROC_SIDES; ++*side) {
        for (inproc_session *s = transport->sessions[*side]; s; s = s->ends[*side].next) {
            if (s->ends[*side].peer == peer) return s;
        }
    }
    return NULL;
}
