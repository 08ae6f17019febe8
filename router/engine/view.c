/* What other threads see of the engine: the view, and decayed loads. */
#include <math.h>
#include <string.h>

#include "common/metrics.h"
#include "router/engine/internal.h"

#define MOE_LOAD_RESCALE 1e12 /* loads are stored growing; beyond this they are scaled back */

/* Loads decay by half every MOE_LOAD_HALF_LIFE_S. Instead of shrinking all of them, new rows weigh more as time goes on. */
static double load_weight(const moe_engine *e, int64_t now) {
    return exp2((double)(now - e->load_epoch_ns) / (MOE_LOAD_HALF_LIFE_S * (double)MOE_NS_PER_S));
}

static void rescale_loads(moe_engine *e, int64_t now) {
    double weight = load_weight(e, now);
    if (weight < MOE_LOAD_RESCALE) return;
    int64_t count = (int64_t)e->model->num_moe_layers * e->model->num_experts;
    for (int64_t i = 0; i < count; i++) e->loads[i] /= weight;
    for (int32_t i = 0; i < MOE_PLACEMENT_MAX_WORKERS; i++) e->worker_loads[i] /= weight;
    e->load_epoch_ns = now;
}

void view_add_loads(moe_engine *e, int32_t layer, const placed_map *map, const int32_t *rows_of_expert, const int32_t *chosen) {
    pthread_mutex_lock(&e->lock);
    int64_t now = engine_now(e);
    rescale_loads(e, now);
    double weight = load_weight(e, now);
    for (int32_t x = 0; x < e->model->num_experts; x++) {
        if (chosen[x] < 0) continue;
        e->loads[(int64_t)layer * e->model->num_experts + x] += rows_of_expert[x] * weight;
        e->worker_loads[map->worker[chosen[x]]] += rows_of_expert[x] * weight;
    }
    pthread_mutex_unlock(&e->lock);
}

void moe_engine_get_loads(moe_engine *e, double *loads) {
    pthread_mutex_lock(&e->lock);
    double weight = load_weight(e, engine_now(e));
    int64_t count = (int64_t)e->model->num_moe_layers * e->model->num_experts;
    for (int64_t i = 0; i < count; i++) loads[i] = e->loads[i] / weight;
    pthread_mutex_unlock(&e->lock);
}

/* Every expert has a READY replica on a connected worker of the right incarnation. */
static bool all_experts_reachable(const moe_engine *e) {
    if (e->model->num_moe_layers == 0) return true;
    if (!e->map) return false;
    const moe_placement *p = e->map->placement;
    for (int64_t i = 0; i < (int64_t)p->num_layers * p->num_experts; i++) {
        bool reachable = false;
        for (int r = 0; r < p->entries[i].num_replicas && !reachable; r++)
            reachable =
                p->entries[i].replicas[r].state != MOE_REPLICA_LOADING && workers_up(e, e->map, p->entries[i].replicas[r].worker);
        if (!reachable) return false;
    }
    return true;
}

static void view_workers(const moe_engine *e, moe_engine_view *view, int64_t now) {
    double weight = load_weight(e, now);
    view->num_workers = 0;
    for (int32_t i = 0; e->map && i < e->map->placement->num_workers; i++) {
        moe_engine_worker_view *v = &view->workers[view->num_workers++];
        const moe_placement_worker *pw = &e->map->placement->workers[i];
        int32_t w = e->map->worker[i];
        memcpy(v->id, pw->id, sizeof v->id);
        v->incarnation = pw->incarnation;
        v->up = w >= 0 && e->workers[w].up && e->workers[w].incarnation == pw->incarnation;
        v->suspect = w >= 0 && e->workers[w].suspect;
        v->quarantine_ns = w >= 0 && e->workers[w].quarantined ? moe_quarantine_until_ns(&e->quarantine, pw->id) - now : 0;
        v->load = w >= 0 ? e->worker_loads[w] / weight : 0;
    }
}

void view_refresh(moe_engine *e, int64_t now) {
    if (!e->view_dirty && now - e->viewed_ns < MOE_ENGINE_VIEW_INTERVAL_NS) return;
    bool topology = e->view_dirty;
    e->viewed_ns = now;
    e->view_dirty = false;
    pthread_mutex_lock(&e->lock);
    e->view.epoch = e->map ? e->map->placement->epoch : 0;
    e->view.running = e->running.count;
    e->view.waiting = e->num_queued;
    if (topology) e->view.ready = all_experts_reachable(e);
    view_workers(e, &e->view, now);
    int32_t up = 0, quarantined = 0;
    for (int32_t i = 0; i < e->view.num_workers; i++) {
        up += e->view.workers[i].up;
        quarantined += e->view.workers[i].quarantine_ns > 0;
    }
    moe_metric_set(MOE_METRIC_WORKERS_QUARANTINED, quarantined);
    moe_metric_set(MOE_METRIC_WORKERS_UP, up);
    moe_metric_set(MOE_METRIC_REQUESTS_RUNNING, e->running.count);
    moe_metric_set(MOE_METRIC_REQUESTS_WAITING, e->num_queued);
    moe_metric_set(MOE_METRIC_KV_BLOCKS_USED, e->blocks.num_blocks - e->blocks.num_free);
    pthread_mutex_unlock(&e->lock);
}

void moe_engine_get_view(moe_engine *e, moe_engine_view *out) {
    pthread_mutex_lock(&e->lock);
    *out = e->view;
    out->waiting = e->num_queued;
    pthread_mutex_unlock(&e->lock);
}

double moe_engine_hint_recall(const moe_engine *e, int32_t layer) {
    int64_t made = atomic_load(&e->hints_made[layer]), found = atomic_load(&e->hints_found[layer]);
    return made > 0 ? (double)found / (double)made : -1;
}
