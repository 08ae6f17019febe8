/* Experts of backend.h that are computed from images: handles whose matrices lie in memory of the caller's. */
#pragma once
#include "cpu/ffn.h"

moe_status moe_cpu_host_experts_create(const moe_cpu_kernels *kernels, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi,
                                       const moe_image_layout *layout, int32_t count, moe_host_experts **out, moe_error *err);
void moe_cpu_host_experts_free(moe_host_experts *experts); /* NULL is ignored */
moe_expert *moe_cpu_host_expert(const moe_host_experts *experts, int32_t index, const void *image);
