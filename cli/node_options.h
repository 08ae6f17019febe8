/* From parsed options to the configurations of nodes: what several commands share. */
#pragma once
#include "cli/router_node.h"
#include "common/options.h"

/* The engine's settings, shared by serve, router and eval. */
void moe_engine_options(const moe_options *options, moe_router_node_config *config);

/* --placement: balanced, random:SEED or a file. INVALID_ARGUMENT for a bad seed. */
moe_status moe_placement_option(const moe_options *options, moe_router_node_config *config, moe_error *err);

/* --threads, where 0 means all of this machine's cores. */
int32_t moe_threads_option(const moe_options *options);

/* Threads of each of `processes` that share this machine: --threads where given, else an equal share of the cores, at least 1. */
int32_t moe_threads_share(const moe_options *options, int32_t processes);

/* Prints "moesaic: message" and returns the exit status of a command that failed. */
int moe_command_failed(const moe_error *err);
