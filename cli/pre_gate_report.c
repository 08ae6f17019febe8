#include "cli/pre_gate_report.h"

#include <string.h>

#include "cli/evaluate.h"

typedef struct report {
    const moe_model_config *model;
    const moe_pre_gate_set *sets;
    int32_t num_sets;
    moe_recall *recall;
    json_t *by_gate, *by_set[MOE_RECALL_MAX_SETS]; /* results of moe_evaluate */
} report;

static moe_status measure(report *r, moe_router_node_config node, const json_t *texts, moe_error *err) {
    moe_evaluation evaluation = {.texts = texts, .scored = true, .what = "by gates"};
    node.gating = MOE_GATING_GATE;
    node.micro_batches = 1;
    node.on_layer = moe_recall_on_layer;
    node.on_layer_ctx = r->recall;
    moe_status status = moe_evaluate(&node, &evaluation, &r->by_gate, err);
    node.on_layer = NULL;
    node.gating = MOE_GATING_PRE_GATE;
    for (int32_t i = 0; i < r->num_sets && status == MOE_OK; i++) {
        evaluation.what = r->sets[i].name;
        node.source.pre_gates = r->sets[i].file;
        status = moe_evaluate(&node, &evaluation, &r->by_set[i], err);
    }
    return status;
}

static double number(const json_t *result, const char *key) { return json_number_value(json_object_get(result, key)); }

static void print_heading(const report *r, moe_buf *out) {
    int32_t k = r->model->top_k, ahead = 2 * k < r->model->num_experts ? 2 * k : r->model->num_experts;
    moe_buf_printf(out, "%-12s%10s", "", "gate");
    for (int32_t i = 0; i < r->num_sets; i++) moe_buf_printf(out, "  %16s", r->sets[i].name);
    moe_buf_printf(out, "\n%-12s%10s", "recall at", "");
    for (int32_t i = 0; i < r->num_sets; i++) moe_buf_printf(out, "  %8d%8d", k, ahead);
    moe_buf_printf(out, "\n");
}

static void print_recall(const report *r, moe_buf *out) {
    double mean[MOE_RECALL_MAX_SETS][2] = {{0}};
    int32_t layers = r->model->num_moe_layers;
    for (int32_t layer = 1; layer < layers; layer++) {
        moe_buf_printf(out, "layer %-6d%10s", layer, "");
        for (int32_t i = 0; i < r->num_sets; i++) {
            moe_buf_printf(out, "  ");
            for (int32_t times = 1; times <= 2; times++) {
                double recall = moe_recall_at(r->recall, i, layer, times);
                mean[i][times - 1] += recall / (layers - 1);
                moe_buf_printf(out, "%8.4f", recall);
            }
        }
        moe_buf_printf(out, "\n");
    }
    moe_buf_printf(out, "%-12s%10s", "mean", "");
    for (int32_t i = 0; i < r->num_sets; i++) moe_buf_printf(out, "  %8.4f%8.4f", mean[i][0], mean[i][1]);
    moe_buf_printf(out, "\n");
}

static void print_numbers(const report *r, const char *key, moe_buf *out) {
    moe_buf_printf(out, "%-12s%10.5f", key, number(r->by_gate, key));
    for (int32_t i = 0; i < r->num_sets; i++) moe_buf_printf(out, "  %16.5f", number(r->by_set[i], key));
    moe_buf_printf(out, "\n");
}

static void print(const report *r, moe_buf *out) {
    print_heading(r, out);
    print_recall(r, out);
    print_numbers(r, "loss", out);
    print_numbers(r, "perplexity", out);
}

moe_status moe_pre_gate_report(const moe_router_node_config *node, const moe_model_config *model, const json_t *texts,
                               const moe_pre_gate_set *sets, int32_t num_sets, moe_buf *out, moe_error *err) {
    report r = {.model = model, .sets = sets, .num_sets = num_sets};
    moe_recall_sets weights = {.count = num_sets};
    MOE_ASSERT(num_sets <= MOE_RECALL_MAX_SETS);
    for (int32_t i = 0; i < num_sets; i++) weights.weights[i] = sets[i].weights;
    moe_status status = moe_recall_new(model, &weights, node->max_num_batched_tokens, &r.recall, err);
    if (status == MOE_OK) status = measure(&r, *node, texts, err);
    if (status == MOE_OK) print(&r, out);
    if (status == MOE_OK && out->failed) status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    moe_recall_free(&r.recall);
    json_decref(r.by_gate);
    for (int32_t i = 0; i < num_sets; i++) json_decref(r.by_set[i]);
    return status;
}
