/* Every command and option of Moesaic, as data. An option is added by one row in option_table.c. */
#pragma once
#include "common/options.h"

/* In the order of the table's commands. */
typedef enum moe_command_id {
    MOE_COMMAND_SERVE,
    MOE_COMMAND_ROUTER,
    MOE_COMMAND_WORKER,
    MOE_COMMAND_CHAT,
    MOE_COMMAND_STATUS,
    MOE_COMMAND_EVAL,
    MOE_COMMAND_TRAIN_PREGATE,
    MOE_COMMAND_TRACE,
    MOE_COMMAND_TRACE_REPLAY,
    MOE_COMMAND_KEYGEN,
    MOE_COMMAND_DIGEST,
    MOE_COMMAND_BENCH,
    MOE_COMMAND_PLACEMENT,
    MOE_COMMAND_MOVE,
    MOE_COMMAND_REPLICATE,
    MOE_COMMAND_DRAIN,
    MOE_COMMAND_UNDRAIN,
    MOE_COMMAND_REBALANCE,
    MOE_COMMAND_HEALTH,
    MOE_COMMAND_COUNT
} moe_command_id;

const moe_option_table *moe_option_table_get(void);
