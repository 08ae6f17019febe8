/* A blocking HTTP client on a raw loopback socket, for tests: what it sends and receives is bytes. Waits are bounded (10 s), then
 * the test fails. */
#pragma once
#include <stdbool.h>
#include <stddef.h>

typedef struct http_client {
    int fd;
    char *received; /* not yet taken by a response */
    size_t size, capacity;
} http_client;

typedef struct http_response {
    int status;
    char *head; /* status line and headers, as received; owned */
    char *body; /* with chunks joined; NUL-terminated; owned */
    size_t body_size;
} http_response;

http_client http_client_open(int port);
void http_client_close(http_client *client);
void http_client_send(http_client *client, const void *data, size_t size);
void http_client_send_text(http_client *client, const char *text);
/* Sends a request with a body (NULL: none); `headers` are whole lines, each with "\r\n", or "". */
void http_client_request(http_client *client, const char *method, const char *path, const char *headers, const char *body);

/* The next response. `head_only`: to a HEAD request. */
http_response http_client_response(http_client *client, bool head_only);
void http_response_free(http_response *response);
/* A header's value, or NULL; valid until the next call. */
const char *http_response_header(const http_response *response, const char *name);

/* Reads until `text` has arrived; the bytes stay for the response. */
void http_client_await_text(http_client *client, const char *text);
/* Whether the server closed the connection (after whatever was still to be read). */
bool http_client_closed(http_client *client);

/* Reads to the connection's end: the first response's status, 0 where none came. */
int http_client_last_status(http_client *client);

/* One request on a connection of its own. */
http_response http_get(int port, const char *path);
http_response http_post(int port, const char *path, const char *body);
