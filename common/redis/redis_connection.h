/* One blocking connection to Redis, for redis_store.c only: connects lazily, authenticates, sends commands in a batch, reads
 * type-checked replies of bounded size, all within a time-out. Any failure closes the connection: what was half sent or half
 * read can then never be taken for the answer to a later command. One thread. */
#pragma once
#include <hiredis/hiredis.h>

#include "common/buf.h"
#include "common/clock.h"
#include "common/redis/redis_store.h"

#define MOE_REDIS_MAX_REPLY_BYTES (MOE_STORE_MAX_VALUE_BYTES + (INT64_C(1) << 20)) /* not yet parsed */
#define MOE_REDIS_MAX_REPLY_ELEMENTS 65536
#define MOE_REDIS_MAX_ARGUMENTS 80
#define MOE_REDIS_FIRST_BACKOFF_NS (50 * MOE_NS_PER_MS)
#define MOE_REDIS_MAX_BACKOFF_NS (1 * MOE_NS_PER_S)

typedef struct moe_redis_connection {
    char *host; /* or the path of the socket */
    int port;   /* 0: a unix socket */
    char *username, *password_file;
    int64_t timeout_ns;
    redisContext *context; /* NULL while not connected */
    redisReplyObjectFunctions reply_functions;
    void *(*create_array)(const redisReadTask *task, int elements); /* hiredis's own */
    moe_buf batch;                                                  /* commands not yet sent */
    int64_t retry_at_ns, backoff_ns;
} moe_redis_connection;

moe_status moe_redis_connection_init(moe_redis_connection *c, const moe_redis_config *config, moe_error *err);
void moe_redis_connection_close(moe_redis_connection *c);

/* One argument of a command. */
typedef struct moe_redis_argument {
    const char *data;
    size_t size;
} moe_redis_argument;

/* Adds a command to the batch; running out of memory shows at send. */
void moe_redis_queue(moe_redis_connection *c, const moe_redis_argument *arguments, int num_arguments);
/* Sends the batch, connecting first where needed. UNAVAILABLE: could not, or the back-off has not passed. */
moe_status moe_redis_send(moe_redis_connection *c, moe_error *err);
/* The next reply, of hiredis type `type`, or nil where `or_nil`; the caller frees it with freeReplyObject. Blocks for at most
 * twice the time-out. An error reply or another type is an error here. */
moe_status moe_redis_receive(moe_redis_connection *c, int type, bool or_nil, redisReply **out, moe_error *err);
/* Closes the connection after a failure and sets when the next attempt may be made; returns `status`. */
moe_status moe_redis_give_up(moe_redis_connection *c, moe_status status);
