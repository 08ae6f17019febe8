/* The commands' HTTP client, the chat client and the status table, against a scripted server: framings cut at every byte, broken
 * and hostile answers, cancellation. */
#include <arpa/inet.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#include "cli/chat_client.h"
#include "cli/http_client.h"
#include "cli/status_text.h"
#include "common/clock.h"
#include "tests/support/test.h"

#define MAX_ANSWERS 8
#define REQUEST_BYTES 8192

/* Answers its i-th connection with answers[i], in writes of at most `piece` bytes, then closes. */
typedef struct server {
    const char *answers[MAX_ANSWERS];
    int num_answers;
    size_t piece;   /* 0: whole */
    bool hold_open; /* the last connection stays open until the client goes */
    char url[64];
    int fd;
    pthread_t thread;
    char requests[MAX_ANSWERS][REQUEST_BYTES];
} server;

static void read_request(int fd, char *out) {
    size_t used = 0, want = SIZE_MAX;
    while (used < want && used < REQUEST_BYTES - 1) {
        ssize_t got = read(fd, out + used, REQUEST_BYTES - 1 - used);
        if (got <= 0) return;
        used += (size_t)got;
        out[used] = '\0';
        const char *end = strstr(out, "\r\n\r\n"), *length = strcasestr(out, "content-length: ");
        if (end) want = (size_t)(end + 4 - out) + (length ? strtoul(length + 16, NULL, 10) : 0);
    }
}

static void *serve(void *argument) {
    server *s = argument;
    for (int i = 0; i < s->num_answers; i++) {
        int fd = accept(s->fd, NULL, NULL);
        if (fd < 0) break;
        read_request(fd, s->requests[i]);
        size_t size = strlen(s->answers[i]), piece = s->piece ? s->piece : size;
        for (size_t at = 0; at < size; at += piece)
            if (send(fd, s->answers[i] + at, size - at < piece ? size - at : piece, MSG_NOSIGNAL) < 0) break;
        char byte;
        if (s->hold_open && i == s->num_answers - 1 && read(fd, &byte, 1) > 0) abort();
        close(fd);
    }
    return NULL;
}

static void server_start(server *s) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    s->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(s->fd >= 0);
    assert_int_equal(bind(s->fd, (struct sockaddr *)&address, size), 0);
    assert_int_equal(listen(s->fd, 16), 0);
    assert_int_equal(getsockname(s->fd, (struct sockaddr *)&address, &size), 0);
    snprintf(s->url, sizeof s->url, "http://127.0.0.1:%d", ntohs(address.sin_port));
    while (s->num_answers < MAX_ANSWERS && s->answers[s->num_answers]) s->num_answers++;
    assert_int_equal(pthread_create(&s->thread, NULL, serve, s), 0);
}

static void server_stop(server *s) {
    shutdown(s->fd, SHUT_RDWR);
    pthread_join(s->thread, NULL);
    close(s->fd);
}

static moe_http_call get(const server *s) {
    return (moe_http_call){.url = s->url, .path = "/x", .silence_ns = 10 * MOE_NS_PER_S, .cancel_fd = -1};
}

/* ---- HTTP ---- */

static void answers(const char *text, size_t piece, int wanted_status, const char *wanted_body) {
    server s = {.answers = {text}, .piece = piece};
    moe_buf body = {0};
    moe_error err = {0};
    int http_status = -1;
    server_start(&s);
    moe_http_call call = get(&s);
    moe_status status = moe_http_run(&call, &http_status, &body, &err);
    server_stop(&s);
    if (status != MOE_OK) fail_msg("'%.60s' by %zu: %s", text, piece, err.message);
    assert_int_equal(http_status, wanted_status);
    assert_string_equal(moe_buf_text(&body), wanted_body);
    moe_buf_free(&body);
}

static void test_framings(void **state) {
    (void)state;
    static const size_t pieces[] = {0, 1, 2, 3, 7};
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
        size_t p = pieces[i];
        answers("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", p, 200, "hello");
        answers("HTTP/1.1 200 OK\r\ncontent-length:5\r\nX: y\r\n\r\nhello and more", p, 200, "hello");
        answers("HTTP/1.0 404 Not Found\r\n\r\nuntil\r\nclose", p, 404, "until\r\nclose");
        answers("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nA;ext=1\r\n 123456789\r\n0\r\n\r\n", p, 200,
                "hello 123456789");
        answers("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", p, 204, "");
    }
}

static void broken(const char *text, moe_status wanted) {
    server s = {.answers = {text}};
    moe_buf body = {0};
    moe_error err = {0};
    int http_status;
    server_start(&s);
    moe_http_call call = get(&s);
    moe_status status = moe_http_run(&call, &http_status, &body, &err);
    server_stop(&s);
    if (status != wanted) fail_msg("'%.60s': %s %s", text, moe_status_name(status), err.message);
    assert_non_null(strstr(err.message, s.url));
    moe_buf_free(&body);
}

static void test_broken_answers(void **state) {
    (void)state;
    broken("", MOE_UNAVAILABLE);
    broken("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell", MOE_UNAVAILABLE);
    broken("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", MOE_UNAVAILABLE);
    broken("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloX\r\n0\r\n\r\n", MOE_DATA_LOSS);
    broken("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n", MOE_DATA_LOSS);
    broken("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nhello\r\n", MOE_DATA_LOSS);
    broken("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhello", MOE_DATA_LOSS);
    broken("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", MOE_DATA_LOSS);
    broken("HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n", MOE_DATA_LOSS);
    broken("HTTP/1.1 abc\r\n\r\n", MOE_DATA_LOSS);
    broken("HTTP/1.1\r\n\r\n 200", MOE_DATA_LOSS);
    broken("SSH-2.0-OpenSSH_9.2\r\n", MOE_DATA_LOSS);
    char *head = calloc(1, MOE_HTTP_CLIENT_MAX_HEAD_BYTES + 64);
    assert_non_null(head);
    strcpy(head, "HTTP/1.1 200 OK\r\nX: ");
    memset(head + strlen(head), 'x', MOE_HTTP_CLIENT_MAX_HEAD_BYTES);
    broken(head, MOE_DATA_LOSS);
    free(head);
}

static void test_request(void **state) {
    (void)state;
    server s = {.answers = {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"}};
    char url[96];
    moe_buf body = {0};
    moe_error err;
    int http_status;
    server_start(&s);
    snprintf(url, sizeof url, "%s/base/", s.url);
    moe_http_call call = get(&s);
    call.url = url;
    call.key = "secret";
    call.body = "{\"a\":1}";
    assert_int_equal(moe_http_run(&call, &http_status, &body, &err), MOE_OK);
    server_stop(&s);
    assert_non_null(strstr(s.requests[0], "POST /base/x HTTP/1.1\r\n"));
    assert_non_null(strstr(s.requests[0], "\r\nAuthorization: Bearer secret\r\n"));
    assert_non_null(strstr(s.requests[0], "\r\nContent-Length: 7\r\n"));
    assert_non_null(strstr(s.requests[0], "\r\n\r\n{\"a\":1}"));
    snprintf(url, sizeof url, "\r\nHost: %s:", "127.0.0.1");
    assert_non_null(strstr(s.requests[0], url));
    moe_buf_free(&body);
}

static void test_bad_targets(void **state) {
    (void)state;
    static const char *const urls[] = {"ftp://localhost:1", "localhost:1", "http://",     "https://:443",
                                       "http://h:123456789",  "http://h:1x", "http://[::1", ""};
    moe_http_call call = {.path = "/", .silence_ns = MOE_NS_PER_S, .cancel_fd = -1};
    moe_buf body = {0};
    moe_error err;
    int http_status;
    for (size_t i = 0; i < sizeof urls / sizeof *urls; i++) {
        call.url = urls[i];
        if (moe_http_run(&call, &http_status, &body, &err) != MOE_INVALID_ARGUMENT) fail_msg("%s", urls[i]);
        assert_non_null(strstr(err.message, "http://host:port"));
    }
    server s = {0}; /* takes a port and leaves it again */
    server_start(&s);
    server_stop(&s);
    call.url = s.url;
    assert_int_equal(moe_http_run(&call, &http_status, &body, &err), MOE_UNAVAILABLE);
    assert_non_null(strstr(err.message, "refused"));
    assert_int_equal(http_status, 0);
}

static void test_silence_and_cancel(void **state) {
    (void)state;
    server s = {.answers = {"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe"}, .hold_open = true};
    int pipe_fds[2], http_status;
    moe_buf body = {0};
    moe_error err;
    server_start(&s);
    moe_http_call call = get(&s);
    call.silence_ns = 50 * MOE_NS_PER_MS;
    assert_int_equal(moe_http_run(&call, &http_status, &body, &err), MOE_DEADLINE_EXCEEDED);
    server_stop(&s);
    server t = {.answers = {"HTTP/1.1 200 OK\r\n"}, .hold_open = true};
    assert_int_equal(pipe(pipe_fds), 0);
    assert_int_equal(write(pipe_fds[1], "x", 1), 1);
    server_start(&t);
    call = get(&t);
    call.cancel_fd = pipe_fds[0];
    assert_int_equal(moe_http_run(&call, &http_status, &body, &err), MOE_CANCELLED);
    server_stop(&t);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
    moe_buf_free(&body);
}

/* ---- chat ---- */

#define HEAD "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
#define MODELS "HTTP/1.1 200 OK\r\n\r\n{\"object\":\"list\",\"data\":[{\"id\":\"demo\"}]}"
#define PIECE(text) "data: {\"choices\":[{\"delta\":{\"content\":\"" text "\"},\"finish_reason\":null}]}\n\n"
#define FINISH(reason) "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"" reason "\"}]}\n\n"
#define DONE "data: [DONE]\n\n"

static void collect(void *ctx, const char *text) { moe_buf_append_text(ctx, text); }

static moe_chat_client *open_chat(const server *s) {
    moe_chat_client_config config = {.url = s->url,
                                     .system = "Be brief.",
                                     .has_temperature = true,
                                     .max_tokens = 7,
                                     .silence_ns = 10 * MOE_NS_PER_S,
                                     .cancel_fd = -1};
    moe_chat_client *client;
    moe_error err;
    if (moe_chat_client_open(&config, &client, &err) != MOE_OK) fail_msg("%s", err.message);
    assert_string_equal(moe_chat_client_model(client), "demo");
    return client;
}

static json_t *body_of(const char *request) {
    json_t *root = json_loads(strstr(request, "\r\n\r\n"), 0, NULL);
    assert_non_null(root);
    return root;
}

static void test_chat(void **state) {
    (void)state;
    server s = {.answers = {MODELS,
                            HEAD "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\n: comment\r\n" PIECE("Grü")
                                PIECE("ezi\\n") FINISH("stop") DONE,
                            HEAD "data:{\"choices\":[]}\r\n\r\n" PIECE("again") FINISH("length") DONE,
                            "HTTP/1.1 400 Bad Request\r\n\r\n{\"error\":{\"message\":\"max_tokens is too large\"}}",
                            HEAD PIECE("hal") "data: {\"error\":{\"message\":\"no replica\"}}\n\n", HEAD PIECE("hal"),
                            HEAD "data: nonsense\n\n"},
                .piece = 5};
    moe_buf text = {0};
    moe_error err;
    char finish[32];
    server_start(&s);
    moe_chat_client *client = open_chat(&s);
    assert_int_equal(moe_chat_client_ask(client, "Hi", collect, &text, finish, &err), MOE_OK);
    assert_string_equal(moe_buf_text(&text), "Grüezi\n");
    assert_string_equal(finish, "stop");
    assert_int_equal(moe_chat_client_ask(client, "More", collect, &text, finish, &err), MOE_OK);
    assert_string_equal(finish, "length");
    json_t *sent = body_of(s.requests[2]);
    json_t *wanted = json_loads(
        "{\"model\":\"demo\",\"stream\":true,\"max_tokens\":7,\"temperature\":0.0,\"messages\":["
        "{\"role\":\"system\",\"content\":\"Be brief.\"},{\"role\":\"user\",\"content\":\"Hi\"},"
        "{\"role\":\"assistant\",\"content\":\"Grüezi\\n\"},{\"role\":\"user\",\"content\":\"More\"}]}",
        0, NULL);
    assert_true(json_equal(sent, wanted));
    json_decref(sent);
    json_decref(wanted);
    assert_int_equal(moe_chat_client_messages(client), 4);
    assert_int_equal(moe_chat_client_ask(client, "a", collect, &text, finish, &err), MOE_FAILED_PRECONDITION);
    assert_non_null(strstr(err.message, "HTTP 400: max_tokens is too large"));
    assert_int_equal(moe_chat_client_ask(client, "b", collect, &text, finish, &err), MOE_UNAVAILABLE);
    assert_non_null(strstr(err.message, "no replica"));
    assert_int_equal(moe_chat_client_ask(client, "c", collect, &text, finish, &err), MOE_UNAVAILABLE);
    assert_int_equal(moe_chat_client_ask(client, "d", collect, &text, finish, &err), MOE_DATA_LOSS);
    assert_int_equal(moe_chat_client_ask(client, "\xff", collect, &text, finish, &err), MOE_INVALID_ARGUMENT);
    assert_int_equal(moe_chat_client_messages(client), 4);
    moe_chat_client_reset(client);
    assert_int_equal(moe_chat_client_messages(client), 0);
    server_stop(&s);
    moe_chat_client_close(&client);
    moe_chat_client_close(&client);
    moe_buf_free(&text);
}

/* Ctrl-C after the first piece: what came of the answer stays in the history. */
typedef struct interrupt {
    int fd;
    moe_buf text;
} interrupt;

static void collect_and_interrupt(void *ctx, const char *text) {
    interrupt *i = ctx;
    moe_buf_append_text(&i->text, text);
    assert_int_equal(write(i->fd, "x", 1), 1);
}

static void test_chat_cancel(void **state) {
    (void)state;
    server s = {.answers = {MODELS, HEAD PIECE("half")}, .hold_open = true};
    int pipe_fds[2];
    moe_error err;
    moe_chat_client *client;
    assert_int_equal(pipe(pipe_fds), 0);
    server_start(&s);
    moe_chat_client_config config = {.url = s.url, .max_tokens = 7, .silence_ns = 10 * MOE_NS_PER_S, .cancel_fd = pipe_fds[0]};
    assert_int_equal(moe_chat_client_open(&config, &client, &err), MOE_OK);
    interrupt i = {.fd = pipe_fds[1]};
    assert_int_equal(moe_chat_client_ask(client, "Hi", collect_and_interrupt, &i, NULL, &err), MOE_CANCELLED);
    assert_string_equal(moe_buf_text(&i.text), "half");
    assert_int_equal(moe_chat_client_messages(client), 2);
    server_stop(&s);
    moe_chat_client_close(&client);
    moe_buf_free(&i.text);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
}

static void test_printable(void **state) {
    (void)state;
    moe_buf text = {0};
    moe_chat_printable(
        "a\x1b[31mb\r\n\tc\x7f\x07 ü€😀\xc2\x9b"
        "31m\xc2\xa0!",
        &text);
    assert_string_equal(text.data, "a[31mb\n\tc ü€😀31m\xc2\xa0!");
    moe_buf_free(&text);
}

/* ---- status ---- */

static void test_status_text(void **state) {
    (void)state;
    json_t *status = json_loads(
        "{\"epoch\":3,\"ready\":true,\"model\":\"demo\",\"replicas\":2,\"redis\":{\"used\":true,\"up\":true,\"pid\":42},"
        "\"workers\":[{\"id\":\"w0\",\"pid\":101,\"host\":\"here\",\"endpoint\":\"ipc:///"
        "x\",\"state\":\"up\",\"experts\":48,\"load\":0.25,\"profile\":\"cuda/sm90/bfloat16\"},"
        "{\"id\":\"worker-1\",\"pid\":7,\"host\":\"here\",\"endpoint\":\"ipc:///"
        "y\",\"state\":\"suspect\",\"experts\":8,\"load\":0.75,\"quarantine_s\":12}],"
        "\"routers\":[{\"id\":\"r0\",\"pid\":9,\"host\":\"here\",\"state\":\"up\",\"leader\":true}],"
        "\"layers\":[{\"max_over_mean\":1.5},{\"max_over_mean\":1.25}]}",
        0, NULL);
    moe_buf text = {0};
    assert_non_null(status);
    moe_status_text(status, &text);
    assert_string_equal(text.data,
                        "demo: ready, epoch 3, replicas 2, Redis up (pid 42)\n\n"
                        "WORKER    STATE    HOST  PID  EXPERTS    LOAD  QUARANTINE  PROFILE             ENDPOINT\n"
                        "w0        up       here  101       48  25.0 %           -  cuda/sm90/bfloat16  ipc:///x\n"
                        "worker-1  suspect  here    7        8  75.0 %          12  -                   ipc:///y\n\n"
                        "ROUTER  STATE  HOST  PID  LEADER\n"
                        "r0      up     here    9  yes\n\n"
                        "busiest worker over the mean, by MoE layer (1.00 is even)\n"
                        "    0: 1.50    1: 1.25\n");
    moe_buf_clear(&text);
    json_decref(status);
    status = json_object();
    moe_status_text(status, &text);
    assert_non_null(strstr(text.data, "-: not ready, epoch -, replicas -, Redis not used\n"));
    moe_buf_free(&text);
    json_decref(status);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_framings),    cmocka_unit_test(test_broken_answers),     cmocka_unit_test(test_request),
        cmocka_unit_test(test_bad_targets), cmocka_unit_test(test_silence_and_cancel), cmocka_unit_test(test_chat),
        cmocka_unit_test(test_chat_cancel), cmocka_unit_test(test_printable),          cmocka_unit_test(test_status_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
