/* One blocking connection to Redis, for redis_store.c only: connects lazily, authenticates, sends commands in a batch, reads
 * type-checked replies of bounded size, all within a time-out. Any failure closes the connection: what was half sent or half
 * read can then never be taken for the answer to a later command. One thread. */
#pragma once
#include <hiredis/hiredis.h>

#include "common/buf.h"
#include "common/clock.h"
#include "common/random.h"
#include "common/redis/redis_store.h"

#define MOE_REDIS_MAX_REPLY_BYTES (MOE_STORE_MAX_VALUE_BYTES + (INT64_C(1) << 20)) /* not yet parsed */
#define MOE_REDIS_MAX_REPLY_ELEMENTS 65536
#define MOE_REDIS_MAX_ARGUMENTS 80
#define MOE_REDIS_FIRST_BACKOFF_NS (50 * MOE_NS_PER_MS)
#define MOE_REDIS_MAX_BACKOFF_NS (1 * MOE_NS_PER_S)

#define MOE_REDIS_MAX_SENTINELS 16

typedef struct moe_redis_endpoint {
    char *host; /* or the path of the socket; owned */
    int port;   /* 0: a unix socket */
} moe_redis_endpoint;

typedef struct moe_redis_connection {
    moe_redis_endpoint server;                             /* as sentinels last told, where there are any */
    moe_redis_endpoint sentinels[MOE_REDIS_MAX_SENTINELS]; /* asked in turn, which one has the master; none: a fixed server */
    int num_sentinels, next_sentinel;
    char *master; /* its name among the sentinels */
    moe_random random;
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
