/* Slots of backend.h: one block of memory, cut into places for experts of one shape. */
#pragma once
#include "cpu/copier.h"
#include "cpu/ffn.h"

moe_status moe_cpu_slots_create(const moe_cpu_kernels *kernels, bool threaded, const moe_ffn_weights *weights, int32_t block_lo,
                                int32_t block_hi, int32_t count, moe_slots **out, moe_error *err);
void moe_cpu_slots_free(moe_slots *slots); /* NULL is ignored */
moe_expert *moe_cpu_slot(const moe_slots *slots, int32_t index);
void moe_cpu_slot_fill(const moe_slot_fill *fill, moe_job *job);
