#include "cli/bench_floor.h"

typedef struct sum {
    const moe_bench_bounds *bounds;
    moe_bench_work work;
} sum;

/* One product, or several that overlap; bytes are of weights, kv_bytes of keys and values. */
static void add(sum *s, double bytes, double kv_bytes, double flop) {
    double read = bytes + kv_bytes;
    s->work.weight_bytes += bytes;
    s->work.kv_bytes += kv_bytes;
    s->work.flop += flop;
    if (s->bounds->bytes_per_second <= 0 || s->bounds->flop_per_second <= 0) return;
    double reading = read / s->bounds->bytes_per_second, computing = flop / s->bounds->flop_per_second;
    s->work.seconds += reading > computing ? reading : computing;
}

static void add_linear(sum *s, const moe_tensor *w, double rows) {
    if (moe_tensor_present(w)) add(s, (double)moe_tensor_bytes(w), 0, 2 * rows * (double)w->rows * (double)w->cols);
}

/* `count` networks alike, `rows` rows through them in all. */
static void add_ffn(sum *s, const moe_ffn_weights *w, double count, double rows) {
    const moe_tensor *const parts[] = {&w->gate, &w->up, &w->down};
    for (int i = 0; i < 3; i++) {
        if (!moe_tensor_present(parts[i])) continue;
        add(s, count * (double)moe_tensor_bytes(parts[i]), 0, 2 * rows * (double)parts[i]->rows * (double)parts[i]->cols);
    }
}

moe_bench_work moe_bench_floor(const moe_model *m, int64_t kv_token_bytes, const moe_bench_step *step,
                               const moe_bench_bounds *bounds) {
    const moe_model_config *c = &m->config;
    sum s = {.bounds = bounds};
    double kv_bytes = step->kv_tokens * (double)kv_token_bytes / c->num_layers;
    int32_t moe_index = 0;
    for (int32_t layer = 0; layer < c->num_layers; layer++) {
        const moe_layer_weights *w = &m->layers[layer];
        const moe_tensor *const products[] = {&w->q, &w->k, &w->v, &w->o, &w->gate, &w->shared_gate};
        for (size_t i = 0; i < sizeof products / sizeof *products; i++) add_linear(&s, products[i], step->rows);
        add(&s, 0, kv_bytes, 4 * step->attended * c->num_heads * c->head_dim);
        add_ffn(&s, &w->dense, 1, step->rows);
        add_ffn(&s, &w->shared, 1, step->rows);
        if (c->layer_is_moe[layer]) add_ffn(&s, moe_model_expert(m, moe_index++, 0), step->layer_experts, step->rows * c->top_k);
    }
    add_linear(&s, &m->lm_head, step->logit_rows);
    return s.work;
}
