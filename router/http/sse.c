#include "router/http/sse.h"

#include <string.h>

#include "router/http/json_text.h"

bool moe_sse_send(moe_http_exchange *exchange, json_t *json) {
    moe_buf event = {0};
    moe_buf_append_text(&event, "data: ");
    bool dumped = moe_json_append(&event, json);
    moe_buf_append_text(&event, "\n\n");
    json_decref(json);
    bool sent = dumped && !event.failed && moe_http_stream_add(exchange, event.data, event.size);
    if (!dumped || event.failed) moe_http_cut_off(exchange);
    moe_buf_free(&event);
    return sent;
}

bool moe_sse_send_done(moe_http_exchange *exchange) {
    static const char done[] = "data: [DONE]\n\n";
    return moe_http_stream_add(exchange, done, strlen(done));
}
