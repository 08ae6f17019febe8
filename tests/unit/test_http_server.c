/* The HTTP server's own behaviour: routes, methods, key, limits, connections, clients that leave or read slowly, drain and stop.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "router/http/exchange.h"
#include "router/http/server.h"
#include "tests/support/fake_inference.h"
#include "tests/support/http_client.h"
#include "tests/support/test.h"

#define CHAT_BODY "{\"model\":\"demo\",\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}]}"
#define CHAT_STREAM_BODY "{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}],\"stream\":true}"

typedef struct fixture {
    fake_inference fake;
    moe_cluster_view cluster;
    moe_http_server *server;
    int port;
} fixture;

static moe_status cluster_status(void *ctx, moe_cluster_status *out, moe_error *err) {
    (void)ctx;
    moe_status status = moe_cluster_status_resize(out, 1, 1, 1, err);
    if (status != MOE_OK) return status;
    out->epoch = 7;
    out->ready = out->redis_used = out->redis_up = true;
    snprintf(out->model, sizeof out->model, "demo");
    moe_worker_status *worker = &out->workers[0];
    snprintf(worker->id, sizeof worker->id, "w0");
    worker->state = "up";
    snprintf(worker->profile, sizeof worker->profile, "cpu/avx2/float32");
    worker->pid = 4242;
    worker->experts = 96;
    worker->load = 0.5;
    worker->incarnation = 0xabcdef;
    worker->quarantine_s = 7;
    snprintf(out->routers[0].id, sizeof out->routers[0].id, "r0");
    out->layers[0] = (moe_layer_status){.max_over_mean = 1.25, .min_replicas = 2, .cost_max_over_mean = 1.5, .hint_recall = 0.75};
    out->residency = (moe_residency_status){.hits = 5, .late_hits = 4, .misses = 3, .copied_bytes = 200, .wasted_bytes = 100, .host_experts = 2};
    out->expert_ns = 9000;
    out->row_ns = 700;
    return MOE_OK;
}

static moe_status expert_loads(void *ctx, moe_buf *json, moe_error *err) {
    (void)ctx, (void)err;
    moe_buf_append_text(json, "{\"layers\":[[1,2]]}");
    return MOE_OK;
}

static void start(fixture *f, const char *api_key) {
    moe_error err = {0};
    fake_inference_start(&f->fake, SOURCE_DIR "/models/demo");
    f->cluster = (moe_cluster_view){.status = cluster_status, .experts = expert_loads};
    moe_http_config config = {.host = "127.0.0.1", .api_key = api_key, .inference = &f->fake.inference, .cluster = &f->cluster};
    if (moe_http_server_start(&config, &f->server, &err) != MOE_OK) fail_msg("%s", err.message);
    f->port = moe_http_server_port(f->server);
    assert_true(f->port > 0);
}

static int setup(void **state) {
    fixture *f = calloc(1, sizeof *f);
    start(f, NULL);
    *state = f;
    return 0;
}

static int setup_key(void **state) {
    fixture *f = calloc(1, sizeof *f);
    start(f, "secret");
    *state = f;
    return 0;
}

static int teardown(void **state) {
    fixture *f = *state;
    moe_http_server_stop(&f->server);
    moe_http_server_stop(&f->server);
    fake_inference_stop(&f->fake);
    free(f);
    return 0;
}

/* An OpenAI error body with this code and param (NULL: null). */
static void check_error(const http_response *response, int status, const char *code, const char *param) {
    json_t *body = json_loads(response->body, 0, NULL), *error = json_object_get(body, "error");
    if (response->status != status) fail_msg("status %d, not %d: %s", response->status, status, response->body);
    assert_true(json_is_string(json_object_get(error, "message")) && json_is_string(json_object_get(error, "type")));
    assert_string_equal(json_string_value(json_object_get(error, "code")), code);
    assert_int_equal(json_object_size(error), 4);
    if (param)
        assert_string_equal(json_string_value(json_object_get(error, "param")), param);
    else
        assert_true(json_is_null(json_object_get(error, "param")));
    json_decref(body);
}

static void expect_json(int port, const char *path, int status, const char *wanted) {
    http_response response = http_get(port, path);
    json_t *is = json_loads(response.body, 0, NULL), *should = json_loads(wanted, 0, NULL);
    assert_non_null(should);
    assert_int_equal(response.status, status);
    assert_string_equal(http_response_header(&response, "Content-Type"), "application/json");
    if (!json_equal(is, should)) fail_msg("%s answers %s", path, response.body);
    json_decref(is);
    json_decref(should);
    http_response_free(&response);
}

static void test_get_routes(void **state) {
    fixture *f = *state;
    expect_json(f->port, "/health", 200, "{\"status\":\"ok\"}");
    expect_json(f->port, "/liveness", 200, "{\"status\":\"ok\"}");
    expect_json(f->port, "/readiness?verbose=1", 200, "{\"ready\":true,\"draining\":false}");
    expect_json(f->port, "/version", 200, "{\"version\":\"" MOESAIC_VERSION "\"}");
    expect_json(f->port, "/debug/experts", 200, "{\"layers\":[[1,2]]}");
    expect_json(f->port, "/cluster/status", 200,
                "{\"epoch\":7,\"ready\":true,\"model\":\"demo\",\"cluster_uuid\":\"\",\"replicas\":0,"
                "\"workers\":[{\"id\":\"w0\",\"pid\":4242,\"host\":\"\",\"endpoint\":\"\",\"profile\":\"cpu/avx2/"
                "float32\",\"state\":\"up\",\"experts\":96,\"load\":0.5,"
                "\"incarnation\":\"0000000000abcdef\",\"quarantine_s\":7}],"
                "\"routers\":[{\"id\":\"r0\",\"pid\":0,\"host\":\"\",\"state\":\"up\",\"leader\":false}],"
                "\"redis\":{\"used\":true,\"up\":true},\"layers\":[{\"max_over_mean\":1.25,\"min_replicas\":2,"
                "\"cost_max_over_mean\":1.5,\"hint_recall\":0.75}],"
                "\"residency\":{\"hits\":5,\"late_hits\":4,\"misses\":3,\"copied_bytes\":200,\"wasted_bytes\":100,\"host_experts\":2},"
                "\"operations\":[],\"migration\":\"\",\"moves\":0,"
                "\"cost\":{\"expert_ns\":9000,\"row_ns\":700}}");
    http_response metrics = http_get(f->port, "/metrics");
    assert_int_equal(metrics.status, 200);
    assert_string_equal(http_response_header(&metrics, "Content-Type"), "text/plain; version=0.0.4; charset=utf-8");
    assert_non_null(strstr(metrics.body, "# TYPE moesaic_requests_total counter\n"));
    http_response_free(&metrics);
}

static void test_readiness_follows_the_engine(void **state) {
    fixture *f = *state;
    pthread_mutex_lock(&f->fake.mutex);
    f->fake.view.ready = false;
    pthread_mutex_unlock(&f->fake.mutex);
    expect_json(f->port, "/readiness", 503, "{\"ready\":false,\"draining\":false}");
    expect_json(f->port, "/health", 200, "{\"status\":\"ok\"}");
}

static void test_models(void **state) {
    fixture *f = *state;
    http_response list = http_get(f->port, "/v1/models");
    json_t *body = json_loads(list.body, 0, NULL), *model = json_array_get(json_object_get(body, "data"), 0);
    assert_int_equal(list.status, 200);
    assert_string_equal(json_string_value(json_object_get(body, "object")), "list");
    assert_string_equal(json_string_value(json_object_get(model, "id")), "demo");
    assert_string_equal(json_string_value(json_object_get(model, "object")), "model");
    assert_string_equal(json_string_value(json_object_get(model, "owned_by")), "moesaic");
    assert_int_equal(json_integer_value(json_object_get(model, "max_model_len")), 2048);
    assert_true(json_integer_value(json_object_get(model, "created")) > 1700000000);
    http_response one = http_get(f->port, "/v1/models/d%65mo"), none = http_get(f->port, "/v1/models/dem");
    json_t *same = json_loads(one.body, 0, NULL);
    assert_true(json_equal(same, model));
    check_error(&none, 404, "model_not_found", "model");
    json_decref(same);
    json_decref(body);
    http_response_free(&list);
    http_response_free(&one);
    http_response_free(&none);
}

static void test_unknown_path_and_method(void **state) {
    fixture *f = *state;
    static const struct {
        const char *method, *path;
        int status;
        const char *code, *allow;
    } rows[] = {
        {"GET", "/", 404, "unknown_url", NULL},
        {"GET", "/v1", 404, "unknown_url", NULL},
        {"GET", "/v1/models/", 404, "unknown_url", NULL},
        {"POST", "/v1/chat", 404, "unknown_url", NULL},
        {"GET", "/v1/chat/completions/x", 404, "unknown_url", NULL},
        {"GET", "/v1/chat/completions", 405, "method_not_allowed", "POST, OPTIONS"},
        {"GET", "/v1/completions", 405, "method_not_allowed", "POST, OPTIONS"},
        {"DELETE", "/v1/completions", 405, "method_not_allowed", "POST, OPTIONS"},
        {"PUT", "/tokenize", 405, "method_not_allowed", "POST, OPTIONS"},
        {"PATCH", "/detokenize", 405, "method_not_allowed", "POST, OPTIONS"},
        {"POST", "/v1/models", 405, "method_not_allowed", "GET, HEAD, OPTIONS"},
        {"TRACE", "/health", 405, "method_not_allowed", "GET, HEAD, OPTIONS"},
        {"POST", "/metrics", 405, "method_not_allowed", "GET, HEAD, OPTIONS"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        http_client client = http_client_open(f->port);
        http_client_request(&client, rows[i].method, rows[i].path, "", strcmp(rows[i].method, "POST") ? NULL : "{}");
        http_response response = http_client_response(&client, false);
        check_error(&response, rows[i].status, rows[i].code, NULL);
        const char *allow = http_response_header(&response, "Allow");
        if (rows[i].allow)
            assert_string_equal(allow, rows[i].allow);
        else
            assert_null(allow);
        http_response_free(&response);
        http_client_close(&client);
    }
}

static void test_head_and_options(void **state) {
    fixture *f = *state;
    http_client client = http_client_open(f->port);
    http_client_request(&client, "HEAD", "/version", "", NULL);
    http_response head = http_client_response(&client, true);
    http_client_request(&client, "GET", "/version", "", NULL);
    http_response get = http_client_response(&client, false);
    http_client_request(&client, "OPTIONS", "/v1/chat/completions", "", NULL);
    http_response options = http_client_response(&client, false);
    assert_int_equal(head.status, 200);
    assert_int_equal(strtoul(http_response_header(&head, "Content-Length"), NULL, 10), get.body_size);
    assert_int_equal(options.status, 204);
    assert_string_equal(http_response_header(&options, "Allow"), "POST, OPTIONS");
    http_response_free(&head);
    http_response_free(&get);
    http_response_free(&options);
    http_client_close(&client);
}

static int status_with(int port, const char *method, const char *path, const char *headers) {
    http_client client = http_client_open(port);
    http_client_request(&client, method, path, headers, strcmp(method, "POST") ? NULL : CHAT_BODY);
    http_response response = http_client_response(&client, false);
    int status = response.status;
    if (status == 401) check_error(&response, 401, "invalid_api_key", NULL);
    http_response_free(&response);
    http_client_close(&client);
    return status;
}

static void test_api_key(void **state) {
    fixture *f = *state;
    static const char *const wrong[] = {"",
                                        "Authorization: Bearer\r\n",
                                        "Authorization: Bearer secre\r\n",
                                        "Authorization: Bearer secrets\r\n",
                                        "Authorization: Basic secret\r\n",
                                        "Authorization: secret\r\n"};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        assert_int_equal(status_with(f->port, "POST", "/v1/chat/completions", wrong[i]), 401);
        assert_int_equal(status_with(f->port, "GET", "/v1/models", wrong[i]), 401);
        assert_int_equal(status_with(f->port, "GET", "/cluster/status", wrong[i]), 401);
    }
    assert_int_equal(status_with(f->port, "POST", "/v1/chat/completions", "Authorization: Bearer secret\r\n"), 200);
    assert_int_equal(status_with(f->port, "GET", "/v1/models", "authorization: bearer secret\r\n"), 200);
    static const char *const open[] = {"/health", "/liveness", "/readiness", "/metrics"};
    for (size_t i = 0; i < sizeof open / sizeof open[0]; i++) assert_int_equal(status_with(f->port, "GET", open[i], ""), 200);
}

static void check_request_id(int port, const char *header, const char *wanted) {
    http_client client = http_client_open(port);
    http_client_request(&client, "GET", "/nowhere", header, NULL);
    http_response response = http_client_response(&client, false);
    const char *id = http_response_header(&response, "x-request-id");
    assert_non_null(id);
    if (wanted)
        assert_string_equal(id, wanted);
    else
        assert_int_equal(strlen(id), strlen("req-") + 32);
    http_response_free(&response);
    http_client_close(&client);
}

static void test_request_id(void **state) {
    fixture *f = *state;
    char line[512] = "X-Request-Id: ";
    check_request_id(f->port, "X-Request-Id: my-id.1\r\n", "my-id.1");
    check_request_id(f->port, "", NULL);
    check_request_id(f->port, "X-Request-Id: two words\r\n", NULL);
    memset(line + strlen(line), 'x', 200);
    strcat(line, "\r\n");
    check_request_id(f->port, line, NULL);
    http_client client = http_client_open(f->port);
    http_client_request(&client, "POST", "/v1/chat/completions", "x-request-id: abc\r\n", CHAT_BODY);
    http_response response = http_client_response(&client, false);
    assert_int_equal(response.status, 200);
    assert_string_equal(f->fake.requests[0].request_id, "abc");
    http_response_free(&response);
    http_client_close(&client);
}

static void test_content_type(void **state) {
    fixture *f = *state;
    static const struct {
        const char *type;
        int status;
    } rows[] = {{"application/json", 200},
                {"Application/JSON; charset=utf-8", 200},
                {"text/plain", 415},
                {"application/x-www-form-urlencoded", 415},
                {"application/jsonl", 415}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        char request[1024];
        http_client client = http_client_open(f->port);
        snprintf(request, sizeof request,
                 "POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Type: %s\r\nContent-Length: %zu\r\n\r\n%s",
                 rows[i].type, strlen(CHAT_BODY), CHAT_BODY);
        http_client_send_text(&client, request);
        http_response response = http_client_response(&client, false);
        assert_int_equal(response.status, rows[i].status);
        http_response_free(&response);
        http_client_close(&client);
    }
}

static void test_body_limit(void **state) {
    fixture *f = *state;
    size_t size = MOE_HTTP_MAX_BODY_BYTES + 1;
    char *body = malloc(size + 1);
    memset(body, ' ', size);
    body[size] = '\0';
    http_response over = http_post(f->port, "/v1/chat/completions", body);
    check_error(&over, 413, "request_too_large", NULL);
    http_response_free(&over);
    memcpy(body + size - 1 - strlen(CHAT_BODY), CHAT_BODY, strlen(CHAT_BODY));
    body[size - 1] = '\0';
    http_response just = http_post(f->port, "/v1/chat/completions", body);
    assert_int_equal(just.status, 200);
    http_response_free(&just);
    free(body);
    /* Announced far beyond: refused before it is sent, by libevent itself. */
    http_client client = http_client_open(f->port);
    http_client_send_text(&client, "POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 99999999999\r\n\r\n");
    shutdown(client.fd, SHUT_WR);
    assert_true(http_client_closed(&client));
    http_client_close(&client);
}

/* What libevent refuses by itself: it must answer 4xx/5xx or close, and the server lives on. */
static void test_malformed_http(void **state) {
    fixture *f = *state;
    static const char *const rows[] = {"\r\n\r\n",
                                       "GET\r\n\r\n",
                                       "GET /health\r\n\r\n",
                                       "GET /health HTTP/9.9\r\n\r\n",
                                       "BREW /health HTTP/1.1\r\nHost: t\r\n\r\n",
                                       "GET /health HTTP/1.1\r\nno colon\r\n\r\n",
                                       "POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
                                       "POST /v1/completions HTTP/1.1\r\nContent-Length: 1x\r\n\r\n",
                                       "GET http:// HTTP/1.1\r\n\r\n",
                                       "\x16\x03\x01\x02\x01",
                                       "POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
                                       "POST /v1/completions HTTP/1.1\r\nExpect: something\r\nContent-Length: 2\r\n\r\n{}",
                                       "OPTIONS * HTTP/1.1\r\nHost: t\r\n\r\n",
                                       "CONNECT example.org:80 HTTP/1.1\r\n\r\n"};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        http_client client = http_client_open(f->port);
        http_client_send_text(&client, rows[i]);
        shutdown(client.fd, SHUT_WR);
        assert_true(http_client_closed(&client));
        http_client_close(&client);
    }
    char *header = malloc(2 * MOE_HTTP_MAX_HEADER_BYTES);
    memset(header, 'h', 2 * MOE_HTTP_MAX_HEADER_BYTES);
    http_client client = http_client_open(f->port);
    http_client_send_text(&client, "GET /health HTTP/1.1\r\nX: ");
    http_client_send(&client, header, 2 * MOE_HTTP_MAX_HEADER_BYTES);
    assert_true(http_client_closed(&client));
    http_client_close(&client);
    free(header);
    expect_json(f->port, "/health", 200, "{\"status\":\"ok\"}");
}

static void test_keep_alive_and_pipelining(void **state) {
    fixture *f = *state;
    http_client client = http_client_open(f->port);
    http_client_request(&client, "POST", "/v1/chat/completions", "x-request-id: a\r\n", CHAT_BODY);
    http_client_request(&client, "GET", "/version", "x-request-id: b\r\n", NULL);
    http_client_request(&client, "POST", "/v1/chat/completions", "x-request-id: c\r\n", CHAT_STREAM_BODY);
    http_client_request(&client, "GET", "/nowhere", "x-request-id: d\r\n", NULL);
    static const struct {
        const char *id;
        int status;
    } rows[] = {{"a", 200}, {"b", 200}, {"c", 200}, {"d", 404}};
    for (size_t i = 0; i < 4; i++) {
        http_response response = http_client_response(&client, false);
        assert_int_equal(response.status, rows[i].status);
        assert_string_equal(http_response_header(&response, "x-request-id"), rows[i].id);
        http_response_free(&response);
    }
    http_client_request(&client, "GET", "/version", "Connection: close\r\n", NULL);
    http_response last = http_client_response(&client, false);
    assert_int_equal(last.status, 200);
    assert_true(http_client_closed(&client));
    http_response_free(&last);
    http_client_close(&client);
}

static void test_chunked_request_and_expect(void **state) {
    fixture *f = *state;
    char request[1024];
    http_client client = http_client_open(f->port);
    snprintf(request, sizeof request,
             "POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n%.5s\r\n%zx\r\n%s\r\n0\r\n\r\n",
             CHAT_BODY, strlen(CHAT_BODY) - 5, &CHAT_BODY[5]);
    http_client_send_text(&client, request);
    http_response response = http_client_response(&client, false);
    assert_int_equal(response.status, 200);
    http_response_free(&response);
    snprintf(request, sizeof request, "POST /v1/chat/completions HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %zu\r\n\r\n",
             strlen(CHAT_BODY));
    http_client_send_text(&client, request);
    http_client_await_text(&client, "HTTP/1.1 100 Continue\r\n\r\n");
    http_client_send_text(&client, CHAT_BODY);
    http_client_await_text(&client, "HTTP/1.1 200 OK");
    http_client_close(&client);
}

static void test_http_1_0(void **state) {
    fixture *f = *state;
    char request[1024];
    http_client client = http_client_open(f->port);
    snprintf(request, sizeof request,
             "POST /v1/chat/completions HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: %zu\r\n\r\n%s",
             strlen(CHAT_STREAM_BODY), CHAT_STREAM_BODY);
    http_client_send_text(&client, request);
    http_response response = http_client_response(&client, false); /* up to the connection's end */
    assert_int_equal(response.status, 200);
    assert_null(http_response_header(&response, "Content-Length"));
    assert_null(http_response_header(&response, "Transfer-Encoding"));
    assert_non_null(strstr(response.body, "data: [DONE]\n\n"));
    http_response_free(&response);
    http_client_close(&client);
}

static void leave(fixture *f, const char *body, const char *await) {
    http_client client = http_client_open(f->port);
    int32_t before = f->fake.num_requests;
    http_client_request(&client, "POST", "/v1/chat/completions", "", body);
    fake_inference_await(&f->fake, &f->fake.num_requests, before + 1);
    if (await) http_client_await_text(&client, await);
    http_client_close(&client);
    fake_inference_await(&f->fake, &f->fake.num_cancelled, before + 1);
    fake_inference_await(&f->fake, &f->fake.num_ended, before + 1);
}

static void test_client_gone_cancels(void **state) {
    fixture *f = *state;
    fake_inference_permit(&f->fake, 0);
    leave(f, CHAT_BODY, NULL);
    leave(f, CHAT_STREAM_BODY, NULL);
    fake_inference_permit(&f->fake, 2);
    leave(f, CHAT_STREAM_BODY, "\"content\":\",\"");
    fake_inference_permit(&f->fake, INT64_MAX);
    http_response response = http_post(f->port, "/v1/chat/completions", CHAT_BODY);
    assert_int_equal(response.status, 200);
    http_response_free(&response);
}

/* All n choices of a request end with their client. */
static void test_client_gone_cancels_every_choice(void **state) {
    fixture *f = *state;
    fake_inference_permit(&f->fake, 0);
    http_client client = http_client_open(f->port);
    http_client_request(&client, "POST", "/v1/completions", "", "{\"prompt\":[\"a\",\"b\"],\"n\":3}");
    fake_inference_await(&f->fake, &f->fake.num_requests, 6);
    http_client_close(&client);
    fake_inference_await(&f->fake, &f->fake.num_cancelled, 6);
    assert_int_equal(f->fake.num_cancelled, 6);
}

/* Data that a client sends behind its request while that is served must not disturb it. */
static void test_data_behind_a_request(void **state) {
    fixture *f = *state;
    char junk[1000];
    memset(junk, 'j', sizeof junk);
    fake_inference_permit(&f->fake, 0);
    http_client client = http_client_open(f->port);
    http_client_request(&client, "POST", "/v1/chat/completions", "", CHAT_STREAM_BODY);
    fake_inference_await(&f->fake, &f->fake.num_requests, 1);
    for (int i = 0; i < 200; i++) http_client_send(&client, junk, sizeof junk); /* beyond what is read ahead */
    fake_inference_permit(&f->fake, INT64_MAX);
    http_response response = http_client_response(&client, false);
    assert_non_null(strstr(response.body, "data: [DONE]\n\n"));
    http_response_free(&response);
    http_client_close(&client);
}

static void test_slow_reader_is_cut_off(void **state) {
    fixture *f = *state;
    static char text[64 * 1024];
    memset(text, 'x', sizeof text - 1);
    const fake_step step = {text, 5};
    f->fake.steps = &step;
    f->fake.num_steps = 1;
    f->fake.repeat = 100000; /* 6 GB, were it taken */
    http_client client = http_client_open(f->port);
    http_client_request(&client, "POST", "/v1/chat/completions", "", CHAT_STREAM_BODY);
    fake_inference_await(&f->fake, &f->fake.num_cancelled, 1);
    fake_inference_await(&f->fake, &f->fake.num_ended, 1);
    assert_true(f->fake.requests[0].sent < f->fake.repeat);
    assert_true(http_client_closed(&client));
    http_client_close(&client);
}

#define CONCURRENT 64

static void test_concurrent_requests(void **state) {
    fixture *f = *state;
    http_client clients[CONCURRENT];
    fake_inference_permit(&f->fake, 0);
    for (int i = 0; i < CONCURRENT; i++) {
        clients[i] = http_client_open(f->port);
        http_client_request(&clients[i], "POST", "/v1/chat/completions", "", i % 2 ? CHAT_BODY : CHAT_STREAM_BODY);
    }
    fake_inference_await(&f->fake, &f->fake.num_requests, CONCURRENT);
    assert_int_equal(moe_http_server_in_flight(f->server), CONCURRENT);
    fake_inference_permit(&f->fake, INT64_MAX);
    for (int i = 0; i < CONCURRENT; i++) {
        http_response response = http_client_response(&clients[i], false);
        assert_int_equal(response.status, 200);
        assert_non_null(strstr(response.body, i % 2 ? "\"content\":\"Hello, world\"" : "\"content\":\" world\""));
        http_response_free(&response);
        http_client_close(&clients[i]);
    }
}

static void test_drain(void **state) {
    fixture *f = *state;
    fake_inference_permit(&f->fake, 0);
    http_client client = http_client_open(f->port);
    http_client_request(&client, "POST", "/v1/chat/completions", "", CHAT_BODY);
    fake_inference_await(&f->fake, &f->fake.num_requests, 1);
    moe_http_server_drain(f->server);
    http_response refused = http_post(f->port, "/v1/chat/completions", CHAT_BODY);
    check_error(&refused, 503, "service_unavailable", NULL);
    assert_non_null(http_response_header(&refused, "Retry-After"));
    expect_json(f->port, "/readiness", 503, "{\"ready\":false,\"draining\":true}");
    fake_inference_permit(&f->fake, INT64_MAX);
    http_response going_on = http_client_response(&client, false);
    assert_int_equal(going_on.status, 200);
    http_response_free(&refused);
    http_response_free(&going_on);
    http_client_close(&client);
}

static void test_stop_with_requests_in_flight(void **state) {
    fixture *f = *state;
    fake_inference_permit(&f->fake, 1);
    http_client clients[3];
    for (int i = 0; i < 3; i++) {
        clients[i] = http_client_open(f->port);
        http_client_request(&clients[i], "POST", "/v1/chat/completions", "", i ? CHAT_BODY : CHAT_STREAM_BODY);
        fake_inference_await(&f->fake, &f->fake.num_requests, i + 1);
    }
    moe_http_server_stop(&f->server);
    assert_null(f->server);
    for (int i = 0; i < 3; i++) {
        assert_true(http_client_closed(&clients[i]));
        http_client_close(&clients[i]);
    }
    fake_inference_await(&f->fake, &f->fake.num_ended, 3);
}

static void test_address_in_use_and_no_address(void **state) {
    fixture *f = *state;
    moe_error err = {0};
    moe_http_server *second = NULL;
    moe_http_config config = {.host = "127.0.0.1", .port = f->port, .inference = &f->fake.inference};
    assert_int_equal(moe_http_server_start(&config, &second, &err), MOE_UNAVAILABLE);
    assert_non_null(strstr(err.message, "127.0.0.1"));
    assert_null(second);
    config.host = "not an address";
    assert_int_equal(moe_http_server_start(&config, &second, &err), MOE_INVALID_ARGUMENT);
    assert_null(second);
}

int main(void) {
#define TEST(function) cmocka_unit_test_setup_teardown(function, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_get_routes),
        TEST(test_readiness_follows_the_engine),
        TEST(test_models),
        TEST(test_unknown_path_and_method),
        TEST(test_head_and_options),
        cmocka_unit_test_setup_teardown(test_api_key, setup_key, teardown),
        TEST(test_request_id),
        TEST(test_content_type),
        TEST(test_body_limit),
        TEST(test_malformed_http),
        TEST(test_keep_alive_and_pipelining),
        TEST(test_chunked_request_and_expect),
        TEST(test_http_1_0),
        TEST(test_client_gone_cancels),
        TEST(test_client_gone_cancels_every_choice),
        TEST(test_data_behind_a_request),
        TEST(test_slow_reader_is_cut_off),
        TEST(test_concurrent_requests),
        TEST(test_drain),
        TEST(test_stop_with_requests_in_flight),
        TEST(test_address_in_use_and_no_address),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
