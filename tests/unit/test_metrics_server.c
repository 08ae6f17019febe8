/* The HTTP listener of a worker's metrics, asked through a real socket. */
#include <stdio.h>
#include <string.h>

#include "cli/http_client.h"
#include "cli/metrics_server.h"
#include "common/clock.h"
#include "common/metrics.h"
#include "tests/support/test.h"

static int get(int port, const char *path, moe_buf *body) {
    char url[64];
    int http_status;
    moe_error err;
    snprintf(url, sizeof url, "http://127.0.0.1:%d", port);
    moe_http_call call = {.url = url, .path = path, .silence_ns = 5 * MOE_NS_PER_S, .cancel_fd = -1};
    assert_int_equal(moe_http_run(&call, &http_status, body, &err), MOE_OK);
    return http_status;
}

static void serves_a_workers_metrics(void **state) {
    moe_metrics_server *server;
    moe_error err;
    moe_buf text = {0};
    (void)state;
    moe_metric_add(MOE_METRIC_WORKER_ROWS, 41);
    moe_metric_observe_ns(MOE_METRIC_WORKER_QUEUE, 5000);
    assert_int_equal(moe_metrics_server_start("127.0.0.1", 0, &server, &err), MOE_OK);
    assert_int_equal(get(moe_metrics_server_port(server), "/metrics", &text), 200);
    const char *got = moe_buf_text(&text);
    assert_non_null(strstr(got, "# TYPE moesaic_worker_rows_total counter\nmoesaic_worker_rows_total 41\n"));
    assert_non_null(strstr(got, "\nmoesaic_worker_seconds_count{stage=\"queue\"} 1\n"));
    for (const char *stage = "queue\0compute\0copy\0"; *stage; stage += strlen(stage) + 1) {
        char count[80];
        snprintf(count, sizeof count, "\nmoesaic_worker_seconds_count{stage=\"%s\"} ", stage);
        assert_non_null(strstr(got, count));
    }
    assert_non_null(strstr(got, "\nmoesaic_worker_experts 0\n"));
    assert_null(strstr(got, "moesaic_requests_total")); /* those of routers would be 0 and mislead alerts */
    assert_null(strstr(got, "moesaic_redis_up"));
    moe_buf_free(&text);
    assert_int_equal(get(moe_metrics_server_port(server), "/health", &text), 200);
    assert_string_equal(moe_buf_text(&text), "{\"status\":\"ok\"}");
    moe_buf_free(&text);
    assert_int_equal(get(moe_metrics_server_port(server), "/v1/models", &text), 404);
    moe_buf_free(&text);
    moe_metrics_server_stop(&server);
    assert_null(server);
    moe_metrics_server_stop(&server);
}

static void says_why_it_cannot_listen(void **state) {
    moe_metrics_server *first, *second;
    moe_error err;
    (void)state;
    assert_int_equal(moe_metrics_server_start("127.0.0.1", 0, &first, &err), MOE_OK);
    assert_int_equal(moe_metrics_server_start("127.0.0.1", moe_metrics_server_port(first), &second, &err), MOE_UNAVAILABLE);
    assert_non_null(strstr(err.message, "Address already in use"));
    assert_null(second);
    assert_int_equal(moe_metrics_server_start("203.0.113.7", 0, &second, &err), MOE_UNAVAILABLE);
    moe_metrics_server_stop(&first);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(serves_a_workers_metrics), cmocka_unit_test(says_why_it_cannot_listen)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
