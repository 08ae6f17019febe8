/* Between the cluster as the controller sees it and the policy, which is a pure function. */
#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "router/placement/controller_internal.h"

bool moe_member_leaves(const moe_controller *c, const moe_member *m) {
    const moe_worker_stats *stats = moe_member_stats(m);
    if (stats && stats->leaving) return true;
    for (int32_t i = 0; i < c->num_operations; i++) {
        const moe_operation *op = &c->operations[i];
        bool drains = op->kind == MOE_OP_DRAIN && op->state <= MOE_OP_DONE && op->incarnation == m->identity.incarnation;
        if (drains && strcmp(op->from, m->identity.id) == 0) return true;
    }
    return false;
}

/* It said that it leaves and ended before its experts were elsewhere: nobody waits for it to come back. */
static bool gave_up_leaving(const moe_controller *c, const moe_member *m, int32_t worker) {
    const moe_worker_stats *stats = m->stats;
    return !m->registered && stats && stats->leaving && stats->incarnation == c->map->workers[worker].incarnation;
}

static moe_policy_worker_state state_in_map(moe_controller *c, int32_t worker) {
    moe_member *m = moe_controller_member(c, c->map->workers[worker].id);
    int64_t now = moe_controller_now(c);
    if (moe_controller_serves(c, c->map, worker)) {
        m->gone_ns = 0;
        if (!moe_member_stats(m)) return MOE_POLICY_AWAY; /* not known well enough */
        return moe_member_leaves(c, m) ? MOE_POLICY_LEAVES : MOE_POLICY_ACCEPTS;
    }
    if (m && !m->gone_ns) m->gone_ns = now;
    bool known_gone = m && now >= moe_controller_trusted_at(c) && !moe_jobs_has(&c->jobs, "", worker);
    bool missed = c->config.balance.automatic && m && now - m->gone_ns >= c->config.balance.heal_after_ns;
    return known_gone && (missed || gave_up_leaving(c, m, worker)) ? MOE_POLICY_DEAD : MOE_POLICY_AWAY;
}

/* A worker without a share that could take some of it. */
static bool is_newcomer(moe_controller *c, const moe_member *m) {
    return moe_member_available(c, m) && moe_placement_find_worker(c->map, m->identity.id) < 0 && moe_member_stats(m) &&
           !moe_member_leaves(c, m) && !moe_jobs_has(&c->jobs, m->identity.id, -1) && moe_member_profile_fits(c, m);
}

static int32_t room_of(const moe_controller *c, const moe_member *m) {
    int64_t capacity = moe_member_capacity(c, m);
    return capacity < INT32_MAX ? (int32_t)capacity : INT32_MAX;
}

static void list_workers(moe_controller *c, moe_plan_workers *w) {
    w->count = c->map->num_workers;
    for (int32_t i = 0; i < w->count; i++) {
        const moe_member *m = moe_controller_member(c, c->map->workers[i].id);
        w->ids[i] = c->map->workers[i].id;
        w->states[i] = (moe_policy_worker){state_in_map(c, i), m ? room_of(c, m) : 0};
    }
    for (int32_t i = 0; i < c->num_members && w->count < MOE_PLACEMENT_MAX_WORKERS; i++) {
        const moe_member *m = &c->members[i];
        if (!is_newcomer(c, m)) continue;
        w->ids[w->count] = m->identity.id;
        w->states[w->count++] = (moe_policy_worker){MOE_POLICY_ACCEPTS, room_of(c, m)};
    }
}

static moe_policy_config policy_of(const moe_controller *c, moe_plan_scope scope) {
    const moe_balance_config *b = &c->config.balance;
    moe_placement_cost cost = moe_placement_unit_cost(c->map);
    return (moe_policy_config){.replicas = c->config.replicas,
                               .redundant = b->redundant,
                               .alpha = (double)cost.per_expert,
                               .beta = (double)cost.per_row,
                               .hysteresis = b->hysteresis,
                               .min_rows = MOE_POLICY_MIN_ROWS,
                               .dwell_ns = scope == MOE_PLAN_NOW ? 0 : b->dwell_ns};
}

static moe_policy_input input_of(const moe_controller *c, const moe_plan_workers *w, moe_plan_scope scope) {
    return (moe_policy_input){.map = c->map,
                              .num_workers = w->count,
                              .workers = w->states,
                              .loads = c->loads,
                              .changed_ns = c->changed_ns,
                              .now_ns = moe_controller_now(c),
                              .balance = scope != MOE_PLAN_SAFETY,
                              .even_idle = scope == MOE_PLAN_NOW};
}

int32_t moe_controller_plan(moe_controller *c, moe_plan_scope scope, moe_plan_workers *workers) {
    moe_error err;
    int32_t count = 0;
    list_workers(c, workers);
    moe_policy_config policy = policy_of(c, scope);
    moe_policy_input input = input_of(c, workers, scope);
    return moe_policy_plan(&policy, &input, c->steps, MOE_VIEW_MAX_STEPS, &count, &err) == MOE_OK ? count : 0;
}

static void show_step(moe_step_view *to, const moe_policy_step *step, const moe_plan_workers *w) {
    to->layer = step->layer;
    to->expert = step->expert;
    snprintf(to->from, sizeof to->from, "%s", step->from >= 0 ? w->ids[step->from] : "");
    snprintf(to->to, sizeof to->to, "%s", step->to >= 0 ? w->ids[step->to] : "");
    moe_policy_step_text(step, w->ids, to->text, sizeof to->text);
}

void moe_controller_plan_view(moe_controller *c) {
    moe_plan_workers workers;
    int64_t now = moe_controller_now(c);
    if (!c->map || now < c->next_plan_ns) return;
    c->next_plan_ns = now + MOE_PLAN_NS;
    int32_t count = moe_controller_plan(c, MOE_PLAN_BALANCE, &workers);
    moe_policy_config policy = policy_of(c, MOE_PLAN_BALANCE);
    moe_policy_input input = input_of(c, &workers, MOE_PLAN_BALANCE);
    pthread_mutex_lock(&c->view_mutex);
    c->view.num_steps = count;
    for (int32_t i = 0; i < count; i++) show_step(&c->view.steps[i], &c->steps[i], &workers);
    for (int32_t l = 0; l < c->map->num_layers; l++) c->view.imbalance[l] = moe_policy_imbalance(&policy, &input, l, NULL);
    pthread_mutex_unlock(&c->view_mutex);
}

static bool same_workers(const moe_placement *a, const moe_placement_entry *x, const moe_placement *b,
                         const moe_placement_entry *y) {
    if (x->num_replicas != y->num_replicas) return false;
    for (int32_t i = 0; i < x->num_replicas; i++) {
        bool found = false;
        for (int32_t k = 0; k < y->num_replicas && !found; k++)
            found = strcmp(a->workers[x->replicas[i].worker].id, b->workers[y->replicas[k].worker].id) == 0;
        if (!found) return false;
    }
    return true;
}

void moe_controller_note_changes(moe_controller *c, const moe_placement *next) {
    int64_t now = moe_controller_now(c);
    for (int64_t i = 0; c->map && i < (int64_t)next->num_layers * next->num_experts; i++)
        if (!same_workers(c->map, &c->map->entries[i], next, &next->entries[i])) c->changed_ns[i] = now;
}
