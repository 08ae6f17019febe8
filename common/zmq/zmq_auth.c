/* CURVE on tcp sockets, and the ZAP handler (ZeroMQ RFC 27) that maps a client's public key to its role. */
#include <string.h>

#include "common/log.h"
#include "common/zmq/zmq_internal.h"

#define ZAP_DOMAIN "moesaic"
#define ZAP_ENDPOINT "inproc://zeromq.zap.01" /* fixed by RFC 27 */
#define ZAP_REQUEST_FRAMES 7                  /* version, request id, domain, address, routing id, mechanism, client key */
#define CURVE_BINARY_KEY_BYTES 32
#define REFUSAL_LOG_INTERVAL_NS MOE_NS_PER_S

static const char *const role_names[MOE_ROLE_COUNT] = {"", "router", "worker", "operator"};

const char *moe_zmq_role_name(moe_role role) { return role_names[role]; }

bool moe_zmq_role_parse(const char *name, moe_role *out) {
    for (int role = MOE_ROLE_LOCAL + 1; role < MOE_ROLE_COUNT; role++) {
        if (strcmp(name, role_names[role]) != 0) continue;
        *out = (moe_role)role;
        return true;
    }
    return false;
}

static moe_status need_keys(const zmq_transport *t, moe_error *err) {
    if (!t->config.keys) {
        return moe_fail(err, MOE_FAILED_PRECONDITION,
                        "tcp endpoints need CURVE keys: make them with `moesaic keygen DIR` and name DIR, or use ipc");
    }
    if (!zmq_has("curve")) return moe_fail(err, MOE_UNIMPLEMENTED, "this libzmq was built without CURVE; use ipc endpoints");
    return MOE_OK;
}

static moe_status open_zap(zmq_transport *t, moe_error *err) {
    if (t->zap) return MOE_OK;
    void *zap = zmq_socket(t->context, ZMQ_REP);
    if (!zap) return moe_zmq_fail(err, "open", ZAP_ENDPOINT);
    if (!moe_zmq_set_int(zap, ZMQ_LINGER, 0) || zmq_bind(zap, ZAP_ENDPOINT) != 0) {
        moe_status status = moe_zmq_fail(err, "bind", ZAP_ENDPOINT);
        zmq_close(zap);
        return status;
    }
    t->zap = zap;
    return moe_zmq_watch(t, zap, &t->zap_ready) ? MOE_OK : moe_zmq_fail(err, "watch", ZAP_ENDPOINT);
}

moe_status moe_zmq_auth_server(zmq_transport *t, void *socket, moe_error *err) {
    moe_status status = need_keys(t, err);
    if (status == MOE_OK) status = open_zap(t, err);
    if (status != MOE_OK) return status;
    if (moe_zmq_set_int(socket, ZMQ_CURVE_SERVER, 1) &&
        zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, t->keys.secret_key, MOE_CURVE_KEY_BYTES) == 0 &&
        zmq_setsockopt(socket, ZMQ_ZAP_DOMAIN, ZAP_DOMAIN, strlen(ZAP_DOMAIN)) == 0) {
        return MOE_OK;
    }
    return moe_fail(err, MOE_INVALID_ARGUMENT, "our CURVE key pair is refused by libzmq: %s", zmq_strerror(zmq_errno()));
}

moe_status moe_zmq_auth_client(zmq_transport *t, void *socket, moe_role server, moe_error *err) {
    moe_status status = need_keys(t, err);
    if (status != MOE_OK) return status;
    const char *server_key = t->keys.role_keys[server];
    if (!server_key[0]) {
        return moe_fail(err, MOE_FAILED_PRECONDITION, "no public key of the role %s: its .pub file is missing in the key folder",
                        role_names[server]);
    }
    if (zmq_setsockopt(socket, ZMQ_CURVE_SERVERKEY, server_key, MOE_CURVE_KEY_BYTES) == 0 &&
        zmq_setsockopt(socket, ZMQ_CURVE_PUBLICKEY, t->keys.public_key, MOE_CURVE_KEY_BYTES) == 0 &&
        zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, t->keys.secret_key, MOE_CURVE_KEY_BYTES) == 0) {
        return MOE_OK;
    }
    return moe_fail(err, MOE_INVALID_ARGUMENT, "a CURVE key is refused by libzmq: %s", zmq_strerror(zmq_errno()));
}

static bool frame_is(zmq_msg_t *frame, const char *text) {
    return zmq_msg_size(frame) == strlen(text) && memcmp(zmq_msg_data(frame), text, strlen(text)) == 0;
}

/* The role whose public key the request carries; LOCAL when no role has it. */
static moe_role role_of_request(const zmq_transport *t, zmq_msg_t *frames) {
    char key[MOE_CURVE_KEY_BYTES];
    if (!frame_is(&frames[0], "1.0") || !frame_is(&frames[5], "CURVE")) return MOE_ROLE_LOCAL;
    if (zmq_msg_size(&frames[6]) != CURVE_BINARY_KEY_BYTES) return MOE_ROLE_LOCAL;
    if (!zmq_z85_encode(key, zmq_msg_data(&frames[6]), CURVE_BINARY_KEY_BYTES)) return MOE_ROLE_LOCAL;
    for (int role = MOE_ROLE_LOCAL + 1; role < MOE_ROLE_COUNT; role++) {
        if (strcmp(t->keys.role_keys[role], key) == 0) return (moe_role)role;
    }
    return MOE_ROLE_LOCAL;
}

static void log_refusal(zmq_transport *t, zmq_msg_t *address, int64_t now_ns) {
    if (t->refusal_logged_ns && now_ns - t->refusal_logged_ns < REFUSAL_LOG_INTERVAL_NS) return;
    t->refusal_logged_ns = now_ns;
    moe_warn("refused a connection from %.*s: its key belongs to no role of the key folder", (int)zmq_msg_size(address),
             (const char *)zmq_msg_data(address));
}

static void answer_one(zmq_transport *t, zmq_msg_t *frames, int64_t now_ns) {
    moe_role role = role_of_request(t, frames);
    if (role == MOE_ROLE_LOCAL) log_refusal(t, &frames[3], now_ns);
    const char *code = role == MOE_ROLE_LOCAL ? "400" : "200", *text = role == MOE_ROLE_LOCAL ? "unknown key" : "OK";
    zmq_send(t->zap, "1.0", strlen("1.0"), ZMQ_DONTWAIT | ZMQ_SNDMORE);
    zmq_msg_send(&frames[1], t->zap, ZMQ_DONTWAIT | ZMQ_SNDMORE);
    zmq_send(t->zap, code, strlen(code), ZMQ_DONTWAIT | ZMQ_SNDMORE);
    zmq_send(t->zap, text, strlen(text), ZMQ_DONTWAIT | ZMQ_SNDMORE);
    zmq_send(t->zap, role_names[role], strlen(role_names[role]), ZMQ_DONTWAIT | ZMQ_SNDMORE);
    zmq_send(t->zap, "", 0, ZMQ_DONTWAIT);
}

void moe_zmq_auth_answer(zmq_transport *t, int64_t now_ns) {
    for (;;) {
        zmq_msg_t frames[ZAP_REQUEST_FRAMES];
        int count = 0;
        bool more = true;
        for (int i = 0; i < ZAP_REQUEST_FRAMES; i++) {
            zmq_msg_init(&frames[i]);
            if (!more) continue;
            /* After a frame that has not come yet none is taken: one that comes this moment begins the next request. */
            more = zmq_msg_recv(&frames[i], t->zap, ZMQ_DONTWAIT) >= 0;
            count += more;
            more = more && zmq_msg_more(&frames[i]);
        }
        /* The requests are libzmq's own: with CURVE they have exactly these frames. */
        if (count == ZAP_REQUEST_FRAMES) answer_one(t, frames, now_ns);
        for (int i = 0; i < ZAP_REQUEST_FRAMES; i++) zmq_msg_close(&frames[i]);
        if (count != ZAP_REQUEST_FRAMES) return;
    }
}
