/* `moesaic serve`: a whole cluster on this machine. This process supervises: it starts a private Redis, a router and expert
 * workers, starts again what dies, and stops them in order. With --workers 0 it is the router itself. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cli/commands.h"
#include "cli/local_cluster.h"
#include "cli/node_options.h"
#include "cli/option_table.h"
#include "cli/signals.h"
#include "common/log.h"

#define TICK_NS (20 * MOE_NS_PER_MS)
#define STOP_MARGIN_NS (5 * MOE_NS_PER_S) /* beyond --shutdown-timeout, for the processes after the router */

typedef enum restart_policy { RESTART_NEVER, RESTART_WORKERS, RESTART_ALL } restart_policy;

typedef struct supervisor {
    const moe_options *options;
    moe_local_cluster cluster;
    int workers;
    restart_policy restart;
} supervisor;

static moe_status check_options(const moe_options *o, int workers, moe_error *err) {
    const char *transport = moe_option_text(o, "transport");
    int64_t replicas = moe_option_int(o, "replicas");
    if (strcmp(transport, "shm") == 0 && moe_option_given(o, "listen"))
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "--transport shm and --listen: tcp endpoints are not in shared memory; give one of the two");
    if (strcmp(transport, "inproc") == 0 && workers > 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "--transport inproc reaches experts in the router's process only: use it with --workers 0");
    if ((strcmp(transport, "zmq") == 0 || strcmp(transport, "shm") == 0) && workers == 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--transport %s needs expert workers: --workers 1 or more", transport);
    if (replicas > workers && !(workers == 0 && replicas == 1))
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "--replicas %lld: each replica of an expert needs a worker of its own, and --workers is %d",
                        (long long)replicas, workers);
    return MOE_OK;
}

static moe_status prepare(supervisor *s, moe_error *err) {
    const moe_options *o = s->options;
    moe_local_cluster_config config = {.model_dir = moe_options_positional(o),
                                       .run_dir = moe_option_text(o, "run-dir"),
                                       .listen = moe_option_text(o, "listen"),
                                       .ipc = strcmp(moe_option_text(o, "transport"), "zmq") == 0,
                                       .keys = moe_option_text(o, "keys")};
    moe_status status = moe_local_cluster_prepare(&config, &s->cluster, err);
    snprintf(s->cluster.file.url, sizeof s->cluster.file.url, "http%s://%s:%s",
             moe_option_text(o, "ssl-certfile") ? "s" : "", moe_option_text(o, "host"), moe_option_text(o, "port"));
    return status;
}

/* ---- children ---- */

/* What the router is told on its own; the rest of what was given to serve is passed on as it is. */
static const char *const own_options[] = {"listen", "keys", "threads", "micro-batches", "port", "host", "devices", NULL};

static moe_status start_router(supervisor *s, moe_error *err) {
    char store[PATH_MAX + 16], listen[PATH_MAX + 16], keys[PATH_MAX + 16], workers[48], threads[48], batches[48], port[48],
        host[300], devices[32], password[PATH_MAX + 64];
    moe_machine_share share = moe_share_machine(s->options, s->workers);
    const char *argv[MOE_CHILD_MAX_ARGS];
    int32_t device;
    int n = 0;
    moe_status status = moe_router_device_option(s->options, &device, err);
    if (status != MOE_OK) return status;
    snprintf(store, sizeof store, "--store=%s", s->cluster.file.redis);
    snprintf(listen, sizeof listen, "--listen=%s", s->cluster.file.router);
    snprintf(keys, sizeof keys, "--keys=%s", s->cluster.file.keys);
    snprintf(workers, sizeof workers, "--initial-workers=%d", s->workers);
    snprintf(threads, sizeof threads, "--threads=%d", share.router_threads);
    snprintf(batches, sizeof batches, "--micro-batches=%d", share.micro_batches);
    snprintf(port, sizeof port, "--port=%s", moe_option_text(s->options, "port"));
    snprintf(host, sizeof host, "--host=%s", moe_option_text(s->options, "host"));
    snprintf(devices, sizeof devices, "--devices=%d", device);
    snprintf(password, sizeof password, "--redis-password-file=%s/redis-router.password", s->cluster.file.run_dir);
    const char *own[] = {
        s->cluster.self, "router", s->cluster.file.model, "--id=r0", "--redis-username=router", password, store, listen, workers,
        threads, batches, port, host, devices};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) argv[n++] = own[i];
    if (s->cluster.file.keys[0]) argv[n++] = keys;
    n += moe_options_pass_on(s->options, MOE_COMMAND_ROUTER, own_options, argv + n, MOE_CHILD_MAX_ARGS - 1 - n);
    argv[n] = NULL;
    return moe_children_start(&s->cluster.children, "router", argv, s->restart == RESTART_ALL, err);
}

/* Stopped in reverse: the router drains while its workers still answer. */
static moe_status start_all(supervisor *s, moe_error *err) {
    moe_status status = moe_local_cluster_start_redis(&s->cluster, s->restart == RESTART_ALL, err);
    if (status != MOE_OK) return status;
    setenv("MOESAIC_SERVE_RUN_DIR", s->cluster.file.run_dir, 1);
    setenv("MOESAIC_SERVE_CLUSTER_UUID", s->cluster.file.uuid, 1);
    status = moe_cluster_file_write(&s->cluster.file, &s->cluster.children, err);
    double replicas = (double)moe_option_int(s->options, "replicas");
    for (int i = 0; i < s->workers && status == MOE_OK; i++)
        status = moe_local_cluster_start_worker(&s->cluster, s->options, i, s->workers, replicas / s->workers,
                                                s->restart != RESTART_NEVER, err);
    setenv("MOESAIC_SERVE_NEW_CLUSTER", "1", 1); /* for this start only: a router that is started again may find an older map */
    if (status == MOE_OK) status = start_router(s, err);
    unsetenv("MOESAIC_SERVE_NEW_CLUSTER");
    if (status == MOE_OK) status = moe_cluster_file_write(&s->cluster.file, &s->cluster.children, err);
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

/* A process that refused its settings, or a router that ends quickly with an exit status of its own, has said why on standard error;
 * starting it again would not help. */
static bool never_started(const supervisor *s) {
    for (int i = 0; i < s->cluster.children.count; i++) {
        const moe_child *c = &s->cluster.children.items[i];
        if (c->pid == 0 && WIFEXITED(c->exit_status) && WEXITSTATUS(c->exit_status) == MOE_EXIT_REFUSED) return true;
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
        const moe_child *gone = moe_children_tick(&s->cluster.children, moe_now_ns(moe_clock_real()), &changed);
        if ((gone && is_fatal(gone)) || never_started(s)) return 1;
        if (changed && moe_cluster_file_write(&s->cluster.file, &s->cluster.children, &err) != MOE_OK)
            moe_warn("%s", err.message);
    }
}

static int serve_cluster(supervisor *s, moe_error *err) {
    int exit_status = 1;
    moe_status status = prepare(s, err);
    if (status == MOE_OK) status = start_all(s, err);
    if (status == MOE_OK) {
        printf("serving %s on %s; run folder %s\nadd a worker: %s worker --cluster %s\n", s->cluster.file.model,
               s->cluster.file.url, s->cluster.file.run_dir, s->cluster.self, s->cluster.file.run_dir);
        fflush(stdout);
        exit_status = supervise(s);
    } else if (status != MOE_CANCELLED) {
        exit_status = moe_command_failed(err);
    }
    int64_t wait = moe_option_ns(s->options, "shutdown-timeout") + STOP_MARGIN_NS;
    moe_children_stop(&s->cluster.children, moe_now_ns(moe_clock_real()) + wait);
    if (!moe_option_text(s->options, "run-dir") && s->cluster.file.run_dir[0]) moe_run_dir_remove(s->cluster.file.run_dir);
    return exit_status;
}

/* --workers 0: this process becomes the router. */
static int become_router(const supervisor *s, moe_error *err) {
    const char *argv[MOE_CHILD_MAX_ARGS] = {s->cluster.self, "router", moe_options_positional(s->options), "--id=r0"};
    static const char *const none[] = {"listen", "keys", "devices", NULL};
    char devices[32];
    int32_t device;
    int n = 4;
    if (moe_router_device_option(s->options, &device, err) != MOE_OK) return moe_command_failed(err);
    snprintf(devices, sizeof devices, "--devices=%d", device);
    argv[n++] = devices;
    n += moe_options_pass_on(s->options, MOE_COMMAND_ROUTER, none, argv + n, MOE_CHILD_MAX_ARGS - 1 - n);
    argv[n] = NULL;
    execv(s->cluster.self, (char *const *)argv);
    moe_fail(err, MOE_INTERNAL, "cannot start %s: %s", s->cluster.self, strerror(errno));
    return moe_command_failed(err);
}

int moe_command_serve(const moe_options *o) {
    static supervisor s; /* large, and one per process */
    moe_error err;
    s.options = o;
    s.workers = (int)moe_option_int(o, "workers");
    s.restart = (restart_policy)moe_option_choice(o, "restart");
    if (check_options(o, s.workers, &err) != MOE_OK) return moe_command_failed(&err);
    if (s.workers == 0) {
        ssize_t length = readlink("/proc/self/exe", s.cluster.self, sizeof s.cluster.self - 1);
        s.cluster.self[length > 0 ? length : 0] = '\0';
        return become_router(&s, &err);
    }
    moe_signals_block();
    return serve_cluster(&s, &err);
}
