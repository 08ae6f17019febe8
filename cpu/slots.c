#include "cpu/slots.h"

#include "common/alloc.h"

struct moe_slots {
    void *memory;
    moe_cpu_copier *copier;
    moe_expert *experts; /* [count] */
    int32_t count;
};

moe_status moe_cpu_slots_create(const moe_cpu_kernels *kernels, bool threaded, const moe_ffn_weights *weights, int32_t block_lo,
                                int32_t block_hi, int32_t count, moe_slots **out, moe_error *err) {
    moe_cpu_ffn shape = moe_cpu_ffn_shape(kernels, weights, block_lo, block_hi);
    int64_t bytes = moe_cpu_ffn_bytes(&shape);
    moe_slots *s = *out = moe_calloc(1, sizeof *s);
    if (!s) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for expert slots");
    s->count = count;
    s->experts = moe_calloc((size_t)count, sizeof *s->experts);
    s->memory = moe_alloc_aligned((size_t)count, (size_t)bytes);
    moe_status status = MOE_OK;
    if (!s->experts || !s->memory)
        status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for %d expert slots of %lld bytes", count, (long long)bytes);
    if (status == MOE_OK) status = moe_cpu_copier_open(threaded, &s->copier, err);
    if (status != MOE_OK) {
        moe_cpu_slots_free(s);
        *out = NULL;
        return status;
    }
    for (int32_t i = 0; i < count; i++) {
        s->experts[i] = (moe_expert){.ffn = shape, .slots = s};
        moe_cpu_ffn_place(&s->experts[i].ffn, (uint8_t *)s->memory + i * bytes);
    }
    return MOE_OK;
}

void moe_cpu_slots_free(moe_slots *s) {
    if (!s) return;
    moe_cpu_copier_close(&s->copier);
    moe_free(s->experts);
    moe_free(s->memory);
    moe_free(s);
}

moe_expert *moe_cpu_slot(const moe_slots *s, int32_t index) {
    MOE_ASSERT(index >= 0 && index < s->count);
    return &s->experts[index];
}

void moe_cpu_slot_fill(const moe_slot_fill *fill, moe_job *job) {
    const moe_slots *slots = fill->slot->slots;
    int64_t bytes = moe_cpu_ffn_bytes(&fill->slot->ffn);
    MOE_ASSERT(slots && fill->offset >= 0 && fill->bytes > 0 && fill->bytes <= bytes - fill->offset);
    moe_cpu_copier_submit(slots->copier, (uint8_t *)slots->memory + (fill->slot - slots->experts) * bytes, fill, job);
}
