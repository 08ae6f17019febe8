/* `moesaic bench`: the engine's speed, with the experts in its process, in workers over shared memory, over ipc, and
 * over tcp with CURVE. All of these stand side by side and take turns, so that what else the machine does falls on all alike. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/bench_report.h"
#include "cli/commands.h"
#include "cli/local_cluster.h"
#include "cli/node_options.h"
#include "cli/signals.h"
#include "common/alloc.h"
#include "common/log.h"

#define READY_POLL_NS (10 * MOE_NS_PER_MS)
#define STOP_TIMEOUT_NS (10 * MOE_NS_PER_S)
#define MAX_TARGETS 4
#define MAX_CONCURRENCIES 16
#define MAX_PREFILLS 8
#define MAX_CASES (MAX_CONCURRENCIES + MAX_PREFILLS)

/* One place where the experts are, and the engine that uses them there. */
typedef struct target {
    const char *name;
    int32_t workers, threads; /* worker processes; threads of each, or of the engine where there are none */
    moe_local_cluster cluster;
    moe_router_node *node;
} target;

typedef struct bench {
    const moe_options *options;
    target targets[MAX_TARGETS];
    int32_t num_targets;
    moe_bench_case cases[MAX_CASES];
    moe_bench_setting settings[MOE_BENCH_MAX_SETTINGS];
    int32_t num_cases, num_settings, runs;
    moe_bench_series *series; /* [num_settings, num_cases, num_targets] */
    FILE *csv;
} bench;

/* ---- what to measure ---- */

static moe_status add_target(bench *b, const char *name, size_t length, moe_error *err) {
    static const char *const names[MAX_TARGETS] = {"inproc", "shm", "ipc", "tcp"};
    for (int i = 0; i < MAX_TARGETS; i++) {
        if (strlen(names[i]) != length || strncmp(names[i], name, length) != 0) continue;
        for (int32_t t = 0; t < b->num_targets; t++)
            if (b->targets[t].name == names[i]) return MOE_OK;
        target *t = &b->targets[b->num_targets++];
        t->name = names[i];
        t->workers = i == 0 ? 0 : (int32_t)moe_option_int(b->options, "workers");
        t->threads = moe_share_machine(b->options, t->workers).worker_threads;
        return MOE_OK;
    }
    return moe_fail(err, MOE_INVALID_ARGUMENT, "--experts: '%.*s' is none of inproc, shm, ipc, tcp", (int)length, name);
}

/* A number of the list --`option`, of which there may be `room`; 0 after a failure. */
static int32_t list_number(const char *option, const char *text, size_t length, long most, int32_t room, moe_error *err) {
    char *end;
    long number = strtol(text, &end, 10);
    if (length == 0 || end != text + length || number < 1 || number > most) {
        moe_fail(err, MOE_INVALID_ARGUMENT, "--%s: '%.*s' is not a number from 1 to %ld", option, (int)length, text, most);
        return 0;
    }
    if (room <= 0) moe_fail(err, MOE_INVALID_ARGUMENT, "--%s: too many numbers", option);
    return room > 0 ? (int32_t)number : 0;
}

static moe_status add_prefill(bench *b, const char *text, size_t length, moe_error *err) {
    int32_t tokens = list_number("prefill-tokens", text, length, 1 << 20, MAX_CASES - b->num_cases, err);
    if (tokens == 0) return MOE_INVALID_ARGUMENT;
    b->cases[b->num_cases++] = (moe_bench_case){.requests = 1, .prompt_tokens = tokens, .output_tokens = 1};
    return MOE_OK;
}

static moe_status add_concurrency(bench *b, const char *text, size_t length, moe_error *err) {
    long most = (long)moe_option_int(b->options, "max-num-seqs");
    if (most > MOE_BENCH_MAX_REQUESTS) most = MOE_BENCH_MAX_REQUESTS;
    int32_t requests = list_number("concurrency", text, length, most, MAX_CONCURRENCIES - b->num_cases, err);
    if (requests == 0) return moe_fail_prefix(err, MOE_INVALID_ARGUMENT, "(see --max-num-seqs)");
    b->cases[b->num_cases++] = (moe_bench_case){.requests = requests,
                                                .prompt_tokens = (int32_t)moe_option_int(b->options, "prompt-tokens"),
                                                .output_tokens = (int32_t)moe_option_int(b->options, "output-tokens")};
    return MOE_OK;
}

/* Calls `add` for each part of a comma-separated list. */
static moe_status each_of(bench *b, const char *list, moe_status (*add)(bench *, const char *, size_t, moe_error *),
                          moe_error *err) {
    moe_status status = MOE_OK;
    for (const char *part = list; part && status == MOE_OK;) {
        size_t length = strcspn(part, ",");
        status = add(b, part, length, err);
        part = part[length] ? part + length + 1 : NULL;
    }
    return status;
}

static moe_status read_options(bench *b, moe_error *err) {
    const moe_options *o = b->options;
    const char *csv = moe_option_text(o, "csv");
    moe_status status = each_of(b, moe_option_text(o, "experts"), add_target, err);
    if (status == MOE_OK) status = each_of(b, moe_option_text(o, "concurrency"), add_concurrency, err);
    if (status == MOE_OK) status = each_of(b, moe_option_text(o, "prefill-tokens"), add_prefill, err);
    if (status != MOE_OK) return status;
    status = moe_bench_settings(o, b->settings, &b->num_settings, err);
    if (status != MOE_OK) return status;
    if (moe_option_text(o, "sweep") && (b->num_targets != 1 || strcmp(b->targets[0].name, "inproc") != 0))
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--sweep: settings change in this process alone: give --experts inproc");
    b->runs = (int32_t)moe_option_int(o, "runs");
    b->series = moe_calloc((size_t)b->num_settings * (size_t)b->num_cases * (size_t)b->num_targets, sizeof *b->series);
    if (!b->series) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    for (int32_t t = 0; t < b->num_targets; t++)
        if (strcmp(b->targets[t].name, "inproc") != 0 && b->targets[t].workers == 0)
            return moe_fail(err, MOE_INVALID_ARGUMENT, "--workers 0 measures nothing over %s: give --experts inproc",
                            b->targets[t].name);
    if (csv && !(b->csv = fopen(csv, "w"))) return moe_fail(err, MOE_UNAVAILABLE, "cannot write %s: %s", csv, strerror(errno));
    return MOE_OK;
}

/* ---- targets ---- */

static moe_status start_processes(const bench *b, target *t, moe_error *err) {
    moe_local_cluster_config config = {.model_dir = moe_options_positional(b->options),
                                       .ipc = strcmp(t->name, "ipc") == 0,
                                       .listen = strcmp(t->name, "tcp") == 0 ? "tcp://127.0.0.1:0" : NULL};
    moe_local_cluster *c = &t->cluster;
    moe_status status = moe_local_cluster_prepare(&config, c, err);
    if (status == MOE_OK) status = moe_local_cluster_start_redis(c, false, err);
    if (status == MOE_OK) status = moe_cluster_file_write(&c->file, &c->children, err);
    for (int32_t i = 0; i < t->workers && status == MOE_OK; i++)
        status = moe_local_cluster_start_worker(c, b->options, i, t->workers, 1.0 / t->workers, false, err);
    return status;
}

static moe_status open_node(const bench *b, target *t, moe_error *err) {
    moe_router_node_config config = {.skip_tokenizer = moe_option_bool(b->options, "skip-tokenizer-init"),
                                     .embedded = t->workers == 0,
                                     .store = {.address = t->cluster.file.redis, .cluster = "default"},
                                     .keys_dir = t->cluster.file.keys[0] ? t->cluster.file.keys : NULL,
                                     .cluster_uuid = t->workers ? t->cluster.file.uuid : NULL,
                                     .id = "bench",
                                     .replicas = 1,
                                     .initial_workers = t->workers,
                                     .new_cluster = true};
    moe_status status = moe_engine_options(b->options, &config, err);
    config.gating = b->settings[0].node.gating;
    config.dummy_routing = b->settings[0].node.dummy_routing;
    config.tiers.device = b->settings[0].node.device;
    for (int32_t s = 0; s < b->num_settings; s++) /* what any of them takes is opened, and measured for AUTO */
        if (b->settings[s].node.cold > config.tiers.cold) config.tiers.cold = b->settings[s].node.cold;
    if (status == MOE_OK) status = moe_router_device_option(b->options, &config.backend.device, err);
    if (status != MOE_OK) return status;
    config.skip_tokenizer = config.skip_tokenizer || config.source.dummy;
    moe_machine_share share = moe_share_machine(b->options, t->workers);
    config.backend.threads = share.router_threads;
    config.micro_batches = share.micro_batches;
    return moe_router_node_open(&config, &t->node, err);
}

static moe_status await_ready(target *t, moe_error *err) {
    while (!moe_router_node_ready(t->node)) {
        bool changed;
        const moe_child *gone = moe_children_tick(&t->cluster.children, moe_now_ns(moe_clock_real()), &changed);
        if (gone) return moe_fail(err, MOE_UNAVAILABLE, "%s ended before the cluster was ready", gone->name);
        if (moe_signals_wait(READY_POLL_NS)) return moe_fail(err, MOE_CANCELLED, "interrupted");
    }
    return MOE_OK;
}

static moe_status open_targets(bench *b, moe_error *err) {
    moe_status status = MOE_OK;
    for (int32_t i = 0; i < b->num_targets && status == MOE_OK; i++)
        if (b->targets[i].workers > 0) status = start_processes(b, &b->targets[i], err);
    for (int32_t i = 0; i < b->num_targets && status == MOE_OK; i++) status = open_node(b, &b->targets[i], err);
    for (int32_t i = 0; i < b->num_targets && status == MOE_OK; i++) status = await_ready(&b->targets[i], err);
    return status;
}

static void close_targets(bench *b) {
    for (int32_t i = 0; i < b->num_targets; i++) {
        target *t = &b->targets[i];
        moe_router_node_close(&t->node);
        moe_children_stop(&t->cluster.children, moe_now_ns(moe_clock_real()) + STOP_TIMEOUT_NS);
        if (t->cluster.file.run_dir[0]) moe_run_dir_remove(t->cluster.file.run_dir);
    }
}

/* ---- measuring ---- */

static int64_t device_used(const bench *b, const target *t) {
    moe_memory_info info;
    moe_error err;
    if (strcmp(moe_option_text(b->options, "backend"), "cuda") != 0 || moe_router_node_memory(t->node, &info, &err) != MOE_OK) return 0;
    return info.total_bytes - info.free_bytes;
}

static moe_status measure_one(bench *b, int32_t setting, int32_t round, int32_t index, int32_t target_index, moe_error *err) {
    const target *t = &b->targets[target_index];
    moe_bench_series *series = &b->series[(setting * b->num_cases + index) * b->num_targets + target_index];
    moe_bench_sample sample;
    series->setting = &b->settings[setting];
    series->experts = t->name;
    series->workers = t->workers;
    series->threads = t->threads;
    series->model = moe_router_node_model(t->node);
    series->kv_token_bytes = moe_router_node_kv_token_bytes(t->node);
    series->bounds = (moe_bench_bounds){moe_option_float(b->options, "measured-bandwidth") * 1e9,
                                        moe_option_float(b->options, "measured-rate") * 1e12};
    series->c = b->cases[index];
    series->c.seed = (uint64_t)(round + 1);
    moe_status status = moe_bench_run(moe_router_node_inference(t->node), &series->c, &sample, err);
    if (status != MOE_OK || round < 0) return status;
    series->runs[series->num_runs++] = sample;
    series->device_used_bytes = device_used(b, t);
    if (b->csv) moe_bench_csv_run(b->csv, series, round);
    return MOE_OK;
}

/* Changes the node of a sweep, which has one. */
static moe_status apply_setting(bench *b, int32_t setting, moe_error *err) {
    double rate;
    if (!moe_option_text(b->options, "sweep")) return MOE_OK;
    moe_status status = moe_router_node_set(b->targets[0].node, &b->settings[setting].node, &rate, err);
    for (int32_t i = 0; i < b->num_cases; i++) b->series[setting * b->num_cases + i].copy_bytes_per_s = rate;
    return status;
}

/* One warming round, then those that count: each in turn with all cases and places. */
static moe_status measure_setting(bench *b, int32_t setting, moe_error *err) {
    bool show = isatty(STDERR_FILENO);
    moe_status status = apply_setting(b, setting, err);
    for (int32_t round = -1; round < b->runs && status == MOE_OK; round++) {
        if (show) fprintf(stderr, "\rbench: setting %d of %d, round %d of %d ", setting + 1, b->num_settings, round + 1, b->runs);
        for (int32_t i = 0; i < b->num_cases && status == MOE_OK; i++)
            for (int32_t t = 0; t < b->num_targets && status == MOE_OK; t++) status = measure_one(b, setting, round, i, t, err);
    }
    if (show) fputc('\n', stderr);
    return status;
}

static moe_status measure_all(bench *b, moe_error *err) {
    moe_status status = MOE_OK;
    if (b->csv) moe_bench_csv_header(b->csv);
    for (int32_t s = 0; s < b->num_settings && status == MOE_OK; s++) status = measure_setting(b, s, err);
    return status;
}

static void print_tables(const bench *b) {
    int32_t each = b->num_cases * b->num_targets;
    for (int32_t s = 0; s < b->num_settings; s++) {
        const moe_bench_setting *setting = &b->settings[s];
        if (b->num_settings > 1)
            printf("%s%s, %s of the experts on the device, cold experts: %s, %s\n", s ? "\n" : "", setting->gating,
                   setting->device_memory[0] ? setting->device_memory : "all", setting->cold_experts, setting->dummy_routing);
        moe_bench_tables(stdout, b->series + s * each, each);
    }
}

/* --tune: nothing else is measured. */
static int tune(const moe_options *o) {
    moe_error err;
    moe_model *model = NULL;
    moe_backend_config backend;
    moe_model_source source = moe_model_option(o, moe_options_positional(o));
    moe_status status = moe_backend_option(o, 0, &backend, NULL, &err);
    if (status == MOE_OK) status = moe_model_source_open(&source, &model, &err);
    if (status == MOE_OK) status = moe_backend_tune(&backend, &model->config, &err);
    moe_model_close(&model);
    if (status != MOE_OK) return moe_command_failed(&err);
    printf("thresholds for this model's experts are in %s\n", backend.tune_file);
    return 0;
}

int moe_command_bench(const moe_options *o) {
    static bench b; /* large, and one per process */
    moe_error err;
    if (moe_option_bool(o, "tune")) return tune(o);
    b.options = o;
    if (!moe_option_given(o, "log-level")) {
        moe_log_init(MOE_LOG_WARN, "bench");
        setenv("MOESAIC_LOG_LEVEL", "warn", 0); /* for the workers */
    }
    moe_signals_block();
    moe_status status = read_options(&b, &err);
    if (status == MOE_OK) status = open_targets(&b, &err);
    if (status == MOE_OK) status = measure_all(&b, &err);
    if (status == MOE_OK) print_tables(&b);
    close_targets(&b);
    if (b.csv && fclose(b.csv) != 0 && status == MOE_OK)
        status = moe_fail(&err, MOE_UNAVAILABLE, "cannot write %s: %s", moe_option_text(o, "csv"), strerror(errno));
    moe_free(b.series);
    return status == MOE_OK ? 0 : moe_command_failed(&err);
}
