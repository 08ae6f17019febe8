#include "cpu/host_experts.h"

#include "common/alloc.h"

struct moe_host_experts {
    int32_t count;
    moe_expert *experts; /* [count] */
};

moe_status moe_cpu_host_experts_create(const moe_cpu_kernels *kernels, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi,
                                       int32_t count, moe_host_experts **out, moe_error *err) {
    moe_host_experts *h = *out = moe_calloc(1, sizeof *h);
    if (h) h->experts = moe_calloc((size_t)count, sizeof *h->experts);
    if (!h || !h->experts) {
        moe_cpu_host_experts_free(h);
        *out = NULL;
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the handles of %d experts in host memory", count);
    }
    h->count = count;
    for (int32_t i = 0; i < count; i++) h->experts[i].ffn = moe_cpu_ffn_shape(kernels, weights, block_lo, block_hi);
    return MOE_OK;
}

void moe_cpu_host_experts_free(moe_host_experts *h) {
    if (h) moe_free(h->experts);
    moe_free(h);
}

moe_expert *moe_cpu_host_expert(const moe_host_experts *h, int32_t index, const void *image) {
    MOE_ASSERT(index >= 0 && index < h->count);
    moe_cpu_ffn_place(&h->experts[index].ffn, (void *)(uintptr_t)image); /* matrices are only read from */
    return &h->experts[index];
}
