/* What the rows of a step are, as kernels read it: one block of integers, at the same device addresses for every step that
 * launches the same number of rows. */
#pragma once
#include "cuda/base_kernels.h"
#include "cuda/device.h"
#include "cuda/simple.h"

#define MOE_CUDA_GRAPH_ROWS 256 /* steps of at most so many rows are captured; longer ones hide their launches */
#define MOE_CUDA_DECODE_ROWS 8  /* rows of a sequence that are attended one by one; more form tiles */

typedef struct moe_cuda_step {
    int32_t num_rows, launch_rows; /* launch_rows ≥ num_rows: the rest is padding */
    int32_t num_pieces, num_tiles, piece_tokens;
    /* device */
    moe_cuda_row_inputs rows;
    moe_simple_places places;
    const int32_t *whole; /* [2]: 0, num_rows; the only group of a dense FFN */
    const int32_t *num_pieces_at, *num_tiles_at;
    const moe_cuda_piece *pieces;
    const moe_cuda_tile *tiles;
} moe_cuda_step;

/* What decides how attention is cut. */
typedef struct moe_cuda_step_shape {
    moe_cuda_attention_shape attention;
    bool tiles_only; /* one kernel for all rows, so that a row's bits do not depend on how it comes */
    bool padded;     /* launch_rows may exceed num_rows */
    int32_t num_sms;
} moe_cuda_step_shape;

/* Rows that steps of up to max_rows rows may launch, padding included: what buffers must have room for. */
int32_t moe_cuda_step_room(int32_t max_rows);
/* Counts; *ints is the size of the block. Checks the segment's rows by assertion. */
void moe_cuda_step_plan(const moe_segment *segment, int32_t vocab, const moe_cuda_step_shape *shape, moe_cuda_step *out,
                        size_t *ints);
/* Fills the block in host memory, and the pointers for its copy at `device`. identity: device, 0, 1, … */
void moe_cuda_step_fill(const moe_segment *segment, const moe_cuda_step_shape *shape, const int32_t *identity, int32_t *host,
                        const int32_t *device, moe_cuda_step *step);
