#include "cpu/host_experts.h"

#include "common/alloc.h"

struct moe_host_experts {
    int32_t count;
    bool laid_out; /* images are another backend's, as `layout` says */
    moe_image_layout layout;
    moe_expert *experts; /* [count] */
};

static bool fits(const moe_image_matrix *from, const moe_cpu_matrix *m) {
    return from->rows == m->n && (m->n == 0 || (from->cols == m->k && from->run > 0));
}

/* The matrix as it lies in an image. */
static void lay_out(moe_cpu_matrix *m, const moe_image_matrix *from) {
    m->dtype = from->dtype;
    m->run = from->run;
    m->run_bytes = from->run_bytes;
    m->row_bytes = from->row_bytes;
}

static moe_status make_handles(moe_host_experts *h, moe_cpu_ffn ffn, moe_error *err) {
    if (h->laid_out && !(fits(&h->layout.gate, &ffn.gate) && fits(&h->layout.up, &ffn.up) && fits(&h->layout.down, &ffn.down)))
        return moe_fail(err, MOE_INVALID_ARGUMENT, "images of experts [%d, %d] are not laid out for experts [%d, %d]", h->layout.up.rows,
                        h->layout.up.cols, ffn.up.n, ffn.up.k);
    if (h->laid_out) {
        lay_out(&ffn.gate, &h->layout.gate);
        lay_out(&ffn.up, &h->layout.up);
        lay_out(&ffn.down, &h->layout.down);
    }
    for (int32_t i = 0; i < h->count; i++) h->experts[i].ffn = ffn;
    return MOE_OK;
}

moe_status moe_cpu_host_experts_create(const moe_cpu_kernels *kernels, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi,
                                       const moe_image_layout *layout, int32_t count, moe_host_experts **out, moe_error *err) {
    moe_host_experts *h = moe_calloc(1, sizeof *h);
    *out = NULL;
    if (h) h->experts = moe_calloc((size_t)count, sizeof *h->experts);
    if (!h || !h->experts) {
        moe_cpu_host_experts_free(h);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the handles of %d experts in host memory", count);
    }
    h->count = count;
    h->laid_out = layout != NULL;
    if (layout) h->layout = *layout;
    moe_status status = make_handles(h, moe_cpu_ffn_shape(kernels, weights, block_lo, block_hi), err);
    if (status == MOE_OK)
        *out = h;
    else
        moe_cpu_host_experts_free(h);
    return status;
}

void moe_cpu_host_experts_free(moe_host_experts *h) {
    if (h) moe_free(h->experts);
    moe_free(h);
}

moe_expert *moe_cpu_host_expert(const moe_host_experts *h, int32_t index, const void *image) {
    MOE_ASSERT(index >= 0 && index < h->count);
    moe_cpu_ffn *ffn = &h->experts[index].ffn;
    uint8_t *at = (uint8_t *)(uintptr_t)image; /* matrices are only read from */
    if (h->laid_out) {
        if (ffn->gated) ffn->gate.data = at + h->layout.gate.offset;
        ffn->up.data = at + h->layout.up.offset;
        ffn->down.data = at + h->layout.down.offset;
    } else {
        moe_cpu_ffn_place(ffn, at);
    }
    return &h->experts[index];
}
