/* Who is at the other ends: hellos, acceptance, pings, and what remains to be done when a peer goes away. */
#include <string.h>

#include "common/alloc.h"
#include "common/log.h"
#include "common/metrics.h"
#include "proto/rpc_internal.h"

static moe_rpc_entry *find_link(const moe_rpc *rpc, uint64_t link) {
    moe_map_node *node = link ? moe_map_find(&rpc->by_link, link, 0) : NULL;
    return node ? MOE_CONTAINER_OF(node, moe_rpc_entry, by_link) : NULL;
}

moe_rpc_entry *moe_peers_find(const moe_rpc *rpc, moe_peer peer) {
    moe_map_node *node = moe_map_find(&rpc->by_peer, peer, 0);
    return node ? MOE_CONTAINER_OF(node, moe_rpc_entry, by_peer) : NULL;
}

static const moe_rpc_peer *accepted(const moe_rpc_entry *entry) {
    return entry && entry->state == MOE_RPC_PEER_ACCEPTED ? &entry->view : NULL;
}

const moe_rpc_peer *moe_rpc_peer_of(const moe_rpc *rpc, moe_peer peer) { return accepted(moe_peers_find(rpc, peer)); }
const moe_rpc_peer *moe_rpc_peer_of_link(const moe_rpc *rpc, uint64_t link) { return accepted(find_link(rpc, link)); }

static moe_rpc_entry *add_entry(moe_rpc *rpc, const moe_event *event, int64_t now_ns) {
    moe_rpc_entry *entry = moe_calloc(1, sizeof *entry);
    if (!entry) return NULL;
    entry->state = MOE_RPC_PEER_GREETED;
    entry->view = (moe_rpc_peer){.peer = event->peer,
                                 .link = event->link,
                                 .role = event->role,
                                 .cluster_uuid = "",
                                 .claimed_role = "",
                                 .id = "",
                                 .profile = "",
                                 .progress_at_ns = now_ns,
                                 .heard_at_ns = now_ns};
    moe_map_insert(&rpc->by_peer, &entry->by_peer, event->peer, 0);
    if (event->link) moe_map_insert(&rpc->by_link, &entry->by_link, event->link, 0);
    moe_list_append(&rpc->peers, &entry->node);
    rpc->num_greeted++;
    return entry;
}

static void set_state(moe_rpc *rpc, moe_rpc_entry *entry, moe_rpc_peer_state state) {
    if (entry->state == MOE_RPC_PEER_GREETED) rpc->num_greeted--;
    entry->state = state;
}

/* Takes the peer out of the tables and decides its calls; it stays readable until the end of the step. */
static void detach(moe_rpc *rpc, moe_rpc_entry *entry, const char *message) {
    set_state(rpc, entry, MOE_RPC_PEER_GONE);
    moe_map_remove(&rpc->by_peer, &entry->by_peer);
    if (entry->view.link) moe_map_remove(&rpc->by_link, &entry->by_link);
    moe_list_move(&rpc->gone, &entry->node);
    moe_client_end_peer(rpc, entry, message);
    moe_server_cancel_peer(rpc, entry->view.peer);
}

static void lose(moe_rpc *rpc, moe_rpc_entry *entry, const char *message) {
    bool was_up = entry->state == MOE_RPC_PEER_ACCEPTED;
    detach(rpc, entry, message);
    moe_rpc_report(rpc);
    if (was_up && rpc->config.on_peer_down) rpc->config.on_peer_down(rpc->config.ctx, &entry->view);
}

static void free_entries(moe_list *list) {
    while (!moe_list_empty(list)) {
        moe_rpc_entry *entry = MOE_CONTAINER_OF(list->next, moe_rpc_entry, node);
        moe_list_remove(&entry->node);
        moe_wire_free((ProtobufCMessage *)entry->hello);
        moe_free(entry);
    }
}

void moe_peers_free_gone(moe_rpc *rpc) { free_entries(&rpc->gone); }

void moe_peers_free(moe_rpc *rpc) {
    free_entries(&rpc->peers);
    free_entries(&rpc->gone);
}

static void send_hello(moe_rpc *rpc, moe_peer peer, moe_status verdict, const char *message) {
    const moe_rpc_hello *ours = &rpc->config.hello;
    Moesaic__V1__Hello hello = MOESAIC__V1__HELLO__INIT;
    hello.cluster_uuid = (char *)ours->cluster_uuid;
    hello.role = (char *)ours->role;
    hello.id = (char *)ours->id;
    hello.profile = (char *)ours->profile;
    hello.incarnation = ours->incarnation;
    hello.model_digest = ours->model_digest;
    hello.epoch = ours->epoch;
    hello.fence = ours->fence;
    hello.protocol = MOE_PROTOCOL_VERSION;
    Moesaic__V1__Envelope envelope = MOESAIC__V1__ENVELOPE__INIT;
    envelope.kind = MOESAIC__V1__MESSAGE_KIND__HELLO;
    envelope.status = (uint32_t)verdict;
    envelope.message = (char *)message;
    moe_error err;
    if (moe_rpc_send(rpc, peer, &envelope, (ProtobufCMessage *)&hello, NULL, 0, &err) != MOE_OK)
        moe_warn("hello to peer %llu not sent, it will be repeated: %s", (unsigned long long)peer, err.message);
}

static void greet(moe_rpc *rpc, moe_rpc_entry *entry, int64_t now_ns) {
    entry->hello_due_ns = now_ns + MOE_RPC_HELLO_INTERVAL_NS;
    moe_rpc_due_at(rpc, entry->hello_due_ns);
    send_hello(rpc, entry->view.peer, MOE_OK, "");
}

void moe_peers_on_up(moe_rpc *rpc, const moe_event *event) {
    moe_rpc_entry *old = find_link(rpc, event->link);
    if (old) lose(rpc, old, "the peer connected anew");
    if (!event->link || moe_peers_find(rpc, event->peer)) return;
    int64_t now_ns = moe_now_ns(rpc->config.clock);
    moe_rpc_entry *entry = add_entry(rpc, event, now_ns);
    if (entry)
        greet(rpc, entry, now_ns);
    else
        moe_error_log("out of memory: a new connection stays unused until it is made again");
}

void moe_peers_on_down(moe_rpc *rpc, const moe_event *event) {
    moe_rpc_entry *entry = moe_peers_find(rpc, event->peer);
    if (entry) lose(rpc, entry, "the peer went away");
}

void moe_rpc_disconnect(moe_rpc *rpc, uint64_t link) {
    moe_rpc_entry *entry = find_link(rpc, link);
    if (entry) detach(rpc, entry, "the connection was closed here");
    rpc->config.transport->ops->disconnect(rpc->config.transport, link);
}

/* ---- hello ---- */

/* Short and printable, since it goes into log lines and tables. */
static bool text_fits(const char *text) {
    size_t length = 0;
    for (const char *c = text; *c; c++, length++)
        if ((unsigned char)*c < ' ' || *c == 0x7f) return false;
    return length <= MOE_RPC_MAX_HELLO_TEXT_BYTES;
}

static moe_status unpack_hello(const Moesaic__V1__Envelope *envelope, Moesaic__V1__Hello **out, moe_error *err) {
    ProtobufCMessage *message;
    moe_status status = moe_wire_unpack(&moesaic__v1__hello__descriptor, envelope->body.data, envelope->body.len, &message, err);
    *out = (Moesaic__V1__Hello *)message;
    if (status != MOE_OK) return status;
    const Moesaic__V1__Hello *hello = *out;
    if (text_fits(hello->cluster_uuid) && text_fits(hello->role) && text_fits(hello->id) && text_fits(hello->profile))
        return MOE_OK;
    moe_wire_free(message);
    *out = NULL;
    return moe_fail(err, MOE_INVALID_ARGUMENT, "a hello with a text that is unprintable or over %d bytes",
                    MOE_RPC_MAX_HELLO_TEXT_BYTES);
}

static void adopt_hello(moe_rpc_entry *entry, Moesaic__V1__Hello *hello, moe_role role) {
    entry->hello = hello;
    moe_rpc_peer *view = &entry->view;
    view->role = role;
    view->cluster_uuid = hello->cluster_uuid;
    view->claimed_role = hello->role;
    view->id = hello->id;
    view->profile = hello->profile;
    view->incarnation = hello->incarnation;
    view->model_digest = hello->model_digest;
    view->epoch = hello->epoch;
    view->fence = hello->fence;
}

/* A role proved by a key must be the one that the hello claims. */
static moe_status check_role(const moe_rpc_peer *view, moe_error *err) {
    static const char *const names[MOE_ROLE_COUNT] = {NULL, "router", "worker", "operator"};
    if (view->role == MOE_ROLE_LOCAL || strcmp(names[view->role], view->claimed_role) == 0) return MOE_OK;
    return moe_fail(err, MOE_PERMISSION_DENIED, "the peer claims to be a %s, its key is a %s's", view->claimed_role,
                    names[view->role]);
}

static moe_status judge(moe_rpc *rpc, moe_rpc_entry *entry, const Moesaic__V1__Envelope *envelope, moe_error *err) {
    if (entry->hello->protocol != MOE_PROTOCOL_VERSION) {
        return moe_fail(err, MOE_FAILED_PRECONDITION, "protocol version %u, this process speaks %d; run one release everywhere",
                        entry->hello->protocol, MOE_PROTOCOL_VERSION);
    }
    if (envelope->status != MOE_OK) {
        moe_status status = envelope->status < MOE_STATUS_COUNT ? (moe_status)envelope->status : MOE_UNKNOWN;
        return moe_fail(err, status, "refused by the peer: %.300s", envelope->message);
    }
    moe_status status = check_role(&entry->view, err);
    if (status == MOE_OK && rpc->config.on_peer_up) status = rpc->config.on_peer_up(rpc->config.ctx, &entry->view, err);
    return status;
}

static void answer_hello(moe_rpc *rpc, const moe_rpc_entry *entry) {
    bool refused = entry->state == MOE_RPC_PEER_REFUSED;
    if (entry->view.link == 0)
        send_hello(rpc, entry->view.peer, refused ? entry->refusal.code : MOE_OK, refused ? entry->refusal.message : "");
}

static void settle(moe_rpc *rpc, moe_rpc_entry *entry, const Moesaic__V1__Envelope *envelope) {
    moe_error err = {.message = "refused"};
    moe_status status = judge(rpc, entry, envelope, &err);
    if (entry->state != MOE_RPC_PEER_GREETED) return; /* the callback disconnected it */
    if (status == MOE_OK) {
        set_state(rpc, entry, MOE_RPC_PEER_ACCEPTED);
    } else {
        set_state(rpc, entry, MOE_RPC_PEER_REFUSED);
        err.code = status;
        entry->refusal = err;
        moe_warn("%s %s refused: %s", entry->view.claimed_role, entry->view.id, err.message);
    }
    answer_hello(rpc, entry);
}

/* Makes room in a full table: an accepted peer whose transport cannot tell that it went away is only known by its silence. */
static bool make_room(moe_rpc *rpc, int64_t now_ns) {
    if (rpc->by_peer.count < MOE_RPC_MAX_PEERS) return true;
    moe_rpc_entry *quietest = NULL;
    for (moe_list *node = rpc->peers.next; node != &rpc->peers; node = node->next) {
        moe_rpc_entry *entry = MOE_CONTAINER_OF(node, moe_rpc_entry, node);
        if (entry->view.link == 0 && (!quietest || entry->view.heard_at_ns < quietest->view.heard_at_ns)) quietest = entry;
    }
    if (!quietest || now_ns - quietest->view.heard_at_ns < MOE_RPC_PEER_IDLE_NS) return false;
    lose(rpc, quietest, "the peer was silent and its place was needed");
    return true;
}

static void hello_failed(moe_rpc *rpc, const moe_event *event, moe_status status, const char *message) {
    moe_warn("a hello was refused: %s", message);
    if (event->link == 0) send_hello(rpc, event->peer, status, message);
}

void moe_peers_on_hello(moe_rpc *rpc, const moe_event *event, const Moesaic__V1__Envelope *envelope) {
    moe_error err;
    Moesaic__V1__Hello *hello;
    moe_status status = unpack_hello(envelope, &hello, &err);
    if (status != MOE_OK) {
        moe_metric_add(MOE_METRIC_BAD_MESSAGES, 1);
        hello_failed(rpc, event, status, err.message);
        return;
    }
    int64_t now_ns = moe_now_ns(rpc->config.clock);
    moe_rpc_entry *entry = moe_peers_find(rpc, event->peer);
    if (entry && entry->hello && entry->hello->incarnation == hello->incarnation) { /* repeated: our answer may be lost */
        answer_hello(rpc, entry);
        moe_wire_free((ProtobufCMessage *)hello);
        return;
    }
    if (entry && entry->hello) { /* another process behind the same connection */
        lose(rpc, entry, "the peer restarted");
        entry = NULL;
    }
    if (!entry && event->link) { /* late, from a connection that was given up: those enter by PEER_UP only */
        moe_wire_free((ProtobufCMessage *)hello);
        return;
    }
    bool room = entry || make_room(rpc, now_ns);
    if (!entry && room) entry = add_entry(rpc, event, now_ns);
    if (entry) {
        adopt_hello(entry, hello, event->role);
        settle(rpc, entry, envelope);
    } else {
        moe_wire_free((ProtobufCMessage *)hello);
        hello_failed(rpc, event, MOE_RESOURCE_EXHAUSTED, room ? "out of memory" : "too many peers");
    }
}

/* ---- liveness ---- */

void moe_peers_on_progress(moe_rpc *rpc, moe_rpc_entry *entry, uint64_t progress) {
    if (progress <= entry->view.progress) return; /* overtaken by a newer one */
    entry->view.progress = progress;
    entry->view.progress_at_ns = moe_now_ns(rpc->config.clock);
}

static void ping(moe_rpc *rpc, moe_rpc_entry *entry, int64_t now_ns) {
    Moesaic__V1__Envelope envelope = MOESAIC__V1__ENVELOPE__INIT;
    envelope.kind = MOESAIC__V1__MESSAGE_KIND__PING;
    entry->ping_due_ns = now_ns + MOE_RPC_PING_INTERVAL_NS;
    moe_rpc_send(rpc, entry->view.peer, &envelope, NULL, NULL, 0, NULL); /* lost: the silence is what the caller watches */
}

void moe_peers_expire(moe_rpc *rpc, int64_t now_ns) {
    for (moe_list *node = rpc->peers.next; node != &rpc->peers; node = node->next) {
        moe_rpc_entry *entry = MOE_CONTAINER_OF(node, moe_rpc_entry, node);
        if (entry->state == MOE_RPC_PEER_GREETED) {
            if (entry->hello_due_ns <= now_ns) greet(rpc, entry, now_ns);
            moe_rpc_due_at(rpc, entry->hello_due_ns);
        } else if (entry->outstanding > 0) {
            if (entry->ping_due_ns <= now_ns) ping(rpc, entry, now_ns);
            moe_rpc_due_at(rpc, entry->ping_due_ns);
        }
    }
}
