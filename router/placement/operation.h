/* What an operator asks of the placement, as kept in the store under op:<id>. Any router takes it, the leader carries it out; one
 * at a time, the oldest first. */
#pragma once
#include "router/placement/placement.h"

#define MOE_OPERATION_ID_BYTES 40
#define MOE_OPERATION_ERROR_BYTES 200
#define MOE_MAX_OPERATIONS 32          /* kept; finished ones go first */
#define MOE_MAX_OPERATION_BYTES 4096   /* of the text */

typedef enum moe_operation_kind {
    MOE_OP_MOVE,
    MOE_OP_REPLICATE,
    MOE_OP_DRAIN,
    MOE_OP_REBALANCE,
    MOE_OP_UNDRAIN,
    MOE_OP_KINDS
} moe_operation_kind;
typedef enum moe_operation_state {
    MOE_OP_PENDING,
    MOE_OP_RUNNING,
    MOE_OP_DONE,
    MOE_OP_FAILED,
    MOE_OP_CANCELLED, /* a drain, by UNDRAIN */
    MOE_OP_STATES
} moe_operation_state;

typedef struct moe_operation {
    char id[MOE_OPERATION_ID_BYTES]; /* letters, digits, '.', '_', '-' */
    moe_operation_kind kind;
    int32_t layer, expert;          /* MOVE, REPLICATE */
    char from[MOE_WORKER_ID_BYTES]; /* MOVE; the worker to DRAIN or UNDRAIN */
    char to[MOE_WORKER_ID_BYTES];   /* MOVE, REPLICATE ("": the least loaded) */
    uint64_t incarnation;           /* DRAIN, UNDRAIN: of the worker; a restarted one is not meant any more */
    int64_t created_ms;             /* wall clock, for their order */
    moe_operation_state state;
    char phase[32];       /* of the moves under way; "": none */
    int32_t done, total;  /* moves */
    bool safe_to_stop;    /* nothing of it is under way; of a DRAIN: it is done, and the worker can be stopped */
    char error[MOE_OPERATION_ERROR_BYTES]; /* the last one; "" for none */
} moe_operation;

const char *moe_operation_kind_name(moe_operation_kind kind);    /* "move", "replicate", "drain", "rebalance", "undrain" */
const char *moe_operation_state_name(moe_operation_state state); /* "pending", "running", "done", "failed", "cancelled" */
static inline bool moe_operation_finished(const moe_operation *op) { return op->state >= MOE_OP_DONE; }
bool moe_operation_id_valid(const char *id);
/* Whether both ask for the same. */
bool moe_operation_same(const moe_operation *a, const moe_operation *b);

moe_status moe_operation_to_json(const moe_operation *op, moe_buf *out, moe_error *err);
moe_status moe_operation_from_json(const char *text, size_t size, moe_operation *out, moe_error *err);
