#include "router/placement/controller.h"

#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "common/log.h"
#include "router/placement/controller_internal.h"

void moe_controller_lease_value(char out[MOE_LEADER_BYTES], const char *id, uint64_t incarnation) {
    snprintf(out, MOE_LEADER_BYTES, "%s %016llx", id, (unsigned long long)incarnation);
}

static moe_status check_config(const moe_controller_config *config, moe_error *err) {
    if (config->replicas < 1 || config->replicas > MOE_PLACEMENT_MAX_REPLICAS) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%d replicas: 1 to %d are possible", config->replicas,
                        MOE_PLACEMENT_MAX_REPLICAS);
    }
    if (config->initial_workers < 0 || config->initial_workers > MOE_PLACEMENT_MAX_WORKERS) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%d initial workers: 0 to %d are possible", config->initial_workers,
                        MOE_PLACEMENT_MAX_WORKERS);
    }
    if (config->initial_workers && config->replicas > config->initial_workers) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%d replicas of every expert need %d workers, there will be %d",
                        config->replicas, config->replicas, config->initial_workers);
    }
    if (!config->id[0] || strlen(config->id) >= MOE_WORKER_ID_BYTES || strlen(config->endpoint) >= MOE_ENDPOINT_BYTES ||
        strlen(config->host) >= MOE_HOST_BYTES || strlen(config->cluster_uuid) >= MOE_UUID_BYTES) {
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "the router's id, endpoint or host, or the cluster's uuid, is empty or too long");
    }
    if (config->layout == MOE_PLACEMENT_FILE && !config->layout_file) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "a placement file is needed");
    }
    if (config->num_moe_layers < 1 || config->num_moe_layers > MOE_VIEW_MAX_LAYERS || config->num_experts < 1) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "a model with 1 to %d MoE layers is needed", MOE_VIEW_MAX_LAYERS);
    }
    return MOE_OK;
}

static bool copy_strings(moe_controller_config *config) {
    const char **fields[] = {&config->cluster_uuid, &config->id,          &config->endpoint,
                             &config->host,         &config->layout_file, &config->state_dir};
    bool ok = true;
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        if (*fields[i]) ok = (*fields[i] = moe_strdup(*fields[i])) && ok;
    }
    return ok;
}

static void free_strings(moe_controller_config *config) {
    const char *fields[] = {config->cluster_uuid, config->id,          config->endpoint,
                            config->host,         config->layout_file, config->state_dir};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) moe_free((void *)fields[i]);
}

/* Adopts the uuid of the cluster's meta, or makes a meta with a fresh one. */
static moe_status find_uuid(moe_controller *c, moe_error *err) {
    moe_store *store = moe_controller_store(c);
    moe_buf text = {0};
    moe_meta meta = {.model_digest = c->config.model_digest, .replicas = c->config.replicas};
    bool found = false;
    moe_uuid_make(meta.uuid);
    moe_status status = moe_meta_to_json(&meta, &text, err);
    if (!status) {
        moe_store_write write = {.key = "meta", .value = text.data, .size = text.size};
        status = store->ops->compare_and_set(store, "meta", NULL, 0, &write, 1, err);
    }
    if (!status || status == MOE_ABORTED) status = store->ops->get(store, "meta", &text, &found, err);
    if (!status && !found) status = moe_fail(err, MOE_UNAVAILABLE, "the store lost meta while this router started");
    if (!status) status = moe_meta_from_json(moe_buf_text(&text), text.size, &meta, err);
    if (!status && meta.model_digest != c->config.model_digest) {
        status = moe_fail(err, MOE_FAILED_PRECONDITION, "cluster %s serves model %016llx, this router has %016llx", meta.uuid,
                          (unsigned long long)meta.model_digest, (unsigned long long)c->config.model_digest);
    }
    memcpy(c->cluster_uuid, meta.uuid, sizeof meta.uuid);
    moe_buf_free(&text);
    return status;
}

static moe_status on_peer_up(void *ctx, const moe_rpc_peer *peer, moe_error *err) {
    moe_controller *c = ctx;
    if (strcmp(peer->cluster_uuid, c->cluster_uuid) != 0) {
        return moe_fail(err, MOE_FAILED_PRECONDITION, "worker %s is of cluster %s", peer->id, peer->cluster_uuid);
    }
    if (peer->model_digest != c->config.model_digest) {
        return moe_fail(err, MOE_FAILED_PRECONDITION, "worker %s has another revision of the model", peer->id);
    }
    moe_controller_learn(c, peer->epoch, peer->fence);
    c->next_leases_ns = 0; /* it may have registered just now: a restarted worker's share waits for it */
    return MOE_OK;
}

static moe_status open_rpc(moe_controller *c, moe_error *err) {
    moe_rpc_config config = {.transport = c->config.transport,
                             .clock = c->config.clock,
                             .hello = {.cluster_uuid = c->cluster_uuid,
                                       .role = "router",
                                       .id = c->config.id,
                                       .profile = "",
                                       .incarnation = c->config.incarnation,
                                       .model_digest = c->config.model_digest},
                             .ctx = c,
                             .on_peer_up = on_peer_up};
    return moe_rpc_new(&config, &c->rpc, err);
}

static void set_default_ns(int64_t *value, int64_t fallback) {
    if (*value == 0) *value = fallback;
}

static void set_defaults(moe_balance_config *b) {
    set_default_ns(&b->interval_ns, 5 * MOE_NS_PER_S);
    set_default_ns(&b->dwell_ns, 30 * MOE_NS_PER_S);
    set_default_ns(&b->load_half_life_ns, 30 * MOE_NS_PER_S);
    set_default_ns(&b->heal_after_ns, 10 * MOE_NS_PER_S);
    if (b->hysteresis == 0) b->hysteresis = 0.1;
    if (b->max_moves == 0) b->max_moves = 16;
    if (b->max_moves > MOE_MIGRATION_MAX_MOVES) b->max_moves = MOE_MIGRATION_MAX_MOVES;
}

static moe_status make_tables(moe_controller *c, moe_error *err) {
    size_t total = (size_t)c->config.num_moe_layers * (size_t)c->config.num_experts;
    c->loads = moe_calloc(total, sizeof *c->loads);
    c->changed_ns = moe_calloc(total, sizeof *c->changed_ns);
    c->steps = moe_calloc(MOE_VIEW_MAX_STEPS, sizeof *c->steps);
    if (!c->loads || !c->changed_ns || !c->steps)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the placement controller");
    for (size_t i = 0; i < total; i++) c->changed_ns[i] = -(INT64_C(1) << 60); /* long ago */
    c->loads_ns = moe_controller_now(c);
    return MOE_OK;
}

moe_status moe_controller_new(const moe_controller_config *config, moe_controller **out, moe_error *err) {
    moe_status status = check_config(config, err);
    if (status) return status;
    moe_controller *c = moe_calloc(1, sizeof *c);
    if (!c) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the placement controller");
    pthread_mutex_init(&c->view_mutex, NULL);
    c->config = *config;
    c->contact_ns = INT64_MAX;
    c->router_lost_ns = INT64_MIN;
    set_defaults(&c->config.balance);
    if (!copy_strings(&c->config)) status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the placement controller");
    if (!status) {
        snprintf(c->cluster_uuid, sizeof c->cluster_uuid, "%s", config->cluster_uuid);
        moe_controller_lease_value(c->lease_value, config->id, config->incarnation);
        if (!c->cluster_uuid[0]) status = find_uuid(c, err);
    }
    if (!status) status = make_tables(c, err);
    if (!status) status = open_rpc(c, err);
    if (status) {
        moe_controller_free(&c);
        return status;
    }
    *out = c;
    return MOE_OK;
}

void moe_controller_free(moe_controller **controller) {
    moe_controller *c = *controller;
    *controller = NULL;
    if (!c) return;
    moe_controller_stop(c);
    moe_jobs_clear(&c->jobs);
    moe_jobs_clear(&c->rejoins);
    moe_migration_forget(c);
    for (int32_t i = 0; i < c->num_members; i++) moe_worker_stats_free(&c->members[i].stats);
    moe_rpc_free(&c->rpc);
    moe_placement_unref(&c->plan);
    moe_placement_unref(&c->served);
    moe_placement_unref(&c->map);
    moe_buf_free(&c->meta_text);
    moe_buf_free(&c->map_text);
    moe_free(c->loads);
    moe_free(c->changed_ns);
    moe_free(c->steps);
    free_strings(&c->config);
    pthread_mutex_destroy(&c->view_mutex);
    moe_free(c);
}

const char *moe_controller_cluster_uuid(const moe_controller *c) { return c->cluster_uuid; }

static int64_t lease_poll_ns(const moe_controller *c) {
    return c->leading && c->migration.phase != MOE_MIGRATION_NONE ? MOE_POLL_BUSY_NS : MOE_POLL_LEASES_NS;
}

static void talk_to_store(moe_controller *c, int64_t now) {
    if (c->leased_epoch != moe_controller_routing_epoch(c)) c->next_renew_ns = 0;
    moe_controller_store_submitted(c);
    if (now >= c->next_meta_ns) {
        c->next_meta_ns = now + MOE_POLL_META_NS;
        moe_controller_follow(c);
    }
    if (now >= c->next_leases_ns && c->store_up) {
        c->next_leases_ns = now + lease_poll_ns(c);
        moe_controller_list_workers(c);
        if (c->store_up) moe_controller_list_routers(c);
        if (c->store_up) moe_controller_list_operations(c);
    }
    if (now >= c->next_renew_ns && c->store_up) {
        c->next_renew_ns = now + MOE_RENEW_NS;
        moe_controller_renew(c);
    }
}

moe_status moe_controller_step(moe_controller *c, int64_t deadline_ns, moe_error *err) {
    if (!c->started) {
        c->started = true;
        moe_controller_load_map(c);
    }
    moe_controller_take_hurry(c);
    talk_to_store(c, moe_controller_now(c));
    moe_controller_poll_stats(c);
    moe_controller_exchange_maps(c);
    if (moe_controller_may_write(c)) {
        moe_controller_assign(c);
        moe_jobs_step(&c->jobs, c);
    }
    moe_controller_rejoin(c);
    moe_controller_plan_view(c);
    moe_controller_update_view(c);
    if (deadline_ns > c->next_meta_ns) deadline_ns = c->next_meta_ns;
    int64_t soon = moe_controller_now(c) + MOE_MIGRATION_PASS_NS;
    if (c->migration.phase != MOE_MIGRATION_NONE && deadline_ns > soon) deadline_ns = soon;
    return moe_rpc_step(c->rpc, deadline_ns, err);
}

static void *run(void *arg) {
    moe_controller *c = arg;
    moe_error err = {0};
    while (!c->stopping) {
        moe_status status = moe_controller_step(c, INT64_MAX, &err);
        if (status == MOE_RESOURCE_EXHAUSTED) moe_warn("the placement controller: %s; it goes on", err.message);
        if (!status || status == MOE_RESOURCE_EXHAUSTED) continue;
        moe_error_log("the placement controller stops: its transport failed: %s", err.message);
        break;
    }
    return NULL;
}

moe_status moe_controller_start(moe_controller *c, moe_error *err) {
    MOE_ASSERT(!c->running);
    c->stopping = false;
    if (pthread_create(&c->thread, NULL, run, c) != 0) {
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "no thread for the placement controller");
    }
    c->running = true;
    return MOE_OK;
}

void moe_controller_stop(moe_controller *c) {
    if (!c->running) return;
    c->stopping = true;
    moe_rpc_wake(c->rpc);
    pthread_join(c->thread, NULL);
    c->running = false;
}
