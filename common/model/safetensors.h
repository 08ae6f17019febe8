/* Safetensors checkpoints (one file, or shards named by model.safetensors.index.json), memory-mapped.
 *
 * Only headers are read at open; tensor bytes are touched when used, so a process reads the ranges it needs. Everything
 * is checked before it is trusted: header length against the file, JSON, duplicate names, dtypes, shapes (checked
 * products), data_offsets (within the file, equal to the shape's bytes, not overlapping, no holes), the index against the
 * shards. Errors name the file and the tensor. Immutable after open: any thread may look up. */
#pragma once
#include <stdint.h>

#include "common/status.h"
#include "common/tensor.h"

#define MOE_SAFETENSORS_MAX_HEADER_BYTES (UINT64_C(100) << 20) /* the format's own limit */
#define MOE_SAFETENSORS_MAX_INDEX_BYTES (UINT64_C(100) << 20)
#define MOE_SAFETENSORS_MAX_SHARDS 4096
#define MOE_SAFETENSORS_MAX_DIMS 4

typedef struct moe_safetensors moe_safetensors;

typedef struct moe_safetensor {
    const char *name; /* borrowed from the checkpoint */
    moe_dtype dtype;
    int num_dims;
    int64_t dims[MOE_SAFETENSORS_MAX_DIMS];
    const void *data; /* in the map; may be unaligned */
    size_t bytes;
    bool used; /* set by moe_safetensors_find, so that unused tensors can be named */
} moe_safetensor;

/* Opens DIR: DIR/model.safetensors where it exists, else the shards of DIR/model.safetensors.index.json. The caller owns *out
 * and closes it after its last use of any tensor. The files must not shrink while they are open (they are mapped).
 * NOT_FOUND (no checkpoint, or a shard is missing), INVALID_ARGUMENT (damaged), UNIMPLEMENTED (a dtype or rank not built),
 * RESOURCE_EXHAUSTED (memory). */
moe_status moe_safetensors_open(const char *dir, moe_safetensors **out, moe_error *err);
/* Opens the one file at `path`; otherwise the same. */
moe_status moe_safetensors_open_file(const char *path, moe_safetensors **out, moe_error *err);
void moe_safetensors_close(moe_safetensors **checkpoint); /* NULLs the pointer; idempotent */

/* The tensor of that name, marked used; NULL if there is none. One thread at a time. */
moe_safetensor *moe_safetensors_find(moe_safetensors *checkpoint, const char *name);

/* A map is read page by page, without the kernel's read-ahead, which would fetch neighbours that belong to other processes.
 * will_need starts reading the `bytes` bytes at `data`, exactly those, and does not wait; release gives their pages back: a
 * later read maps them again. Both are advice, and do nothing for memory that is not a map of this checkpoint. Any thread. */
void moe_safetensors_will_need(const moe_safetensors *checkpoint, const void *data, size_t bytes);
void moe_safetensors_release(const moe_safetensors *checkpoint, const void *data, size_t bytes);

/* All tensors, sorted by name. */
int64_t moe_safetensors_count(const moe_safetensors *checkpoint);
const moe_safetensor *moe_safetensors_at(const moe_safetensors *checkpoint, int64_t index);
