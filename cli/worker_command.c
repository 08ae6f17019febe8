/* `moesaic worker`: one expert worker of a cluster, or one for each of several GPUs, until a signal ends it. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cli/cluster_file.h"
#include "cli/commands.h"
#include "cli/cores.h"
#include "cli/device_lease.h"
#include "cli/device_list.h"
#include "cli/metrics_server.h"
#include "cli/node_options.h"
#include "cli/signals.h"
#include "cli/worker_node.h"
#include "common/failpoint.h"
#include "common/log.h"
#include "common/zmq/zmq_transport.h"
#include "expert-worker/registry.h"
#include "expert-worker/worker.h"

#define WORKER_AND_ROUTER 2 /* processes that may share this machine; serve knows better and says --poll-us */
#define LEAVE_POLL_NS (10 * MOE_NS_PER_MS)
#define HAND_OVER_REPORT_NS (5 * MOE_NS_PER_S)
#define WATCH_NS (100 * MOE_NS_PER_MS) /* between looks for a defect */
#define WATCHES_A_MOVE 20 /* of those for each look whether the host's address changed */

typedef struct worker_settings {
    moe_cluster_file file; /* of --cluster; all "" without it */
    char id[MOE_WORKER_ID_BYTES];
    char listen[PATH_MAX];
    char password_file[PATH_MAX + 32]; /* of the run folder's Redis user for workers */
    const char *model_dir, *keys_dir;
    moe_store_address store;
} worker_settings;

static const char *given(const char *option, const char *from_file) { return option ? option : *from_file ? from_file : NULL; }

/* Options come first; what they leave open, the run folder of --cluster answers. */
static moe_status read_options(const moe_options *o, worker_settings *s, moe_error *err) {
    const char *cluster = moe_option_text(o, "cluster"), *listen = moe_option_text(o, "listen");
    moe_status status = cluster ? moe_cluster_file_read(cluster, &s->file, NULL, err) : MOE_OK;
    if (status != MOE_OK) return status;
    if (moe_option_text(o, "id"))
        snprintf(s->id, sizeof s->id, "%s", moe_option_text(o, "id"));
    else
        moe_default_id("worker", s->id, sizeof s->id);
    s->model_dir = given(moe_options_positional(o), s->file.model);
    s->keys_dir = given(moe_option_text(o, "keys"), s->file.keys);
    s->store = (moe_store_address){given(moe_option_text(o, "store"), s->file.redis), moe_option_text(o, "redis-username"),
                                   moe_option_text(o, "redis-password-file"), moe_option_text(o, "cluster-name")};
    snprintf(s->password_file, sizeof s->password_file, "%s/redis-worker.password", s->file.run_dir);
    bool private_redis = cluster && !moe_option_text(o, "store") && !s->store.username && !s->store.password_file;
    if (private_redis && access(s->password_file, R_OK) == 0) {
        s->store.username = "worker";
        s->store.password_file = s->password_file;
    }
    if (listen)
        snprintf(s->listen, sizeof s->listen, "%s", listen);
    else if (strncmp(s->file.listen, "tcp:", 4) == 0)
        snprintf(s->listen, sizeof s->listen, "%s", s->file.listen);
    else if (cluster)
        snprintf(s->listen, sizeof s->listen, "%s%.3900s/%s.sock", strcmp(s->file.listen, "shm") == 0 ? "shm:" : "ipc://",
                 s->file.run_dir, s->id);
    if (!s->model_dir) return moe_fail(err, MOE_INVALID_ARGUMENT, "worker needs MODEL, or --cluster DIR");
    if (!s->store.address) return moe_fail(err, MOE_INVALID_ARGUMENT, "worker needs --store ADDRESS, or --cluster DIR");
    if (!s->listen[0]) return moe_fail(err, MOE_INVALID_ARGUMENT, "worker needs --listen ENDPOINT, or --cluster DIR");
    return MOE_OK;
}

/* The cluster's uuid: of the run folder, else of the store's meta, which the first router writes. */
static moe_status find_cluster(const worker_settings *s, moe_store *store, char uuid[MOE_UUID_BYTES], moe_error *err) {
    bool told = false;
    if (s->file.uuid[0]) {
        memcpy(uuid, s->file.uuid, MOE_UUID_BYTES);
        return MOE_OK;
    }
    for (;;) {
        moe_status status = moe_registry_cluster_uuid(store, uuid, err);
        if (status == MOE_OK) return MOE_OK;
        if (status != MOE_NOT_FOUND && status != MOE_UNAVAILABLE) return status;
        if (!told) moe_info("waiting for the cluster at %s: %s", s->store.address, err->message);
        told = true;
        if (moe_signals_wait(200 * MOE_NS_PER_MS)) return moe_fail(err, MOE_CANCELLED, "stopped before the cluster was found");
    }
}

/* The expert worker of one GPU, or the one there is. */
typedef struct device_worker {
    moe_backend *backend, *host; /* host: as in moe_worker_config */
    moe_worker_node *node;
    char id[MOE_WORKER_ID_BYTES];
    char listen[PATH_MAX];
} device_worker;

typedef struct worker_process {
    const moe_options *options;
    worker_settings settings;
    moe_model *model;
    moe_backend *reference; /* cpu-ref, for known-answer batches */
    char uuid[MOE_UUID_BYTES]; /* "" until the cluster was found */
    moe_metrics_server *metrics; /* NULL without --metrics-port */
    moe_device_lease lease;      /* of --devices auto */
    moe_store *lease_store;
    int32_t num_workers;
    device_worker workers[MOE_MAX_DEVICES];
} worker_process;

/* Of several workers in a process each needs a name and an endpoint of its own: both get the GPU's number at their end. */
static moe_status name_worker(const worker_settings *s, device_worker *w, int32_t device, bool alone, moe_error *err) {
    char suffix[16] = "";
    bool tcp = strncmp(s->listen, "tcp:", 4) == 0;
    const char *port = strrchr(s->listen, ':');
    if (!alone) snprintf(suffix, sizeof suffix, "-%d", device);
    if (!alone && tcp && (!port || strcmp(port, ":0") != 0))
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "--listen %s: several --devices need a port each; give port 0, or run one worker for each", s->listen);
    if ((size_t)snprintf(w->id, sizeof w->id, "%s%s", s->id, suffix) >= sizeof w->id)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--id %s: too long", s->id);
    if ((size_t)snprintf(w->listen, sizeof w->listen, "%s%s", s->listen, tcp ? "" : suffix) >= sizeof w->listen)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--listen %s: too long", s->listen);
    return MOE_OK;
}

/* One of `count` that share this process. */
static moe_status open_worker(worker_process *p, device_worker *w, const moe_backend_config *backend, int32_t count, moe_error *err) {
    const worker_settings *s = &p->settings;
    moe_curve_keys keys = {.public_key = ""};
    moe_store *store;
    moe_transport *transport;
    moe_tier_options tiers;
    moe_status status = moe_tier_option(p->options, &tiers, err);
    tiers.share = moe_option_float(p->options, "share");
    moe_backend_config host = *backend;
    host.threads = host.threads > count ? host.threads / count : 1;
    if (status == MOE_OK && tiers.cold != MOE_COLD_FETCH) status = moe_host_backend_open(&host, w->backend, &w->host, err);
    if (status == MOE_OK && s->keys_dir) status = moe_curve_keys_read(s->keys_dir, MOE_ROLE_WORKER, &keys, err);
    if (status == MOE_OK) status = moe_store_open(&s->store, &store, err);
    if (status != MOE_OK) return status;
    if (!p->uuid[0]) status = find_cluster(s, store, p->uuid, err);
    int64_t poll_us = moe_poll_us_option(p->options, WORKER_AND_ROUTER);
    if (status == MOE_OK) status = moe_network_open(s->keys_dir, MOE_ROLE_WORKER, poll_us, &transport, err);
    if (status != MOE_OK) {
        store->ops->close(store);
        return status;
    }
    moe_worker_node_config config = {.model = p->model,
                                     .backend = w->backend,
                                     .host = w->host,
                                     .transport = transport,
                                     .store = store,
                                     .listen = w->listen,
                                     .advertise = moe_option_text(p->options, "advertise"),
                                     .public_key = keys.public_key,
                                     .id = w->id,
                                     .cluster_uuid = p->uuid,
                                     .state_dir = moe_option_text(p->options, "state-dir"),
                                     .max_queued_calls = (int32_t)moe_option_int(p->options, "max-queued-calls"),
                                     .max_batch_rows = (int32_t)moe_option_int(p->options, "max-batch-rows"),
                                     .capacity_experts = moe_option_int(p->options, "max-experts"),
                                     .copy_bytes_per_s = moe_option_int(p->options, "copy-rate"),
                                     .tiers = tiers,
                                     .threads = moe_threads_option(p->options) / count,
                                     .reference = p->reference->ops->single};
    return moe_worker_node_open(&config, &w->node, err);
}

/* --devices auto: waits until one of this machine's GPUs is free; another worker may be about to end. */
static moe_status lease_device(worker_process *p, moe_error *err) {
    moe_device_name names[MOE_MAX_DEVICES];
    int32_t count;
    bool told = false;
    moe_status status = moe_backend_devices(moe_option_text(p->options, "backend"), names, &count, err);
    if (status == MOE_OK) status = moe_store_open(&p->settings.store, &p->lease_store, err);
    if (status != MOE_OK) return status;
    for (;;) {
        status = moe_device_lease_take(p->lease_store, moe_clock_real(), names, count, p->settings.id, &p->lease, err);
        if (status == MOE_OK) moe_info("GPU %d (%s) of %d is this worker's", p->lease.device, names[p->lease.device], count);
        if (status != MOE_RESOURCE_EXHAUSTED && status != MOE_UNAVAILABLE) return status;
        if (!told) moe_info("waiting for a GPU: %s", err->message);
        told = true;
        if (moe_signals_wait(MOE_NS_PER_S)) return moe_fail(err, MOE_CANCELLED, "stopped before a GPU was free");
    }
}

static moe_status open_leased_worker(worker_process *p, moe_error *err) {
    moe_status status = lease_device(p, err);
    if (status != MOE_OK) return status;
    device_worker *w = &p->workers[p->num_workers++];
    moe_backend_config config = moe_backend_option_on(p->options, p->lease.device);
    status = name_worker(&p->settings, w, config.device, true, err);
    if (status == MOE_OK) status = moe_backend_open(&config, &w->backend, err);
    return status == MOE_OK ? open_worker(p, w, &config, 1, err) : status;
}

/* One worker for each of --devices; the CPU backends have one device. */
static moe_status open_workers(worker_process *p, moe_error *err) {
    moe_backend_config config;
    int32_t count = 1;
    if (strcmp(moe_option_text(p->options, "devices"), "auto") == 0) return open_leased_worker(p, err);
    moe_status status = moe_backend_option(p->options, 0, &config, &count, err);
    if (status == MOE_OK && count > 1 && strcmp(config.name, "cuda") != 0)
        status = moe_fail(err, MOE_INVALID_ARGUMENT, "--devices %s: several are for --backend cuda",
                          moe_option_text(p->options, "devices"));
    if (status == MOE_OK && count > 1 && moe_option_text(p->options, "advertise"))
        status = moe_fail(err, MOE_INVALID_ARGUMENT,
                          "--advertise: several --devices listen at several endpoints; run one worker for each");
    for (int32_t i = 0; i < count && status == MOE_OK; i++) {
        device_worker *w = &p->workers[p->num_workers++];
        status = moe_backend_option(p->options, i, &config, NULL, err);
        if (status == MOE_OK) status = name_worker(&p->settings, w, config.device, count == 1, err);
        if (status == MOE_OK) status = moe_backend_open(&config, &w->backend, err);
        if (status == MOE_OK) status = open_worker(p, w, &config, count, err);
    }
    return status;
}

static moe_status open_metrics(worker_process *p, moe_error *err) {
    const char *host = moe_option_text(p->options, "metrics-host");
    if (!moe_option_given(p->options, "metrics-port")) return MOE_OK;
    moe_status status = moe_metrics_server_start(host, (int)moe_option_int(p->options, "metrics-port"), &p->metrics, err);
    if (status == MOE_OK) moe_info("metrics at http://%s:%d/metrics", host, moe_metrics_server_port(p->metrics));
    return status;
}

static bool all_left(const worker_process *p) {
    bool left = true;
    for (int32_t i = 0; i < p->num_workers; i++) left = left && (!p->workers[i].node || moe_worker_node_left(p->workers[i].node));
    return left;
}

static bool moved(const worker_process *p) {
    for (int32_t i = 0; i < p->num_workers; i++)
        if (p->workers[i].node && moe_worker_node_moved(p->workers[i].node)) return true;
    return false;
}

static int32_t experts_held(const worker_process *p) {
    int32_t held = 0;
    for (int32_t i = 0; i < p->num_workers; i++) held += p->workers[i].node ? moe_worker_node_experts(p->workers[i].node) : 0;
    return held;
}

/* Serves on until the experts are elsewhere, no router is left, none of them was taken over for the time of --hand-over-timeout,
 * or a second signal comes. What is left then is loaded from the checkpoint by others. */
static void hand_over(worker_process *p) {
    int64_t limit = moe_option_ns(p->options, "hand-over-timeout"), now = moe_now_ns(moe_clock_real()), until = now + limit,
            report_ns = now + HAND_OVER_REPORT_NS;
    int32_t least = experts_held(p);
    moe_info("leaving: handing %d experts over; a second signal ends this at once", least);
    for (int32_t i = 0; i < p->num_workers; i++)
        if (p->workers[i].node) moe_worker_node_leave(p->workers[i].node);
    while (!all_left(p) && !moe_signals_wait(LEAVE_POLL_NS)) {
        int32_t held = experts_held(p);
        moe_device_lease_keep(&p->lease);
        now = moe_now_ns(moe_clock_real());
        if (held < least) until = now + limit;
        if (held < least) least = held;
        if (now >= until) {
            moe_error_log("leaving with %d experts: none was taken over for %.0f s (--hand-over-timeout)", held,
                          (double)limit / MOE_NS_PER_S);
            return;
        }
        if (now >= report_ns) moe_info("leaving: %d experts left", held);
        if (now >= report_ns) report_ns = now + HAND_OVER_REPORT_NS;
    }
}

/* Takes a worker that found itself defective out of the cluster. True when there was one: the process is to end, since what is
 * wrong with one GPU may be wrong with the process; a fresh one begins with checks. */
static bool quarantine_defective(worker_process *p) {
    char reason[MOE_WORKER_DEFECT_BYTES];
    bool any = false;
    for (int32_t i = 0; i < p->num_workers; i++) {
        device_worker *w = &p->workers[i];
        if (!w->node || !moe_worker_node_defective(w->node, reason, sizeof reason)) continue;
        moe_error_log("worker %s leaves the cluster, exit status %d: %s", w->id, MOE_EXIT_DEFECTIVE, reason);
        moe_worker_node_close(&w->node);
        any = true;
    }
    return any;
}

int moe_command_worker(const moe_options *o) {
    static worker_process p; /* large, and one per process */
    moe_error err;
    p.options = o;
    moe_signals_block();
    moe_status status = read_options(o, &p.settings, &err);
    if (status == MOE_OK) moe_failpoints_open(p.settings.id);
    if (status == MOE_OK && moe_option_text(o, "cores")) status = moe_cores_restrict(moe_option_text(o, "cores"), &err);
    moe_model_source source = moe_model_option(o, p.settings.model_dir);
    if (status == MOE_OK) status = moe_model_source_open(&source, &p.model, &err);
    const moe_backend_config plain = {.name = "cpu-ref", .dtype = MOE_F32};
    if (status == MOE_OK) status = moe_backend_open(&plain, &p.reference, &err);
    if (status == MOE_OK) status = open_metrics(&p, &err);
    if (status == MOE_OK) status = open_workers(&p, &err);
    bool defective = false;
    for (int watch = 1; status == MOE_OK && !defective && !moe_signals_wait(WATCH_NS); watch++) {
        for (int32_t i = 0; i < p.num_workers; i++) moe_worker_node_remember(p.workers[i].node);
        defective = quarantine_defective(&p);
        moe_device_lease_keep(&p.lease);
        if (watch % WATCHES_A_MOVE == 0 && moved(&p))
            status = moe_fail(&err, MOE_UNAVAILABLE, "this host has another address now; start the worker again");
    }
    if (status == MOE_OK && (!defective || p.num_workers > 1)) hand_over(&p);
    for (int32_t i = 0; i < p.num_workers; i++) {
        moe_worker_node_close(&p.workers[i].node);
        moe_host_backend_close(&p.workers[i].host, p.workers[i].backend);
        if (p.workers[i].backend) p.workers[i].backend->ops->close(p.workers[i].backend);
    }
    moe_device_lease_release(&p.lease); /* once its memory is free */
    if (p.lease_store) p.lease_store->ops->close(p.lease_store);
    moe_metrics_server_stop(&p.metrics);
    if (p.reference) p.reference->ops->close(p.reference);
    moe_model_close(&p.model);
    if (defective) return MOE_EXIT_DEFECTIVE;
    if (status == MOE_OK || status == MOE_CANCELLED) return 0;
    moe_command_failed(&err);
    return status == MOE_INVALID_ARGUMENT ? MOE_EXIT_REFUSED : 1;
}
