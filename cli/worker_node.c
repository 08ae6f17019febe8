#include "cli/worker_node.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cli/worker_state.h"
#include "common/alloc.h"
#include "common/log.h"
#include "common/random.h"
#include "expert-worker/calibrate.h"
#include "expert-worker/registry.h"
#include "expert-worker/worker.h"

#define HOST_BYTES 64

struct moe_worker_node {
    moe_transport *transport;
    moe_store *store;
    moe_worker *worker;
    moe_registration *registration;
    char *id, *cluster_uuid; /* borrowed by the worker */
    char *state_dir;         /* NULL: none */
    moe_worker_memory remembered;
    char address[HOST_BYTES]; /* of this host, as registered; "" where the endpoint was told */
};

void moe_host_name(char *host, size_t size) {
    if (gethostname(host, size) != 0) snprintf(host, size, "localhost");
    host[size - 1] = '\0';
}

void moe_default_id(const char *prefix, char *id, size_t size) {
    char host[32];
    moe_host_name(host, sizeof host);
    snprintf(id, size, "%s-%s-%d", prefix, host, (int)getpid());
}

/* This host's address as its own name resolves, numeric; the name itself where that is loopback or nothing. Numeric, since every
 * look-up of a dead host's name would hold up the network thread of those who try to reach it. */
static void own_address(char address[HOST_BYTES]) {
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *found = NULL;
    moe_host_name(address, HOST_BYTES);
    if (getaddrinfo(address, NULL, &hints, &found) != 0) return;
    const struct sockaddr_in *in = (const struct sockaddr_in *)found->ai_addr;
    if (ntohl(in->sin_addr.s_addr) >> 24 != 127)
        getnameinfo(found->ai_addr, found->ai_addrlen, address, HOST_BYTES, NULL, 0, NI_NUMERICHOST);
    freeaddrinfo(found);
}

/* What routers connect to: as told, or as bound; for an address that stands for all of this host's, one that leads here. */
static void advertised(moe_worker_node *n, const char *told, const char *bound, char endpoint[MOE_ENDPOINT_BYTES]) {
    static const char *const all[] = {"tcp://0.0.0.0:", "tcp://*:", "tcp://[::]:"};
    snprintf(endpoint, MOE_ENDPOINT_BYTES, "%s", told ? told : bound);
    for (size_t i = 0; !told && i < sizeof all / sizeof *all; i++) {
        if (strncmp(bound, all[i], strlen(all[i])) != 0) continue;
        own_address(n->address);
        snprintf(endpoint, MOE_ENDPOINT_BYTES, "tcp://%.64s:%.100s", n->address, bound + strlen(all[i]));
    }
}

bool moe_worker_node_moved(const moe_worker_node *n) {
    char address[HOST_BYTES];
    struct in_addr numeric;
    if (!n->address[0]) return false;
    own_address(address);
    return inet_pton(AF_INET, address, &numeric) == 1 && strcmp(address, n->address) != 0;
}

/* Nothing hangs on it: without a figure routers go by a guess. */
static moe_calibration calibrate(const moe_worker_node_config *c) {
    moe_calibration cost = {0};
    moe_error err;
    bool alone = c->stepped && c->tiers.cold != MOE_COLD_AUTO; /* the only worker there is, and nothing to choose between */
    if (alone || c->model->config.num_moe_layers == 0) return cost;
    if (moe_calibrate(c->backend, c->model, &cost, &err) != MOE_OK) {
        moe_warn("worker %s could not measure what experts cost it: %s", c->id, err.message);
        return (moe_calibration){0};
    }
    moe_info("worker %s: a distinct expert costs %.1f us, a row %.2f us", c->id, (double)cost.expert_ns / 1e3,
             (double)cost.row_ns / 1e3);
    return cost;
}

static int32_t load_threads(int32_t share) {
    return share < 1 ? 1 : share < MOE_LOADER_MAX_THREADS ? share : MOE_LOADER_MAX_THREADS;
}

/* Likewise: costs that are not known are learnt. */
static moe_cold_costs calibrate_cold(const moe_worker_node_config *c, const moe_calibration *device) {
    moe_cold_costs costs = {.device = {(double)device->expert_ns, (double)device->row_ns}};
    moe_error err;
    if (c->tiers.cold != MOE_COLD_AUTO || !c->host || c->model->config.num_moe_layers == 0) return costs;
    if (moe_calibrate_cold(c->backend, c->host, c->model, &costs, &err) != MOE_OK) {
        moe_warn("worker %s could not measure what cold experts cost it: %s", c->id, err.message);
        return (moe_cold_costs){.copy_byte_ns = 0};
    }
    moe_info("worker %s: copies pass at %.2f GB/s; on the host an expert costs %.1f us, a row %.2f us", c->id, 1 / costs.copy_byte_ns,
             costs.host.expert_ns / 1e3, costs.host.row_ns / 1e3);
    return costs;
}

static moe_status start(moe_worker_node *n, const moe_worker_node_config *c, moe_error *err) {
    char bound[MOE_ENDPOINT_BYTES], endpoint[MOE_ENDPOINT_BYTES], host[64];
    moe_host_name(host, sizeof host);
    n->id = moe_strdup(c->id);
    n->cluster_uuid = moe_strdup(c->cluster_uuid);
    if (c->state_dir) n->state_dir = moe_strdup(c->state_dir);
    if (!n->id || !n->cluster_uuid || (c->state_dir && !n->state_dir)) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    moe_status status = n->transport->ops->listen(n->transport, c->listen, bound, err);
    if (status != MOE_OK) return status;
    if (n->state_dir) n->remembered = moe_worker_state_read(n->state_dir, n->id, n->cluster_uuid);
    moe_worker_config worker = {.model = c->model,
                                .backend = c->backend,
                                .host = c->host,
                                .transport = n->transport,
                                .clock = moe_clock_real(),
                                .cluster_uuid = n->cluster_uuid,
                                .id = n->id,
                                .incarnation = moe_random_identity(),
                                .max_queued_calls = c->max_queued_calls,
                                .max_batch_rows = c->max_batch_rows,
                                .reference = c->reference,
                                .load_threads = load_threads(c->threads),
                                .copy_bytes_per_s = c->copy_bytes_per_s,
                                .max_experts = (int32_t)c->capacity_experts,
                                .tiers = c->tiers,
                                .timeline = c->timeline,
                                .known_epoch = n->remembered.epoch,
                                .known_fence = n->remembered.fence};
    moe_calibration cost = calibrate(c);
    worker.tiers.costs = calibrate_cold(c, &cost);
    status = moe_worker_new(&worker, &n->worker, err);
    if (status == MOE_OK && !c->stepped) status = moe_worker_start(n->worker, err);
    if (status != MOE_OK) return status;
    advertised(n, c->advertise, bound, endpoint);
    moe_registration_config registration = {.store = n->store,
                                            .clock = worker.clock,
                                            .id = c->id,
                                            .endpoint = endpoint,
                                            .public_key = c->public_key,
                                            .host = host,
                                            .profile = c->backend->ops->profile(c->backend),
                                            .incarnation = worker.incarnation,
                                            .model_digest = c->model->digest,
                                            .pid = getpid(),
                                            .capacity_experts = c->capacity_experts,
                                            .expert_ns = cost.expert_ns,
                                            .row_ns = cost.row_ns};
    status = moe_registration_new(&registration, &n->registration, err);
    if (status == MOE_OK) status = moe_registration_start(n->registration, err);
    if (status == MOE_OK) moe_info("worker %s listens at %s, for routers %s", c->id, bound, endpoint);
    return status;
}

moe_status moe_worker_node_open(const moe_worker_node_config *config, moe_worker_node **out, moe_error *err) {
    moe_worker_node *n = *out = moe_calloc(1, sizeof *n);
    if (!n) {
        config->transport->ops->close(config->transport);
        config->store->ops->close(config->store);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    }
    n->transport = config->transport;
    n->store = config->store;
    moe_status status = start(n, config, err);
    if (status != MOE_OK) moe_worker_node_close(out);
    return status;
}

bool moe_worker_node_step(moe_worker_node *n) {
    moe_error err;
    if (moe_worker_step(n->worker, 0, &err) != MOE_OK) moe_error_log("worker %s: %s", n->id, err.message);
    return moe_worker_has_work(n->worker);
}

moe_expert *const *moe_worker_node_lend_experts(moe_worker_node *n) { return moe_worker_lend_experts(n->worker); }

moe_layer_experts moe_worker_node_layer_experts(moe_worker_node *n) { return moe_worker_layer_experts(n->worker); }

/* What the worker chose by where it measured. Nothing steps it. */
static void tell_costs(const moe_worker_node *n) {
    const moe_cold_costs c = moe_worker_cold_costs(n->worker);
    if (c.copy_byte_ns <= 0) return;
    moe_info("worker %s learnt of cold experts: copies pass at %.2f GB/s; on the device an expert costs %.1f us, a row %.2f us, on the "
             "host %.1f and %.2f us, a job %.1f us, its rows %.1f us on the device",
             n->id, 1 / c.copy_byte_ns, c.device.expert_ns / 1e3, c.device.row_ns / 1e3, c.host.expert_ns / 1e3, c.host.row_ns / 1e3,
             c.host_job_ns / 1e3, c.host_rows_ns / 1e3);
}

moe_status moe_worker_node_resize(moe_worker_node *n, moe_memory_limit device, moe_cold_experts cold, double *copy_bytes_per_s,
                                  moe_error *err) {
    tell_costs(n);
    return moe_worker_resize(n->worker, device, cold, copy_bytes_per_s, err);
}

void moe_worker_node_leave(moe_worker_node *n) { moe_worker_leave(n->worker); }

bool moe_worker_node_left(moe_worker_node *n) {
    moe_worker_view view;
    moe_worker_get_view(n->worker, &view);
    return view.routers == 0 || (view.experts == 0 && view.queued_calls == 0);
}

int32_t moe_worker_node_experts(moe_worker_node *n) {
    moe_worker_view view;
    moe_worker_get_view(n->worker, &view);
    return view.experts;
}

void moe_worker_node_memory(moe_worker_node *n, int64_t *weight_bytes, int64_t *device_bytes) {
    moe_worker_view view;
    moe_worker_get_view(n->worker, &view);
    *weight_bytes = view.weight_bytes;
    *device_bytes = view.device_bytes;
}

void moe_worker_node_remember(moe_worker_node *n) {
    moe_worker_view view;
    moe_error err;
    if (!n->state_dir) return;
    moe_worker_get_view(n->worker, &view);
    if (view.epoch <= n->remembered.epoch && view.fence <= n->remembered.fence) return;
    n->remembered = (moe_worker_memory){view.epoch, view.fence}; /* of a failed attempt, too: the next rise tries again */
    if (moe_worker_state_write(n->state_dir, n->id, n->cluster_uuid, n->remembered, &err) != MOE_OK) moe_warn("%s", err.message);
}

bool moe_worker_node_defective(moe_worker_node *n, char *reason, size_t size) {
    moe_worker_view view;
    moe_worker_get_view(n->worker, &view);
    if (view.defect[0]) snprintf(reason, size, "%s", view.defect);
    return view.defect[0] != '\0';
}

void moe_worker_node_close(moe_worker_node **node) {
    moe_worker_node *n = *node;
    *node = NULL;
    if (!n) return;
    if (n->registration) {
        moe_error err;
        moe_registration_stop(n->registration);
        if (moe_registration_leave(n->registration, &err) != MOE_OK) moe_warn("leaving the registry: %s", err.message);
        moe_registration_free(&n->registration);
    }
    if (n->worker) moe_worker_stop(n->worker);
    if (n->worker) tell_costs(n);
    moe_worker_free(&n->worker);
    n->transport->ops->close(n->transport);
    n->store->ops->close(n->store);
    moe_free(n->id);
    moe_free(n->cluster_uuid);
    moe_free(n->state_dir);
    moe_free(n);
}
