/* What `moesaic bench` prints: a line per measurement as CSV, and tables of medians. */
#pragma once
#include <stdio.h>

#include "cli/bench.h"
#include "cli/bench_floor.h"
#include "cli/bench_sweep.h"

#define MOE_BENCH_MAX_RUNS 101

/* All runs of one case with the experts in one place. */
typedef struct moe_bench_series {
    const char *experts; /* "inproc", "shm", "ipc", "tcp" */
    int32_t workers;     /* processes; 0: none */
    int32_t threads;     /* of each process */
    moe_bench_case c;
    const moe_model *model;  /* borrowed, as long as the series is reported */
    int64_t kv_token_bytes;  /* keys and values of a token in all layers */
    moe_bench_bounds bounds; /* of the machine */
    const moe_bench_setting *setting; /* borrowed */
    double copy_bytes_per_s;          /* whole experts from host memory to the device; 0: not measured */
    int64_t device_used_bytes;        /* of a GPU's memory, by whomever, at the end of the newest run; 0 elsewhere */
    int32_t num_runs;
    moe_bench_sample runs[MOE_BENCH_MAX_RUNS];
} moe_bench_series;

void moe_bench_csv_header(FILE *out);
void moe_bench_csv_run(FILE *out, const moe_bench_series *series, int32_t run);
/* Tokens per second (median, lowest, highest), milliseconds a token of one request, the floor of that where bounds are known,
 * distinct experts of a layer, bytes on the wire for a token; then medians of the stage times. */
void moe_bench_tables(FILE *out, const moe_bench_series *series, int32_t count);
