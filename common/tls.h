/* TLS 1.2 and later by OpenSSL, over sockets that do not block. The only user of libssl. */
#pragma once
#include <sys/types.h>

#include "common/status.h"

typedef struct ssl_ctx_st moe_tls;       /* what connections of a server or client share; any thread */
typedef struct ssl_st moe_tls_session;   /* one connection; one thread at a time */

/* A server's: its certificate with those between it and the root, and its key, as PEM files. NOT_FOUND: a file cannot be read;
 * INVALID_ARGUMENT: it is not PEM of that kind, or the key is not the certificate's. */
moe_status moe_tls_server(const char *cert_file, const char *key_file, moe_tls **out, moe_error *err);
/* A client's: it trusts the certificates of a PEM file (authorities, or the server's own), or with NULL the system's. Errors as above. */
moe_status moe_tls_client(const char *ca_file, moe_tls **out, moe_error *err);
void moe_tls_free(moe_tls **tls); /* NULLs; idempotent. Sessions may outlive it. */

/* A session without a socket yet, for who drives the handshake itself (libevent); NULL: out of memory. */
moe_tls_session *moe_tls_session_new(moe_tls *tls);
/* A client's session over a connected socket (borrowed). The server must prove that it is `host` (a name or an address), or with
 * NULL only that it has a trusted certificate. RESOURCE_EXHAUSTED. */
moe_status moe_tls_connect(moe_tls *tls, int fd, const char *host, moe_tls_session **out, moe_error *err);
void moe_tls_session_free(moe_tls_session **session); /* NULLs; idempotent */

/* As send and recv, with the handshake done on the way: bytes (> 0), 0 at the peer's orderly end, or -1 with *wait the poll events
 * to wait for before the same call is made again; 0 there with *err when the session failed (UNAVAILABLE; UNAUTHENTICATED: the
 * server's certificate). */
ssize_t moe_tls_send(moe_tls_session *session, const void *data, size_t size, short *wait, moe_error *err);
ssize_t moe_tls_recv(moe_tls_session *session, void *data, size_t size, short *wait, moe_error *err);
