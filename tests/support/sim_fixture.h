/* What the tests on a simulated cluster share: a tiny model with the tokens that transformers generates with it, and the oracles.
 *   O1 the tokens of a request are those of the fault-free run, which are transformers' (expected.json): sim_check
 *   O2 every accepted request gets exactly one terminal event: sim_check
 *   O3 memory, descriptors and threads return to what they were: sim_free and the sanitizer builds
 *   O4 the epoch never falls, every published map has a READY replica of each expert: on_map of sim_cluster.c, told by sim_check
 */
#pragma once
#include "tests/support/sim_cluster.h"

#define SIM_PROMPT_TOKENS 40
#define SIM_GREEDY_TOKENS 24

typedef struct sim_fixture {
    moe_model *model;
    moe_backend *backend, *reference; /* cpu, cpu-ref; without threads */
    int32_t prompt[SIM_PROMPT_TOKENS], greedy[SIM_GREEDY_TOKENS];
} sim_fixture;

extern sim_fixture sim_fx;

/* CMocka's group set-up and tear-down. Logs are off, unless MOESAIC_SIM_SHOW is set. */
int sim_fixture_open(void **state);
int sim_fixture_close(void **state);

/* 3 workers, 2 replicas, 2 micro-batches. */
sim_config sim_fixture_config(uint64_t seed);

/* Submits the fixture's prompt so many times, to router 0. */
void sim_submit_greedy(sim_cluster *sim, int32_t count);

/* O1, O2 and O4 over the requests from `first` on, all of which have ended. Those that failed did so for want of replicas, or
 * because their router went away. Returns how many got all their tokens. */
int32_t sim_check(const sim_cluster *sim, int32_t first);
/* And none failed. */
void sim_check_all_right(const sim_cluster *sim, int32_t first);
