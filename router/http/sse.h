/* Server-sent events (WHATWG HTML, 9.2), as OpenAI's API uses them: "data: {…}\n\n" for each chunk, "data: [DONE]\n\n" at the
 * end. */
#pragma once
#include "router/http/exchange.h"

#define MOE_SSE_CONTENT_TYPE "text/event-stream; charset=utf-8"

/* Steals `json`. False when the exchange is gone (see moe_http_stream_add); JSON NULL counts as out of memory and cuts it off. */
bool moe_sse_send(moe_http_exchange *exchange, json_t *json);
bool moe_sse_send_done(moe_http_exchange *exchange);
