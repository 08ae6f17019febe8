#include "expert-worker/fetch.h"

#include <stdio.h>
#include <string.h>

#include "common/alloc.h"

#define FETCH_METHOD "/moesaic.v1.WorkerService/Fetch"

void moe_fetch_init(moe_fetch *f, moe_rpc **rpc, const moe_clock *clock, int64_t bytes_per_s) {
    *f = (moe_fetch){.rpc = rpc, .clock = clock, .bytes_per_s = bytes_per_s};
}

static void stop_call(moe_fetch *f) {
    if (f->calling) moe_rpc_cancel(*f->rpc, f->call_id);
    f->calling = false;
}

void moe_fetch_disconnect(moe_fetch *f) {
    stop_call(f);
    if (f->link) moe_rpc_disconnect(*f->rpc, f->link);
    f->link = 0;
    f->endpoint[0] = '\0';
}

void moe_fetch_close(moe_fetch *f) {
    if (f->rpc && *f->rpc) moe_fetch_disconnect(f);
    moe_free(f->bytes);
    f->bytes = NULL;
    f->state = MOE_FETCH_IDLE;
}

static void fail(moe_fetch *f, moe_status status, const char *message) {
    moe_fail(&f->error, status, "%.300s", message);
    f->state = MOE_FETCH_FAILED;
    stop_call(f);
}

void moe_fetch_begin(moe_fetch *f, const char *endpoint, uint64_t incarnation, int32_t layer, int32_t expert, uint64_t digest,
                     int64_t total) {
    stop_call(f);
    moe_free(f->bytes);
    if (strcmp(f->endpoint, endpoint) != 0) moe_fetch_disconnect(f);
    snprintf(f->endpoint, sizeof f->endpoint, "%s", endpoint);
    f->incarnation = incarnation;
    f->layer = layer;
    f->expert = expert;
    f->digest = digest;
    f->total = total;
    f->at = 0;
    f->failures = 0;
    f->give_up_ns = moe_now_ns(f->clock) + MOE_FETCH_TIMEOUT_NS;
    f->state = MOE_FETCH_RUNNING;
    f->bytes = moe_alloc_aligned((size_t)total, 1);
    if (!f->bytes) fail(f, MOE_RESOURCE_EXHAUSTED, "out of memory for the copy of an expert");
}

/* The piece is asked for again, from where it began. */
static void piece_failed(moe_fetch *f, moe_status status, const char *message) {
    f->give_up_ns = moe_now_ns(f->clock) + MOE_FETCH_TIMEOUT_NS;
    if (++f->failures == MOE_FETCH_MAX_FAILURES) fail(f, status, message);
}

static moe_status check_piece(const moe_fetch *f, const moe_rpc_reply *reply, moe_error *err) {
    const Moesaic__V1__FetchResponse *body = (const Moesaic__V1__FetchResponse *)reply->body;
    if (body->incarnation != f->incarnation || (f->digest && body->digest != f->digest) || body->total_bytes != (uint64_t)f->total)
        return moe_fail(err, MOE_DATA_LOSS, "the source has another copy of the expert");
    if (reply->num_payload != 1 || reply->payload[0].size == 0 || reply->payload[0].size > (size_t)(f->total - f->at) ||
        reply->payload[0].size > MOE_FETCH_PIECE_BYTES)
        return moe_fail(err, MOE_DATA_LOSS, "a piece of the wrong length");
    return MOE_OK;
}

static void on_piece(void *ctx, const moe_rpc_reply *reply) {
    moe_fetch *f = ctx;
    moe_error err;
    f->calling = false;
    if (f->state != MOE_FETCH_RUNNING) return;
    if (reply->status != MOE_OK) {
        piece_failed(f, reply->status, reply->message);
        return;
    }
    if (check_piece(f, reply, &err) != MOE_OK) {
        fail(f, err.code, err.message);
        return;
    }
    size_t size = reply->payload[0].size;
    memcpy(f->bytes + f->at, reply->payload[0].data, size);
    f->at += (int64_t)size;
    f->failures = 0;
    int64_t now = moe_now_ns(f->clock);
    f->give_up_ns = now + MOE_FETCH_TIMEOUT_NS;
    if (f->next_ns < now) f->next_ns = now;
    if (f->bytes_per_s) f->next_ns += (int64_t)((double)size / (double)f->bytes_per_s * (double)MOE_NS_PER_S);
    if (f->at == f->total) f->state = MOE_FETCH_DONE;
}

static void ask(moe_fetch *f, moe_peer peer) {
    moe_error err;
    Moesaic__V1__FetchRequest request = MOESAIC__V1__FETCH_REQUEST__INIT;
    request.incarnation = f->incarnation;
    request.layer = (uint32_t)f->layer;
    request.expert = (uint32_t)f->expert;
    request.offset = (uint64_t)f->at;
    request.max_bytes = MOE_FETCH_PIECE_BYTES;
    int64_t deadline = moe_now_ns(f->clock) + MOE_FETCH_TIMEOUT_NS;
    moe_status status = moe_rpc_call_start(*f->rpc, peer, FETCH_METHOD, &request.base, NULL, 0, deadline, on_piece, f, &f->call_id, &err);
    f->calling = status == MOE_OK;
    if (status != MOE_OK) piece_failed(f, status, err.message);
}

moe_fetch_state moe_fetch_turn(moe_fetch *f) {
    moe_error err;
    int64_t now = moe_now_ns(f->clock);
    if (f->state != MOE_FETCH_RUNNING || f->calling || now < f->next_ns) return f->state;
    if (!f->link && moe_rpc_connect(*f->rpc, f->endpoint, &f->link, &err) != MOE_OK) {
        f->link = 0;
        fail(f, err.code, err.message);
        return f->state;
    }
    const moe_rpc_peer *peer = moe_rpc_peer_of_link(*f->rpc, f->link);
    if (peer && peer->incarnation != f->incarnation)
        fail(f, MOE_UNAVAILABLE, "the source is another process now");
    else if (peer)
        ask(f, peer->peer);
    else if (now >= f->give_up_ns)
        fail(f, MOE_UNAVAILABLE, "no connection to the source");
    return f->state;
}

uint8_t *moe_fetch_take(moe_fetch *f) {
    MOE_ASSERT(f->state == MOE_FETCH_DONE);
    uint8_t *bytes = f->bytes;
    f->bytes = NULL;
    f->state = MOE_FETCH_IDLE;
    return bytes;
}

int64_t moe_fetch_due_ns(const moe_fetch *f) {
    if (f->state != MOE_FETCH_RUNNING || f->calling) return INT64_MAX;
    return f->next_ns > moe_now_ns(f->clock) ? f->next_ns : moe_now_ns(f->clock) + 5 * MOE_NS_PER_MS;
}
