/* Moving experts: PLAN → COPY (and verify) → PUBLISH (destination and source READY) → SWITCH (source DRAINING) → DRAIN (no router
 * routes by an older map) → REMOVE (the map no longer names the source) → DROP.
 *
 * The moves under way are in the store before anything happens, so that a next leader finds them. What has been done of them is
 * read from the map and from the workers, so every phase can be done again, and a next leader simply begins with the first. A move
 * whose destination goes away before the source was removed is rolled back: the source becomes READY again. No published map
 * leaves an expert without a READY replica on a worker that serves, and nothing is dropped that a live router may still ask for
 * (leftovers.c). */
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "common/failpoint.h"
#include "common/json.h"
#include "common/log.h"
#include "router/placement/controller_internal.h"

#define MAX_COPY_REFUSALS 3

const char *moe_migration_phase_name(moe_migration_phase phase) {
    static const char *const names[] = {"", "copy", "publish", "switch", "drain", "remove", "drop"};
    return names[phase];
}

static int32_t index_of(const moe_controller *c, const moe_move *m) { return m->layer * c->config.num_experts + m->expert; }

static void enter(moe_controller *c, moe_migration_phase phase) {
    moe_failpoint(MOE_FAILPOINT_MIGRATE_COPY + (moe_failpoint_id)(phase - MOE_MIGRATION_COPY));
    c->migration.phase = phase;
    c->migration.phase_ns = moe_controller_now(c);
    c->next_leases_ns = 0;
}

static void abandon(moe_controller *c, moe_move *m, const char *why) {
    if (m->abandoned) return;
    m->abandoned = true;
    snprintf(c->migration.error, sizeof c->migration.error, "layer %d expert %d to %s: %.100s", m->layer, m->expert, m->to, why);
    moe_warn("placement: moving expert %d of MoE layer %d from %s to %s is given up: %s", m->expert, m->layer,
             m->from[0] ? m->from : "nowhere", m->to[0] ? m->to : "nowhere", why);
}

bool moe_migration_wants(const moe_controller *c, const char *worker, int32_t expert) {
    const moe_migration *g = &c->migration;
    if (g->phase == MOE_MIGRATION_NONE || g->phase > MOE_MIGRATION_PUBLISH) return false;
    for (int32_t i = 0; i < g->count; i++)
        if (!g->moves[i].abandoned && index_of(c, &g->moves[i]) == expert && strcmp(g->moves[i].to, worker) == 0) return true;
    return false;
}

/* ---- the store's copy ---- */

static json_t *moves_json(const moe_move *moves, int32_t count) {
    json_t *list = json_array();
    for (int32_t i = 0; i < count; i++)
        json_array_append_new(list, json_pack("[i, i, s, s]", moves[i].layer, moves[i].expert, moves[i].to, moves[i].from));
    return list;
}

static void key_of(const moe_controller *c, char key[64]) { snprintf(key, 64, "mig:%s", c->migration.id); }

bool moe_migration_begin(moe_controller *c, const char *id, const moe_move *moves, int32_t count) {
    moe_migration *g = &c->migration;
    moe_buf text = {0};
    moe_error err;
    char key[64];
    MOE_ASSERT(g->phase == MOE_MIGRATION_NONE && count > 0 && count <= MOE_MIGRATION_MAX_MOVES);
    moe_failpoint(MOE_FAILPOINT_MIGRATE_PLAN);
    snprintf(g->id, sizeof g->id, "%s", id);
    key_of(c, key);
    bool ok = moe_json_write(json_pack("{s:s, s:o}", "id", id, "moves", moves_json(moves, count)), &text);
    const moe_store_write write = {.key = key, .value = text.data, .size = text.size};
    ok = ok && moe_controller_write(c, &write, 1, &err) == MOE_OK;
    moe_buf_free(&text);
    if (!ok) return false;
    memcpy(g->moves, moves, (size_t)count * sizeof *moves);
    g->count = count;
    g->error[0] = '\0';
    enter(c, MOE_MIGRATION_COPY);
    moe_info("placement: %s: %d moves in MoE layer %d begin", id, count, moves[0].layer);
    return true;
}

void moe_migration_forget(moe_controller *c) {
    moe_jobs_clear(&c->migration.copies);
    c->migration.copying = false;
    c->migration.count = 0;
    c->migration.phase = MOE_MIGRATION_NONE;
}

static bool read_move(const moe_controller *c, const json_t *item, moe_move *m) {
    const json_t *layer = json_array_get(item, 0), *expert = json_array_get(item, 1);
    const char *to = json_string_value(json_array_get(item, 2)), *from = json_string_value(json_array_get(item, 3));
    *m = (moe_move){.layer = (int32_t)json_integer_value(layer), .expert = (int32_t)json_integer_value(expert)};
    if (!to || !from || strlen(to) >= sizeof m->to || strlen(from) >= sizeof m->from || (!to[0] && !from[0])) return false;
    snprintf(m->to, sizeof m->to, "%s", to);
    snprintf(m->from, sizeof m->from, "%s", from);
    return json_is_integer(layer) && json_is_integer(expert) && json_integer_value(layer) >= 0 && json_integer_value(expert) >= 0 &&
           json_integer_value(layer) < c->config.num_moe_layers && json_integer_value(expert) < c->config.num_experts;
}

/* The first that can be read; one that makes no sense is left behind: nothing was published of it that the map does not say. */
static void on_migration(void *ctx, const char *key, const char *value, size_t size) {
    moe_controller *c = ctx;
    moe_migration *g = &c->migration;
    json_t *root = json_loadb(value, size, JSON_REJECT_DUPLICATES, NULL);
    const json_t *moves = json_object_get(root, "moves");
    size_t count = json_array_size(moves);
    bool ok = g->count == 0 && count > 0 && count <= MOE_MIGRATION_MAX_MOVES && moe_json_get_text(root, "id", g->id, sizeof g->id) &&
              strcmp(g->id, key + strlen("mig:")) == 0;
    for (size_t i = 0; ok && i < count; i++) ok = read_move(c, json_array_get(moves, i), &g->moves[i]);
    if (ok) g->count = (int32_t)count;
    json_decref(root);
}

/* What the leader before us had begun. */
static bool resume(moe_controller *c) {
    moe_error err = {0};
    moe_store *store = moe_controller_store(c);
    moe_migration_forget(c);
    moe_status status = store->ops->list(store, "mig:", on_migration, c, &err);
    moe_controller_store_answered(c, status, &err);
    if (status != MOE_OK) return false;
    c->migration_known = true;
    if (c->migration.count == 0) return true;
    c->router_lost_ns = moe_controller_now(c); /* whom the leader before us had seen is not known */
    moe_info("placement: the migration %s goes on", c->migration.id);
    enter(c, MOE_MIGRATION_COPY);
    return true;
}

/* ---- looking at the map ---- */

static moe_placement_entry *entry_of(const moe_placement *map, const moe_move *m) {
    return moe_placement_at(map, m->layer, m->expert);
}

static int32_t source_in(const moe_placement *map, const moe_move *m) {
    int32_t worker = m->from[0] ? moe_placement_find_worker(map, m->from) : -1;
    return worker >= 0 && moe_placement_has(entry_of(map, m), worker) ? worker : -1;
}

static int32_t destination_in(const moe_placement *map, const moe_move *m) {
    int32_t worker = m->to[0] ? moe_placement_find_worker(map, m->to) : -1;
    return worker >= 0 && moe_placement_has(entry_of(map, m), worker) ? worker : -1;
}

/* A READY replica on a worker that serves, other than `but`. */
static bool other_ready(moe_controller *c, const moe_placement *map, const moe_move *m, int32_t but) {
    const moe_placement_entry *e = entry_of(map, m);
    for (int32_t r = 0; r < e->num_replicas; r++) {
        int32_t w = e->replicas[r].worker;
        if (w != but && e->replicas[r].state == MOE_REPLICA_READY && moe_controller_serves(c, map, w)) return true;
    }
    return false;
}

/* A move that takes away may do so once its new replica, or where it has none another one, serves. */
static bool may_take_away(moe_controller *c, const moe_placement *map, const moe_move *m, int32_t source) {
    int32_t to = destination_in(map, m);
    if (m->to[0] && (to < 0 || !moe_controller_serves(c, map, to))) return false;
    return other_ready(c, map, m, source);
}

/* Publishes a changed map; false: try again at the next pass. */
static bool publish(moe_controller *c, moe_placement *next, bool changed) {
    moe_error err = {0};
    return !changed || moe_controller_publish(c, next, &err) == MOE_OK;
}

/* ---- COPY ---- */

static bool make_copies(moe_controller *c) {
    moe_migration *g = &c->migration;
    int32_t experts[MOE_MIGRATION_MAX_MOVES];
    for (int32_t i = 0; i < g->count; i++) {
        moe_move *first = &g->moves[i];
        if (!first->to[0] || first->abandoned || moe_jobs_has(&g->copies, first->to, -1)) continue;
        const moe_member *to = moe_controller_member(c, first->to);
        int32_t count = 0;
        if (!to || !moe_member_available(c, to)) {
            if (destination_in(c->map, first) < 0) abandon(c, first, "the destination is not there");
            continue;
        }
        for (int32_t k = i; k < g->count; k++) {
            const moe_move *m = &g->moves[k];
            if (!m->abandoned && strcmp(m->to, first->to) == 0 && destination_in(c->map, m) < 0) experts[count++] = index_of(c, m);
        }
        if (count && !moe_jobs_add_experts(&g->copies, c, to, experts, count)) return false;
    }
    return true;
}

static void abandon_copies(moe_controller *c, const moe_load_job *job, const char *why) {
    for (int32_t i = 0; i < c->migration.count; i++) {
        moe_move *m = &c->migration.moves[i];
        if (strcmp(m->to, job->id) == 0 && destination_in(c->map, m) < 0) abandon(c, m, why);
    }
}

static void copy(moe_controller *c) {
    moe_migration *g = &c->migration;
    if (!g->copying && !make_copies(c)) return;
    g->copying = true;
    bool done = true;
    for (int32_t i = g->copies.count - 1; i >= 0; i--) {
        const moe_load_job *job = g->copies.items[i];
        const moe_member *to = moe_controller_member(c, job->id);
        const char *why = !moe_member_alive(to, job->incarnation) ? "the destination went away"
                          : job->refusals >= MAX_COPY_REFUSALS    ? "the destination could not load it"
                                                                  : NULL;
        if (why) {
            abandon_copies(c, job, why);
            moe_jobs_remove(&g->copies, i);
        } else {
            done = done && moe_load_job_done(job);
        }
    }
    moe_jobs_step(&g->copies, c);
    if (done) enter(c, MOE_MIGRATION_PUBLISH);
}

/* ---- PUBLISH ---- */

static bool copied(const moe_migration *g, const moe_move *m, int32_t expert) {
    for (int32_t i = 0; i < g->copies.count; i++) {
        const moe_load_job *job = g->copies.items[i];
        if (strcmp(job->id, m->to) != 0) continue;
        for (int32_t k = 0; k < job->num_experts; k++)
            if (job->experts[k] == expert) return true;
    }
    return false;
}

/* True where the map changed. */
static bool add_destination(moe_controller *c, moe_placement *next, moe_move *m) {
    const moe_member *to = moe_controller_member(c, m->to);
    if (!m->to[0] || m->abandoned || destination_in(next, m) >= 0) return false;
    if (!to || !moe_member_available(c, to) || !copied(&c->migration, m, index_of(c, m))) {
        abandon(c, m, "the destination went away");
        return false;
    }
    int32_t worker = moe_placement_find_worker(next, m->to);
    bool stranger = worker >= 0 && next->workers[worker].incarnation != to->identity.incarnation;
    if (worker < 0) worker = moe_placement_add_worker(next, &to->identity);
    if (worker < 0 || stranger || entry_of(next, m)->num_replicas == MOE_PLACEMENT_MAX_REPLICAS) {
        abandon(c, m, "there is no place for it in the map");
        return false;
    }
    moe_placement_add_replica(entry_of(next, m), worker, MOE_REPLICA_READY);
    return true;
}

static void publish_destinations(moe_controller *c) {
    moe_migration *g = &c->migration;
    moe_placement *next = moe_placement_copy(c->map);
    bool changed = false;
    if (!next) return;
    for (int32_t i = 0; i < g->copies.count; i++) {
        moe_load_job *job = g->copies.items[i];
        if (!moe_job_agrees(job, next)) abandon_copies(c, job, "its copy differs");
    }
    for (int32_t i = 0; i < g->count; i++) changed |= add_destination(c, next, &g->moves[i]);
    if (publish(c, next, changed)) {
        moe_jobs_clear(&g->copies);
        enter(c, MOE_MIGRATION_SWITCH);
    }
    moe_placement_unref(&next);
}

/* ---- SWITCH, DRAIN, REMOVE ---- */

static void switch_sources(moe_controller *c) {
    moe_migration *g = &c->migration;
    moe_placement *next = moe_placement_copy(c->map);
    bool changed = false;
    if (!next) return;
    for (int32_t i = 0; i < g->count; i++) {
        moe_move *m = &g->moves[i];
        int32_t from = source_in(next, m);
        if (m->abandoned || from < 0) continue;
        moe_replica *source = moe_placement_replica(entry_of(next, m), from);
        if (!may_take_away(c, next, m, from)) {
            abandon(c, m, "no other replica serves");
        } else if (source->state != MOE_REPLICA_DRAINING) {
            source->state = MOE_REPLICA_DRAINING;
            changed = true;
        }
    }
    if (publish(c, next, changed)) enter(c, MOE_MIGRATION_DRAIN);
    moe_placement_unref(&next);
}

/* Sources that must go on after all become READY again. True where the map was changed. */
static bool roll_back(moe_controller *c) {
    moe_migration *g = &c->migration;
    moe_placement *next = moe_placement_copy(c->map);
    bool changed = false;
    if (!next) return true;
    for (int32_t i = 0; i < g->count; i++) {
        moe_move *m = &g->moves[i];
        int32_t from = source_in(next, m);
        if (from < 0 || (!m->abandoned && may_take_away(c, next, m, from))) continue;
        abandon(c, m, "no other replica serves; it stays where it is");
        moe_replica *source = moe_placement_replica(entry_of(next, m), from);
        if (source->state != MOE_REPLICA_DRAINING) continue;
        source->state = MOE_REPLICA_READY;
        changed = true;
    }
    publish(c, next, changed);
    moe_placement_unref(&next);
    return changed;
}

static void drain(moe_controller *c) {
    if (!roll_back(c) && moe_controller_acknowledged(c)) enter(c, MOE_MIGRATION_REMOVE);
}

static void remove_sources(moe_controller *c) {
    moe_migration *g = &c->migration;
    moe_placement *next = NULL;
    bool changed = false;
    if (roll_back(c) || !(next = moe_placement_copy(c->map))) return;
    for (int32_t i = 0; i < g->count; i++) {
        const moe_move *m = &g->moves[i];
        int32_t from = m->abandoned ? -1 : source_in(next, m);
        if (from < 0) continue;
        moe_placement_remove_replica(entry_of(next, m), from);
        changed = true;
    }
    if (publish(c, next, changed)) enter(c, MOE_MIGRATION_DROP);
    moe_placement_unref(&next);
}

/* ---- DROP ---- */

static bool dropped(moe_controller *c) {
    const moe_migration *g = &c->migration;
    for (int32_t i = 0; i < g->count; i++) {
        const moe_move *m = &g->moves[i];
        const moe_member *from = m->from[0] && !m->abandoned ? moe_controller_member(c, m->from) : NULL;
        if (!from || !moe_member_available(c, from) || source_in(c->map, m) >= 0) continue;
        const moe_worker_stats *stats = moe_member_stats(from);
        if (!stats || stats->as_of_ns < g->phase_ns || moe_stats_holds(stats, index_of(c, m))) return false;
    }
    return true;
}

static moe_operation *operation_of(moe_controller *c) {
    for (int32_t i = 0; i < c->num_operations; i++)
        if (strcmp(c->operations[i].id, c->migration.id) == 0) return &c->operations[i];
    return NULL;
}

/* The record goes and the operation advances in one transaction: neither is ever seen without the other. */
static bool write_end(moe_controller *c, int32_t moved) {
    moe_operation *op = operation_of(c), advanced;
    moe_buf text = {0};
    moe_error err = {0};
    char key[64], op_key[64];
    key_of(c, key);
    snprintf(op_key, sizeof op_key, "op:%s", c->migration.id);
    moe_store_write writes[2] = {{.key = key}, {.key = op_key}};
    moe_status status = MOE_OK;
    if (op) {
        advanced = *op;
        advanced.done += moved;
        if (advanced.total < advanced.done) advanced.total = advanced.done;
        snprintf(advanced.error, sizeof advanced.error, "%s", c->migration.error);
        status = moe_operation_to_json(&advanced, &text, &err);
        writes[1].value = text.data;
        writes[1].size = text.size;
    }
    if (status == MOE_OK) status = moe_controller_write(c, writes, op ? 2 : 1, &err);
    if (status == MOE_OK && op) *op = advanced;
    moe_buf_free(&text);
    return status == MOE_OK;
}

static void end_migration(moe_controller *c) {
    moe_migration *g = &c->migration;
    int32_t moved = 0;
    for (int32_t i = 0; i < g->count; i++) moved += !g->moves[i].abandoned;
    moe_failpoint(MOE_FAILPOINT_MIGRATE_END);
    if (!write_end(c, moved)) return;
    c->moves += (uint64_t)moved;
    moe_info("placement: %s: %d of %d moves in MoE layer %d are done", g->id, moved, g->count, g->moves[0].layer);
    moe_migration_forget(c);
}

static void step_migration(moe_controller *c) {
    switch (c->migration.phase) {
        case MOE_MIGRATION_NONE:
            break;
        case MOE_MIGRATION_COPY:
            copy(c);
            break;
        case MOE_MIGRATION_PUBLISH:
            publish_destinations(c);
            break;
        case MOE_MIGRATION_SWITCH:
            switch_sources(c);
            break;
        case MOE_MIGRATION_DRAIN:
            drain(c);
            break;
        case MOE_MIGRATION_REMOVE:
            remove_sources(c);
            break;
        case MOE_MIGRATION_DROP:
            if (dropped(c) || moe_controller_now(c) - c->migration.phase_ns >= MOE_DROP_PATIENCE_NS) end_migration(c);
            break;
    }
}

/* ---- what to do next ---- */

static bool expert_taken(const moe_controller *c, const bool *taken, int32_t step) {
    for (int32_t k = 0; k < step; k++)
        if (taken[k] && c->steps[k].expert == c->steps[step].expert) return true;
    return false;
}

/* The moves of the first step's layer that can be under way together: of an expert its first alone, and all replicas that are
 * added fit before any is dropped. */
static int32_t take_moves(const moe_controller *c, int32_t steps, const moe_plan_workers *w, moe_move *moves) {
    int32_t count = 0, totals[MOE_PLACEMENT_MAX_WORKERS] = {0};
    bool taken[MOE_VIEW_MAX_STEPS] = {false};
    for (int64_t i = 0; i < (int64_t)c->map->num_layers * c->map->num_experts; i++)
        for (int32_t r = 0; r < c->map->entries[i].num_replicas; r++) totals[c->map->entries[i].replicas[r].worker]++;
    for (int32_t i = 0; i < steps && count < c->config.balance.max_moves; i++) {
        const moe_policy_step *s = &c->steps[i];
        if (s->layer != c->steps[0].layer) continue;
        if (expert_taken(c, taken, i)) continue;
        if (s->to >= 0 && totals[s->to] >= w->states[s->to].room) return count;
        if (s->to >= 0) totals[s->to]++;
        taken[i] = true;
        moe_move *m = &moves[count++];
        *m = (moe_move){.layer = s->layer, .expert = s->expert};
        snprintf(m->to, sizeof m->to, "%s", s->to >= 0 ? w->ids[s->to] : "");
        snprintf(m->from, sizeof m->from, "%s", s->from >= 0 ? w->ids[s->from] : "");
    }
    return count;
}

/* Begins what the policy asks; how many steps it asked for. */
static int32_t begin_planned(moe_controller *c, const char *id, moe_plan_scope scope) {
    moe_plan_workers workers;
    moe_move moves[MOE_MIGRATION_MAX_MOVES];
    int32_t steps = moe_controller_plan(c, scope, &workers);
    int32_t count = steps ? take_moves(c, steps, &workers, moves) : 0;
    if (count) moe_migration_begin(c, id, moves, count);
    return count ? steps : 0;
}

static void end_operation(moe_controller *c, moe_operation *op, const char *error) {
    op->state = error ? MOE_OP_FAILED : MOE_OP_DONE;
    op->safe_to_stop = !error || op->kind != MOE_OP_DRAIN;
    if (error && error != op->error) snprintf(op->error, sizeof op->error, "%.*s", (int)sizeof op->error - 1, error);
    moe_info("placement: operation %s (%s) %s%s%s", op->id, moe_operation_kind_name(op->kind), error ? "failed" : "is done",
             error ? ": " : "", error ? error : "");
    moe_operation_save(c, op);
}

static bool empty_worker(moe_controller *c, const moe_operation *op) {
    const moe_member *m = moe_controller_member(c, op->from);
    int32_t worker = moe_placement_find_worker(c->map, op->from);
    for (int64_t i = 0; worker >= 0 && i < (int64_t)c->map->num_layers * c->map->num_experts; i++)
        if (moe_placement_has(&c->map->entries[i], worker)) return false;
    const moe_worker_stats *stats = m ? moe_member_stats(m) : NULL;
    return !m || !m->registered || (stats && stats->num_held == 0);
}

static bool restarted(moe_controller *c, const moe_operation *op) {
    const moe_member *m = moe_controller_member(c, op->from);
    return m && m->registered && m->identity.incarnation != op->incarnation;
}

static void run_planned(moe_controller *c, moe_operation *op) {
    bool drains = op->kind == MOE_OP_DRAIN;
    if (drains && restarted(c, op)) {
        end_operation(c, op, "the worker was restarted, which ends its drain");
        return;
    }
    int32_t steps = begin_planned(c, op->id, drains ? MOE_PLAN_SAFETY : MOE_PLAN_NOW);
    if (steps) {
        op->total = op->done + steps;
        op->safe_to_stop = false;
        moe_operation_save(c, op);
    } else if (!drains || empty_worker(c, op)) {
        end_operation(c, op, NULL);
    } else if (moe_controller_now(c) >= c->next_secure_ns && !op->error[0]) {
        snprintf(op->error, sizeof op->error, "no other worker has room for what is left");
        moe_operation_save(c, op);
    }
}

static bool least_loaded(moe_controller *c, const moe_operation *op, char to[MOE_WORKER_ID_BYTES]) {
    int32_t best = -1, least = INT32_MAX;
    for (int32_t w = 0; w < c->map->num_workers; w++) {
        const moe_member *m = moe_controller_member(c, c->map->workers[w].id);
        int32_t held = 0;
        if (!moe_controller_serves(c, c->map, w) || moe_member_leaves(c, m)) continue;
        if (moe_placement_has(moe_placement_at(c->map, op->layer, op->expert), w)) continue;
        for (int64_t i = 0; i < (int64_t)c->map->num_layers * c->map->num_experts; i++)
            held += moe_placement_has(&c->map->entries[i], w);
        if (held >= least || held >= moe_member_capacity(c, m)) continue;
        least = held;
        best = w;
    }
    if (best >= 0) snprintf(to, MOE_WORKER_ID_BYTES, "%s", c->map->workers[best].id);
    return best >= 0;
}

/* Of one expert: done when the map says so, failed when its one move was given up. */
static void run_single(moe_controller *c, moe_operation *op) {
    moe_move m = {.layer = op->layer, .expert = op->expert};
    snprintf(m.to, sizeof m.to, "%s", op->to);
    snprintf(m.from, sizeof m.from, "%s", op->kind == MOE_OP_MOVE ? op->from : "");
    if (op->error[0]) {
        end_operation(c, op, op->error);
    } else if ((op->total > 0 && op->done >= op->total) || (m.to[0] && destination_in(c->map, &m) >= 0 && source_in(c->map, &m) < 0)) {
        end_operation(c, op, NULL);
    } else if (m.from[0] && source_in(c->map, &m) < 0) {
        end_operation(c, op, "the worker to move it from does not have it");
    } else if (!m.to[0] && !least_loaded(c, op, m.to)) {
        end_operation(c, op, "no worker without a replica has room");
    } else if (moe_migration_begin(c, op->id, &m, 1)) {
        op->total = 1;
        op->safe_to_stop = false;
        moe_operation_save(c, op);
    }
}

static void run_operation(moe_controller *c, moe_operation *op) {
    if (op->state == MOE_OP_PENDING) {
        op->state = MOE_OP_RUNNING;
        moe_info("placement: operation %s (%s) begins", op->id, moe_operation_kind_name(op->kind));
    }
    if (op->kind == MOE_OP_MOVE || op->kind == MOE_OP_REPLICATE)
        run_single(c, op);
    else
        run_planned(c, op);
}

/* Workers of the map that left and have nothing in it are forgotten; a successor under the same id is a newcomer then. */
static bool tidy(moe_controller *c) {
    for (int32_t w = 0; w < c->map->num_workers; w++) {
        const moe_member *m = moe_controller_member(c, c->map->workers[w].id);
        bool empty = true;
        if (moe_member_alive(m, c->map->workers[w].incarnation)) continue;
        for (int64_t i = 0; empty && i < (int64_t)c->map->num_layers * c->map->num_experts; i++)
            empty = !moe_placement_has(&c->map->entries[i], w);
        moe_placement *next = empty ? moe_placement_copy(c->map) : NULL;
        if (!next) continue;
        moe_placement_remove_worker(next, w);
        publish(c, next, true);
        moe_placement_unref(&next);
        return true;
    }
    return false;
}

/* A replica that drains although nothing is under way: the record of its move was lost together with the leader who knew of it (a
 * store that came back empty or older). It serves on. */
static bool recover_draining(moe_controller *c) {
    moe_placement *next = NULL;
    for (int64_t i = 0; i < (int64_t)c->map->num_layers * c->map->num_experts; i++) {
        for (int32_t r = 0; r < c->map->entries[i].num_replicas; r++) {
            if (c->map->entries[i].replicas[r].state != MOE_REPLICA_DRAINING) continue;
            if (!next && !(next = moe_placement_copy(c->map))) return false;
            next->entries[i].replicas[r].state = MOE_REPLICA_READY;
        }
    }
    if (!next) return false;
    moe_info("placement: replicas that drained in a migration nobody knows of serve again");
    publish(c, next, true);
    moe_placement_unref(&next);
    return true;
}

void moe_controller_migrate(moe_controller *c) {
    int64_t now = moe_controller_now(c);
    if (!c->migration_known && !resume(c)) return;
    moe_controller_forget_operations(c);
    moe_controller_cancel_drains(c);
    moe_controller_drop_leftovers(c);
    if (c->migration.phase != MOE_MIGRATION_NONE) {
        step_migration(c);
        return;
    }
    moe_operation *op = moe_controller_current_operation(c);
    if (op) run_operation(c, op);
    if (c->migration.phase != MOE_MIGRATION_NONE || now < c->next_secure_ns) return;
    c->next_secure_ns = now + MOE_SECURE_NS;
    if (recover_draining(c)) return;
    if (now >= moe_controller_trusted_at(c) && tidy(c)) return;
    if (begin_planned(c, "auto", MOE_PLAN_SAFETY) || !c->config.balance.automatic || now < c->next_balance_ns) return;
    c->next_balance_ns = now + (begin_planned(c, "auto", MOE_PLAN_BALANCE) ? 0 : c->config.balance.interval_ns);
}
