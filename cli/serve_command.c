/* `moesaic serve`: a whole cluster on this machine. This process supervises: it starts a private Redis, a router and expert
 * workers, starts again what dies, and stops them in order. With --workers 0 it is the router itself. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cli/cluster_file.h"
#include "cli/commands.h"
#include "cli/implementations.h"
#include "cli/node_options.h"
#include "cli/option_table.h"
#include "cli/signals.h"
#include "common/log.h"
#include "common/zmq/zmq_transport.h"

#define TICK_NS (20 * MOE_NS_PER_MS)
#define REDIS_START_TIMEOUT_NS (10 * MOE_NS_PER_S)
#define STOP_MARGIN_NS (5 * MOE_NS_PER_S) /* beyond --shutdown-timeout, for the processes after the router */

typedef enum restart_policy { RESTART_NEVER, RESTART_WORKERS, RESTART_ALL } restart_policy;

typedef struct supervisor {
    const moe_options *options;
    moe_cluster_file file;
    moe_children children;
    char self[PATH_MAX]; /* the moesaic program */
    int workers, threads_each;
    restart_policy restart;
} supervisor;

static moe_status check_options(const moe_options *o, int workers, moe_error *err) {
    const char *transport = moe_option_text(o, "transport");
    int64_t replicas = moe_option_int(o, "replicas");
    if (strcmp(transport, "shm") == 0)
        return moe_fail(err, MOE_UNIMPLEMENTED, "--transport shm: this version has no shared-memory transport; use auto or zmq");
    if (strcmp(transport, "inproc") == 0 && workers > 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "--transport inproc reaches experts in the router's process only: use it with --workers 0");
    if (strcmp(transport, "zmq") == 0 && workers == 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--transport zmq needs expert workers: --workers 1 or more");
    if (replicas > workers && !(workers == 0 && replicas == 1))
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "--replicas %lld: each replica of an expert needs a worker of its own, and --workers is %d",
                        (long long)replicas, workers);
    return MOE_OK;
}

/* ---- run folder, keys, cluster.json ---- */

static moe_status absolute_path(const char *path, char out[PATH_MAX], moe_error *err) {
    return realpath(path, out) ? MOE_OK : moe_fail(err, MOE_NOT_FOUND, "cannot find %s: %s", path, strerror(errno));
}

static moe_status prepare_keys(supervisor *s, moe_error *err) {
    const char *listen = moe_option_text(s->options, "listen"), *keys = moe_option_text(s->options, "keys");
    snprintf(s->file.listen, sizeof s->file.listen, "%s", listen ? listen : "ipc");
    if (listen && strncmp(listen, "tcp:", 4) != 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "--listen %s: serve takes tcp://host:0 here; without it workers get ipc sockets in the run folder",
                        listen);
    if (keys) return absolute_path(keys, s->file.keys, err);
    if (!listen) return MOE_OK;
    snprintf(s->file.keys, sizeof s->file.keys, "%.4080s/keys", s->file.run_dir);
    if (access(s->file.keys, F_OK) == 0) return MOE_OK;
    return moe_curve_keys_write(s->file.keys, err);
}

static moe_status prepare(supervisor *s, moe_error *err) {
    const moe_options *o = s->options;
    ssize_t length = readlink("/proc/self/exe", s->self, sizeof s->self - 1);
    if (length < 0) return moe_fail(err, MOE_INTERNAL, "cannot read /proc/self/exe: %s", strerror(errno));
    s->self[length] = '\0';
    moe_status status = absolute_path(moe_options_positional(o), s->file.model, err);
    if (status == MOE_OK) status = moe_run_dir_make(moe_option_text(o, "run-dir"), s->file.run_dir, err);
    if (status == MOE_OK) status = prepare_keys(s, err);
    if (status != MOE_OK) return status;
    moe_uuid_make(s->file.uuid);
    snprintf(s->file.redis, sizeof s->file.redis, "unix:%.4000s/redis.sock", s->file.run_dir);
    snprintf(s->file.router, sizeof s->file.router, "ipc://%.4000s/router.sock", s->file.run_dir);
    snprintf(s->file.url, sizeof s->file.url, "http://%s:%s", moe_option_text(o, "host"), moe_option_text(o, "port"));
    return MOE_OK;
}

/* ---- children ---- */

static moe_status start_redis(supervisor *s, moe_error *err) {
    const char *socket = s->file.redis + strlen("unix:");
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
                          s->file.run_dir,
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
    moe_status status = moe_children_start(&s->children, "redis", argv, s->restart == RESTART_ALL, err);
    int64_t until = moe_now_ns(moe_clock_real()) + REDIS_START_TIMEOUT_NS;
    while (status == MOE_OK && access(socket, F_OK) != 0) {
        bool changed;
        if (moe_children_tick(&s->children, moe_now_ns(moe_clock_real()), &changed) || moe_now_ns(moe_clock_real()) > until)
            return moe_fail(err, MOE_UNAVAILABLE, "Redis did not start; see %s/redis.log", s->file.run_dir);
        if (moe_signals_wait(TICK_NS)) return moe_fail(err, MOE_CANCELLED, "interrupted");
    }
    return status;
}

/* What every child is told on its own; the rest of what was given to serve is passed on as it is. */
static const char *const own_options[] = {"listen", "keys", "threads", "port", "host", NULL};

static moe_status start_router(supervisor *s, moe_error *err) {
    char store[PATH_MAX + 16], listen[PATH_MAX + 16], keys[PATH_MAX + 16], workers[48], threads[48], port[48], host[300];
    const char *argv[MOE_CHILD_MAX_ARGS];
    int n = 0;
    snprintf(store, sizeof store, "--store=%s", s->file.redis);
    snprintf(listen, sizeof listen, "--listen=%s", s->file.router);
    snprintf(keys, sizeof keys, "--keys=%s", s->file.keys);
    snprintf(workers, sizeof workers, "--initial-workers=%d", s->workers);
    snprintf(threads, sizeof threads, "--threads=%d", s->threads_each);
    snprintf(port, sizeof port, "--port=%s", moe_option_text(s->options, "port"));
    snprintf(host, sizeof host, "--host=%s", moe_option_text(s->options, "host"));
    const char *own[] = {s->self, "router", s->file.model, "--id=r0", store, listen, workers, threads, port, host};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) argv[n++] = own[i];
    if (s->file.keys[0]) argv[n++] = keys;
    n += moe_options_pass_on(s->options, MOE_COMMAND_ROUTER, own_options, argv + n, MOE_CHILD_MAX_ARGS - 1 - n);
    argv[n] = NULL;
    return moe_children_start(&s->children, "router", argv, s->restart == RESTART_ALL, err);
}

static moe_status start_worker(supervisor *s, int index, moe_error *err) {
    char name[16], id[32], cluster[PATH_MAX + 16], threads[48];
    const char *argv[MOE_CHILD_MAX_ARGS];
    int n = 0;
    snprintf(name, sizeof name, "w%d", index);
    snprintf(id, sizeof id, "--id=%s", name);
    snprintf(cluster, sizeof cluster, "--cluster=%s", s->file.run_dir);
    snprintf(threads, sizeof threads, "--threads=%d", s->threads_each);
    const char *own[] = {s->self, "worker", s->file.model, id, cluster, threads};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) argv[n++] = own[i];
    n += moe_options_pass_on(s->options, MOE_COMMAND_WORKER, own_options, argv + n, MOE_CHILD_MAX_ARGS - 1 - n);
    argv[n] = NULL;
    return moe_children_start(&s->children, name, argv, s->restart != RESTART_NEVER, err);
}

/* Stopped in reverse: the router drains while its workers still answer. */
static moe_status start_all(supervisor *s, moe_error *err) {
    moe_status status = start_redis(s, err);
    if (status != MOE_OK) return status;
    setenv("MOESAIC_SERVE_RUN_DIR", s->file.run_dir, 1);
    setenv("MOESAIC_SERVE_CLUSTER_UUID", s->file.uuid, 1);
    status = moe_cluster_file_write(&s->file, &s->children, err);
    for (int i = 0; i < s->workers && status == MOE_OK; i++) status = start_worker(s, i, err);
    if (status == MOE_OK) status = start_router(s, err);
    if (status == MOE_OK) status = moe_cluster_file_write(&s->file, &s->children, err);
    return status;
}

/* ---- supervision ---- */

/* True when the cluster cannot go on: its router or Redis ended for good. */
static bool is_fatal(const moe_child *gone) {
    char why[64];
    moe_child_describe_exit(gone, why, sizeof why);
    moe_error_log("%s ended: %s", gone->name, why);
    return strcmp(gone->name, "router") == 0 || strcmp(gone->name, "redis") == 0;
}

/* A router that ends quickly with an exit status of its own has said why on standard error; starting it again would not help. */
static bool never_started(const supervisor *s) {
    for (int i = 0; i < s->children.count; i++) {
        const moe_child *c = &s->children.items[i];
        if (c->pid == 0 && c->restart && strcmp(c->name, "router") == 0 && c->exit_status != 0 && !WIFSIGNALED(c->exit_status) &&
            c->backoff_ns <= 2 * MOE_CHILD_BACKOFF_FIRST_NS)
            return true;
    }
    return false;
}

static int supervise(supervisor *s) {
    moe_error err;
    for (;;) {
        if (moe_signals_wait(TICK_NS)) return 0;
        bool changed = false;
        const moe_child *gone = moe_children_tick(&s->children, moe_now_ns(moe_clock_real()), &changed);
        if ((gone && is_fatal(gone)) || never_started(s)) return 1;
        if (changed && moe_cluster_file_write(&s->file, &s->children, &err) != MOE_OK) moe_warn("%s", err.message);
    }
}

static int serve_cluster(supervisor *s, moe_error *err) {
    int exit_status = 1;
    moe_status status = prepare(s, err);
    if (status == MOE_OK) status = start_all(s, err);
    if (status == MOE_OK) {
        printf("serving %s on %s; run folder %s\nadd a worker: %s worker --cluster %s\n", s->file.model, s->file.url,
               s->file.run_dir, s->self, s->file.run_dir);
        fflush(stdout);
        exit_status = supervise(s);
    } else if (status != MOE_CANCELLED) {
        exit_status = moe_command_failed(err);
    }
    int64_t wait = moe_option_ns(s->options, "shutdown-timeout") + STOP_MARGIN_NS;
    moe_children_stop(&s->children, moe_now_ns(moe_clock_real()) + wait);
    if (!moe_option_text(s->options, "run-dir") && s->file.run_dir[0]) moe_run_dir_remove(s->file.run_dir);
    return exit_status;
}

/* --workers 0: this process becomes the router. */
static int become_router(const supervisor *s, moe_error *err) {
    const char *argv[MOE_CHILD_MAX_ARGS] = {s->self, "router", moe_options_positional(s->options), "--id=r0"};
    static const char *const none[] = {"listen", "keys", NULL};
    int n = 4;
    n += moe_options_pass_on(s->options, MOE_COMMAND_ROUTER, none, argv + n, MOE_CHILD_MAX_ARGS - 1 - n);
    argv[n] = NULL;
    execv(s->self, (char *const *)argv);
    moe_fail(err, MOE_INTERNAL, "cannot start %s: %s", s->self, strerror(errno));
    return moe_command_failed(err);
}

int moe_command_serve(const moe_options *o) {
    static supervisor s; /* large, and one per process */
    moe_error err;
    s.options = o;
    s.workers = (int)moe_option_int(o, "workers");
    s.restart = (restart_policy)moe_option_choice(o, "restart");
    if (check_options(o, s.workers, &err) != MOE_OK) return moe_command_failed(&err);
    int32_t cores = moe_threads_option(o);
    s.threads_each = moe_option_given(o, "threads") ? cores : cores / (s.workers + 1) > 0 ? cores / (s.workers + 1) : 1;
    if (s.workers == 0) {
        ssize_t length = readlink("/proc/self/exe", s.self, sizeof s.self - 1);
        s.self[length > 0 ? length : 0] = '\0';
        return become_router(&s, &err);
    }
    moe_signals_block();
    return serve_cluster(&s, &err);
}
