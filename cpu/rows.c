#include <string.h>

#include "common/alloc.h"
#include "cpu/base.h"

static int32_t widest(const moe_model_config *c) {
    return c->dense_intermediate > c->shared_intermediate ? c->dense_intermediate : c->shared_intermediate;
}

/* Where a buffer is in a moe_rows, and the floats of one row. */
typedef struct row_buffer {
    float **at;
    int64_t width;
} row_buffer;

#define NUM_BUFFERS 10

static void list_buffers(moe_rows *rows, const moe_model_config *c, row_buffer out[NUM_BUFFERS]) {
    const row_buffer buffers[NUM_BUFFERS] = {
        {&rows->hidden, c->hidden},
        {&rows->normed, c->hidden},
        {&rows->qkv, (int64_t)(c->num_heads + 2 * c->num_kv_heads) * c->head_dim},
        {&rows->attention, (int64_t)c->num_heads * c->head_dim},
        {&rows->delta, c->hidden},
        {&rows->inner, widest(c)},
        {&rows->up, widest(c)},
        {&rows->router, c->num_experts + 1}, /* + 1: a shared expert's gate */
        {&rows->cosine, c->head_dim / 2},
        {&rows->sine, c->head_dim / 2},
    };
    memcpy(out, buffers, sizeof buffers);
}

moe_rows moe_cpu_rows_from(const moe_rows *rows, const moe_model_config *c, int32_t first) {
    moe_rows part = *rows;
    row_buffer buffers[NUM_BUFFERS];
    list_buffers(&part, c, buffers);
    for (int i = 0; i < NUM_BUFFERS; i++) *buffers[i].at += buffers[i].width * first;
    part.max_rows -= first;
    part.spans += first;
    return part;
}

moe_status moe_cpu_rows_create(const moe_model_config *c, int32_t max_rows, moe_rows **out, moe_error *err) {
    moe_rows *rows = moe_calloc(1, sizeof *rows);
    row_buffer buffers[NUM_BUFFERS];
    *out = NULL;
    if (!rows) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a micro-batch");
    list_buffers(rows, c, buffers);
    int64_t row_floats = 0, at = 0;
    for (int i = 0; i < NUM_BUFFERS; i++) row_floats += buffers[i].width;
    /* each buffer begins on a cache line of its own */
    size_t floats = (size_t)row_floats * (size_t)max_rows + (size_t)NUM_BUFFERS * MOE_CPU_LANES;
    float *memory = rows->memory = moe_alloc_aligned(floats, sizeof(float));
    rows->spans = moe_calloc((size_t)max_rows, sizeof *rows->spans);
    if (!memory || !rows->spans) {
        moe_cpu_rows_free(rows);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a micro-batch of %d rows", max_rows);
    }
    for (int i = 0; i < NUM_BUFFERS; i++) {
        *buffers[i].at = memory + at;
        at += (buffers[i].width * max_rows + MOE_CPU_LANES - 1) / MOE_CPU_LANES * MOE_CPU_LANES;
    }
    rows->max_rows = max_rows;
    *out = rows;
    return MOE_OK;
}

moe_status moe_cpu_rows_reserve_outputs(moe_rows *rows, const moe_model_config *c, moe_error *err) {
    if (rows->outputs) return MOE_OK;
    rows->outputs = moe_alloc_aligned((size_t)rows->max_rows * (size_t)c->top_k, (size_t)c->hidden * sizeof(float));
    if (rows->outputs) return MOE_OK;
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the expert outputs of a micro-batch of %d rows", rows->max_rows);
}

void moe_cpu_rows_free(moe_rows *rows) {
    if (!rows) return;
    moe_free(rows->memory);
    moe_free(rows->spans);
    moe_free(rows->attention_scratch);
    moe_free(rows->logits);
    moe_free(rows->outputs);
    moe_free(rows);
}
