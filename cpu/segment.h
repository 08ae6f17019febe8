/* The base layers between two dispatches: which ops in which order, written once for every CPU implementation. */
#pragma once
#include "cpu/base.h"

/* Runs a segment as backend.h defines it, on a backend of that dtype. RESOURCE_EXHAUSTED: out of memory for attention scores or
 * logits. FAILED_PRECONDITION: it is to combine what the rows hold, and they hold nothing. */
moe_status moe_cpu_segment_run(const moe_cpu_kernels *kernels, moe_dtype dtype, const moe_cpu_run *run, const moe_base *base,
                               const moe_segment *segment, moe_error *err);

/* About how many multiply-adds a segment takes. */
int64_t moe_cpu_segment_multiply_adds(const moe_base *base, const moe_segment *segment);

/* y = x @ w^T (+ bias) over all outputs, in parallel over rows and outputs. */
void moe_cpu_linear_run(const moe_cpu_kernels *kernels, const moe_cpu_run *run, const moe_cpu_matrix *w, const float *bias,
                        const float *x, int32_t rows, float *y);
