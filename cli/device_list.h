/* --devices: which GPUs a command uses. */
#pragma once
#include "common/status.h"

#define MOE_MAX_DEVICES 64

typedef struct moe_device_list {
    int32_t count; /* 1 … MOE_MAX_DEVICES */
    int32_t ids[MOE_MAX_DEVICES];
} moe_device_list;

/* "0,1,3". INVALID_ARGUMENT: not numbers from 0 to MOE_MAX_DEVICES - 1, one named twice, or none. */
moe_status moe_device_list_parse(const char *text, moe_device_list *out, moe_error *err);
