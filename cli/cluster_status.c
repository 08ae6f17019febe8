#include "cli/cluster_status.h"

#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "cli/cluster_file.h"
#include "common/alloc.h"
#include "common/metrics.h"

struct moe_cluster_reporter {
    moe_cluster_reporter_config config;
    moe_cluster_view view;
    pthread_mutex_t lock;
    moe_placement *map; /* guarded by lock */
};

/* One answer's worth of views; too large for a stack. */
typedef struct snapshot {
    moe_controller_view controller;
    moe_engine_view engine;
    moe_placement *map; /* NULL before the first */
    double *loads;      /* [num_moe_layers, num_experts] */
} snapshot;

static moe_placement *current_map(moe_cluster_reporter *r) {
    pthread_mutex_lock(&r->lock);
    moe_placement *map = r->map ? moe_placement_ref(r->map) : NULL;
    pthread_mutex_unlock(&r->lock);
    return map;
}

static void snapshot_free(snapshot *s) {
    if (!s) return;
    moe_placement_unref(&s->map);
    moe_free(s->loads);
    moe_free(s);
}

static snapshot *take_snapshot(moe_cluster_reporter *r) {
    const moe_model_config *m = &r->config.model->config;
    snapshot *s = moe_calloc(1, sizeof *s);
    if (s) s->loads = moe_calloc((size_t)m->num_moe_layers * (size_t)m->num_experts, sizeof *s->loads);
    if (!s || !s->loads) {
        snapshot_free(s);
        return NULL;
    }
    if (r->config.controller) moe_controller_get_view(r->config.controller, &s->controller);
    moe_engine_get_view(r->config.engine, &s->engine);
    moe_engine_get_loads(r->config.engine, s->loads);
    s->map = current_map(r);
    return s;
}

static const moe_engine_worker_view *engine_worker(const snapshot *s, const moe_controller_worker_view *w) {
    for (int32_t i = 0; i < s->engine.num_workers; i++)
        if (s->engine.workers[i].incarnation == w->incarnation) return &s->engine.workers[i];
    return NULL;
}

static void fill_workers(const snapshot *s, moe_cluster_status *out) {
    double total = 0;
    for (int32_t i = 0; i < s->engine.num_workers; i++) total += s->engine.workers[i].load;
    for (int32_t i = 0; i < s->controller.num_workers; i++) {
        const moe_controller_worker_view *from = &s->controller.workers[i];
        const moe_engine_worker_view *seen = engine_worker(s, from);
        moe_worker_status *to = &out->workers[i];
        snprintf(to->id, sizeof to->id, "%s", from->id);
        snprintf(to->host, sizeof to->host, "%s", from->host);
        snprintf(to->endpoint, sizeof to->endpoint, "%s", from->endpoint);
        snprintf(to->profile, sizeof to->profile, "%s", from->profile);
        to->pid = (uint64_t)from->pid;
        to->incarnation = from->incarnation;
        to->experts = (uint32_t)from->experts;
        to->state = seen && seen->suspect ? "suspect" : moe_worker_state_name(from->state);
        to->quarantine_s = seen ? (uint32_t)((seen->quarantine_ns + MOE_NS_PER_S - 1) / MOE_NS_PER_S) : 0;
        to->load = seen && total > 0 ? seen->load / total : 0;
    }
}

static void fill_routers(const snapshot *s, moe_cluster_status *out) {
    for (int32_t i = 0; i < s->controller.num_routers; i++) {
        const moe_controller_router_view *from = &s->controller.routers[i];
        moe_router_status *to = &out->routers[i];
        snprintf(to->id, sizeof to->id, "%s", from->id);
        snprintf(to->host, sizeof to->host, "%s", from->host);
        to->pid = (uint64_t)from->pid;
        to->state = "up";
        to->leader = from->leader;
    }
}

/* Rows of a layer by worker, an expert's rows shared evenly by its replicas: the busiest worker's over the mean. */
static double max_over_mean(const snapshot *s, int32_t layer) {
    double rows[MOE_PLACEMENT_MAX_WORKERS] = {0}, total = 0, most = 0;
    for (int32_t e = 0; e < s->map->num_experts; e++) {
        const moe_placement_entry *entry = moe_placement_at(s->map, layer, e);
        double load = s->loads[(int64_t)layer * s->map->num_experts + e];
        for (int r = 0; r < entry->num_replicas; r++) rows[entry->replicas[r].worker] += load / entry->num_replicas;
    }
    for (int32_t w = 0; w < s->map->num_workers; w++) {
        total += rows[w];
        most = rows[w] > most ? rows[w] : most;
    }
    return total > 0 ? most * s->map->num_workers / total : 1.0;
}

/* Read each time, since `serve` starts a Redis that died again. */
static uint64_t redis_pid(const char *run_dir) {
    moe_cluster_file file;
    pid_t pid = 0;
    moe_error ignored;
    return run_dir && moe_cluster_file_read(run_dir, &file, &pid, &ignored) == MOE_OK ? (uint64_t)pid : 0;
}

static double part(moe_metric some, moe_metric all) {
    int64_t total = moe_metric_value(all);
    return total ? (double)moe_metric_value(some) / (double)total : 1;
}

void moe_cluster_budget_status(moe_expert_budget budget, const moe_model_config *model, moe_expert_budget_status *out) {
    *out = (moe_expert_budget_status){.experts = (uint64_t)moe_metric_value(MOE_METRIC_VIRTUAL_EXPERTS),
                                      .of = (uint64_t)model->num_moe_layers * (uint64_t)model->num_experts,
                                      .swaps = (uint64_t)moe_metric_value(MOE_METRIC_VIRTUAL_SWAPS),
                                      .choices_held = part(MOE_METRIC_GATE_CHOICES_HELD, MOE_METRIC_GATE_CHOICES),
                                      .weight_held = part(MOE_METRIC_GATE_WEIGHT_HELD, MOE_METRIC_GATE_WEIGHT)};
    if (moe_expert_budget_given(budget)) moe_expert_budget_name(budget, out->budget);
}

static moe_status report(void *ctx, moe_cluster_status *out, moe_error *err) {
    moe_cluster_reporter *r = ctx;
    snapshot *s = take_snapshot(r);
    if (!s) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    int32_t layers = s->map ? s->map->num_layers : 0;
    moe_status status = moe_cluster_status_resize(out, s->controller.num_workers, s->controller.num_routers, layers, err);
    if (status == MOE_OK) {
        out->epoch = s->engine.epoch;
        out->ready = s->engine.ready;
        out->replicas = (uint32_t)s->controller.replicas;
        out->redis_used = r->config.redis_used;
        out->redis_up = r->config.redis_used && s->controller.store_up;
        out->redis_pid = redis_pid(r->config.run_dir);
        snprintf(out->model, sizeof out->model, "%s", r->config.served_name);
        snprintf(out->cluster_uuid, sizeof out->cluster_uuid, "%s", r->config.cluster_uuid);
        fill_workers(s, out);
        fill_routers(s, out);
        for (int32_t l = 0; l < layers; l++)
            out->layers[l] = (moe_layer_status){max_over_mean(s, l), (uint32_t)s->controller.min_replicas[l],
                                                s->controller.imbalance[l], moe_engine_hint_recall(r->config.engine, l),
                                                (uint32_t)moe_engine_virtual_size(r->config.engine, l)};
        moe_cluster_budget_status(r->config.expert_budget, &r->config.model->config, &out->expert_budget);
        out->residency = (moe_residency_status){(uint64_t)moe_metric_value(MOE_METRIC_EXPERT_HITS),
                                                (uint64_t)moe_metric_value(MOE_METRIC_EXPERT_LATE_HITS),
                                                (uint64_t)moe_metric_value(MOE_METRIC_EXPERT_MISSES),
                                                (uint64_t)moe_metric_value(MOE_METRIC_EXPERT_COPIED_BYTES),
                                                (uint64_t)moe_metric_value(MOE_METRIC_EXPERT_WASTED_BYTES),
                                                (uint64_t)moe_metric_value(MOE_METRIC_EXPERT_HOST)};
        out->num_operations = s->controller.num_operations;
        memcpy(out->operations, s->controller.operations, sizeof out->operations);
        snprintf(out->migration, sizeof out->migration, "%s", s->controller.migration);
        out->moves = s->controller.moves;
        moe_placement_cost cost = s->map ? moe_placement_unit_cost(s->map) : MOE_COST_DEFAULT;
        out->expert_ns = (uint64_t)cost.per_expert;
        out->row_ns = (uint64_t)cost.per_row;
    }
    snapshot_free(s);
    return status;
}

/* {"layers": [{"loads": [...], "replicas": [["w0", …], …]}, …]} */
static moe_status report_experts(void *ctx, moe_buf *out, moe_error *err) {
    moe_cluster_reporter *r = ctx;
    snapshot *s = take_snapshot(r);
    json_t *root = json_object(), *layers = json_array();
    for (int32_t l = 0; s && s->map && l < s->map->num_layers; l++) {
        json_t *layer = json_object(), *loads = json_array(), *replicas = json_array();
        for (int32_t e = 0; e < s->map->num_experts; e++) {
            const moe_placement_entry *entry = moe_placement_at(s->map, l, e);
            json_t *holders = json_array();
            for (int i = 0; i < entry->num_replicas; i++)
                json_array_append_new(holders, json_string(s->map->workers[entry->replicas[i].worker].id));
            json_array_append_new(replicas, holders);
            json_array_append_new(loads, json_real(s->loads[(int64_t)l * s->map->num_experts + e]));
        }
        json_object_set_new(layer, "loads", loads);
        json_object_set_new(layer, "replicas", replicas);
        json_array_append_new(layers, layer);
    }
    json_object_set_new(root, "layers", layers);
    char *text = s ? json_dumps(root, JSON_COMPACT | JSON_REAL_PRECISION(9)) : NULL;
    if (text) moe_buf_append_text(out, text);
    bool failed = !text || out->failed;
    moe_free(text);
    json_decref(root);
    snapshot_free(s);
    return failed ? moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory") : MOE_OK;
}

static moe_status report_plan(void *ctx, moe_step_view *steps, int32_t *num_steps, uint64_t *epoch, moe_error *err) {
    moe_cluster_reporter *r = ctx;
    snapshot *s = take_snapshot(r);
    if (!s) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    *num_steps = s->controller.num_steps;
    *epoch = s->controller.epoch;
    memcpy(steps, s->controller.steps, (size_t)*num_steps * sizeof *steps);
    snapshot_free(s);
    return MOE_OK;
}

static moe_status submit(void *ctx, const moe_operation *wanted, char id[MOE_OPERATION_ID_BYTES], moe_error *err) {
    moe_cluster_reporter *r = ctx;
    if (!r->config.controller) return moe_fail(err, MOE_FAILED_PRECONDITION, "this model has no experts to place");
    return moe_controller_submit(r->config.controller, wanted, id, err);
}

moe_status moe_cluster_reporter_new(const moe_cluster_reporter_config *config, moe_cluster_reporter **out, moe_error *err) {
    moe_cluster_reporter *r = *out = moe_calloc(1, sizeof *r);
    if (!r) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    r->config = *config;
    r->view = (moe_cluster_view){.ctx = r, .status = report, .experts = report_experts, .plan = report_plan, .submit = submit};
    pthread_mutex_init(&r->lock, NULL);
    return MOE_OK;
}

void moe_cluster_reporter_free(moe_cluster_reporter **reporter) {
    moe_cluster_reporter *r = *reporter;
    *reporter = NULL;
    if (!r) return;
    moe_placement_unref(&r->map);
    pthread_mutex_destroy(&r->lock);
    moe_free(r);
}

void moe_cluster_reporter_set_map(moe_cluster_reporter *r, moe_placement *map) {
    pthread_mutex_lock(&r->lock);
    moe_placement *old = r->map;
    r->map = moe_placement_ref(map);
    pthread_mutex_unlock(&r->lock);
    moe_placement_unref(&old);
}

const moe_cluster_view *moe_cluster_reporter_view(const moe_cluster_reporter *r) { return &r->view; }
