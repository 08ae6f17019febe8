#include "cli/local_cluster.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cores.h"
#include "cli/node_options.h"
#include "cli/option_table.h"
#include "cli/signals.h"
#include "common/redis/redis_acl.h"
#include "common/zmq/zmq_transport.h"

#define REDIS_TICK_NS (20 * MOE_NS_PER_MS)
#define REDIS_START_TIMEOUT_NS (10 * MOE_NS_PER_S)

static moe_status absolute_path(const char *path, char out[PATH_MAX], moe_error *err) {
    return realpath(path, out) ? MOE_OK : moe_fail(err, MOE_NOT_FOUND, "cannot find %s: %s", path, strerror(errno));
}

static moe_status prepare_keys(const moe_local_cluster_config *config, moe_cluster_file *file, moe_error *err) {
    const char *listen = config->listen;
    snprintf(file->listen, sizeof file->listen, "%s", listen ? listen : config->ipc ? "ipc" : "shm");
    if (listen && strncmp(listen, "tcp:", 4) != 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "--listen %s: serve takes tcp://host:0 here; without it workers get endpoints in the run folder", listen);
    if (config->keys) return absolute_path(config->keys, file->keys, err);
    if (!listen) return MOE_OK;
    snprintf(file->keys, sizeof file->keys, "%.4080s/keys", file->run_dir);
    if (access(file->keys, F_OK) == 0) return MOE_OK;
    return moe_curve_keys_write(file->keys, err);
}

moe_status moe_local_cluster_prepare(const moe_local_cluster_config *config, moe_local_cluster *c, moe_error *err) {
    moe_cluster_file *file = &c->file;
    ssize_t length = readlink("/proc/self/exe", c->self, sizeof c->self - 1);
    if (length < 0) return moe_fail(err, MOE_INTERNAL, "cannot read /proc/self/exe: %s", strerror(errno));
    c->self[length] = '\0';
    moe_status status = absolute_path(config->model_dir, file->model, err);
    if (status == MOE_OK) status = moe_run_dir_make(config->run_dir, file->run_dir, err);
    if (status == MOE_OK) status = prepare_keys(config, file, err);
    if (status != MOE_OK) return status;
    moe_uuid_make(file->uuid);
    snprintf(file->redis, sizeof file->redis, "unix:%.4000s/redis.sock", file->run_dir);
    snprintf(file->router, sizeof file->router, "ipc://%.4000s/router.sock", file->run_dir);
    return MOE_OK;
}

moe_status moe_local_cluster_start_redis(moe_local_cluster *c, bool restart, moe_error *err) {
    const char *socket = c->file.redis + strlen("unix:");
    char acl[PATH_MAX + 32];
    snprintf(acl, sizeof acl, "%s/" MOE_REDIS_ACL_FILE, c->file.run_dir);
    const char *argv[] = {"/usr/bin/redis-server",
                          "--port",
                          "0",
                          "--unixsocket",
                          socket,
                          "--unixsocketperm",
                          "600",
                          "--save",
                          "",
                          "--appendonly",
                          "no",
                          "--dir",
                          c->file.run_dir,
                          "--aclfile",
                          acl,
                          "--daemonize",
                          "no",
                          "--loglevel",
                          "warning",
                          "--logfile",
                          "redis.log",
                          NULL};
    if (access(argv[0], X_OK) != 0)
        return moe_fail(err, MOE_NOT_FOUND, "%s is missing: install the package redis-server", argv[0]);
    unlink(socket);
    moe_status written = moe_redis_acl_write(c->file.run_dir, true, err);
    if (written != MOE_OK) return written;
    moe_status status = moe_children_start(&c->children, "redis", argv, restart, err);
    int64_t until = moe_now_ns(moe_clock_real()) + REDIS_START_TIMEOUT_NS;
    while (status == MOE_OK && access(socket, F_OK) != 0) {
        bool changed;
        if (moe_children_tick(&c->children, moe_now_ns(moe_clock_real()), &changed) || moe_now_ns(moe_clock_real()) > until)
            return moe_fail(err, MOE_UNAVAILABLE, "Redis did not start; see %s/redis.log", c->file.run_dir);
        if (moe_signals_wait(REDIS_TICK_NS)) return moe_fail(err, MOE_CANCELLED, "interrupted");
    }
    return status;
}

/* What a worker is told on its own or finds in cluster.json; the rest of what was given is passed on as it is. */
static const char *const own_options[] = {"listen", "keys", "threads", "poll-us", "cores", "devices", "share", NULL};

moe_status moe_local_cluster_start_worker(moe_local_cluster *c, const moe_options *options, int index, int workers, double share_of_experts,
                                          bool restart, moe_error *err) {
    char name[16], id[32], cluster[PATH_MAX + 16], threads[48], poll[48], device[32], part[48],
        cores[MOE_CORES_TEXT_BYTES + 16] = "--cores=";
    moe_backend_config backend;
    moe_status status = moe_backend_option(options, index, &backend, NULL, err);
    if (status != MOE_OK) return status;
    moe_machine_share share = moe_share_machine(options, workers);
    const char *argv[MOE_CHILD_MAX_ARGS];
    int n = 0;
    snprintf(name, sizeof name, "w%d", index);
    snprintf(id, sizeof id, "--id=%s", name);
    snprintf(cluster, sizeof cluster, "--cluster=%s", c->file.run_dir);
    snprintf(threads, sizeof threads, "--threads=%d", share.worker_threads);
    snprintf(poll, sizeof poll, "--poll-us=%lld", (long long)share.worker_poll_us);
    snprintf(device, sizeof device, "--devices=%d", backend.device);
    snprintf(part, sizeof part, "--share=%.12f", share_of_experts);
    const char *own[] = {c->self, "worker", c->file.model, id, cluster, threads, poll, device, part};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) argv[n++] = own[i];
    if (share.bind_workers && moe_cores_share(index, workers, cores + strlen(cores))) argv[n++] = cores;
    n += moe_options_pass_on(options, MOE_COMMAND_WORKER, own_options, argv + n, MOE_CHILD_MAX_ARGS - 1 - n);
    argv[n] = NULL;
    return moe_children_start(&c->children, name, argv, restart, err);
}
