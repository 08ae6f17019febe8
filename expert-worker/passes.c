#include "expert-worker/passes.h"

#include <string.h>

#include "common/elements.h"

static const moe_ffn_group *groups(const moe_passes *p) { return p->batch->parts[MOE_BATCH_GROUPS].memory; }

/* Which of the batch's parts a pass uses: MOE_BATCH_PASS_* are the device's. */
static int part_at(moe_pass_place place, int part) {
    return place == MOE_PASS_HOST ? part + MOE_BATCH_HOST_GROUPS - MOE_BATCH_PASS_GROUPS : part;
}

static size_t exact_row_bytes(const moe_passes *p) { return moe_row_bytes(MOE_F32, p->shard->model->config.hidden); }

moe_status moe_passes_begin(moe_passes *p, moe_batch *batch, moe_shard *shard, moe_error *err) {
    int32_t count = batch->ffn.num_groups;
    bool host = moe_residency_cold(shard->residency) != MOE_COLD_FETCH;
    *p = (moe_passes){.batch = NULL, .shard = shard};
    if (!moe_batch_reserve(batch, MOE_BATCH_DONE, count, 1) ||
        !moe_batch_reserve(batch, MOE_BATCH_PASS_GROUPS, count, sizeof(moe_ffn_group)) ||
        (host && !moe_batch_reserve(batch, MOE_BATCH_HOST_GROUPS, count, sizeof(moe_ffn_group))) ||
        (host && !moe_batch_reserve(batch, MOE_BATCH_COLD, count, sizeof(moe_cold_group))))
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a batch of %d experts", count);
    p->batch = batch;
    p->groups = (moe_groups){.residency = shard->residency,
                             .layer = TAILQ_FIRST(&batch->works)->layer,
                             .count = count,
                             .experts = batch->parts[MOE_BATCH_EXPERTS].memory,
                             .groups = groups(p),
                             .states = batch->parts[MOE_BATCH_DONE].memory,
                             .cold = host ? batch->parts[MOE_BATCH_COLD].memory : NULL};
    moe_groups_begin(&p->groups);
    moe_groups_decide(&p->groups);
    return MOE_OK;
}

/* Takes what is ready into the pass: groups with handles, at the places in the batch. */
static void take_ready(moe_passes *p, moe_pass_place place) {
    moe_ffn_group *taken = p->batch->parts[part_at(place, MOE_BATCH_PASS_GROUPS)].memory;
    moe_pass *pass = &p->pass[place];
    pass->num_taken = 0;
    for (int32_t g = 0; g < p->groups.count && p->groups.num_left > 0; g++) {
        moe_expert *expert = moe_groups_take(&p->groups, g, place);
        if (!expert) continue;
        taken[pass->num_taken] = groups(p)[g];
        taken[pass->num_taken++].expert = expert;
    }
}

static moe_status reserve_split(moe_passes *p, moe_pass_place place, moe_error *err) {
    moe_batch *b = p->batch;
    bool sums = b->ffn.mode == MOE_COMBINE_PARTIAL;
    if (moe_batch_reserve(b, part_at(place, MOE_BATCH_PASS_ROWS), b->assignments, sizeof(int32_t)) &&
        moe_batch_reserve(b, part_at(place, MOE_BATCH_PASS_OUT), b->assignments, exact_row_bytes(p)) &&
        (!sums || moe_batch_reserve(b, MOE_BATCH_EXACT, b->assignments, exact_row_bytes(p))) &&
        (!sums || moe_batch_reserve(b, MOE_BATCH_SUMS, b->rows, exact_row_bytes(p))))
        return MOE_OK;
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a part of a batch of %d rows", b->assignments);
}

/* The pass as a batch of its own: its groups follow each other, one row an assignment comes out. */
static void assemble(moe_passes *p, moe_pass_place place) {
    moe_batch *b = p->batch;
    moe_pass *pass = &p->pass[place];
    moe_ffn_group *taken = b->parts[part_at(place, MOE_BATCH_PASS_GROUPS)].memory;
    int32_t *rows = b->parts[part_at(place, MOE_BATCH_PASS_ROWS)].memory, at = 0;
    for (int32_t i = 0; i < pass->num_taken; i++) {
        memcpy(rows + at, b->ffn.assignment_rows + taken[i].first, (size_t)taken[i].count * sizeof *rows);
        taken[i].first = at;
        at += taken[i].count;
    }
    pass->ffn = b->ffn;
    pass->ffn.groups = taken;
    pass->ffn.num_groups = pass->num_taken;
    pass->ffn.assignment_rows = rows;
    pass->ffn.num_assignments = at;
    pass->ffn.mode = MOE_COMBINE_EXACT;
    pass->ffn.out = b->parts[part_at(place, MOE_BATCH_PASS_OUT)].memory;
}

moe_status moe_passes_next(moe_passes *p, moe_pass_place place, const moe_ffn_batch **out, moe_error *err) {
    moe_batch *b = p->batch;
    moe_pass *pass = &p->pass[place];
    MOE_ASSERT(!pass->out);
    *out = NULL;
    if (p->groups.num_left == 0) return MOE_OK;
    if (place == MOE_PASS_HOST) moe_groups_decide(&p->groups);
    take_ready(p, place);
    if (pass->num_taken == 0) return MOE_OK;
    pass->out = true;
    if (pass->num_taken == b->ffn.num_groups) { /* as with all experts on the device */
        memcpy(b->parts[MOE_BATCH_GROUPS].memory, b->parts[part_at(place, MOE_BATCH_PASS_GROUPS)].memory,
               (size_t)pass->num_taken * sizeof(moe_ffn_group));
        *out = &b->ffn;
        return MOE_OK;
    }
    p->split = true;
    moe_status status = reserve_split(p, place, err);
    if (status != MOE_OK) return status;
    assemble(p, place);
    *out = &pass->ffn;
    return MOE_OK;
}

/* The pass's rows to where they are in the batch's order. */
static void place_rows(const moe_passes *p, moe_pass_place place) {
    moe_batch *b = p->batch;
    size_t row_bytes = exact_row_bytes(p);
    uint8_t *to = b->ffn.mode == MOE_COMBINE_EXACT ? b->ffn.out : b->parts[MOE_BATCH_EXACT].memory;
    const uint8_t *from = b->parts[part_at(place, MOE_BATCH_PASS_OUT)].memory;
    for (int32_t g = 0; g < b->ffn.num_groups; g++) {
        if (!moe_groups_taken(&p->groups, g, place)) continue;
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

bool moe_passes_ended(moe_passes *p, moe_pass_place place) {
    if (p->split) place_rows(p, place);
    for (int32_t g = 0; g < p->groups.count; g++)
        if (moe_groups_taken(&p->groups, g, place)) moe_groups_let_go(&p->groups, g);
    p->pass[place].out = false;
    if (p->groups.num_left > 0 || p->pass[MOE_PASS_DEVICE].out || p->pass[MOE_PASS_HOST].out) return false;
    if (p->split && p->batch->ffn.mode == MOE_COMBINE_PARTIAL) add_up(p);
    moe_residency_batch_ended(p->shard->residency);
    p->batch = NULL;
    return true;
}

void moe_passes_give_up(moe_passes *p) {
    if (!p->batch) return;
    for (int32_t g = 0; g < p->groups.count; g++) moe_groups_let_go(&p->groups, g);
    p->batch = NULL;
}
