/* Feed-forward networks: experts, shared experts and dense layers, in the two forms of moe_ffn_weights:
 *   gated                  y = down · (silu(gate · x) ⊙ (up · x))
 *   without a gate matrix  y = down · relu(up · x) */
#pragma once
#include "cpu/kernels.h"
#include "cpu/runner.h"
#include "cpu/scratch.h"

/* The blocks [block_lo, block_hi) of a network's intermediate width. */
typedef struct moe_cpu_ffn {
    moe_cpu_matrix gate;           /* [width, hidden], width of the slice; absent where the network is not gated */
    moe_cpu_matrix up, down;       /* [width, hidden], [hidden, width] */
    int32_t hidden, intermediate;  /* intermediate: of the whole network */
    int32_t block_lo, block_hi;
    bool gated;   /* moe_ffn_gated */
    void *memory; /* owned, of all matrices; NULL: they lie in a slot or an image */
} moe_cpu_ffn;

/* One network applied to rows that lie together. */
typedef struct moe_cpu_ffn_part {
    const moe_cpu_ffn *ffn;
    const float *x;   /* [rows, hidden] */
    float *inner;     /* [rows, slice width]: working memory, what `down` is applied to */
    float *up;        /* likewise; untouched where the network is not gated */
    float *y;         /* [rows, hidden] */
    int32_t rows;
    int32_t block_lo, block_hi; /* within the network's slice */
} moe_cpu_ffn_part;

moe_status moe_cpu_ffn_load(const moe_cpu_kernels *kernels, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi,
                            moe_cpu_ffn *out, moe_error *err);
void moe_cpu_ffn_free(moe_cpu_ffn *ffn); /* idempotent */

/* The same in steps, for memory of the caller's: a network without data; where its data is in moe_cpu_ffn_bytes of aligned memory;
 * the packing into that. */
moe_cpu_ffn moe_cpu_ffn_shape(const moe_cpu_kernels *kernels, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi);
void moe_cpu_ffn_place(moe_cpu_ffn *ffn, void *memory);
void moe_cpu_ffn_fill(const moe_cpu_ffn *ffn, const moe_ffn_weights *weights);
int64_t moe_cpu_ffn_bytes(const moe_cpu_ffn *ffn);

/* Computes all parts, in parallel over parts, rows and outputs. */
void moe_cpu_ffn_run(const moe_cpu_kernels *kernels, const moe_cpu_run *run, const moe_cpu_ffn_part *parts, int32_t num_parts);

static inline bool moe_cpu_ffn_present(const moe_cpu_ffn *ffn) { return ffn->hidden > 0; }

/* Multiply-adds of one row through the whole network, of which `ffn` may be a slice; 0 where there is none. */
int64_t moe_cpu_ffn_row_multiply_adds(const moe_cpu_ffn *ffn);
/* Multiply-adds of a batch, the whole width taken. */
int64_t moe_cpu_ffn_multiply_adds(const moe_ffn_batch *batch);

/* moe_ffn_batch as backend.h defines it, on a backend of that dtype. RESOURCE_EXHAUSTED: out of memory. */
moe_status moe_cpu_ffn_batch(const moe_cpu_kernels *kernels, moe_dtype dtype, moe_cpu_scratch_list *scratch,
                             const moe_cpu_run *run, const moe_ffn_batch *batch, moe_error *err);

struct moe_expert {
    moe_cpu_ffn ffn;
    moe_slots *slots; /* whose slot it is; NULL: an expert of its own */
};
