/* From parsed options to the configurations of nodes: what several commands share. */
#pragma once
#include "cli/router_node.h"
#include "common/options.h"

/* The settings of model, backend and engine but --gating, for the commands that run an engine; the model is the command's argument.
 * INVALID_ARGUMENT: --devices. */
moe_status moe_engine_options(const moe_options *options, moe_router_node_config *config, moe_error *err);

moe_gating moe_gating_option(const moe_options *options);

/* --dummy-routing; off where it is not given. INVALID_ARGUMENT. */
moe_status moe_dummy_routing_option(const moe_options *options, moe_dummy_routing_spec *out, moe_error *err);
/* The same for a text from elsewhere. */
moe_status moe_dummy_routing_text(const moe_options *options, const char *text, moe_dummy_routing_spec *out, moe_error *err);

/* --load-format, --layers, --seed; dir is borrowed. */
moe_model_source moe_model_option(const moe_options *options, const char *dir);

/* --backend and what belongs to it, for the i-th of --devices, which are taken in turn (--threads: moe_threads_option).
 * *num_devices (may be NULL) receives how many there are. INVALID_ARGUMENT. */
moe_status moe_backend_option(const moe_options *options, int32_t index, moe_backend_config *out, int32_t *num_devices,
                              moe_error *err);

/* The same for a device that was found otherwise. */
moe_backend_config moe_backend_option_on(const moe_options *options, int32_t device);

/* --router-device, else the first of --devices. INVALID_ARGUMENT. */
moe_status moe_router_device_option(const moe_options *options, int32_t *out, moe_error *err);

/* How experts move, for commands with the Placement options. */
moe_balance_config moe_balance_options(const moe_options *options);

/* --placement: balanced, random:SEED or a file. INVALID_ARGUMENT for a bad seed. */
moe_status moe_placement_option(const moe_options *options, moe_router_node_config *config, moe_error *err);

/* --threads, where 0 means all of this machine's cores. */
int32_t moe_threads_option(const moe_options *options);

/* How a router and its workers share this machine. With two cores for each process they have equal parts, and while workers
 * compute for one micro-batch the router computes another. On fewer, and where the CPU computes, they take turns: one
 * micro-batch, a router of as many threads as cores, and each worker on cores of its own where there is one for each. --threads
 * (of every process; no worker is bound then) and --micro-batches come first. */
typedef struct moe_machine_share {
    bool in_turns, bind_workers;
    int32_t router_threads, worker_threads;
    int32_t micro_batches; /* 0: as the router likes */
    int64_t worker_poll_us;
} moe_machine_share;
moe_machine_share moe_share_machine(const moe_options *options, int32_t workers);

/* --poll-us, where -1 means: MOE_ZMQ_POLL_US where this machine has two cores or more for each of `processes`, that of the thread
 * that polls and one for who answers it; else 0. */
int64_t moe_poll_us_option(const moe_options *options, int32_t processes);

/* Prints "moesaic: message" and returns the exit status of a command that failed. */
int moe_command_failed(const moe_error *err);

/* "8GiB" or "25%", as the value of --`name`. INVALID_ARGUMENT. */
moe_status moe_memory_limit_parse(const char *name, const char *text, moe_memory_limit *out, moe_error *err);

/* --expert-budget. INVALID_ARGUMENT. */
moe_status moe_expert_budget_option(const moe_options *options, moe_expert_budget *out, moe_error *err);

/* --device-memory, --host-memory, --eviction, --cold-experts, --expert-budget; the text is borrowed from the options.
 * INVALID_ARGUMENT. */
moe_status moe_tier_option(const moe_options *options, moe_tier_options *out, moe_error *err);
