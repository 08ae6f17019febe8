/* Replica choice for one layer of a batch: microseconds (mean, p99) and how much busier than the mean the busiest worker is, by
 * cost and by distinct experts. 64 tokens, top 8 of 128 experts, two replicas, as DESIGN asks for under 20 us; then larger
 * shapes. Usage: bench_plan [ROUNDS], by default 20000. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/clock.h"
#include "common/random.h"
#include "router/engine/plan.h"

#define DEFAULT_ROUNDS 20000
#define MAX_ROUNDS 10000000
#define BATCHES 64 /* that are planned in turn */
#define MAX_EXPERTS 512
#define COST ((moe_placement_cost){8, 1})

typedef struct shape {
    const char *layout;
    int32_t tokens, top_k, experts, workers, replicas;
    double skew; /* of the experts' popularity: 1 / rank^skew */
} shape;

static const shape shapes[] = {
    {"balanced", 64, 8, 128, 4, 2, 0},  {"balanced", 64, 8, 128, 8, 2, 0},  {"balanced", 64, 8, 128, 8, 2, 0.8},
    {"random", 1, 8, 128, 8, 2, 0},     {"random", 8, 8, 128, 8, 2, 0},     {"random", 64, 8, 128, 4, 2, 0},
    {"random", 64, 8, 128, 8, 2, 0},    {"random", 64, 8, 128, 8, 2, 0.8},  {"random", 64, 8, 128, 8, 3, 0.8},
    {"random", 512, 8, 128, 8, 2, 0.8}, {"random", 64, 8, 512, 64, 2, 0.8},
};

static _Noreturn void die(const char *why) {
    fprintf(stderr, "bench_plan: %s\n", why);
    exit(1);
}

/* One token's distinct experts, drawn by popularity. */
static void route_token(const shape *s, moe_random *random, const double *popularity, int32_t *rows) {
    bool taken[MAX_EXPERTS] = {0};
    for (int32_t k = 0; k < s->top_k;) {
        double at = moe_random_unit(random) * popularity[s->experts - 1];
        int32_t e = 0;
        while (e < s->experts - 1 && popularity[e] <= at) e++;
        if (taken[e]) continue;
        taken[e] = true;
        rows[e]++;
        k++;
    }
}

static void make_batches(const shape *s, moe_random *random, int32_t *rows) {
    double popularity[MAX_EXPERTS], sum = 0;
    for (int32_t e = 0; e < s->experts; e++) popularity[e] = sum += 1 / pow(e + 1, s->skew);
    memset(rows, 0, (size_t)BATCHES * MAX_EXPERTS * sizeof *rows);
    for (int32_t b = 0; b < BATCHES; b++)
        for (int32_t t = 0; t < s->tokens; t++) route_token(s, random, popularity, rows + b * MAX_EXPERTS);
}

static int by_time(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void measure(const shape *s, int64_t rounds, int64_t *times) {
    static int32_t rows[BATCHES * MAX_EXPERTS], chosen[MAX_EXPERTS], scratch[2 * MAX_EXPERTS];
    static moe_plan_worker workers[MOE_PLACEMENT_MAX_WORKERS];
    moe_random random = {11};
    moe_error err;
    moe_placement *map = moe_placement_new(1, s->experts, s->workers);
    moe_placement_kind kind = strcmp(s->layout, "random") == 0 ? MOE_PLACEMENT_RANDOM : MOE_PLACEMENT_BALANCED;
    if (!map || moe_placement_layout(map, kind, 5, NULL, s->replicas, &err) != MOE_OK) die("no layout");
    for (int32_t w = 0; w < s->workers; w++) workers[w].fitness = MOE_PLAN_FIT;
    make_batches(s, &random, rows);
    double cost_over = 0, experts_over = 0;
    int64_t total = 0;
    for (int64_t i = 0; i < rounds; i++) {
        const int32_t *batch = rows + i % BATCHES * MAX_EXPERTS;
        int64_t before = moe_now_ns(moe_clock_real());
        moe_plan_replicas(map, 0, batch, COST, workers, chosen, scratch);
        times[i] = moe_now_ns(moe_clock_real()) - before;
        total += times[i];
        if (i >= BATCHES) continue;
        int32_t distinct[MOE_PLACEMENT_MAX_WORKERS] = {0}, all = 0, most = 0;
        int64_t cost = 0, highest = 0;
        for (int32_t e = 0; e < s->experts; e++) all += chosen[e] >= 0 && ++distinct[chosen[e]];
        for (int32_t w = 0; w < s->workers; w++) {
            cost += workers[w].cost;
            highest = workers[w].cost > highest ? workers[w].cost : highest;
            most = distinct[w] > most ? distinct[w] : most;
        }
        cost_over += (double)highest * s->workers / (double)cost / BATCHES;
        experts_over += (double)most * s->workers / all / BATCHES;
    }
    qsort(times, (size_t)rounds, sizeof *times, by_time);
    printf("%-9s %6d %5d %7d %7d %8d %5.1f  %8.2f %8.2f  %9.3f %12.3f\n", s->layout, s->tokens, s->top_k, s->experts, s->workers,
           s->replicas, s->skew, (double)total / (double)rounds / 1e3, (double)times[rounds - 1 - rounds / 100] / 1e3, cost_over,
           experts_over);
    moe_placement_unref(&map);
}

int main(int argc, char **argv) {
    int64_t rounds = argc > 1 ? strtoll(argv[1], NULL, 10) : DEFAULT_ROUNDS;
    if (rounds < BATCHES || rounds > MAX_ROUNDS) die("ROUNDS is out of range");
    int64_t *times = moe_calloc((size_t)rounds, sizeof *times);
    if (!times) die("out of memory");
    printf("layout    tokens top-k experts workers replicas  skew   mean us   p99 us  cost max/mean experts max/mean\n");
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) measure(&shapes[i], rounds, times);
    moe_free(times);
    return 0;
}
