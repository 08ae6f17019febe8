#include "tests/support/sim_cluster.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "expert-worker/worker_internal.h"
#include "tests/support/residency_check.h"

#define SIM_START_NS (1000 * MOE_NS_PER_S)
#define SIM_TICK_NS (2 * MOE_NS_PER_MS)       /* the clock jumps to the next delivery, by this much at most */
#define SIM_IDLE_TICK_NS (10 * MOE_NS_PER_MS) /* or this, where no request is live */
#define SIM_LOOK_NS (20 * MOE_NS_PER_MS)      /* between two looks at whether the cluster is healed */
#define SIM_STEP_NS (20 * MOE_NS_PER_US)      /* and by this at least */
#define SIM_COPY_NS (50 * MOE_NS_PER_US)      /* the clock's most while copies are on their way */
#define SIM_COPY_ODDS 3                       /* of so many steps, one ends a worker's copy or batch */
#define SIM_BOOT_LIMIT_NS (60 * MOE_NS_PER_S)

static void must(moe_status status, const moe_error *err) {
    if (status == MOE_OK) return;
    fprintf(stderr, "simulation: %s: %s\n", moe_status_name(status), err->message);
    abort();
}

static void stepped(const sim_cluster *s, moe_status status, const moe_error *err) {
    if (!s->config.starved || status != MOE_RESOURCE_EXHAUSTED) must(status, err);
}

/* ---- history ---- */

typedef enum sim_event { SIM_OUTPUT, SIM_MAP, SIM_WORKER_STARTS, SIM_WORKER_DIES, SIM_ROUTER_STARTS, SIM_ROUTER_ENDS } sim_event;

static void note(sim_cluster *s, sim_event event, uint64_t a, uint64_t b) {
    const uint64_t words[] = {(uint64_t)s->clock.fake_now_ns, event, a, b};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) s->history = moe_mix64(s->history ^ words[i]);
}

/* ---- parts ---- */

static bool has_tiers(const sim_cluster *s, int32_t index) {
    return s->config.tiers && moe_memory_limited(s->config.tiers[index].device);
}

static void start_worker(sim_cluster *s, int32_t index) {
    sim_worker *w = &s->workers[index];
    moe_backend *backend = s->config.worker_backend ? s->config.worker_backend : s->config.backend;
    if (s->config.own_backend[index]) backend = s->config.own_backend[index];
    if (has_tiers(s, index)) {
        moe_slow_init(&w->slow, backend);
        w->slow.slow_batches = true;
        backend = &w->slow.base;
    }
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
                                .tiers = {.budget = s->config.budget,
                                          .share = (double)s->config.replicas / s->config.workers,
                                          .eviction = "hint-aware"},
                                .reference = s->config.reference};
    if (has_tiers(s, index)) config.tiers = s->config.tiers[index];
    config.host = backend; /* its batches take turns with the device's */
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
    note(s, SIM_WORKER_STARTS, (uint64_t)index, incarnation);
}

/* As kill -9: nothing is taken leave of. */
void sim_kill(sim_cluster *s, int32_t index) {
    sim_worker *w = &s->workers[index];
    if (!w->worker) return;
    note(s, SIM_WORKER_DIES, (uint64_t)index, 0);
    if (has_tiers(s, index)) {
        moe_slow_hurry(&w->slow);
        const moe_residency_counts counted = moe_residency_counted(w->worker->residency);
        residency_counts_add(&s->tiers, &counted);
    }
    moe_registration_free(&w->registration);
    moe_worker_free(&w->worker);
    w->transport->ops->close(w->transport);
    w->store->ops->close(w->store);
}

void sim_restart(sim_cluster *s, int32_t index) {
    if (!s->workers[index].worker) start_worker(s, index);
}

static void check_map(sim_router *router, const moe_placement *map) {
    sim_cluster *s = router->sim;
    s->epoch_fell = s->epoch_fell || map->epoch < router->epoch;
    router->epoch = map->epoch > router->epoch ? map->epoch : router->epoch;
    s->newest_epoch = map->epoch > s->newest_epoch ? map->epoch : s->newest_epoch;
    for (int64_t i = 0; i < (int64_t)map->num_layers * map->num_experts; i++) {
        bool ready = false;
        for (int r = 0; r < map->entries[i].num_replicas; r++)
            ready = ready || map->entries[i].replicas[r].state == MOE_REPLICA_READY;
        s->map_incomplete = s->map_incomplete || !ready;
    }
}

static void on_map(void *ctx, moe_placement *map) {
    sim_router *r = ctx;
    check_map(r, map);
    note(r->sim, SIM_MAP, (uint64_t)(r - r->sim->routers), map->epoch);
    moe_engine_set_placement(r->engine, map);
}

static uint64_t routing_epoch(void *ctx) { return moe_engine_routing_epoch(((sim_router *)ctx)->engine); }
static void on_not_held(void *ctx) { moe_controller_hurry(((sim_router *)ctx)->controller); }

static moe_expert *const *local_experts(void *ctx) {
    const sim_cluster *s = ctx;
    return s->workers[0].worker ? moe_worker_lend_experts(s->workers[0].worker) : NULL;
}

void sim_start_router(sim_cluster *s, int32_t index) {
    moe_error err;
    sim_router *r = &s->routers[index];
    const moe_model_config *m = &s->config.model->config;
    uint64_t incarnation = moe_random_next(&s->random) | 1;
    if (r->engine) return;
    note(s, SIM_ROUTER_STARTS, (uint64_t)index, incarnation);
    r->sim = s;
    snprintf(r->id, sizeof r->id, "r%d", index);
    must(moe_inproc_open(s->hub, &r->engine_transport, &err), &err);
    must(moe_inproc_open(s->hub, &r->controller_transport, &err), &err);
    must(moe_memory_open(s->memory, &r->store, &err), &err);
    moe_engine_config engine = {.model = s->config.model,
                                .backend = s->config.backend,
                                .transports = &r->engine_transport,
                                .num_transports = 1,
                                .clock = &s->clock,
                                .cluster_uuid = s->uuid,
                                .id = r->id,
                                .incarnation = incarnation,
                                .gating = s->config.gating,
                                .combine = s->config.combine,
                                .expert_budget = s->config.budget,
                                .max_num_seqs = 16,
                                .max_num_batched_tokens = s->config.max_num_batched_tokens,
                                .max_model_len = m->max_positions,
                                .max_waiting = SIM_MAX_REQUESTS,
                                .micro_batches = s->config.micro_batches,
                                .pipeline_degree = s->config.pipeline_degree,
                                .num_kv_blocks = s->config.num_kv_blocks,
                                .replica_wait_ns = 2 * MOE_NS_PER_S,
                                .call_timeout_ns = 10 * MOE_NS_PER_S,
                                .suspect_after_ns = 300 * MOE_NS_PER_MS,
                                .local_experts = s->config.local ? local_experts : NULL,
                                .local_worker = s,
                                .on_not_held = on_not_held,
                                .on_not_held_ctx = r};
    must(moe_engine_new(&engine, &r->engine, &err), &err);
    moe_controller_config controller = {.store = r->store,
                                        .transport = r->controller_transport,
                                        .clock = &s->clock,
                                        .cluster_uuid = s->uuid,
                                        .id = r->id,
                                        .endpoint = "",
                                        .host = "sim",
                                        .incarnation = incarnation,
                                        .model_digest = s->config.model->digest,
                                        .pid = 1,
                                        .new_cluster = s->config.new_cluster && s->newest_epoch == 0,
                                        .balance = s->config.balance,
                                        .routing_epoch = routing_epoch,
                                        .num_moe_layers = m->num_moe_layers,
                                        .num_experts = m->num_experts,
                                        .replicas = s->config.replicas,
                                        .initial_workers = s->config.workers,
                                        .layout = s->config.layout,
                                        .layout_seed = s->config.seed,
                                        .state_dir = s->config.state_dir,
                                        .on_map = on_map,
                                        .ctx = r};
    must(moe_controller_new(&controller, &r->controller, &err), &err);
}

void sim_stop_router(sim_cluster *s, int32_t index, bool resigns) {
    sim_router *r = &s->routers[index];
    if (!r->engine) return;
    note(s, SIM_ROUTER_ENDS, (uint64_t)index, resigns);
    for (int32_t i = 0; i < s->num_requests; i++)
        if (s->requests[i].router == index && s->requests[i].terminal_events == 0) s->requests[i].abandoned = true;
    if (resigns) moe_controller_resign(r->controller);
    moe_engine_free(&r->engine);
    moe_controller_free(&r->controller);
    r->engine_transport->ops->close(r->engine_transport);
    r->controller_transport->ops->close(r->controller_transport);
    r->store->ops->close(r->store);
}

/* ---- time ---- */

/* Some of what the workers' devices have to do ends; true while more is left. What a worker does next sees it. */
static bool step_devices(sim_cluster *s) {
    bool left = false;
    for (int32_t i = 0; i < s->config.workers; i++) {
        sim_worker *w = &s->workers[i];
        if (!w->worker || !has_tiers(s, i)) continue;
        residency_check(w->worker->residency);
        if (w->slow.num_fills && moe_random_below(&s->dice, SIM_COPY_ODDS) == 0) moe_slow_end(&w->slow);
        if (w->slow.num_batches && moe_random_below(&s->dice, SIM_COPY_ODDS) == 0) moe_slow_end_batch(&w->slow);
        left = left || w->slow.num_fills || w->slow.num_batches || moe_worker_has_work(w->worker);
    }
    return left;
}

static void step_all(sim_cluster *s) {
    moe_error err;
    for (int32_t i = 0; i < SIM_MAX_ROUTERS; i++) {
        if (!s->routers[i].engine) continue;
        stepped(s, moe_engine_step(s->routers[i].engine, 0, &err), &err);
        stepped(s, moe_controller_step(s->routers[i].controller, 0, &err), &err);
    }
    for (int32_t i = 0; i < s->config.workers; i++) {
        sim_worker *w = &s->workers[i];
        if (!w->worker) continue;
        stepped(s, moe_worker_step(w->worker, 0, &err), &err);
        if (moe_registration_next_ns(w->registration) <= s->clock.fake_now_ns) moe_registration_step(w->registration, &err);
    }
    int64_t now = s->clock.fake_now_ns, due = moe_inproc_next_due_ns(s->hub);
    int64_t tick = step_devices(s) ? SIM_COPY_NS : s->num_live ? SIM_TICK_NS : SIM_IDLE_TICK_NS, next = due < now + tick ? due : now + tick;
    s->clock.fake_now_ns = next > now + SIM_STEP_NS ? next : now + SIM_STEP_NS;
}

void sim_run(sim_cluster *s, int64_t ns) {
    for (int64_t until = s->clock.fake_now_ns + ns; s->clock.fake_now_ns < until;) step_all(s);
}

bool sim_run_until_idle(sim_cluster *s, int64_t limit_ns) {
    for (int64_t until = s->clock.fake_now_ns + limit_ns; s->num_live && s->clock.fake_now_ns < until;) step_all(s);
    return s->num_live == 0;
}

static bool healed_at(const sim_cluster *s, const sim_router *r, moe_engine_view *view, moe_controller_view *control) {
    moe_engine_get_view(r->engine, view);
    moe_controller_get_view(r->controller, control);
    bool all = view->ready && view->epoch == control->epoch && view->epoch > 0;
    for (int32_t l = 0; l < control->num_layers; l++) all = all && control->min_replicas[l] >= s->config.replicas;
    for (int32_t i = 0; i < view->num_workers; i++) all = all && view->workers[i].up;
    return all;
}

static bool healed(const sim_cluster *s) {
    moe_engine_view *view = moe_calloc(1, sizeof *view);
    moe_controller_view *control = moe_calloc(1, sizeof *control);
    bool all = view && control;
    for (int32_t i = 0; i < SIM_MAX_ROUTERS; i++)
        if (s->routers[i].engine) all = all && healed_at(s, &s->routers[i], view, control);
    moe_free(view);
    moe_free(control);
    return all;
}

bool sim_run_until_healed(sim_cluster *s, int64_t limit_ns) {
    int64_t until = s->clock.fake_now_ns + limit_ns;
    while (!healed(s)) {
        if (s->clock.fake_now_ns >= until) return false;
        sim_run(s, SIM_LOOK_NS);
    }
    return true;
}

/* ---- the cluster ---- */

sim_cluster *sim_new(const sim_config *config) {
    sim_cluster *s = moe_calloc(1, sizeof *s);
    moe_error err;
    if (!s) abort();
    s->config = *config;
    s->clock = moe_clock_fake(SIM_START_NS);
    s->random = (moe_random){config->seed};
    s->dice = (moe_random){moe_mix64(config->seed)};
    snprintf(s->uuid, sizeof s->uuid, "00000000-0000-4000-8000-%012llx", (unsigned long long)config->seed & 0xffffffffffffULL);
    must(moe_inproc_hub_new(&s->clock, config->seed, &s->hub, &err), &err);
    must(moe_memory_hub_new(&s->clock, &s->memory, &err), &err);
    for (int32_t i = 0; i < (config->routers ? config->routers : 1); i++) sim_start_router(s, i);
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
    for (int32_t i = 0; i < SIM_MAX_ROUTERS; i++) sim_stop_router(s, i, false);
    for (int32_t i = 0; i < s->config.workers; i++) sim_kill(s, i);
    moe_memory_hub_free(&s->memory);
    moe_inproc_hub_free(&s->hub);
    moe_free(s);
}

static void on_output(void *ctx, const moe_output *output) {
    sim_request *r = ctx;
    note(r->sim, SIM_OUTPUT, (uint64_t)(r - r->sim->requests), (uint64_t)output->finish);
    for (int32_t i = 0; i < output->num_tokens && r->num_tokens < SIM_MAX_TOKENS; i++)
        r->tokens[r->num_tokens++] = output->token_ids[i];
    if (output->finish == MOE_FINISH_NONE) return;
    if (r->terminal_events++ == 0) r->sim->num_live--;
    r->finish = output->finish;
    r->status = output->status;
    snprintf(r->message, sizeof r->message, "%s", output->message ? output->message : "");
}

int32_t sim_submit(sim_cluster *s, int32_t router, const int32_t *prompt, int32_t prompt_tokens, int32_t max_tokens,
                   moe_status *refused) {
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
    r->sim = s;
    r->router = router;
    r->max_tokens = max_tokens;
    *refused = moe_engine_submit(s->routers[router].engine, &request, on_output, r, &r->id, &err);
    if (*refused != MOE_OK) return -1;
    s->num_live++;
    return s->num_requests++;
}
