#include "common/metrics.h"

#include <stdatomic.h>
#include <string.h>

#define MOE_HISTOGRAM_BUCKETS 24

typedef struct metric_row {
    moe_metric_kind kind;
    const char *name, *labels, *help;
} metric_row;

static const metric_row rows[MOE_METRIC_COUNT] = {
#define MOE_METRIC_ROW(id, kind, name, labels, help) {MOE_##kind, name, labels, help},
    MOE_METRICS(MOE_METRIC_ROW)
#undef MOE_METRIC_ROW
};

typedef struct metric_cell {
    _Atomic int64_t value; /* counter, gauge; a histogram's count */
    _Atomic int64_t sum;   /* nanoseconds or counts */
    _Atomic int64_t buckets[MOE_HISTOGRAM_BUCKETS];
} metric_cell;

static metric_cell cells[MOE_METRIC_COUNT];

/* Upper bounds: powers of two from 4 µs (to 33 s), or from 1 (to 8 Mi). */
static int64_t bucket_bound(moe_metric_kind kind, int bucket) {
    return kind == MOE_HISTOGRAM_S ? INT64_C(4000) << bucket : INT64_C(1) << bucket;
}

void moe_metric_add(moe_metric metric, int64_t amount) {
    atomic_fetch_add_explicit(&cells[metric].value, amount, memory_order_relaxed);
}

void moe_metric_set(moe_metric metric, int64_t value) {
    atomic_store_explicit(&cells[metric].value, value, memory_order_relaxed);
}

static void observe(moe_metric metric, int64_t value) {
    metric_cell *cell = &cells[metric];
    int bucket = 0;
    while (bucket < MOE_HISTOGRAM_BUCKETS && value > bucket_bound(rows[metric].kind, bucket)) bucket++;
    if (bucket < MOE_HISTOGRAM_BUCKETS) atomic_fetch_add_explicit(&cell->buckets[bucket], 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&cell->sum, value, memory_order_relaxed);
    atomic_fetch_add_explicit(&cell->value, 1, memory_order_relaxed);
}

void moe_metric_observe_ns(moe_metric metric, int64_t ns) { observe(metric, ns); }
void moe_metric_observe_count(moe_metric metric, int64_t n) { observe(metric, n); }
int64_t moe_metric_sum(moe_metric metric) { return atomic_load_explicit(&cells[metric].sum, memory_order_relaxed); }
int64_t moe_metric_value(moe_metric metric) { return atomic_load_explicit(&cells[metric].value, memory_order_relaxed); }

static void render_histogram(moe_buf *out, const metric_row *row, metric_cell *cell) {
    const char *comma = row->labels[0] ? "," : "";
    double unit = row->kind == MOE_HISTOGRAM_S ? 1e-9 : 1.0;
    int64_t cumulative = 0;
    for (int b = 0; b < MOE_HISTOGRAM_BUCKETS; b++) {
        cumulative += atomic_load_explicit(&cell->buckets[b], memory_order_relaxed);
        moe_buf_printf(out, "%s_bucket{%s%sle=\"%.9g\"} %lld\n", row->name, row->labels, comma,
                       (double)bucket_bound(row->kind, b) * unit, (long long)cumulative);
    }
    long long count = (long long)atomic_load_explicit(&cell->value, memory_order_relaxed);
    moe_buf_printf(out, "%s_bucket{%s%sle=\"+Inf\"} %lld\n", row->name, row->labels, comma, count);
    const char *open = row->labels[0] ? "{" : "", *close = row->labels[0] ? "}" : "";
    moe_buf_printf(out, "%s_sum%s%s%s %.9g\n", row->name, open, row->labels, close,
                   (double)atomic_load_explicit(&cell->sum, memory_order_relaxed) * unit);
    moe_buf_printf(out, "%s_count%s%s%s %lld\n", row->name, open, row->labels, close, count);
}

static void render_heading(moe_buf *out, const metric_row *row) {
    static const char *const types[] = {"counter", "gauge", "histogram", "histogram"};
    moe_buf_printf(out, "# HELP %s %s\n# TYPE %s %s\n", row->name, row->help, row->name, types[row->kind]);
}

static void render_values(moe_buf *out, const metric_row *row, moe_metric metric) {
    if (row->kind >= MOE_HISTOGRAM_S) {
        render_histogram(out, row, &cells[metric]);
        return;
    }
    const char *open = row->labels[0] ? "{" : "", *close = row->labels[0] ? "}" : "";
    moe_buf_printf(out, "%s%s%s%s %lld\n", row->name, open, row->labels, close, (long long)moe_metric_value(metric));
}

static void render_row(moe_buf *out, moe_metric metric) {
    const metric_row *row = &rows[metric];
    if (metric == 0 || strcmp(row->name, row[-1].name) != 0) render_heading(out, row);
    render_values(out, row, metric);
}

void moe_metrics_render(moe_buf *out) {
    for (int i = 0; i < MOE_METRIC_COUNT; i++) render_row(out, (moe_metric)i);
}

void moe_metrics_render_worker(moe_buf *out) {
    render_row(out, MOE_METRIC_BAD_MESSAGES);
    render_row(out, MOE_METRIC_REPLIES_DROPPED);
    for (int i = MOE_METRIC_WORKER_ROWS; i < MOE_METRIC_COUNT; i++) render_row(out, (moe_metric)i);
}

void moe_metrics_render_vllm(const char *model, moe_buf *out) {
    static const struct {
        moe_metric metric;
        const char *name;
    } aliases[] = {
#define MOE_METRIC_ALIAS(id, name) {MOE_METRIC_##id, name},
        MOE_METRICS_VLLM(MOE_METRIC_ALIAS)
#undef MOE_METRIC_ALIAS
    };
    moe_buf label = {0};
    moe_buf_append_text(&label, "model_name=\"");
    for (const char *p = model; *p; p++) { /* the format's three escapes */
        if (*p == '\\' || *p == '"') moe_buf_append(&label, "\\", 1);
        moe_buf_append(&label, *p == '\n' ? "\\n" : p, *p == '\n' ? 2 : 1);
    }
    moe_buf_append_text(&label, "\"");
    for (size_t i = 0; i < sizeof aliases / sizeof *aliases; i++) {
        metric_row row = rows[aliases[i].metric];
        row.name = aliases[i].name;
        row.labels = moe_buf_text(&label);
        render_heading(out, &row);
        render_values(out, &row, aliases[i].metric);
    }
    moe_buf_free(&label);
}
