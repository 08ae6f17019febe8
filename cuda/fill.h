/* Slots of backend.h: experts that come and go in one block of device memory, copied from pinned images on a stream of their own. */
#pragma once
#include "cuda/backend.h"

/* As the functions of the same names in backend.h. */
moe_expert_size moe_cuda_expert_size(const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi, moe_dtype profile);
void moe_cuda_expert_layout(const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi, moe_dtype profile, moe_image_layout *out);
void moe_cuda_expert_pack(const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi, moe_dtype profile, void *image);
moe_status moe_cuda_slots_create(moe_cuda *cuda, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi, int32_t count,
                                 moe_slots **out, moe_error *err);
void moe_cuda_slots_free(moe_slots *slots); /* NULL is ignored */
moe_expert *moe_cuda_slot(const moe_slots *slots, int32_t index);
void moe_cuda_slot_fill_submit(moe_cuda *cuda, const moe_slot_fill *fill, moe_job *job);
