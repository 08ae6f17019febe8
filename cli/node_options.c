#include "cli/node_options.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cores.h"
#include "cli/device_list.h"
#include "common/zmq/zmq_transport.h"

static const char random_prefix[] = "random:";

int32_t moe_threads_option(const moe_options *options) {
    int64_t wanted = moe_option_int(options, "threads");
    return wanted > 0 ? (int32_t)wanted : moe_cores_count();
}

int64_t moe_poll_us_option(const moe_options *options, int32_t processes) {
    int64_t wanted = moe_option_int(options, "poll-us");
    if (wanted >= 0) return wanted;
    return moe_cores_count() >= 2 * processes ? MOE_ZMQ_POLL_US : 0;
}

static int32_t at_least_1(int32_t n) { return n > 0 ? n : 1; }

moe_machine_share moe_share_machine(const moe_options *o, int32_t workers) {
    int32_t cores = moe_cores_count(), processes = workers + 1;
    bool cpu = strncmp(moe_option_text(o, "backend"), "cpu", strlen("cpu")) == 0,
         threads_given = moe_option_int(o, "threads") > 0;
    moe_machine_share share = {.in_turns = workers > 0 && cpu && cores < 2 * processes,
                               .router_threads = moe_threads_option(o),
                               .worker_threads = moe_threads_option(o),
                               .worker_poll_us = moe_poll_us_option(o, processes),
                               .micro_batches = (int32_t)moe_option_int(o, "micro-batches")};
    if (share.in_turns && share.micro_batches == 0) share.micro_batches = 1;
    if (threads_given) return share;
    share.bind_workers = share.in_turns;
    share.router_threads = share.in_turns ? cores : at_least_1(cores / processes);
    share.worker_threads = at_least_1(cores / (share.in_turns ? workers : processes));
    return share;
}

moe_model_source moe_model_option(const moe_options *o, const char *dir) {
    return (moe_model_source){
        .dir = dir,
        .dummy = strcmp(moe_option_text(o, "load-format"), "dummy") == 0,
        .generated = {.seed = (uint64_t)moe_option_int(o, "seed"), .num_layers = (int32_t)moe_option_int(o, "layers")}};
}

/* auto is bfloat16 on a GPU and float32 on the CPU. */
static moe_dtype dtype_option(const moe_options *o) {
    const char *wanted = moe_option_text(o, "dtype");
    if (strcmp(wanted, "auto") == 0) return strcmp(moe_option_text(o, "backend"), "cuda") == 0 ? MOE_BF16 : MOE_F32;
    return strcmp(wanted, moe_dtype_name(MOE_BF16)) == 0 ? MOE_BF16 : MOE_F32;
}

moe_backend_config moe_backend_option_on(const moe_options *o, int32_t device) {
    return (moe_backend_config){.name = moe_option_text(o, "backend"),
                                .threads = moe_threads_option(o),
                                .device = device,
                                .dtype = dtype_option(o),
                                .deterministic = moe_option_bool(o, "deterministic"),
                                .tune_file = moe_option_text(o, "tune-file")};
}

moe_status moe_backend_option(const moe_options *o, int32_t index, moe_backend_config *out, int32_t *num_devices,
                              moe_error *err) {
    moe_device_list devices;
    moe_status status = moe_device_list_parse(moe_option_text(o, "devices"), &devices, err);
    if (status != MOE_OK) return status;
    *out = moe_backend_option_on(o, devices.ids[index % devices.count]);
    if (num_devices) *num_devices = devices.count;
    return MOE_OK;
}

moe_status moe_router_device_option(const moe_options *o, int32_t *out, moe_error *err) {
    moe_device_list devices;
    moe_status status = moe_device_list_parse(moe_option_text(o, "devices"), &devices, err);
    *out = moe_option_given(o, "router-device") ? (int32_t)moe_option_int(o, "router-device") : devices.ids[0];
    return status;
}

/* Sums may differ in their last bits between placements, which only a profile that promises its bits minds. */
static moe_combine_mode combine_option(const moe_options *o) {
    const char *wanted = moe_option_text(o, "combine");
    bool sums = strcmp(moe_option_text(o, "backend"), "cuda") == 0 && !moe_option_bool(o, "deterministic");
    if (strcmp(wanted, "auto") == 0) return sums ? MOE_COMBINE_PARTIAL : MOE_COMBINE_EXACT;
    return strcmp(wanted, "partial") == 0 ? MOE_COMBINE_PARTIAL : MOE_COMBINE_EXACT;
}

moe_gating moe_gating_option(const moe_options *o) { return (moe_gating)moe_option_choice(o, "gating"); }

moe_status moe_dummy_routing_option(const moe_options *o, moe_dummy_routing_spec *out, moe_error *err) {
    const char *text = moe_option_text(o, "dummy-routing");
    *out = (moe_dummy_routing_spec){.on = false};
    return text ? moe_dummy_routing_text(o, text, out, err) : MOE_OK;
}

moe_status moe_dummy_routing_text(const moe_options *o, const char *text, moe_dummy_routing_spec *out, moe_error *err) {
    if (strcmp(moe_option_text(o, "load-format"), "dummy") != 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--dummy-routing %s: goes with --load-format dummy alone; here gates choose", text);
    if (moe_dummy_routing_parse(text, out, err) == MOE_OK) return MOE_OK;
    return moe_fail_prefix(err, MOE_INVALID_ARGUMENT, "--dummy-routing");
}

moe_status moe_memory_limit_parse(const char *name, const char *text, moe_memory_limit *out, moe_error *err) {
    char *end;
    *out = (moe_memory_limit){.bytes = 0};
    double percent = strtod(text, &end);
    if (end != text && strcmp(end, "%") == 0 && percent > 0 && percent <= 100) {
        out->part = percent / 100;
        return MOE_OK;
    }
    if (moe_option_parse_bytes(text, &out->bytes) && out->bytes > 0) return MOE_OK;
    return moe_fail(err, MOE_INVALID_ARGUMENT, "--%s: '%s' is neither a size such as 8GiB nor a percentage such as 25%%", name, text);
}

static moe_status memory_limit(const moe_options *o, const char *name, moe_memory_limit *out, moe_error *err) {
    const char *text = moe_option_text(o, name);
    *out = (moe_memory_limit){.bytes = 0};
    return text ? moe_memory_limit_parse(name, text, out, err) : MOE_OK;
}

moe_status moe_expert_budget_option(const moe_options *o, moe_expert_budget *out, moe_error *err) {
    const char *text = moe_option_exists(o, "expert-budget") ? moe_option_text(o, "expert-budget") : NULL; /* not for trace */
    *out = (moe_expert_budget){0};
    return text ? moe_expert_budget_parse(text, out, err) : MOE_OK;
}

moe_status moe_tier_option(const moe_options *o, moe_tier_options *out, moe_error *err) {
    *out = (moe_tier_options){.eviction = moe_option_text(o, "eviction"),
                              .cold = (moe_cold_experts)moe_option_choice(o, "cold-experts"),
                              .threaded = true};
    moe_status status = moe_expert_budget_option(o, &out->budget, err);
    if (status == MOE_OK) status = memory_limit(o, "device-memory", &out->device, err);
    return status == MOE_OK ? memory_limit(o, "host-memory", &out->host, err) : status;
}

moe_status moe_engine_options(const moe_options *o, moe_router_node_config *c, moe_error *err) {
    c->source = moe_model_option(o, moe_options_positional(o));
    c->source.pre_gates = moe_option_text(o, "pre-gates");
    c->local_steps = moe_option_choice(o, "local-steps") == 0;
    c->combine = combine_option(o);
    c->max_num_seqs = (int32_t)moe_option_int(o, "max-num-seqs");
    c->max_num_batched_tokens = (int32_t)moe_option_int(o, "max-num-batched-tokens");
    c->max_model_len = (int32_t)moe_option_int(o, "max-model-len");
    c->max_waiting = (int32_t)moe_option_int(o, "max-waiting");
    c->micro_batches = (int32_t)moe_option_int(o, "micro-batches");
    c->pipeline_degree = (int32_t)moe_option_int(o, "pipeline-degree");
    c->kv_cache_bytes = moe_option_int(o, "kv-cache-memory");
    c->replica_wait_ns = moe_option_ns(o, "replica-wait");
    c->poll_us = moe_poll_us_option(o, 1); /* of all processes of the machine only the engine's thread, where cores are few */
    moe_status status = moe_tier_option(o, &c->tiers, err);
    return status == MOE_OK ? moe_backend_option(o, 0, &c->backend, NULL, err) : status;
}

moe_balance_config moe_balance_options(const moe_options *o) {
    return (moe_balance_config){.automatic = moe_option_bool(o, "auto-placement"),
                                .interval_ns = moe_option_ns(o, "rebalance-interval"),
                                .dwell_ns = moe_option_ns(o, "rebalance-dwell"),
                                .load_half_life_ns = moe_option_ns(o, "load-half-life"),
                                .heal_after_ns = moe_option_ns(o, "heal-after"),
                                .hysteresis = moe_option_float(o, "rebalance-hysteresis"),
                                .redundant = (int32_t)moe_option_int(o, "redundant-experts"),
                                .max_moves = (int32_t)moe_option_int(o, "max-moves"),
                                .copy_from = (moe_copy_from)moe_option_choice(o, "copy-from")};
}

moe_status moe_placement_option(const moe_options *o, moe_router_node_config *c, moe_error *err) {
    const char *how = moe_option_text(o, "placement");
    c->layout = MOE_PLACEMENT_BALANCED;
    if (strcmp(how, "balanced") == 0) return MOE_OK;
    if (strncmp(how, random_prefix, sizeof random_prefix - 1) != 0) {
        c->layout = MOE_PLACEMENT_FILE;
        c->layout_file = how;
        if (access(how, R_OK) == 0) return MOE_OK;
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "--placement: '%s' is neither balanced nor random:SEED nor a readable file: %s", how, strerror(errno));
    }
    const char *seed = how + sizeof random_prefix - 1;
    char *end;
    c->layout = MOE_PLACEMENT_RANDOM;
    c->layout_seed = strtoull(seed, &end, 10);
    if (end != seed && *end == '\0') return MOE_OK;
    return moe_fail(err, MOE_INVALID_ARGUMENT, "--placement: '%s' is not a seed: a whole number", seed);
}

int moe_command_failed(const moe_error *err) {
    fprintf(stderr, "moesaic: %s\n", err->message);
    return 1;
}
