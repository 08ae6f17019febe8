#include "cli/status_text.h"

#include <stdio.h>
#include <string.h>

#define MAX_COLUMNS 9
#define CELL_BYTES 80
#define LAYERS_A_LINE 8

/* A table's column: a member of each row's object. */
typedef struct column {
    const char *title, *member;
    bool right; /* numbers */
} column;

static void cell_text(const json_t *value, char out[CELL_BYTES]) {
    snprintf(out, CELL_BYTES, "-");
    if (json_is_string(value)) snprintf(out, CELL_BYTES, "%s", json_string_value(value));
    if (json_is_integer(value)) snprintf(out, CELL_BYTES, "%lld", (long long)json_integer_value(value));
    if (json_is_real(value)) snprintf(out, CELL_BYTES, "%.1f %%", 100 * json_real_value(value));
    if (json_is_boolean(value)) snprintf(out, CELL_BYTES, "%s", json_is_true(value) ? "yes" : "");
}

static void pad(moe_buf *out, const char *text, int width, bool right, bool last) {
    int used = (int)strlen(text);
    if (right)
        moe_buf_printf(out, "%*s", width, text);
    else
        moe_buf_printf(out, "%s%*s", text, last || used > width ? 0 : width - used, "");
    moe_buf_append_text(out, last ? "\n" : "  ");
}

/* Columns as wide as what is in them. */
static void table(const json_t *rows, const column *columns, int count, moe_buf *out) {
    int widths[MAX_COLUMNS];
    char text[CELL_BYTES];
    size_t index;
    json_t *row;
    for (int c = 0; c < count; c++) widths[c] = (int)strlen(columns[c].title);
    json_array_foreach(rows, index, row) {
        for (int c = 0; c < count; c++) {
            cell_text(json_object_get(row, columns[c].member), text);
            if ((int)strlen(text) > widths[c]) widths[c] = (int)strlen(text);
        }
    }
    for (int c = 0; c < count; c++) pad(out, columns[c].title, widths[c], columns[c].right, c == count - 1);
    json_array_foreach(rows, index, row) {
        for (int c = 0; c < count; c++) {
            cell_text(json_object_get(row, columns[c].member), text);
            pad(out, text, widths[c], columns[c].right, c == count - 1);
        }
    }
}

static void summary(const json_t *status, moe_buf *out) {
    char model[CELL_BYTES], epoch[CELL_BYTES], replicas[CELL_BYTES], pid[CELL_BYTES];
    const json_t *redis = json_object_get(status, "redis");
    bool used = json_is_true(json_object_get(redis, "used")), up = json_is_true(json_object_get(redis, "up"));
    cell_text(json_object_get(status, "model"), model);
    cell_text(json_object_get(status, "epoch"), epoch);
    cell_text(json_object_get(status, "replicas"), replicas);
    cell_text(json_object_get(redis, "pid"), pid);
    moe_buf_printf(out, "%s: %s, epoch %s, replicas %s, Redis %s", model,
                   json_is_true(json_object_get(status, "ready")) ? "ready" : "not ready", epoch, replicas,
                   !used ? "not used"
                   : up  ? "up"
                         : "down");
    if (json_object_get(redis, "pid")) moe_buf_printf(out, " (pid %s)", pid);
    moe_buf_append_text(out, "\n");
}

/* How unevenly each MoE layer's rows fall on the workers: 1.00 is even. */
static void layers(const json_t *list, moe_buf *out) {
    size_t index;
    json_t *layer;
    if (json_array_size(list) == 0) return;
    moe_buf_append_text(out, "\nbusiest worker over the mean, by MoE layer (1.00 is even)\n");
    json_array_foreach(list, index, layer) {
        moe_buf_printf(out, "%5zu: %.2f", index, json_number_value(json_object_get(layer, "max_over_mean")));
        bool last = index + 1 == json_array_size(list) || index % LAYERS_A_LINE == LAYERS_A_LINE - 1;
        if (last) moe_buf_append_text(out, "\n");
    }
}

/* Where experts do not all fit the workers' devices. */
static void residency(const json_t *counts, moe_buf *out) {
    double hits = json_number_value(json_object_get(counts, "hits")), late = json_number_value(json_object_get(counts, "late_hits"));
    double all = hits + late + json_number_value(json_object_get(counts, "misses"));
    double copied = json_number_value(json_object_get(counts, "copied_bytes"));
    double wasted = json_number_value(json_object_get(counts, "wasted_bytes"));
    if (all == 0) return;
    moe_buf_printf(out,
                   "\nexperts wanted: %.1f %% were on the device, %.1f %% on their way, %.1f %% missed; %.1f MB copied, "
                   "%.1f %% of it unused\n",
                   100 * hits / all, 100 * late / all, 100 * (all - hits - late) / all, copied / 1e6,
                   copied > 0 ? 100 * wasted / copied : 0);
    double host = json_number_value(json_object_get(counts, "host_experts"));
    if (host > 0) moe_buf_printf(out, "cold experts: the host computed %.0f of batches\n", host);
}

/* Where tokens are routed among a part of the experts. */
static void expert_budget(const json_t *b, moe_buf *out) {
    if (!b) return;
    moe_buf_printf(out,
                   "\nexpert budget %s: tokens are routed among %lld of %lld experts, which hold %.1f %% of what gates would choose "
                   "(%.1f %% by weight); %lld swaps\n",
                   json_string_value(json_object_get(b, "budget")), (long long)json_integer_value(json_object_get(b, "experts")),
                   (long long)json_integer_value(json_object_get(b, "of")),
                   100 * json_number_value(json_object_get(b, "choices_held")),
                   100 * json_number_value(json_object_get(b, "weight_held")),
                   (long long)json_integer_value(json_object_get(b, "swaps")));
}

/* How many of a layer's experts the layer before had predicted, by MoE layer. */
static void recalls(const json_t *list, moe_buf *out) {
    size_t index;
    json_t *layer;
    bool any = false;
    json_array_foreach(list, index, layer) {
        const json_t *recall = json_object_get(layer, "hint_recall");
        if (!recall) continue;
        moe_buf_printf(out, "%s%zu: %.3f", any ? "   " : "\nrecall of hints, by MoE layer\n    ", index, json_number_value(recall));
        any = true;
    }
    if (any) moe_buf_append_text(out, "\n");
}

void moe_status_text(const json_t *status, moe_buf *out) {
    static const column workers[] = {{"WORKER", "id", false},       {"STATE", "state", false},      {"HOST", "host", false},
                                     {"PID", "pid", true},          {"EXPERTS", "experts", true},   {"LOAD", "load", true},
                                     {"QUARANTINE", "quarantine_s", true},
                                     {"PROFILE", "profile", false}, {"ENDPOINT", "endpoint", false}};
    static const column routers[] = {{"ROUTER", "id", false},
                                     {"STATE", "state", false},
                                     {"HOST", "host", false},
                                     {"PID", "pid", true},
                                     {"LEADER", "leader", false}};
    static const column operations[] = {{"OPERATION", "id", false}, {"KIND", "kind", false},           {"STATE", "state", false},
                                        {"PHASE", "phase", false},  {"DONE", "done", true},            {"TOTAL", "total", true},
                                        {"SAFE TO STOP", "safe_to_stop", false}, {"LAST ERROR", "error", false}};
    const char *migration = json_string_value(json_object_get(status, "migration"));
    summary(status, out);
    moe_buf_append_text(out, "\n");
    table(json_object_get(status, "workers"), workers, sizeof workers / sizeof *workers, out);
    moe_buf_append_text(out, "\n");
    table(json_object_get(status, "routers"), routers, sizeof routers / sizeof *routers, out);
    layers(json_object_get(status, "layers"), out);
    const json_t *cost = json_object_get(status, "cost");
    if (cost)
        moe_buf_printf(out, "\nplacement reckons %lld ns for a distinct expert, %lld ns for a row\n",
                       (long long)json_integer_value(json_object_get(cost, "expert_ns")),
                       (long long)json_integer_value(json_object_get(cost, "row_ns")));
    residency(json_object_get(status, "residency"), out);
    expert_budget(json_object_get(status, "expert_budget"), out);
    recalls(json_object_get(status, "layers"), out);
    if (migration && migration[0]) moe_buf_printf(out, "\nexperts are moving: %s\n", migration);
    if (json_array_size(json_object_get(status, "operations")) == 0) return;
    moe_buf_append_text(out, "\n");
    table(json_object_get(status, "operations"), operations, sizeof operations / sizeof *operations, out);
}
