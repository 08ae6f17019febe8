/* The header of one safetensors file (https://github.com/huggingface/safetensors, "Format"): u64 length n, n bytes of JSON,
 * tensor bytes. Internal to the safetensors reader. */
#pragma once
#include "common/model/safetensors.h"

/* A growable list of tensors that owns their names. */
typedef struct moe_safetensor_list {
    moe_safetensor *items;
    int64_t count, capacity;
} moe_safetensor_list;

void moe_safetensor_list_free(moe_safetensor_list *list);

/* Checks the whole header of the file mapped at `file` and appends its tensors, whose data point into the map. `path` is for
 * messages. On failure *list may hold some of them. Errors as moe_safetensors_open. */
moe_status moe_safetensors_parse(const void *file, size_t size, const char *path, moe_safetensor_list *list, moe_error *err);
