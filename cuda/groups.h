/* Grouped networks: which kernels compute the assignments of several networks of one shape. */
#pragma once
#include "cuda/expert.h"
#include "cuda/simple.h"
#include "cuda/tune.h"

/* Assignments sorted by network (group), as moe_simple_ffn_args and moe_cuda_ffn have them; all pointers but the first three are
 * to device memory. */
typedef struct moe_cuda_groups {
    const moe_cuda_expert_device *device;
    const moe_cuda_tune *tune;           /* NULL: built-in thresholds */
    const moe_cuda_network_shape *shape; /* of every network */
    moe_dtype dtype;                     /* of x and inner */
    int32_t block_lo, block_hi;          /* blocks to be computed */
    int32_t num_groups, num_assignments;
    const int32_t *expert_first;                            /* [num_groups + 1] */
    const int32_t *sorted_rows;                             /* [num_assignments] */
    const int32_t *slot_of;                                 /* row of y of each assignment; NULL: its own number */
    const void *const *gate_up, *const *down, *const *maps; /* [num_groups]: addresses of the networks' gate_up, down, tail */
    const void *x;
    void *inner; /* [num_assignments, padded] */
    float *y;
    bool brought; /* as moe_cuda_ffn has it */
} moe_cuda_groups;

/* In the bfloat16 profile the tensor cores compute what they have kernels for; the simple kernels the rest. By shape alone, never
 * by the number of rows, so that a row has one order of sums. Launchers as in simple.h. */
cudaError_t moe_cuda_groups_run(const moe_cuda_groups *groups, cudaStream_t stream);
