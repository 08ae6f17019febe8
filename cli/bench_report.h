/* What `moesaic bench` prints: a line per measurement as CSV, and a table of medians. */
#pragma once
#include <stdio.h>

#include "cli/bench.h"

#define MOE_BENCH_MAX_RUNS 101

/* All runs of one case with the experts in one place. */
typedef struct moe_bench_series {
    const char *experts; /* "inproc", "ipc", "tcp" */
    int32_t workers;     /* processes; 0: none */
    int32_t threads;     /* of each process */
    moe_bench_case c;
    int32_t num_runs;
    moe_bench_sample runs[MOE_BENCH_MAX_RUNS];
} moe_bench_series;

void moe_bench_csv_header(FILE *out);
void moe_bench_csv_run(FILE *out, const moe_bench_series *series, int32_t run);
/* Tokens per second (median, lowest, highest), milliseconds a token of one request, and medians of the stage times. */
void moe_bench_table(FILE *out, const moe_bench_series *series, int32_t count);
