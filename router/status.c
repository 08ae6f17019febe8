#include "router/status.h"

#include "common/alloc.h"

moe_status moe_cluster_status_resize(moe_cluster_status *status, int32_t num_workers, int32_t num_routers, int32_t num_layers,
                                     moe_error *err) {
    moe_cluster_status_free(status);
    status->workers = moe_calloc((size_t)num_workers, sizeof *status->workers);
    status->routers = moe_calloc((size_t)num_routers, sizeof *status->routers);
    status->layers = moe_calloc((size_t)num_layers, sizeof *status->layers);
    if ((num_workers && !status->workers) || (num_routers && !status->routers) || (num_layers && !status->layers)) {
        moe_cluster_status_free(status);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the cluster's status");
    }
    for (int32_t i = 0; i < num_workers; i++) status->workers[i].state = "joining";
    for (int32_t i = 0; i < num_routers; i++) status->routers[i].state = "up";
    status->num_workers = num_workers;
    status->num_routers = num_routers;
    status->num_layers = num_layers;
    return MOE_OK;
}

void moe_cluster_status_free(moe_cluster_status *status) {
    moe_free(status->workers);
    moe_free(status->routers);
    moe_free(status->layers);
    status->workers = NULL;
    status->routers = NULL;
    status->layers = NULL;
    status->num_workers = status->num_routers = status->num_layers = 0;
}

static json_t *workers_json(const moe_cluster_status *status) {
    json_t *list = json_array();
    for (int32_t i = 0; i < status->num_workers; i++) {
        const moe_worker_status *w = &status->workers[i];
        char incarnation[17];
        snprintf(incarnation, sizeof incarnation, "%016llx", (unsigned long long)w->incarnation);
        json_array_append_new(
            list, json_pack("{s:s, s:I, s:s, s:s, s:s, s:s, s:i, s:f, s:s, s:i}", "id", w->id, "pid", (json_int_t)w->pid, "host",
                            w->host, "endpoint", w->endpoint, "profile", w->profile, "state", w->state, "experts",
                            (int)w->experts, "load", w->load, "incarnation", incarnation, "quarantine_s", (int)w->quarantine_s));
    }
    return list;
}

static json_t *routers_json(const moe_cluster_status *status) {
    json_t *list = json_array();
    for (int32_t i = 0; i < status->num_routers; i++) {
        const moe_router_status *r = &status->routers[i];
        json_array_append_new(list, json_pack("{s:s, s:I, s:s, s:s, s:b}", "id", r->id, "pid", (json_int_t)r->pid, "host",
                                              r->host, "state", r->state, "leader", r->leader));
    }
    return list;
}

static json_t *layers_json(const moe_cluster_status *status) {
    json_t *list = json_array();
    for (int32_t i = 0; i < status->num_layers; i++) {
        const moe_layer_status *l = &status->layers[i];
        json_t *layer = json_pack("{s:f, s:i, s:f}", "max_over_mean", l->max_over_mean, "min_replicas", (int)l->min_replicas,
                                  "cost_max_over_mean", l->cost_max_over_mean);
        if (l->hint_recall >= 0) json_object_set_new(layer, "hint_recall", json_real(l->hint_recall));
        if (l->virtual_experts) json_object_set_new(layer, "virtual_experts", json_integer(l->virtual_experts));
        json_array_append_new(list, layer);
    }
    return list;
}

static json_t *operations_json(const moe_cluster_status *status) {
    json_t *list = json_array();
    for (int32_t i = 0; i < status->num_operations; i++) {
        const moe_operation *o = &status->operations[i];
        json_array_append_new(
            list, json_pack("{s:s, s:s, s:s, s:s, s:i, s:i, s:b, s:s, s:i, s:i, s:s, s:s}", "id", o->id, "kind",
                            moe_operation_kind_name(o->kind), "state", moe_operation_state_name(o->state), "phase", o->phase,
                            "done", o->done, "total", o->total, "safe_to_stop", o->safe_to_stop, "error", o->error, "layer",
                            o->layer, "expert", o->expert, "from", o->from, "to", o->to));
    }
    return list;
}

static json_t *residency_json(const moe_residency_status *r) {
    return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I}", "hits", (json_int_t)r->hits, "late_hits", (json_int_t)r->late_hits, "misses",
                     (json_int_t)r->misses, "copied_bytes", (json_int_t)r->copied_bytes, "wasted_bytes",
                     (json_int_t)r->wasted_bytes, "host_experts", (json_int_t)r->host_experts);
}

json_t *moe_expert_budget_status_json(const moe_expert_budget_status *b) {
    return json_pack("{s:s, s:I, s:I, s:I, s:f, s:f}", "budget", b->budget, "experts", (json_int_t)b->experts, "of",
                     (json_int_t)b->of, "swaps", (json_int_t)b->swaps, "choices_held", b->choices_held, "weight_held",
                     b->weight_held);
}

json_t *moe_cluster_status_to_json(const moe_cluster_status *status) {
    json_t *redis = json_pack("{s:b, s:b}", "used", status->redis_used, "up", status->redis_up);
    if (status->redis_pid) json_object_set_new(redis, "pid", json_integer((json_int_t)status->redis_pid));
    json_t *root = json_pack("{s:I, s:b, s:s, s:s, s:i, s:o, s:o, s:o, s:o, s:o, s:o, s:s, s:I, s:{s:I, s:I}}", "epoch",
                             (json_int_t)status->epoch, "ready", status->ready, "model", status->model, "cluster_uuid",
                             status->cluster_uuid, "replicas", (int)status->replicas, "workers", workers_json(status), "routers",
                             routers_json(status), "redis", redis, "layers", layers_json(status),
                             "residency", residency_json(&status->residency), "operations", operations_json(status),
                             "migration", status->migration, "moves", (json_int_t)status->moves, "cost", "expert_ns",
                             (json_int_t)status->expert_ns, "row_ns", (json_int_t)status->row_ns);
    const moe_expert_budget_status *b = &status->expert_budget;
    if (root && b->budget[0])
        json_object_set_new(root, "expert_budget", moe_expert_budget_status_json(b));
    return root;
}
