/* ZeroMQ transport: endpoints "ipc:///path" and "tcp://host:port". The only code that uses libzmq. */
#pragma once
#include "common/clock.h"
#include "common/transport.h"

#define MOE_CURVE_KEY_BYTES 41 /* Z85 text and NUL */

/* CURVE keys of this process and whom it lets in. A tcp endpoint without keys is refused, both to listen and to connect. */
typedef struct moe_curve_keys {
    char public_key[MOE_CURVE_KEY_BYTES], secret_key[MOE_CURVE_KEY_BYTES];
    char role_keys[MOE_ROLE_COUNT][MOE_CURVE_KEY_BYTES]; /* public key of each role; "" for none: that role is not let in */
} moe_curve_keys;

typedef struct moe_zmq_config {
    const moe_clock *clock;     /* the real clock */
    const moe_curve_keys *keys; /* copied; NULL: ipc only */
    int64_t linger_ms;          /* at close */
    int64_t handshake_timeout_ms, heartbeat_ms; /* 0: defaults */
    int64_t max_message_bytes;  /* 0: MOE_MAX_MESSAGE_BYTES */
} moe_zmq_config;

moe_status moe_zmq_open(const moe_zmq_config *config, moe_transport **out, moe_error *err);

/* A fresh key pair, Z85. */
moe_status moe_curve_keypair(char public_key[MOE_CURVE_KEY_BYTES], char secret_key[MOE_CURVE_KEY_BYTES], moe_error *err);
/* Key files as `moesaic keygen DIR` writes them: DIR/{router,worker,operator}.key (mode 0600: public and secret) and .pub. */
moe_status moe_curve_keys_write(const char *dir, moe_error *err);
/* Reads our own role's pair and the public keys of all roles present. A key file that others may read is refused. */
moe_status moe_curve_keys_read(const char *dir, moe_role role, moe_curve_keys *out, moe_error *err);
