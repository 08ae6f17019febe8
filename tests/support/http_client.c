#include "tests/support/http_client.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "tests/support/test.h"

#define WAIT_S 10
#define READ_BYTES 65536

http_client http_client_open(int port) {
    http_client client = {.fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval wait = {.tv_sec = WAIT_S};
    assert_true(client.fd >= 0);
    setsockopt(client.fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
    setsockopt(client.fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof wait);
    assert_int_equal(connect(client.fd, (struct sockaddr *)&to, sizeof to), 0);
    return client;
}

void http_client_close(http_client *client) {
    if (client->fd >= 0) close(client->fd);
    free(client->received);
    *client = (http_client){.fd = -1};
}

void http_client_send(http_client *client, const void *data, size_t size) {
    for (size_t sent = 0; sent < size;) {
        ssize_t n = send(client->fd, (const char *)data + sent, size - sent, MSG_NOSIGNAL);
        assert_true(n > 0);
        sent += (size_t)n;
    }
}

void http_client_send_text(http_client *client, const char *text) { http_client_send(client, text, strlen(text)); }

void http_client_request(http_client *client, const char *method, const char *path, const char *headers, const char *body) {
    char head[2048];
    size_t size = body ? strlen(body) : 0;
    int length = snprintf(head, sizeof head, "%s %s HTTP/1.1\r\nHost: test\r\n%s", method, path, headers);
    if (body)
        length += snprintf(head + length, sizeof head - (size_t)length,
                           "Content-Type: application/json\r\nContent-Length: %zu\r\n", size);
    length += snprintf(head + length, sizeof head - (size_t)length, "\r\n");
    http_client_send(client, head, (size_t)length);
    if (body) http_client_send(client, body, size);
}

/* Reads some more; false at the end of the connection. */
static bool receive(http_client *client) {
    if (client->capacity - client->size < READ_BYTES + 1) {
        client->capacity = client->capacity * 2 + 2 * READ_BYTES;
        client->received = realloc(client->received, client->capacity);
        assert_non_null(client->received);
    }
    ssize_t n = recv(client->fd, client->received + client->size, READ_BYTES, 0);
    if (n > 0) client->size += (size_t)n;
    client->received[client->size] = '\0';
    return n > 0;
}

static void take(http_client *client, size_t size) {
    memmove(client->received, client->received + size, client->size - size + 1);
    client->size -= size;
}

/* Where the line end after `from` is, reading on for it. */
static size_t line_end(http_client *client, size_t from) {
    for (;;) {
        char *end =
            client->received && client->size > from ? memmem(client->received + from, client->size - from, "\r\n", 2) : NULL;
        if (end) return (size_t)(end - client->received);
        if (!receive(client)) fail_msg("the connection ended in the middle of a line");
    }
}

static void need(http_client *client, size_t size) {
    while (client->size < size)
        if (!receive(client)) fail_msg("the connection ended after %zu of %zu bytes", client->size, size);
}

static void read_chunks(http_client *client, http_response *response) {
    for (;;) {
        size_t end = line_end(client, 0);
        size_t size = strtoul(client->received, NULL, 16);
        need(client, end + 2 + size + 2);
        assert_memory_equal(client->received + end + 2 + size, "\r\n", 2);
        response->body = realloc(response->body, response->body_size + size + 1);
        memcpy(response->body + response->body_size, client->received + end + 2, size);
        response->body_size += size;
        response->body[response->body_size] = '\0';
        take(client, end + 2 + size + 2);
        if (size == 0) return;
    }
}

http_response http_client_response(http_client *client, bool head_only) {
    http_response response = {0};
    size_t end = line_end(client, 0);
    for (size_t next; (next = line_end(client, end + 2)) != end + 2; end = next) continue;
    response.head = strndup(client->received, end + 2);
    take(client, end + 4);
    assert_int_equal(sscanf(response.head, "HTTP/1.%*d %d", &response.status), 1);
    const char *length = http_response_header(&response, "Content-Length");
    size_t size = length ? strtoul(length, NULL, 10) : 0;
    if (!head_only && http_response_header(&response, "Transfer-Encoding")) {
        read_chunks(client, &response);
        return response;
    }
    bool to_the_end = !head_only && !length && response.status != 204;
    if (head_only || response.status == 204) size = 0;
    if (to_the_end) {
        while (receive(client)) continue;
        size = client->size;
    }
    need(client, size);
    response.body = calloc(size + 1, 1);
    if (size) memcpy(response.body, client->received, size);
    response.body_size = size;
    if (client->received) take(client, size);
    return response;
}

void http_response_free(http_response *response) {
    free(response->head);
    free(response->body);
    *response = (http_response){0};
}

const char *http_response_header(const http_response *response, const char *name) {
    static char value[512];
    size_t size = strlen(name);
    for (const char *line = strstr(response->head, "\r\n"); line && line[2]; line = strstr(line + 2, "\r\n")) {
        if (strncasecmp(line + 2, name, size) != 0 || line[2 + size] != ':') continue;
        const char *from = line + 2 + size + 1;
        from += strspn(from, " ");
        snprintf(value, sizeof value, "%.*s", (int)strcspn(from, "\r"), from);
        return value;
    }
    return NULL;
}

void http_client_await_text(http_client *client, const char *text) {
    while (!client->size || !memmem(client->received, client->size, text, strlen(text)))
        if (!receive(client)) fail_msg("the connection ended before \"%s\" came", text);
}

bool http_client_closed(http_client *client) {
    char rest[READ_BYTES];
    ssize_t n;
    while ((n = recv(client->fd, rest, sizeof rest, 0)) > 0) continue;
    return n == 0 || errno == ECONNRESET;
}

int http_client_last_status(http_client *client) {
    int status = 0;
    while (receive(client)) continue;
    if (client->size) assert_int_equal(sscanf(client->received, "HTTP/1.%*d %d", &status), 1);
    return status;
}

static http_response exchange(int port, const char *method, const char *path, const char *body) {
    http_client client = http_client_open(port);
    http_client_request(&client, method, path, "", body);
    http_response response = http_client_response(&client, false);
    http_client_close(&client);
    return response;
}

http_response http_get(int port, const char *path) { return exchange(port, "GET", path, NULL); }
http_response http_post(int port, const char *path, const char *body) { return exchange(port, "POST", path, body); }
