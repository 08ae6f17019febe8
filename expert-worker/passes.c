#include "expert-worker/passes.h"

#include <string.h>

#include "common/elements.h"

/* Of a group. UNDECIDED and HOST need an image, DEVICE and ON_DEVICE a slot. */
enum { GROUP_UNDECIDED, GROUP_DEVICE, GROUP_HOST, GROUP_ON_DEVICE, GROUP_ON_HOST, GROUP_DONE };

static const uint8_t on_place[] = {[MOE_PASS_DEVICE] = GROUP_ON_DEVICE, [MOE_PASS_HOST] = GROUP_ON_HOST};

static int32_t layer_of(const moe_passes *p) { return TAILQ_FIRST(&p->batch->works)->layer; }
static uint8_t *states(const moe_passes *p) { return p->batch->parts[MOE_BATCH_DONE].memory; }
static const int32_t *experts(const moe_passes *p) { return p->batch->parts[MOE_BATCH_EXPERTS].memory; }
static const moe_ffn_group *groups(const moe_passes *p) { return p->batch->parts[MOE_BATCH_GROUPS].memory; }
static bool host_computes(const moe_passes *p) { return moe_residency_cold(p->shard->residency) != MOE_COLD_FETCH; }

/* Which of the batch's parts a pass uses: MOE_BATCH_PASS_* are the device's. */
static int part_at(moe_pass_place place, int part) {
    return place == MOE_PASS_HOST ? part + MOE_BATCH_HOST_GROUPS - MOE_BATCH_PASS_GROUPS : part;
}

static size_t exact_row_bytes(const moe_passes *p) { return moe_row_bytes(MOE_F32, p->shard->model->config.hidden); }

/* ---- where groups are computed ---- */

/* What device and host have to do for this batch before anything else of it. */
static moe_cold_queues queues(const moe_passes *p, const moe_cold_costs *costs) {
    moe_cold_queues q = {.link_ns = moe_residency_link_ns(p->shard->residency),
                         .one_processor = moe_residency_shares_processor(p->shard->residency)};
    for (int32_t g = 0; g < p->batch->ffn.num_groups; g++) {
        int state = states(p)[g];
        if (state == GROUP_DEVICE || state == GROUP_ON_DEVICE) q.device_ns += moe_cold_compute_ns(&costs->device, 1, groups(p)[g].count);
        if (state == GROUP_HOST || state == GROUP_ON_HOST) q.host_ns += moe_cold_compute_ns(&costs->host, 1, groups(p)[g].count);
    }
    if (q.one_processor) q.device_ns += q.host_ns;
    return q;
}

static void decide_for(moe_passes *p, int32_t g, bool host) {
    states(p)[g] = host ? GROUP_HOST : GROUP_DEVICE;
    p->num_undecided--;
    if (host) return;
    moe_residency_need(p->shard->residency, layer_of(p), experts(p)[g]);
    moe_residency_unneed_image(p->shard->residency, layer_of(p), experts(p)[g]);
}

/* Where the undecided groups are computed whose images are there. */
static void decide(moe_passes *p) {
    moe_cold_group *cold = p->batch->parts[MOE_BATCH_COLD].memory;
    moe_residency *r = p->shard->residency;
    bool fixed = moe_residency_cold(r) == MOE_COLD_HOST;
    int32_t count = 0;
    for (int32_t g = 0; g < p->batch->ffn.num_groups && count < p->num_undecided; g++) {
        if (states(p)[g] != GROUP_UNDECIDED || !moe_residency_has_image(r, layer_of(p), experts(p)[g])) continue;
        cold[count++] = (moe_cold_group){.left_bytes = moe_residency_left_bytes(r, layer_of(p), experts(p)[g]),
                                         .rows = groups(p)[g].count,
                                         .index = g,
                                         .host = fixed};
    }
    if (count == 0) return;
    const moe_cold_costs *costs = moe_residency_costs(r);
    if (!fixed) moe_cold_split(costs, queues(p, costs), cold, count);
    for (int32_t i = 0; i < count; i++) decide_for(p, cold[i].index, cold[i].host);
}

moe_status moe_passes_begin(moe_passes *p, moe_batch *batch, moe_shard *shard, moe_error *err) {
    int32_t count = batch->ffn.num_groups;
    *p = (moe_passes){.batch = NULL, .shard = shard, .num_left = count};
    if (!moe_batch_reserve(batch, MOE_BATCH_DONE, count, 1) ||
        !moe_batch_reserve(batch, MOE_BATCH_PASS_GROUPS, count, sizeof(moe_ffn_group)) ||
        (host_computes(p) && !moe_batch_reserve(batch, MOE_BATCH_HOST_GROUPS, count, sizeof(moe_ffn_group))) ||
        (host_computes(p) && !moe_batch_reserve(batch, MOE_BATCH_COLD, count, sizeof(moe_cold_group))))
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a batch of %d experts", count);
    p->batch = batch;
    for (int32_t g = 0; g < count; g++) {
        bool open = host_computes(p) && !moe_residency_is_resident(shard->residency, layer_of(p), experts(p)[g]);
        states(p)[g] = open ? GROUP_UNDECIDED : GROUP_DEVICE;
        p->num_undecided += open;
        (open ? moe_residency_need_image : moe_residency_need)(shard->residency, layer_of(p), experts(p)[g]);
    }
    decide(p);
    return MOE_OK;
}

/* ---- passes ---- */

/* The group's handle, where it can be computed on the device now. What was meant for the host may have come into a slot meanwhile. */
static moe_expert *take_for_device(moe_passes *p, int32_t g) {
    moe_residency *r = p->shard->residency;
    if (states(p)[g] > GROUP_HOST) return NULL;
    moe_expert *expert = moe_residency_acquire(r, layer_of(p), experts(p)[g]);
    if (!expert || states(p)[g] == GROUP_DEVICE) return expert;
    p->num_undecided -= states(p)[g] == GROUP_UNDECIDED;
    moe_residency_need(r, layer_of(p), experts(p)[g]);
    moe_residency_unneed_image(r, layer_of(p), experts(p)[g]);
    return expert;
}

static moe_expert *take_for_host(const moe_passes *p, int32_t g) {
    if (states(p)[g] != GROUP_HOST) return NULL;
    return moe_residency_acquire_image(p->shard->residency, layer_of(p), experts(p)[g], groups(p)[g].count);
}

/* Takes what is ready into the pass: groups with handles, at the places in the batch. */
static void take_ready(moe_passes *p, moe_pass_place place) {
    moe_ffn_group *taken = p->batch->parts[part_at(place, MOE_BATCH_PASS_GROUPS)].memory;
    moe_pass *pass = &p->pass[place];
    pass->num_taken = 0;
    for (int32_t g = 0; g < p->batch->ffn.num_groups && pass->num_taken < p->num_left; g++) {
        moe_expert *expert = place == MOE_PASS_HOST ? take_for_host(p, g) : take_for_device(p, g);
        if (!expert) continue;
        taken[pass->num_taken] = groups(p)[g];
        taken[pass->num_taken++].expert = expert;
        states(p)[g] = on_place[place];
    }
    p->num_left -= pass->num_taken;
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
    if (p->num_left == 0) return MOE_OK;
    if (place == MOE_PASS_HOST) decide(p);
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
        if (states(p)[g] != on_place[place]) continue;
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
    moe_residency *r = p->shard->residency;
    int32_t layer = layer_of(p), expert = experts(p)[g], state = states(p)[g];
    if (state == GROUP_ON_DEVICE) moe_residency_release(r, layer, expert);
    if (state == GROUP_ON_HOST) moe_residency_release_image(r, layer, expert);
    if (state == GROUP_DEVICE || state == GROUP_ON_DEVICE)
        moe_residency_unneed(r, layer, expert);
    else if (state != GROUP_DONE)
        moe_residency_unneed_image(r, layer, expert);
    states(p)[g] = GROUP_DONE;
}

bool moe_passes_ended(moe_passes *p, moe_pass_place place) {
    if (p->split) place_rows(p, place);
    for (int32_t g = 0; g < p->batch->ffn.num_groups; g++)
        if (states(p)[g] == on_place[place]) let_go(p, g);
    p->pass[place].out = false;
    if (p->num_left > 0 || p->pass[MOE_PASS_DEVICE].out || p->pass[MOE_PASS_HOST].out) return false;
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
