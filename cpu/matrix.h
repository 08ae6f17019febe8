/* Packing of checkpoint tensors into an implementation's own layout. */
#pragma once
#include "cpu/kernels.h"

/* Packs the columns [col_lo, col_hi) of `parts`, stacked by rows, as one matrix; absent parts are skipped. Weights stay as
 * stored unless the kernels widen them or the parts differ in dtype. *out is freed by moe_cpu_matrix_free.
 * RESOURCE_EXHAUSTED: out of memory. */
moe_status moe_cpu_matrix_pack(const moe_cpu_kernels *kernels, const moe_tensor *parts, int num_parts, int64_t col_lo,
                               int64_t col_hi, moe_cpu_matrix *out, moe_error *err);

/* The same in two steps, for memory of the caller's: a matrix without data, and the packing into moe_cpu_matrix_bytes of aligned
 * memory at out->data, which moe_cpu_matrix_free must not see. */
moe_cpu_matrix moe_cpu_matrix_shape(const moe_cpu_kernels *kernels, const moe_tensor *parts, int num_parts, int64_t col_lo,
                                    int64_t col_hi);
void moe_cpu_matrix_fill(const moe_cpu_matrix *out, const moe_tensor *parts, int num_parts, int64_t col_lo);

/* One whole tensor; an absent tensor gives an absent matrix. */
moe_status moe_cpu_matrix_pack_one(const moe_cpu_kernels *kernels, const moe_tensor *tensor, moe_cpu_matrix *out, moe_error *err);

void moe_cpu_matrix_free(moe_cpu_matrix *matrix); /* idempotent */
int64_t moe_cpu_matrix_bytes(const moe_cpu_matrix *matrix); /* of its data, be it there or not */

/* The elements of `parts`, one after another, as f32; NULL with OK where all parts are absent. Freed by moe_free. */
moe_status moe_cpu_vector_read(const moe_tensor *parts, int num_parts, float **out, moe_error *err);
