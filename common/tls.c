#include "common/tls.h"

#include <arpa/inet.h>
#include <errno.h>
#include <limits.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509_vfy.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

/* OpenSSL's reason for the last failure of this thread; its queue is emptied. */
static const char *reason(void) {
    unsigned long code = ERR_get_error();
    const char *text = code ? ERR_reason_error_string(code) : NULL;
    ERR_clear_error();
    return text ? text : "unknown error";
}

static moe_status new_context(const SSL_METHOD *method, moe_tls **out, moe_error *err) {
    ERR_clear_error();
    *out = SSL_CTX_new(method);
    if (!*out || !SSL_CTX_set_min_proto_version(*out, TLS1_2_VERSION)) {
        moe_tls_free(out);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "TLS: %s", reason());
    }
    SSL_CTX_set_mode(*out, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_AUTO_RETRY);
    SSL_CTX_set_options(*out, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
    return MOE_OK;
}

static moe_status readable(const char *path, moe_error *err) {
    if (access(path, R_OK) == 0) return MOE_OK;
    return moe_fail(err, MOE_NOT_FOUND, "TLS: cannot read %s: %s", path, strerror(errno));
}

static moe_status use_files(moe_tls *tls, const char *cert_file, const char *key_file, moe_error *err) {
    moe_status status = readable(cert_file, err);
    if (status == MOE_OK) status = readable(key_file, err);
    if (status != MOE_OK) return status;
    if (SSL_CTX_use_certificate_chain_file(tls, cert_file) != 1)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "TLS: %s is not a certificate in PEM: %s", cert_file, reason());
    if (SSL_CTX_use_PrivateKey_file(tls, key_file, SSL_FILETYPE_PEM) != 1)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "TLS: %s is not the key in PEM of the certificate %s: %s", key_file, cert_file,
                        reason());
    return MOE_OK;
}

/* Without it a key with a passphrase would ask for it on the terminal. */
static int no_passphrase(char *text, int size, int writing, void *ctx) {
    (void)text, (void)size, (void)writing, (void)ctx;
    return -1;
}

moe_status moe_tls_server(const char *cert_file, const char *key_file, moe_tls **out, moe_error *err) {
    moe_status status = new_context(TLS_server_method(), out, err);
    if (status != MOE_OK) return status;
    SSL_CTX_set_default_passwd_cb(*out, no_passphrase);
    status = use_files(*out, cert_file, key_file, err);
    if (status != MOE_OK) moe_tls_free(out);
    return status;
}

moe_status moe_tls_client(const char *ca_file, moe_tls **out, moe_error *err) {
    moe_status status = new_context(TLS_client_method(), out, err);
    if (status != MOE_OK) return status;
    SSL_CTX_set_verify(*out, SSL_VERIFY_PEER, NULL);
    if (!ca_file) {
        SSL_CTX_set_default_verify_paths(*out);
        return MOE_OK;
    }
    /* A server's own certificate in the file is trusted as it is, not only those who signed it. */
    X509_VERIFY_PARAM_set_flags(SSL_CTX_get0_param(*out), X509_V_FLAG_PARTIAL_CHAIN);
    status = readable(ca_file, err);
    if (status == MOE_OK && SSL_CTX_load_verify_file(*out, ca_file) != 1)
        status = moe_fail(err, MOE_INVALID_ARGUMENT, "TLS: %s has no certificates in PEM: %s", ca_file, reason());
    if (status != MOE_OK) moe_tls_free(out);
    return status;
}

void moe_tls_free(moe_tls **tls) {
    SSL_CTX_free(*tls);
    *tls = NULL;
}

moe_tls_session *moe_tls_session_new(moe_tls *tls) { return SSL_new(tls); }

/* The certificate must be of this name, or of this address. */
static bool expect_host(moe_tls_session *session, const char *host) {
    struct in6_addr address;
    bool numeric = inet_pton(AF_INET, host, &address) == 1 || inet_pton(AF_INET6, host, &address) == 1;
    if (numeric) return X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(session), host) == 1;
    return SSL_set1_host(session, host) == 1 && SSL_set_tlsext_host_name(session, host) == 1;
}

moe_status moe_tls_connect(moe_tls *tls, int fd, const char *host, moe_tls_session **out, moe_error *err) {
    *out = SSL_new(tls);
    if (*out && SSL_set_fd(*out, fd) == 1 && (!host || expect_host(*out, host))) {
        SSL_set_connect_state(*out);
        return MOE_OK;
    }
    moe_tls_session_free(out);
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "TLS: %s", reason());
}

void moe_tls_session_free(moe_tls_session **session) {
    SSL_free(*session);
    *session = NULL;
}

static ssize_t outcome(moe_tls_session *session, int done, short *wait, moe_error *err) {
    int broken = errno;
    *wait = 0;
    if (done > 0) return done;
    switch (SSL_get_error(session, done)) {
    case SSL_ERROR_WANT_READ: *wait = POLLIN; return -1;
    case SSL_ERROR_WANT_WRITE: *wait = POLLOUT; return -1;
    case SSL_ERROR_ZERO_RETURN: return 0;
    case SSL_ERROR_SYSCALL:
        moe_fail(err, MOE_UNAVAILABLE, "TLS: %s", broken ? strerror(broken) : "the connection ended");
        return -1;
    default: break;
    }
    long verified = SSL_get_verify_result(session);
    if (verified != X509_V_OK)
        moe_fail(err, MOE_UNAUTHENTICATED, "TLS: the server's certificate is refused: %s", X509_verify_cert_error_string(verified));
    else
        moe_fail(err, MOE_UNAVAILABLE, "TLS: %s", reason());
    return -1;
}

static int at_most_int(size_t size) { return size < INT_MAX ? (int)size : INT_MAX; }

ssize_t moe_tls_send(moe_tls_session *session, const void *data, size_t size, short *wait, moe_error *err) {
    ERR_clear_error();
    errno = 0;
    return outcome(session, SSL_write(session, data, at_most_int(size)), wait, err);
}

ssize_t moe_tls_recv(moe_tls_session *session, void *data, size_t size, short *wait, moe_error *err) {
    ERR_clear_error();
    errno = 0;
    return outcome(session, SSL_read(session, data, at_most_int(size)), wait, err);
}
