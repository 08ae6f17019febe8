/* Which token tile the expert kernels take: thresholds by the mean number of rows of an expert that has rows. Built-in ones come
 * from measurements on an H100 (docs/performance.md); a file with measured ones for a machine and shape overrides them.
 *
 * The file is text, one shape a line: hidden, intermediate width, and the largest mean rows at which tiles of 32, 64 and 128 tokens
 * are best (the widest tile above). '#' begins a comment. */
#pragma once
#include "common/status.h"
#include "cuda/expert_kernels.h"

#define MOE_CUDA_TUNE_SHAPES 64
#define MOE_CUDA_TUNE_TILES 4 /* 32, 64, 128 tokens, and the widest, which counts as 256 */

typedef struct moe_cuda_tune_row {
    int32_t hidden, width;
    int32_t limit[MOE_CUDA_TUNE_TILES - 1]; /* ascending */
} moe_cuda_tune_row;

typedef struct moe_cuda_tune {
    moe_cuda_tune_row rows[MOE_CUDA_TUNE_SHAPES];
    int32_t count;
} moe_cuda_tune;

/* Tokens of tile 0 … MOE_CUDA_TUNE_TILES-1. */
static inline int32_t moe_cuda_tune_tokens(int32_t tile) { return 32 << tile; }

/* The tile for moe_cuda_ffn.tile_tokens. `tune` may be NULL. Any thread. */
int32_t moe_cuda_tune_tile(const moe_cuda_tune *tune, int32_t hidden, int32_t width, int32_t num_assignments, int32_t num_groups);

/* Puts a row in place of the shape's earlier one. RESOURCE_EXHAUSTED: there are MOE_CUDA_TUNE_SHAPES others. */
moe_status moe_cuda_tune_add(moe_cuda_tune *tune, const moe_cuda_tune_row *row, moe_error *err);

/* Reads a file into *tune. NOT_FOUND: there is none. INVALID_ARGUMENT: a bad line, by number. */
moe_status moe_cuda_tune_read(const char *path, moe_cuda_tune *tune, moe_error *err);

/* Writes all rows, replacing the file at once. UNAVAILABLE: it cannot be written. */
moe_status moe_cuda_tune_write(const char *path, const moe_cuda_tune *tune, moe_error *err);

/* Times every tile at 1 to 512 rows an expert for `num_experts` experts of this shape, with gate matrices or without, on the
 * current device with weights and rows of its own (as many experts as fit, at least one), and fills *row. Blocks for about a
 * second. RESOURCE_EXHAUSTED: out of device memory; INTERNAL: a CUDA call failed; INVALID_ARGUMENT: a shape that these kernels do
 * not support. */
moe_status moe_cuda_tune_measure(moe_cuda_expert_device device, int32_t hidden, int32_t width, bool gated, int32_t num_experts,
                                 moe_cuda_tune_row *row, moe_error *err);
