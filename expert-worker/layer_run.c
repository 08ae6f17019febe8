#include "expert-worker/layer_run.h"

#include <string.h>

#include "common/alloc.h"
#include "common/random.h"

uint64_t moe_layer_run_step(uint64_t step) { return moe_mix64(~step); }

moe_status moe_layer_run_init(moe_layer_run *run, moe_shard *shard, moe_backend *device, moe_backend *host, moe_error *err) {
    size_t count = (size_t)shard->model->config.num_experts;
    *run = (moe_layer_run){.shard = shard, .device = device, .host = host};
    bool made = true;
    for (int i = 0; i < MOE_RUN_JOBS; i++) {
        moe_run_job *j = &run->jobs[i];
        j->run = run;
        j->place = i == MOE_RUN_HOST ? MOE_PASS_HOST : MOE_PASS_DEVICE;
        if (i == MOE_RUN_HOST)
            made = made && (j->taken = moe_calloc(count + 1, sizeof *j->taken));
        else
            made = made && (j->handles = moe_calloc(count + 1, sizeof(moe_expert *)));
    }
    run->cursor = moe_calloc(count + 1, sizeof *run->cursor);
    run->experts = moe_calloc(count + 1, sizeof *run->experts);
    run->group = moe_calloc(count + 1, sizeof *run->group);
    run->cold = moe_calloc(count + 1, sizeof *run->cold);
    run->states = moe_calloc(count + 1, sizeof *run->states);
    if (made && run->cursor && run->experts && run->group && run->cold && run->states) return MOE_OK;
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for layers of %zu experts", count);
}

static void free_host_rows(moe_layer_run *run) {
    run->device->ops->host_free(run->device, run->host_rows.memory);
    run->host_rows = (moe_host_rows){.memory = NULL};
}

void moe_layer_run_free(moe_layer_run *run) {
    if (!run->shard) return;
    MOE_ASSERT(!run->call);
    free_host_rows(run);
    for (int i = 0; i < MOE_RUN_JOBS; i++) {
        moe_free(run->jobs[i].handles);
        moe_free(run->jobs[i].taken);
    }
    void *const owned[] = {run->cursor, run->experts, run->group, run->cold, run->states};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) moe_free(owned[i]);
    *run = (moe_layer_run){.shard = NULL};
}

/* ---- the call's experts ---- */

static int64_t num_slots(const moe_layer_run *run) {
    return (int64_t)run->call->num_rows * run->shard->model->config.top_k;
}

/* The distinct experts, ascending, with the number of their rows. Returns how many. */
static int32_t make_groups(moe_layer_run *run) {
    int32_t num_experts = run->shard->model->config.num_experts, count = 0, *rows = run->cursor;
    memset(rows, 0, (size_t)num_experts * sizeof *rows);
    for (int64_t s = 0; s < num_slots(run); s++) rows[run->call->experts[s]]++;
    for (int32_t e = 0; e < num_experts; e++) {
        if (rows[e] == 0) continue;
        run->experts[count] = e;
        run->group[count++] = (moe_ffn_group){.expert = moe_shard_at(run->shard, run->call->layer, e)->handle, .count = rows[e]};
    }
    return count;
}

static moe_status check_held(const moe_layer_run *run, int32_t count, moe_error *err) {
    for (int32_t i = 0; i < count; i++)
        if (!moe_shard_holds(run->shard, run->call->layer, run->experts[i]))
            return moe_fail(err, MOE_UNAVAILABLE, "expert %d of MoE layer %d is no longer held in this process", run->experts[i],
                            run->call->layer);
    return MOE_OK;
}

/* Room for all rows of the call that the host may compute. */
static bool reserve_host_rows(moe_layer_run *run) {
    moe_host_rows *h = &run->host_rows;
    size_t hidden = (size_t)run->shard->model->config.hidden;
    int32_t count = moe_groups_host_rows(&run->groups);
    if (count <= h->capacity) return true;
    free_host_rows(run); /* first, so that never both are there */
    h->bytes = (size_t)count * (hidden * sizeof *h->out + 2 * sizeof *h->slots);
    h->memory = run->device->ops->host_alloc(run->device, h->bytes);
    if (!h->memory) return false;
    h->capacity = count;
    h->out = h->memory;
    h->slots = (int32_t *)(h->out + (size_t)count * hidden);
    h->row = h->slots + count;
    return true;
}

static void use_experts(moe_layer_run *run) {
    moe_shard *shard = run->shard;
    moe_layer_call *call = run->call;
    for (int32_t i = 0; i < run->groups.count; i++) {
        moe_shard_use(shard, call->layer, run->experts[i], run->group[i].count);
        if (shard->residency) moe_residency_expect(shard->residency, call->layer, run->experts[i]);
    }
    moe_groups_begin(&run->groups);
    /* last, so that no copy is given up that a hint has begun rightly */
    if (shard->residency) moe_residency_reached(shard->residency, moe_layer_run_step(call->step), call->layer);
}

moe_status moe_layer_run_begin(moe_layer_run *run, moe_layer_call *call, moe_error *err) {
    moe_residency *r = run->shard->residency;
    run->call = call;
    int32_t count = make_groups(run);
    moe_status status = check_held(run, count, err);
    if (status != MOE_OK) {
        run->call = NULL;
        return status;
    }
    run->host_rows.computed = run->host_rows.given = 0;
    run->stalled_since_ns = run->shown_ns = 0;
    bool host = r && run->host && moe_residency_cold(r) != MOE_COLD_FETCH;
    run->groups = (moe_groups){.residency = r,
                               .layer = call->layer,
                               .count = count,
                               .experts = run->experts,
                               .groups = run->group,
                               .states = run->states,
                               .cold = host ? run->cold : NULL};
    use_experts(run);
    return MOE_OK;
}

void moe_layer_run_end(moe_layer_run *run) {
    moe_residency *r = run->shard->residency;
    MOE_ASSERT(!moe_layer_run_busy(run));
    if (r && moe_layer_run_submitted(run)) moe_residency_batch_ended(r);
    for (int32_t i = 0; i < run->groups.count; i++) {
        moe_groups_let_go(&run->groups, i);
        if (r) moe_residency_unexpect(r, run->groups.layer, run->experts[i]);
        moe_shard_release(run->shard, run->groups.layer, run->experts[i]);
    }
    run->call = NULL;
    if (run->host_rows.bytes > MOE_LAYER_RUN_KEPT_BYTES) free_host_rows(run);
}

/* ---- jobs ---- */

bool moe_layer_run_busy(const moe_layer_run *run) {
    for (int i = 0; i < MOE_RUN_JOBS; i++)
        if (run->jobs[i].out) return true;
    return false;
}

bool moe_layer_run_submitted(const moe_layer_run *run) {
    return run->groups.num_left == 0 && !run->jobs[MOE_RUN_HOST].out && run->host_rows.given == run->host_rows.computed;
}

/* A pass costs some launches, and its rows' numbers, however few its experts are: half of those that are left wait for each other, so
 * that there are few passes and the last one is short; but no more than a part of the slots, which the next copies wait for. */
static bool is_enough(const moe_layer_run *run, int32_t ready) {
    const moe_residency *r = run->shard->residency;
    if (!r || !moe_residency_copying(r)) return true;
    return 2 * ready >= run->groups.num_left || MOE_LAYER_RUN_SLOT_PARTS * ready >= moe_residency_slots(r);
}

/* All that is ready, where nothing is with the device; and beside a pass that is, what is ready when it is all that is left, so that
 * the next segment need not wait to be submitted. */
static moe_run_job *free_pass(moe_layer_run *run) {
    int32_t ready = moe_groups_ready(&run->groups);
    bool last = ready == run->groups.num_left && !run->jobs[MOE_RUN_HOST].out;
    bool given = run->host_rows.given < run->host_rows.computed;
    if ((ready == 0 || !is_enough(run, ready)) && !(last && given)) return NULL;
    if (!run->jobs[MOE_RUN_PASS].out && !run->jobs[MOE_RUN_LAST_PASS].out) return &run->jobs[MOE_RUN_PASS];
    if (!last) return NULL;
    int free = run->jobs[MOE_RUN_PASS].out ? MOE_RUN_LAST_PASS : MOE_RUN_PASS;
    return run->jobs[free].out ? NULL : &run->jobs[free];
}

static moe_run_job *next_pass(moe_layer_run *run) {
    const moe_model_config *model = &run->shard->model->config;
    moe_host_rows *h = &run->host_rows;
    moe_run_job *j = free_pass(run);
    if (!j) return NULL;
    j->experts = j->rows = 0;
    memset(j->handles, 0, (size_t)model->num_experts * sizeof(moe_expert *));
    for (int32_t i = 0; i < run->groups.count; i++) {
        moe_expert *expert = moe_groups_take(&run->groups, i, MOE_PASS_DEVICE);
        if (!expert) continue;
        j->handles[run->experts[i]] = expert;
        j->experts++;
        j->rows += run->group[i].count;
    }
    int32_t num_given = h->computed - h->given;
    j->ffn = (moe_layer_ffn){.rows = run->call->rows,
                             .num_rows = run->call->num_rows,
                             .experts = run->call->experts,
                             .handles = j->handles,
                             .given_slots = num_given ? h->slots + h->given : NULL,
                             .given = num_given ? h->out + (size_t)h->given * (size_t)model->hidden : NULL,
                             .num_given = num_given};
    h->given = h->computed;
    return j;
}

/* Takes what the host can compute: groups that follow each other. Returns their rows. */
static int32_t take_for_host(moe_layer_run *run, moe_run_job *j) {
    int32_t at = 0;
    j->experts = 0;
    for (int32_t i = 0; i < run->groups.count; i++) {
        moe_expert *expert = moe_groups_take(&run->groups, i, MOE_PASS_HOST);
        if (!expert) continue;
        run->cursor[run->experts[i]] = run->host_rows.computed + at;
        j->taken[j->experts++] = (moe_ffn_group){.expert = expert, .first = at, .count = run->group[i].count};
        at += run->group[i].count;
    }
    return at;
}

static moe_run_job *next_host(moe_layer_run *run) {
    const moe_model_config *model = &run->shard->model->config;
    moe_host_rows *h = &run->host_rows;
    moe_run_job *j = &run->jobs[MOE_RUN_HOST];
    if (!run->groups.cold || j->out) return NULL;
    if (!run->call->activations) return NULL; /* meanwhile copies go on that were announced */
    moe_groups_decide(&run->groups);
    if (h->computed == 0 && !reserve_host_rows(run)) { /* before the call's first job */
        moe_groups_copy_all(&run->groups);
        return NULL;
    }
    for (int32_t e = 0; e < model->num_experts; e++) run->cursor[e] = -1;
    j->rows = take_for_host(run, j);
    if (j->experts == 0) return NULL;
    for (int64_t s = 0; s < num_slots(run); s++) {
        int32_t *at = &run->cursor[run->call->experts[s]];
        if (*at < 0) continue;
        h->slots[*at] = (int32_t)s;
        h->row[(*at)++] = (int32_t)(s / model->top_k);
    }
    j->batch = (moe_ffn_batch){.x = run->call->activations,
                               .num_rows = run->call->num_rows,
                               .groups = j->taken,
                               .num_groups = j->experts,
                               .assignment_rows = h->row + h->computed,
                               .num_assignments = j->rows,
                               .mode = MOE_COMBINE_EXACT,
                               .block_hi = MOE_FFN_BLOCKS,
                               .out = h->out + (size_t)h->computed * (size_t)model->hidden};
    return j;
}

moe_run_job *moe_layer_run_next(moe_layer_run *run, moe_pass_place place) {
    moe_run_job *j = place == MOE_PASS_HOST ? next_host(run) : next_pass(run);
    if (j) j->out = true;
    return j;
}

void moe_layer_run_job_ended(moe_layer_run *run, moe_run_job *j) {
    j->out = false;
    if (j->place == MOE_PASS_HOST && j->job.status == MOE_OK) run->host_rows.computed += j->rows;
    for (int32_t i = 0; i < run->groups.count; i++) {
        bool of_job = j->place == MOE_PASS_HOST || j->handles[run->experts[i]];
        if (of_job && moe_groups_taken(&run->groups, i, j->place)) moe_groups_let_go(&run->groups, i);
    }
}
