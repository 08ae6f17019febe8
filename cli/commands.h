/* The commands. Each takes parsed options and returns the process's exit status. */
#pragma once
#include "common/options.h"

/* Exit status of a worker that found itself defective: a lost device, or a known-answer batch that failed (EX_SOFTWARE). */
#define MOE_EXIT_DEFECTIVE 70
#define MOE_EXIT_REFUSED 64 /* of a worker: its settings cannot work, and starting it again would not help */

int moe_command_serve(const moe_options *options);
int moe_command_router(const moe_options *options);
int moe_command_worker(const moe_options *options);
int moe_command_chat(const moe_options *options);
int moe_command_status(const moe_options *options);
int moe_command_eval(const moe_options *options);
int moe_command_train_pregate(const moe_options *options);
int moe_command_trace(const moe_options *options);
int moe_command_trace_replay(const moe_options *options);
int moe_command_keygen(const moe_options *options);
int moe_command_digest(const moe_options *options);
int moe_command_bench(const moe_options *options);
int moe_command_placement(const moe_options *options);
int moe_command_move(const moe_options *options);
int moe_command_replicate(const moe_options *options);
int moe_command_drain(const moe_options *options);
int moe_command_undrain(const moe_options *options);
int moe_command_rebalance(const moe_options *options);
int moe_command_health(const moe_options *options);

/* Parses argv (argv[0] is the command's name) and runs the command: the whole of each main. */
int moe_run_command(int argc, char **argv);
