#include "cli/bench_report.h"

#include <stdlib.h>

static double tokens_per_second(const moe_bench_sample *s) { return (double)s->tokens * 1e9 / (double)s->time_ns; }

/* Between two tokens of one request; of a prefill, the prompt's time by its length. */
static double ms_per_token(const moe_bench_case *c, const moe_bench_sample *s) {
    return (double)s->time_ns * c->requests / (double)s->tokens / 1e6;
}

static bool is_prefill(const moe_bench_case *c) { return c->output_tokens == 1; }

/* Waiting for experts that no worker spent computing, copying to and from its GPU or waiting for weights: messages, their encoding,
 * queues. */
static double wire_ns(const moe_bench_sample *s) {
    double ns = s->stage_ns[MOE_BENCH_WAIT] - s->stage_ns[MOE_BENCH_EXPERT] - s->stage_ns[MOE_BENCH_COPY] -
                s->stage_ns[MOE_BENCH_STALL];
    return ns > 0 ? ns : 0;
}

static double wire_bytes_per_token(const moe_bench_series *series, const moe_bench_sample *s) {
    return series->workers > 0 ? (double)s->call_bytes / (double)s->tokens : 0;
}

/* The least work of one token of every request, or of one prompt: one step for all of them, though it may have been several. */
static moe_bench_work work_of(const moe_bench_series *series, const moe_bench_sample *s) {
    const moe_bench_case *c = &series->c;
    double prompt = c->prompt_tokens, most = series->model->config.num_experts;
    moe_bench_step step = {.rows = prompt, .logit_rows = 1, .attended = prompt * (prompt + 1) / 2, .kv_tokens = prompt};
    double batches = (double)s->steps;
    if (!is_prefill(c)) {
        step = (moe_bench_step){.rows = c->requests, .logit_rows = c->requests};
        step.attended = step.kv_tokens = c->requests * s->context;
        batches = (double)s->steps * c->requests / (double)s->tokens;
    }
    step.layer_experts = s->layer_experts * (batches > 1 ? batches : 1);
    if (step.layer_experts > most) step.layer_experts = most;
    return moe_bench_floor(series->model, series->kv_token_bytes, &step, &series->bounds);
}

/* What the floor is a floor of. */
static double step_ms(const moe_bench_series *series, const moe_bench_sample *s) {
    double each = ms_per_token(&series->c, s);
    return is_prefill(&series->c) ? each * series->c.prompt_tokens : each;
}

void moe_bench_csv_header(FILE *out) {
    fprintf(out,
            "experts,workers,threads,phase,requests,prompt_tokens,output_tokens,run,tokens,seconds,tokens_per_second,"
            "ms_per_token,step_ms,micro_batches,layer_experts,wire_bytes_per_token,weight_bytes,kv_bytes,flop,floor_ms,"
            "of_floor");
    for (int s = 0; s < MOE_BENCH_STAGES; s++) fprintf(out, ",%s_us", moe_bench_stage_names[s]);
    fprintf(out,
            ",wire_us,expert_hits,expert_late_hits,expert_misses,copied_bytes,wasted_bytes,first_misses,first_stall_us,moe_layers,gating,"
            "device_memory,cold_experts,dummy_routing,copy_gb_per_s,device_used_bytes,host_experts,host_rows,expert_swaps,"
            "pipeline_degree\n");
}

void moe_bench_csv_run(FILE *out, const moe_bench_series *series, int32_t run) {
    const moe_bench_case *c = &series->c;
    const moe_bench_sample *s = &series->runs[run];
    moe_bench_work work = work_of(series, s);
    fprintf(out, "%s,%d,%d,%s,%d,%d,%d,%d,%lld,%.6f,%.2f,%.5f,%.5f,%lld,%.2f,%.1f,%.0f,%.0f,%.0f", series->experts,
            series->workers, series->threads, is_prefill(c) ? "prefill" : "decode", c->requests, c->prompt_tokens,
            c->output_tokens, run, (long long)s->tokens, (double)s->time_ns / 1e9, tokens_per_second(s), ms_per_token(c, s),
            step_ms(series, s), (long long)s->steps, s->layer_experts, wire_bytes_per_token(series, s), work.weight_bytes,
            work.kv_bytes, work.flop);
    if (work.seconds > 0)
        fprintf(out, ",%.5f,%.4f", work.seconds * 1e3, work.seconds * 1e3 / step_ms(series, s));
    else
        fprintf(out, ",,");
    for (int i = 0; i < MOE_BENCH_STAGES; i++) fprintf(out, ",%.3f", s->stage_ns[i] / 1e3);
    fprintf(out, ",%.3f,%lld,%lld,%lld,%lld,%lld,%lld,%.3f,%d", wire_ns(s) / 1e3, (long long)s->hits, (long long)s->late_hits,
            (long long)s->misses, (long long)s->copied_bytes, (long long)s->wasted_bytes, (long long)s->first_misses,
            s->first_stall_ns / 1e3, series->model->config.num_moe_layers);
    fprintf(out, ",%s,%s,%s,\"%s\",%.3f,%lld,%lld,%lld,%lld,%.2f\n", series->setting->gating,
            series->setting->device_memory, series->setting->cold_experts, series->setting->dummy_routing,
            series->copy_bytes_per_s / 1e9, (long long)series->device_used_bytes, (long long)s->host_experts,
            (long long)s->host_rows, (long long)s->swaps, s->pipeline_degree);
    fflush(out);
}

/* ---- tables ---- */

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

static void print_case(FILE *out, const moe_bench_series *series) {
    char what[32];
    if (is_prefill(&series->c))
        snprintf(what, sizeof what, "prefill %d", series->c.prompt_tokens);
    else
        snprintf(what, sizeof what, "decode x%d", series->c.requests);
    fprintf(out, "%-14s %-7s", what, series->experts);
}

static void print_speed(FILE *out, const moe_bench_series *series) {
    double speed[MOE_BENCH_MAX_RUNS], ms[MOE_BENCH_MAX_RUNS], floor[MOE_BENCH_MAX_RUNS], of[MOE_BENCH_MAX_RUNS];
    double experts[MOE_BENCH_MAX_RUNS], wire[MOE_BENCH_MAX_RUNS];
    int32_t n = series->num_runs;
    for (int32_t r = 0; r < n; r++) {
        const moe_bench_sample *s = &series->runs[r];
        moe_bench_work work = work_of(series, s);
        speed[r] = tokens_per_second(s);
        ms[r] = step_ms(series, s);
        floor[r] = work.seconds * 1e3;
        of[r] = 100 * floor[r] / ms[r];
        experts[r] = s->layer_experts;
        wire[r] = wire_bytes_per_token(series, s);
    }
    summary s = summarize(speed, n);
    print_case(out, series);
    fprintf(out, " %9.0f (%.0f - %.0f)%*s %10.4f", s.median, s.lowest, s.highest,
            16 - snprintf(NULL, 0, "%.0f - %.0f", s.lowest, s.highest), "", summarize(ms, n).median);
    if (floor[0] > 0)
        fprintf(out, " %10.4f %7.1f%%", summarize(floor, n).median, summarize(of, n).median);
    else
        fprintf(out, " %10s %8s", "-", "-");
    fprintf(out, " %8.1f %10.0f\n", summarize(experts, n).median, summarize(wire, n).median);
}

static void print_stages(FILE *out, const moe_bench_series *series) {
    double stage[MOE_BENCH_MAX_RUNS];
    print_case(out, series);
    for (int i = 0; i <= MOE_BENCH_STAGES; i++) {
        for (int32_t r = 0; r < series->num_runs; r++) {
            const moe_bench_sample *s = &series->runs[r];
            stage[r] = (i < MOE_BENCH_STAGES ? s->stage_ns[i] : wire_ns(s)) / 1e3;
        }
        fprintf(out, " %9.1f", summarize(stage, series->num_runs).median);
    }
    fputc('\n', out);
}

void moe_bench_tables(FILE *out, const moe_bench_series *series, int32_t count) {
    fprintf(out, "%-14s %-7s %9s %-18s %10s %10s %8s %8s %10s\n", "", "experts", "tokens/s", "(low - high)", "ms/step", "floor",
            "of it", "experts", "wire");
    fprintf(out, "%-14s %-7s %9s %-18s %10s %10s %8s %8s %10s\n", "", "in", "", "", "", "ms", "", "a layer", "B/token");
    for (int32_t i = 0; i < count; i++) print_speed(out, &series[i]);
    fprintf(out,
            "\n%-14s %-7s  us a layer and micro-batch (wire: of waiting, neither copies nor computation); logits, sample, step: "
            "us a micro-batch\n%22s",
            "", "", "");
    for (int s = 0; s < MOE_BENCH_STAGES; s++) fprintf(out, " %9s", moe_bench_stage_names[s]);
    fprintf(out, " %9s\n", "wire");
    for (int32_t i = 0; i < count; i++) print_stages(out, &series[i]);
}
