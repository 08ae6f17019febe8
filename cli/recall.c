#include "cli/recall.h"

#include <math.h>

#include "common/alloc.h"
#include "common/elements.h"
#include "training/softmax_kl.h"

struct moe_recall {
    const moe_model_config *model;
    int32_t num_sets, max_rows, padded, ahead; /* ahead: how many experts are foreseen, 2k */
    float *weights;                            /* [sets, layers - 1, H, P] */
    float *x, *logits;                         /* [max_rows, H], [max_rows, P] */
    int32_t *foreseen;                         /* [sets, max_rows, ahead] for the layer to come, the likeliest first */
    int64_t *found;                            /* [sets, layers, 2]: among k, among 2k */
    int64_t *chosen;                           /* [layers] */
};

static float *set_weights(const moe_recall *r, int32_t set, int32_t layer) {
    return r->weights + ((int64_t)set * (r->model->num_moe_layers - 1) + layer) * r->model->hidden * r->padded;
}

static void transpose(const moe_recall *r, const float *in /* [E, H] */, float *out /* [H, P] */) {
    for (int32_t e = 0; e < r->model->num_experts; e++)
        for (int32_t h = 0; h < r->model->hidden; h++) out[(int64_t)h * r->padded + e] = in[(int64_t)e * r->model->hidden + h];
}

moe_status moe_recall_new(const moe_model_config *c, const moe_recall_sets *sets, int32_t max_rows, moe_recall **out,
                          moe_error *err) {
    moe_recall *r = *out = moe_calloc(1, sizeof *r);
    if (!r) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    *r = (moe_recall){.model = c,
                      .num_sets = sets->count,
                      .max_rows = max_rows,
                      .padded = moe_training_padded(c->num_experts),
                      .ahead = 2 * c->top_k < c->num_experts ? 2 * c->top_k : c->num_experts};
    size_t layers = (size_t)c->num_moe_layers, hidden = (size_t)c->hidden, padded = (size_t)r->padded,
           count = (size_t)sets->count;
    r->weights = moe_alloc_aligned(count * (layers - 1) * hidden * padded, sizeof *r->weights);
    r->x = moe_alloc_aligned((size_t)max_rows * hidden, sizeof *r->x);
    r->logits = moe_alloc_aligned((size_t)max_rows * padded, sizeof *r->logits);
    r->foreseen = moe_calloc(count * (size_t)max_rows * (size_t)r->ahead, sizeof *r->foreseen);
    r->found = moe_calloc(count * layers * 2, sizeof *r->found);
    r->chosen = moe_calloc(layers, sizeof *r->chosen);
    if (!r->weights || !r->x || !r->logits || !r->foreseen || !r->found || !r->chosen) {
        moe_recall_free(out);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    }
    for (int32_t set = 0; set < sets->count; set++)
        for (int32_t layer = 0; layer + 1 < c->num_moe_layers; layer++)
            transpose(r, sets->weights[set] + (int64_t)layer * c->num_experts * c->hidden, set_weights(r, set, layer));
    return MOE_OK;
}

void moe_recall_free(moe_recall **recall) {
    moe_recall *r = *recall;
    if (!r) return;
    void *const owned[] = {r->weights, r->x, r->logits, r->foreseen, r->found, r->chosen};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) moe_free(owned[i]);
    moe_free(r);
    *recall = NULL;
}

static int32_t *foreseen_by(const moe_recall *r, int32_t set, int32_t row) {
    return r->foreseen + ((int64_t)set * r->max_rows + row) * r->ahead;
}

static void check(moe_recall *r, const moe_layer_view *view) {
    const int32_t top_k = r->model->top_k;
    r->chosen[view->layer] += (int64_t)view->num_rows * top_k;
    for (int32_t set = 0; set < r->num_sets; set++) {
        int64_t *found = r->found + ((int64_t)set * r->model->num_moe_layers + view->layer) * 2;
        for (int32_t i = 0; i < view->num_rows * top_k; i++) {
            const int32_t *ahead = foreseen_by(r, set, i / top_k);
            int32_t at = 0;
            while (at < r->ahead && ahead[at] != view->route->experts[i]) at++;
            found[0] += at < top_k;
            found[1] += at < r->ahead;
        }
    }
}

/* The `count` largest, in descending order; the lower index of equals first. Empties them. */
static void take_largest(float *values, int32_t size, int32_t count, int32_t *out) {
    for (int32_t i = 0; i < count; i++) {
        int32_t best = 0;
        for (int32_t j = 1; j < size; j++)
            if (values[j] > values[best]) best = j;
        out[i] = best;
        values[best] = -INFINITY;
    }
}

static void foresee(moe_recall *r, const moe_layer_view *view) {
    const moe_model_config *c = r->model;
    moe_elements_widen(view->activations, view->dtype, (size_t)view->num_rows * (size_t)c->hidden, r->x);
    for (int32_t set = 0; set < r->num_sets; set++) {
        moe_training_linear(r->x, set_weights(r, set, view->layer), view->num_rows, c->hidden, r->padded, r->logits);
        for (int32_t row = 0; row < view->num_rows; row++)
            take_largest(r->logits + (int64_t)row * r->padded, c->num_experts, r->ahead, foreseen_by(r, set, row));
    }
}

void moe_recall_on_layer(void *recall, const moe_layer_view *view) {
    moe_recall *r = recall;
    MOE_ASSERT(view->num_rows <= r->max_rows);
    if (view->layer > 0) check(r, view);
    if (view->layer + 1 < r->model->num_moe_layers) foresee(r, view);
}

double moe_recall_at(const moe_recall *r, int32_t set, int32_t layer, int32_t times) {
    MOE_ASSERT(layer > 0 && (times == 1 || times == 2));
    int64_t found = r->found[((int64_t)set * r->model->num_moe_layers + layer) * 2 + times - 1];
    return r->chosen[layer] ? (double)found / (double)r->chosen[layer] : 0;
}
