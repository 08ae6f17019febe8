#include "router/http/sse.h"

#include <string.h>

static int append(const char *data, size_t size, void *arg) {
    moe_buf_append(arg, data, size);
    return 0;
}

bool moe_sse_send(moe_http_exchange *exchange, json_t *json) {
    moe_buf event = {0};
    moe_buf_append_text(&event, "data: ");
    bool dumped = json && json_dump_callback(json, append, &event, JSON_COMPACT | JSON_REAL_PRECISION(9)) == 0;
    json_decref(json);
    moe_buf_append_text(&event, "\n\n");
    if (!dumped || event.failed) {
        moe_buf_free(&event);
        moe_http_cut_off(exchange);
        return false;
    }
    bool sent = moe_http_stream_add(exchange, event.data, event.size);
    moe_buf_free(&event);
    return sent;
}

bool moe_sse_send_done(moe_http_exchange *exchange) {
    static const char done[] = "data: [DONE]\n\n";
    return moe_http_stream_add(exchange, done, strlen(done));
}
