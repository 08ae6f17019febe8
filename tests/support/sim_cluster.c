#include "tests/support/sim_cluster.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"

#define SIM_START_NS (1000 * MOE_NS_PER_S)
#define SIM_TICK_NS (2 * MOE_NS_PER_MS)  /* the clock jumps to the next delivery, by this much at most */
#define SIM_STEP_NS (20 * MOE_NS_PER_US) /* and by this at least */
#define SIM_BOOT_LIMIT_NS (60 * MOE_NS_PER_S)

static void must(moe_status status, const moe_error *err) {
    if (status == MOE_OK) return;
    fprintf(stderr, "simulation: %s: %s\n", moe_status_name(status), err->message);
    abort();
}

static void stepped(const sim_cluster *s, moe_status status, const moe_error *err) {
    if (!s->config.starved || status != MOE_RESOURCE_EXHAUSTED) must(status, err);
}

/* ---- parts ---- */

static void start_worker(sim_cluster *s, int32_t index) {
    sim_worker *w = &s->workers[index];
    moe_backend *backend = s->config.worker_backend ? s->config.worker_backend : s->config.backend;
    if (s->config.own_backend[index]) backend = s->config.own_backend[index];
    moe_error err;
    char bound[MOE_ENDPOINT_BYTES];
    uint64_t incarnation = moe_random_next(&s->random) | 1;
    must(moe_inproc_open(s->hub, &w->transport, &err), &err);
    must(moe_memory_open(s->memory, &w->store, &err), &err);
    must(w->transport->ops->listen(w->transport, w->endpoint, bound, &err), &err);
    moe_worker_config config = {.model = s->config.model,
                                .backend = backend,
                                .transport = w->transport,
                                .clock = &s->clock,
                                .cluster_uuid = s->uuid,
                                .id = w->id,
                                .incarnation = incarnation,
                                .max_queued_calls = 64,
                                .max_batch_rows = 4096,
                                .reference = s->config.reference};
    must(moe_worker_new(&config, &w->worker, &err), &err);
    moe_registration_config registration = {.store = w->store,
                                            .clock = &s->clock,
                                            .id = w->id,
                                            .endpoint = bound,
                                            .public_key = "",
                                            .host = "sim",
                                            .profile = backend->ops->profile(backend),
                                            .incarnation = incarnation,
                                            .model_digest = s->config.model->digest,
                                            .pid = index + 1};
    must(moe_registration_new(&registration, &w->registration, &err), &err);
}

/* As kill -9: nothing is taken leave of. */
void sim_kill(sim_cluster *s, int32_t index) {
    sim_worker *w = &s->workers[index];
    if (!w->worker) return;
    moe_registration_free(&w->registration);
    moe_worker_free(&w->worker);
    w->transport->ops->close(w->transport);
    w->store->ops->close(w->store);
}

void sim_restart(sim_cluster *s, int32_t index) {
    if (!s->workers[index].worker) start_worker(s, index);
}

static void check_map(sim_cluster *s, const moe_placement *map) {
    s->epoch_fell = s->epoch_fell || map->epoch < s->newest_epoch;
    s->newest_epoch = map->epoch > s->newest_epoch ? map->epoch : s->newest_epoch;
    for (int64_t i = 0; i < (int64_t)map->num_layers * map->num_experts; i++) {
        bool ready = false;
        for (int r = 0; r < map->entries[i].num_replicas; r++)
            ready = ready || map->entries[i].replicas[r].state == MOE_REPLICA_READY;
        s->map_incomplete = s->map_incomplete || !ready;
    }
}

static void on_map(void *ctx, moe_placement *map) {
    sim_cluster *s = ctx;
    check_map(s, map);
    moe_engine_set_placement(s->engine, map);
}

static moe_expert *const *local_experts(void *ctx) {
    sim_cluster *s = ctx;
    return s->workers[0].worker ? moe_worker_lend_experts(s->workers[0].worker) : NULL;
}

static void start_router(sim_cluster *s) {
    moe_error err;
    const moe_model_config *m = &s->config.model->config;
    must(moe_inproc_open(s->hub, &s->engine_transport, &err), &err);
    must(moe_inproc_open(s->hub, &s->controller_transport, &err), &err);
    must(moe_memory_open(s->memory, &s->store, &err), &err);
    moe_engine_config engine = {.model = s->config.model,
                                .backend = s->config.backend,
                                .transports = &s->engine_transport,
                                .num_transports = 1,
                                .clock = &s->clock,
                                .cluster_uuid = s->uuid,
                                .id = "r0",
                                .incarnation = 99,
                                .gating = s->config.gating,
                                .combine = s->config.combine,
                                .max_num_seqs = 16,
                                .max_num_batched_tokens = s->config.max_num_batched_tokens,
                                .max_model_len = m->max_positions,
                                .max_waiting = SIM_MAX_REQUESTS,
                                .micro_batches = s->config.micro_batches,
                                .num_kv_blocks = s->config.num_kv_blocks,
                                .replica_wait_ns = 2 * MOE_NS_PER_S,
                                .call_timeout_ns = 10 * MOE_NS_PER_S,
                                .suspect_after_ns = 300 * MOE_NS_PER_MS,
                                .local_experts = s->config.local ? local_experts : NULL,
                                .local_worker = s};
    must(moe_engine_new(&engine, &s->engine, &err), &err);
    moe_controller_config controller = {.store = s->store,
                                        .transport = s->controller_transport,
                                        .clock = &s->clock,
                                        .cluster_uuid = s->uuid,
                                        .id = "r0",
                                        .endpoint = "",
                                        .host = "sim",
                                        .incarnation = 99,
                                        .model_digest = s->config.model->digest,
                                        .pid = 1,
                                        .num_moe_layers = m->num_moe_layers,
                                        .num_experts = m->num_experts,
                                        .replicas = s->config.replicas,
                                        .initial_workers = s->config.workers,
                                        .layout = s->config.layout,
                                        .layout_seed = s->config.seed,
                                        .state_dir = s->config.state_dir,
                                        .on_map = on_map,
                                        .ctx = s};
    must(moe_controller_new(&controller, &s->controller, &err), &err);
}

static void stop_router(sim_cluster *s) {
    moe_engine_free(&s->engine);
    moe_controller_free(&s->controller);
    s->engine_transport->ops->close(s->engine_transport);
    s->controller_transport->ops->close(s->controller_transport);
    s->store->ops->close(s->store);
}

void sim_restart_router(sim_cluster *s) {
    stop_router(s);
    start_router(s);
}

/* ---- time ---- */

static void step_all(sim_cluster *s) {
    moe_error err;
    stepped(s, moe_engine_step(s->engine, 0, &err), &err);
    stepped(s, moe_controller_step(s->controller, 0, &err), &err);
    for (int32_t i = 0; i < s->config.workers; i++) {
        sim_worker *w = &s->workers[i];
        if (!w->worker) continue;
        stepped(s, moe_worker_step(w->worker, 0, &err), &err);
        if (moe_registration_next_ns(w->registration) <= s->clock.fake_now_ns) moe_registration_step(w->registration, &err);
    }
    int64_t now = s->clock.fake_now_ns, due = moe_inproc_next_due_ns(s->hub);
    int64_t next = due < now + SIM_TICK_NS ? due : now + SIM_TICK_NS;
    s->clock.fake_now_ns = next > now + SIM_STEP_NS ? next : now + SIM_STEP_NS;
}

void sim_run(sim_cluster *s, int64_t ns) {
    for (int64_t until = s->clock.fake_now_ns + ns; s->clock.fake_now_ns < until;) step_all(s);
}

static bool run_until(sim_cluster *s, bool (*condition)(sim_cluster *), int64_t limit_ns) {
    for (int64_t until = s->clock.fake_now_ns + limit_ns; s->clock.fake_now_ns < until;) {
        if (condition(s)) return true;
        step_all(s);
    }
    return condition(s);
}

static bool idle(sim_cluster *s) {
    for (int32_t i = 0; i < s->num_requests; i++)
        if (s->requests[i].terminal_events == 0) return false;
    return true;
}

static bool healed(sim_cluster *s) {
    moe_engine_view *view = moe_calloc(1, sizeof *view);
    moe_controller_view *control = moe_calloc(1, sizeof *control);
    moe_engine_get_view(s->engine, view);
    moe_controller_get_view(s->controller, control);
    bool all = view->ready && view->epoch == control->epoch && view->epoch > 0;
    for (int32_t l = 0; l < control->num_layers; l++) all = all && control->min_replicas[l] >= s->config.replicas;
    for (int32_t i = 0; i < view->num_workers; i++) all = all && view->workers[i].up;
    moe_free(view);
    moe_free(control);
    return all;
}

bool sim_run_until_idle(sim_cluster *s, int64_t limit_ns) { return run_until(s, idle, limit_ns); }
bool sim_run_until_healed(sim_cluster *s, int64_t limit_ns) { return run_until(s, healed, limit_ns); }

/* ---- the cluster ---- */

sim_cluster *sim_new(const sim_config *config) {
    sim_cluster *s = moe_calloc(1, sizeof *s);
    moe_error err;
    if (!s) abort();
    s->config = *config;
    s->clock = moe_clock_fake(SIM_START_NS);
    s->random = (moe_random){config->seed};
    snprintf(s->uuid, sizeof s->uuid, "00000000-0000-4000-8000-%012llx", (unsigned long long)config->seed & 0xffffffffffffULL);
    must(moe_inproc_hub_new(&s->clock, config->seed, &s->hub, &err), &err);
    must(moe_memory_hub_new(&s->clock, &s->memory, &err), &err);
    start_router(s);
    for (int32_t i = 0; i < config->workers; i++) {
        snprintf(s->workers[i].id, sizeof s->workers[i].id, "w%d", i);
        snprintf(s->workers[i].endpoint, sizeof s->workers[i].endpoint, "inproc:w%d", i);
        start_worker(s, i);
    }
    if (config->boot_ns) {
        sim_run(s, config->boot_ns);
    } else if (!sim_run_until_healed(s, SIM_BOOT_LIMIT_NS)) {
        fprintf(stderr, "simulation: no map within the boot limit\n");
        abort();
    }
    return s;
}

void sim_free(sim_cluster **sim) {
    sim_cluster *s = *sim;
    *sim = NULL;
    stop_router(s);
    for (int32_t i = 0; i < s->config.workers; i++) sim_kill(s, i);
    moe_memory_hub_free(&s->memory);
    moe_inproc_hub_free(&s->hub);
    moe_free(s);
}

static void on_output(void *ctx, const moe_output *output) {
    sim_request *r = ctx;
    for (int32_t i = 0; i < output->num_tokens && r->num_tokens < SIM_MAX_TOKENS; i++)
        r->tokens[r->num_tokens++] = output->token_ids[i];
    if (output->finish == MOE_FINISH_NONE) return;
    r->terminal_events++;
    r->finish = output->finish;
    r->status = output->status;
    snprintf(r->message, sizeof r->message, "%s", output->message ? output->message : "");
}

int32_t sim_submit(sim_cluster *s, const int32_t *prompt, int32_t prompt_tokens, int32_t max_tokens, moe_status *refused) {
    if (s->num_requests == SIM_MAX_REQUESTS) abort();
    sim_request *r = &s->requests[s->num_requests];
    moe_request request = {.id = "sim",
                           .prompt = prompt,
                           .prompt_tokens = prompt_tokens,
                           .sampling = {.top_p = 1,
                                        .repetition_penalty = 1,
                                        .max_tokens = max_tokens,
                                        .ignore_eos = true,
                                        .logprobs = -1,
                                        .prompt_logprobs = -1}};
    moe_error err;
    *refused = moe_engine_submit(s->engine, &request, on_output, r, &r->id, &err);
    return *refused == MOE_OK ? s->num_requests++ : -1;
}
