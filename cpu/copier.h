/* Copies pieces into slots beside the computation: a thread of its own, first come first served. */
#pragma once
#include "common/backend.h"

typedef struct moe_cpu_copier moe_cpu_copier;

/* threaded false: copies happen inside submit. RESOURCE_EXHAUSTED. */
moe_status moe_cpu_copier_open(bool threaded, moe_cpu_copier **out, moe_error *err);
void moe_cpu_copier_close(moe_cpu_copier **copier); /* after what was submitted; NULLs; idempotent */

/* As slot_fill_submit of backend.h, into memory at `to`. Any thread. */
void moe_cpu_copier_submit(moe_cpu_copier *copier, uint8_t *to, const moe_slot_fill *fill, moe_job *job);
