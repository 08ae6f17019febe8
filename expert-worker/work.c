#include "expert-worker/work.h"

#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "expert-worker/residency.h"

/* Two passes over the same parts: sizes first, then copies; each part begins on a cache line. */
static void *place(uint8_t *block, size_t *at, const void *from, size_t size) {
    void *to = block ? block + *at : NULL;
    if (to && from) memcpy(to, from, size);
    *at += (size + MOE_ALIGNMENT_BYTES - 1) / MOE_ALIGNMENT_BYTES * MOE_ALIGNMENT_BYTES;
    return to;
}

static size_t place_all(moe_work *w, uint8_t *block, const moe_forward_call *decoded, int32_t hidden) {
    size_t at = 0, assignments = (size_t)decoded->assignments;
    w->x = place(block, &at, decoded->activations, (size_t)decoded->rows * moe_row_bytes(decoded->dtype, hidden));
    w->row_of = place(block, &at, decoded->assignment_rows, assignments * sizeof *w->row_of);
    w->expert_of = place(block, &at, decoded->assignment_experts, assignments * sizeof *w->expert_of);
    if (decoded->assignment_weights)
        w->weight_of = place(block, &at, decoded->assignment_weights, assignments * sizeof *w->weight_of);
    return at;
}

moe_work *moe_work_new(const moe_forward_call *decoded, moe_rpc_call *call, moe_shard *shard, moe_blocks *blocks,
                       int64_t now_ns) {
    int32_t hidden = shard->model->config.hidden;
    moe_work *w = moe_calloc(1, sizeof *w);
    if (!w) return NULL;
    moe_block block = moe_blocks_take(blocks, place_all(w, NULL, decoded, hidden));
    if (!block.memory) {
        moe_free(w);
        return NULL;
    }
    *w = (moe_work){.call = call,
                    .layer = decoded->layer,
                    .rows = decoded->rows,
                    .assignments = decoded->assignments,
                    .block_lo = decoded->block_lo,
                    .block_hi = decoded->block_hi,
                    .mode = decoded->combine,
                    .block = block,
                    .arrived_ns = now_ns};
    place_all(w, block.memory, decoded, hidden);
    for (int32_t a = 0, end; a < w->assignments; a = end) {
        end = moe_work_group_end(w, a);
        moe_shard_use(shard, w->layer, w->expert_of[a], end - a);
        if (shard->residency) moe_residency_expect(shard->residency, w->layer, w->expert_of[a]);
    }
    return w;
}

void moe_work_free(moe_work *w, moe_shard *shard, moe_blocks *blocks) {
    for (int32_t a = 0; a < w->assignments; a = moe_work_group_end(w, a)) {
        if (shard->residency) moe_residency_unexpect(shard->residency, w->layer, w->expert_of[a]);
        moe_shard_release(shard, w->layer, w->expert_of[a]);
    }
    moe_blocks_give_back(blocks, w->block);
    moe_free(w->not_finite);
    moe_free(w);
}

uint64_t moe_work_digest(const moe_work *w, const moe_shard *shard) {
    uint64_t digest = 0;
    for (int32_t a = 0; a < w->assignments; a = moe_work_group_end(w, a))
        digest ^= moe_shard_at(shard, w->layer, w->expert_of[a])->digest;
    return digest;
}

/* Of an answer's row: an assignment of it, the first one where it is a sum. */
static int32_t assignment_of(const moe_work *w, int32_t out_row) {
    int32_t a = out_row;
    if (w->mode == MOE_COMBINE_PARTIAL)
        for (a = 0; a + 1 < w->assignments && w->row_of[a] != out_row; a++) continue;
    return a;
}

static void note_not_finite(moe_work *w, int32_t assignment) {
    if (!w->not_finite) w->not_finite = moe_calloc((size_t)w->rows, sizeof *w->not_finite);
    if (w->not_finite) w->not_finite[w->row_of[assignment]] = 1;
    if (w->status != MOE_OK) return;
    w->status = MOE_INTERNAL;
    snprintf(w->message, sizeof w->message, "%sexpert %d of MoE layer %d gave a value that is not finite from finite input",
             w->mode == MOE_COMBINE_EXACT ? "" : "a sum with ", w->expert_of[assignment], w->layer);
}

void moe_work_check_finite(moe_work *w, const moe_shard *shard) {
    int32_t hidden = shard->model->config.hidden, out_rows = moe_work_out_rows(w);
    moe_dtype dtype = moe_work_out_dtype(w, shard);
    if (w->status != MOE_OK) return;
    const uint8_t *row = w->out;
    for (int32_t i = 0; i < out_rows; i++, row += moe_row_bytes(dtype, hidden))
        if (!moe_elements_finite(row, dtype, (size_t)hidden)) note_not_finite(w, assignment_of(w, i));
    for (int32_t i = 0; w->not_finite && i < w->rows; i++) /* from marks to a list, in place */
        if (w->not_finite[i]) w->not_finite[w->num_not_finite++] = (uint32_t)i;
}
