#include "cli/bench_report.h"

#include <stdlib.h>

static double tokens_per_second(const moe_bench_sample *s) { return (double)s->tokens * 1e9 / (double)s->time_ns; }

/* Between two tokens of one request; of a prefill, the prompt's time by its length. */
static double ms_per_token(const moe_bench_case *c, const moe_bench_sample *s) {
    return (double)s->time_ns * c->requests / (double)s->tokens / 1e6;
}

static bool is_prefill(const moe_bench_case *c) { return c->output_tokens == 1; }

void moe_bench_csv_header(FILE *out) {
    fprintf(
        out,
        "experts,workers,threads,phase,requests,prompt_tokens,output_tokens,run,tokens,seconds,tokens_per_second,ms_per_token");
    for (int s = 0; s < MOE_BENCH_STAGES; s++) fprintf(out, ",%s_us", moe_bench_stage_names[s]);
    fputc('\n', out);
}

void moe_bench_csv_run(FILE *out, const moe_bench_series *series, int32_t run) {
    const moe_bench_case *c = &series->c;
    const moe_bench_sample *s = &series->runs[run];
    fprintf(out, "%s,%d,%d,%s,%d,%d,%d,%d,%lld,%.6f,%.2f,%.5f", series->experts, series->workers, series->threads,
            is_prefill(c) ? "prefill" : "decode", c->requests, c->prompt_tokens, c->output_tokens, run, (long long)s->tokens,
            (double)s->time_ns / 1e9, tokens_per_second(s), ms_per_token(c, s));
    for (int i = 0; i < MOE_BENCH_STAGES; i++) fprintf(out, ",%.3f", s->stage_ns[i] / 1e3);
    fputc('\n', out);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct summary {
    double median, lowest, highest;
} summary;

static summary summarize(double *values, int32_t count) {
    qsort(values, (size_t)count, sizeof *values, by_value);
    double median = count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
    return (summary){median, values[0], values[count - 1]};
}

static void print_series(FILE *out, const moe_bench_series *series) {
    double speed[MOE_BENCH_MAX_RUNS], ms[MOE_BENCH_MAX_RUNS], stage[MOE_BENCH_MAX_RUNS];
    for (int32_t r = 0; r < series->num_runs; r++) {
        speed[r] = tokens_per_second(&series->runs[r]);
        ms[r] = ms_per_token(&series->c, &series->runs[r]);
    }
    summary s = summarize(speed, series->num_runs);
    char what[32];
    if (is_prefill(&series->c))
        snprintf(what, sizeof what, "prefill %d", series->c.prompt_tokens);
    else
        snprintf(what, sizeof what, "decode x%d", series->c.requests);
    fprintf(out, "%-14s %-7s %9.0f (%.0f - %.0f)%*s %9.4f", what, series->experts, s.median, s.lowest, s.highest,
            16 - snprintf(NULL, 0, "%.0f - %.0f", s.lowest, s.highest), "", summarize(ms, series->num_runs).median);
    for (int i = 0; i < MOE_BENCH_STAGES; i++) {
        for (int32_t r = 0; r < series->num_runs; r++) stage[r] = series->runs[r].stage_ns[i] / 1e3;
        fprintf(out, " %9.1f", summarize(stage, series->num_runs).median);
    }
    fputc('\n', out);
}

void moe_bench_table(FILE *out, const moe_bench_series *series, int32_t count) {
    fprintf(out, "%-14s %-7s %9s %-18s %9s  us a layer and micro-batch; logits, sample: us a micro-batch\n", "", "experts",
            "tokens/s", "(low - high)", "ms/token");
    fprintf(out, "%53s ", "");
    for (int s = 0; s < MOE_BENCH_STAGES; s++) fprintf(out, "%s%9s", s ? " " : "        ", moe_bench_stage_names[s]);
    fputc('\n', out);
    for (int32_t i = 0; i < count; i++) print_series(out, &series[i]);
}
