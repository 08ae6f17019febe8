#include "expert-worker/passes.h"

#include <string.h>

#include "common/elements.h"

enum { GROUP_LEFT, GROUP_OUT, GROUP_DONE };

static int32_t layer_of(const moe_passes *p) { return TAILQ_FIRST(&p->batch->works)->layer; }
static uint8_t *states(const moe_passes *p) { return p->batch->parts[MOE_BATCH_DONE].memory; }
static const int32_t *experts(const moe_passes *p) { return p->batch->parts[MOE_BATCH_EXPERTS].memory; }
static const moe_ffn_group *groups(const moe_passes *p) { return p->batch->parts[MOE_BATCH_GROUPS].memory; }

static size_t exact_row_bytes(const moe_passes *p) { return moe_row_bytes(MOE_F32, p->shard->model->config.hidden); }

moe_status moe_passes_begin(moe_passes *p, moe_batch *batch, moe_shard *shard, moe_error *err) {
    int32_t count = batch->ffn.num_groups;
    if (!moe_batch_reserve(batch, MOE_BATCH_DONE, count, 1) ||
        !moe_batch_reserve(batch, MOE_BATCH_PASS_GROUPS, count, sizeof(moe_ffn_group)))
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a batch of %d experts", count);
    *p = (moe_passes){.batch = batch, .shard = shard, .num_left = count};
    memset(states(p), GROUP_LEFT, (size_t)count);
    for (int32_t g = 0; g < count; g++) moe_residency_need(shard->residency, layer_of(p), experts(p)[g]);
    return MOE_OK;
}

/* Takes what is ready into the pass: groups with handles, at the places in the batch. */
static void take_ready(moe_passes *p) {
    moe_ffn_group *pass = p->batch->parts[MOE_BATCH_PASS_GROUPS].memory;
    p->num_taken = 0;
    for (int32_t g = 0; g < p->batch->ffn.num_groups; g++) {
        if (states(p)[g] != GROUP_LEFT) continue;
        moe_expert *expert = moe_residency_acquire(p->shard->residency, layer_of(p), experts(p)[g]);
        if (!expert) continue;
        pass[p->num_taken] = groups(p)[g];
        pass[p->num_taken++].expert = expert;
        states(p)[g] = GROUP_OUT;
    }
    p->num_left -= p->num_taken;
}

static moe_status reserve_split(moe_passes *p, moe_error *err) {
    moe_batch *b = p->batch;
    bool sums = b->ffn.mode == MOE_COMBINE_PARTIAL;
    if (moe_batch_reserve(b, MOE_BATCH_PASS_ROWS, b->assignments, sizeof(int32_t)) &&
        moe_batch_reserve(b, MOE_BATCH_PASS_OUT, b->assignments, exact_row_bytes(p)) &&
        (!sums || moe_batch_reserve(b, MOE_BATCH_EXACT, b->assignments, exact_row_bytes(p))) &&
        (!sums || moe_batch_reserve(b, MOE_BATCH_SUMS, b->rows, exact_row_bytes(p))))
        return MOE_OK;
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a part of a batch of %d rows", b->assignments);
}

/* The pass as a batch of its own: its groups follow each other, one row an assignment comes out. */
static void assemble(moe_passes *p) {
    moe_batch *b = p->batch;
    moe_ffn_group *pass = b->parts[MOE_BATCH_PASS_GROUPS].memory;
    int32_t *rows = b->parts[MOE_BATCH_PASS_ROWS].memory, at = 0;
    for (int32_t i = 0; i < p->num_taken; i++) {
        memcpy(rows + at, b->ffn.assignment_rows + pass[i].first, (size_t)pass[i].count * sizeof *rows);
        pass[i].first = at;
        at += pass[i].count;
    }
    p->ffn = b->ffn;
    p->ffn.groups = pass;
    p->ffn.num_groups = p->num_taken;
    p->ffn.assignment_rows = rows;
    p->ffn.num_assignments = at;
    p->ffn.mode = MOE_COMBINE_EXACT;
    p->ffn.out = b->parts[MOE_BATCH_PASS_OUT].memory;
}

moe_status moe_passes_next(moe_passes *p, const moe_ffn_batch **out, moe_error *err) {
    moe_batch *b = p->batch;
    *out = NULL;
    take_ready(p);
    if (p->num_taken == 0) return MOE_OK;
    p->out = true;
    if (p->num_taken == b->ffn.num_groups) { /* as with all experts on the device */
        memcpy(b->parts[MOE_BATCH_GROUPS].memory, b->parts[MOE_BATCH_PASS_GROUPS].memory, (size_t)p->num_taken * sizeof(moe_ffn_group));
        *out = &b->ffn;
        return MOE_OK;
    }
    p->split = true;
    moe_status status = reserve_split(p, err);
    if (status != MOE_OK) return status;
    assemble(p);
    *out = &p->ffn;
    return MOE_OK;
}

/* The pass's rows to where they are in the batch's order. */
static void place_rows(const moe_passes *p) {
    moe_batch *b = p->batch;
    size_t row_bytes = exact_row_bytes(p);
    uint8_t *to = b->ffn.mode == MOE_COMBINE_EXACT ? b->ffn.out : b->parts[MOE_BATCH_EXACT].memory;
    const uint8_t *from = b->parts[MOE_BATCH_PASS_OUT].memory;
    for (int32_t g = 0; g < b->ffn.num_groups; g++) {
        if (states(p)[g] != GROUP_OUT) continue;
        size_t bytes = (size_t)groups(p)[g].count * row_bytes;
        memcpy(to + (size_t)groups(p)[g].first * row_bytes, from, bytes);
        from += bytes;
    }
}

/* As moe_ffn_batch defines partial mode. */
static void add_up(const moe_passes *p) {
    moe_batch *b = p->batch;
    size_t hidden = (size_t)p->shard->model->config.hidden, count = (size_t)b->rows * hidden;
    const float *exact = b->parts[MOE_BATCH_EXACT].memory;
    float *sums = b->parts[MOE_BATCH_SUMS].memory;
    memset(sums, 0, count * sizeof *sums);
    for (int32_t a = 0; a < b->assignments; a++)
        moe_elements_accumulate(b->ffn.assignment_weights[a], exact + (size_t)a * hidden, hidden,
                                sums + (size_t)b->ffn.assignment_rows[a] * hidden);
    moe_elements_narrow(sums, p->shard->backend->dtype, count, b->ffn.out);
}

static void let_go(moe_passes *p, int32_t g) {
    if (states(p)[g] == GROUP_OUT) moe_residency_release(p->shard->residency, layer_of(p), experts(p)[g]);
    if (states(p)[g] != GROUP_DONE) moe_residency_unneed(p->shard->residency, layer_of(p), experts(p)[g]);
    states(p)[g] = GROUP_DONE;
}

bool moe_passes_ended(moe_passes *p) {
    if (p->split) place_rows(p);
    for (int32_t g = 0; g < p->batch->ffn.num_groups; g++)
        if (states(p)[g] == GROUP_OUT) let_go(p, g);
    p->out = false;
    if (p->num_left > 0) return false;
    if (p->split && p->batch->ffn.mode == MOE_COMBINE_PARTIAL) add_up(p);
    moe_residency_batch_ended(p->shard->residency);
    p->batch = NULL;
    return true;
}

void moe_passes_give_up(moe_passes *p) {
    if (!p->batch) return;
    for (int32_t g = 0; g < p->batch->ffn.num_groups; g++) let_go(p, g);
    p->batch = NULL;
}
