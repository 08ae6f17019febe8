#include "router/engine/virtual_sets.h"

#include <math.h>
#include <string.h>

#include "common/alloc.h"
#include "common/model/gate.h"

#define NORM_SHARE (1.0 / 16) /* of a new norm in the mean */
#define NONE (-1)

struct moe_virtual_sets {
    const moe_model_config *model;
    moe_expert_budget budget;
    int32_t num_all; /* experts of all layers */
    bool placed;
    bool *inside;     /* [num_all] */
    int32_t *members; /* [num_moe_layers, num_experts]: each layer's, ascending */
    int32_t *size;    /* [num_moe_layers] */
    double *weight;   /* [num_all]: decayed sums of gate weights */
    double *norm;     /* [num_all]: mean norm of outputs; 0: none is known */
    double *rows;     /* [num_moe_layers]: decayed counts */
    double *worth;    /* [num_all]: importance as a part of the layer's */
    int32_t *home;    /* [num_all] */
    int32_t num_homes;
    int32_t *room, *used; /* [MOE_VIRTUAL_MAX_HOMES]: of members */
};

moe_status moe_virtual_sets_new(const moe_model_config *model, moe_expert_budget budget, moe_virtual_sets **out, moe_error *err) {
    moe_virtual_sets *s = *out = moe_calloc(1, sizeof *s);
    size_t layers = (size_t)model->num_moe_layers, all = layers * (size_t)model->num_experts;
    if (!s) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    *s = (moe_virtual_sets){.model = model, .budget = budget, .num_all = (int32_t)all};
    s->inside = moe_calloc(all, sizeof *s->inside);
    s->members = moe_calloc(all, sizeof *s->members);
    s->size = moe_calloc(layers, sizeof *s->size);
    s->weight = moe_calloc(all, sizeof *s->weight);
    s->norm = moe_calloc(all, sizeof *s->norm);
    s->rows = moe_calloc(layers, sizeof *s->rows);
    s->worth = moe_calloc(all, sizeof *s->worth);
    s->home = moe_calloc(all, sizeof *s->home);
    s->room = moe_calloc(MOE_VIRTUAL_MAX_HOMES, sizeof *s->room);
    s->used = moe_calloc(MOE_VIRTUAL_MAX_HOMES, sizeof *s->used);
    if (s->inside && s->members && s->size && s->weight && s->norm && s->rows && s->worth && s->home && s->room && s->used)
        return MOE_OK;
    moe_virtual_sets_free(out);
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the virtual sets of %zu experts", all);
}

void moe_virtual_sets_free(moe_virtual_sets **sets) {
    moe_virtual_sets *s = *sets;
    *sets = NULL;
    if (!s) return;
    void *const owned[] = {s->inside, s->members, s->size, s->weight, s->norm, s->rows, s->worth, s->home, s->room, s->used};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) moe_free(owned[i]);
    moe_free(s);
}

static int32_t first_of(const moe_virtual_sets *s, int32_t layer) { return layer * s->model->num_experts; }
static int32_t number(const moe_virtual_sets *s, moe_virtual_expert e) { return first_of(s, e.layer) + e.expert; }
static moe_virtual_expert expert_of(const moe_virtual_sets *s, int32_t n) {
    return (moe_virtual_expert){n / s->model->num_experts, n % s->model->num_experts};
}

int32_t moe_virtual_sets_size(const moe_virtual_sets *s, int32_t layer) { return s->size[layer]; }
bool moe_virtual_sets_has(const moe_virtual_sets *s, int32_t layer, int32_t expert) {
    return s->inside[first_of(s, layer) + expert];
}

/* ---- members ---- */

static void list_members(moe_virtual_sets *s, int32_t layer) {
    int32_t first = first_of(s, layer), count = 0;
    for (int32_t x = 0; x < s->model->num_experts; x++)
        if (s->inside[first + x]) s->members[first + count++] = x;
    s->size[layer] = count;
}

static void count_rooms(moe_virtual_sets *s) {
    double part = moe_expert_budget_part(s->budget, s->model);
    memset(s->room, 0, (size_t)s->num_homes * sizeof *s->room);
    memset(s->used, 0, (size_t)s->num_homes * sizeof *s->used);
    for (int32_t i = 0; i < s->num_all; i++) {
        s->room[s->home[i]]++;
        s->used[s->home[i]] += s->inside[i];
    }
    for (int32_t h = 0; h < s->num_homes; h++) s->room[h] = (int32_t)ceil(part * s->room[h] - 1e-6);
}

/* The layer's next expert for the first sets: at a home with room, else any. */
static int32_t next_outside(const moe_virtual_sets *s, int32_t layer) {
    int32_t first = first_of(s, layer), any = NONE;
    for (int32_t i = first; i < first + s->model->num_experts; i++) {
        if (s->inside[i]) continue;
        if (s->used[s->home[i]] < s->room[s->home[i]]) return i;
        if (any < 0) any = i;
    }
    return any;
}

static void make_first_sets(moe_virtual_sets *s) {
    int32_t layers = s->model->num_moe_layers, left = moe_expert_budget_count(s->budget, s->model);
    for (int32_t layer = 0; left > 0; layer = (layer + 1) % layers, left--) {
        int32_t i = next_outside(s, layer);
        s->inside[i] = true;
        s->used[s->home[i]]++;
    }
    for (int32_t layer = 0; layer < layers; layer++) list_members(s, layer);
}

void moe_virtual_sets_place(moe_virtual_sets *s, const int32_t *home, int32_t num_homes) {
    MOE_ASSERT(num_homes > 0 && num_homes <= MOE_VIRTUAL_MAX_HOMES);
    memcpy(s->home, home, (size_t)s->num_all * sizeof *home);
    s->num_homes = num_homes;
    count_rooms(s);
    if (!s->placed) make_first_sets(s);
    s->placed = true;
}

/* ---- importance ---- */

/* The norm of an expert that has not been computed is taken for the mean of those that were. */
static double mean_norm(const moe_virtual_sets *s, int32_t layer) {
    double sum = 0;
    int32_t count = 0, first = first_of(s, layer);
    for (int32_t i = first; i < first + s->model->num_experts; i++) {
        sum += s->norm[i];
        count += s->norm[i] > 0;
    }
    return count ? sum / count : 1;
}

static void weigh(moe_virtual_sets *s, int32_t layer) {
    int32_t first = first_of(s, layer), end = first + s->model->num_experts;
    double mean = mean_norm(s, layer), sum = 0;
    for (int32_t i = first; i < end; i++) sum += s->worth[i] = s->weight[i] * (s->norm[i] > 0 ? s->norm[i] : mean);
    for (int32_t i = first; i < end && sum > 0; i++) s->worth[i] /= sum;
}

void moe_virtual_sets_chosen(moe_virtual_sets *s, int32_t layer, const moe_route *route, int32_t rows) {
    int32_t first = first_of(s, layer), slots = rows * s->model->top_k;
    double kept = exp2(-(double)rows / MOE_VIRTUAL_HALF_LIFE_ROWS);
    s->rows[layer] = s->rows[layer] * kept + rows;
    for (int32_t i = first; i < first + s->model->num_experts; i++) s->weight[i] *= kept;
    for (int32_t i = 0; i < slots; i++)
        if (isfinite(route->weights[i])) s->weight[first + route->experts[i]] += (double)route->weights[i];
    weigh(s, layer);
}

void moe_virtual_sets_returned(moe_virtual_sets *s, int32_t layer, int32_t expert, double norm) {
    double *mean = &s->norm[first_of(s, layer) + expert];
    if (isfinite(norm) && norm > 0) *mean = *mean > 0 ? *mean + NORM_SHARE * (norm - *mean) : norm;
}

/* ---- routing ---- */

void moe_virtual_sets_route(const moe_virtual_sets *s, int32_t layer, const float *logits, int32_t rows, moe_route out) {
    const moe_model_config *m = s->model;
    const int32_t *members = s->members + first_of(s, layer);
    int32_t size = s->size[layer];
    float among[MOE_MAX_EXPERTS];
    if (size == m->num_experts) return;
    for (int64_t row = 0; row < rows; row++) {
        int32_t *experts = out.experts + row * m->top_k;
        for (int32_t i = 0; i < size; i++) among[i] = logits[row * m->num_experts + members[i]];
        moe_gate_topk(moe_gate_softmax, among, size, m->top_k, m->norm_topk, experts, out.weights + row * m->top_k);
        for (int32_t j = 0; j < m->top_k; j++) experts[j] = members[experts[j]];
    }
}

/* ---- swaps ---- */

/* The members worth least, by home; [num_homes]: of all homes. */
typedef struct least {
    int32_t at[MOE_VIRTUAL_MAX_HOMES + 1];
} least;

static void least_clear(const moe_virtual_sets *s, least *l) {
    for (int32_t h = 0; h <= s->num_homes; h++) l->at[h] = NONE;
}

static int32_t lesser(const moe_virtual_sets *s, int32_t a, int32_t b) {
    return a < 0 || (b >= 0 && s->worth[b] < s->worth[a]) ? b : a;
}

static void least_add(const moe_virtual_sets *s, least *l, int32_t layer) {
    for (int32_t i = first_of(s, layer); i < first_of(s, layer + 1); i++) {
        if (!s->inside[i]) continue;
        l->at[s->home[i]] = lesser(s, l->at[s->home[i]], i);
        l->at[s->num_homes] = lesser(s, l->at[s->num_homes], i);
    }
}

/* Who would leave for expert i: of its home, or of any where its home has room. */
static int32_t leaver_for(const moe_virtual_sets *s, const least *own_layer, const least *others, int32_t i) {
    int32_t h = s->used[s->home[i]] < s->room[s->home[i]] ? s->num_homes : s->home[i];
    return lesser(s, own_layer->at[h], others->at[h]);
}

static bool gains_enough(const moe_virtual_sets *s, double gain, int32_t leaver) {
    return gain > MOE_VIRTUAL_HYSTERESIS * s->worth[leaver] && gain > MOE_VIRTUAL_LEAST_GAIN / s->model->num_experts;
}

static bool warm(const moe_virtual_sets *s, int32_t layer) { return s->rows[layer] >= MOE_VIRTUAL_WARM_UP_ROWS; }

bool moe_virtual_sets_propose(const moe_virtual_sets *s, moe_virtual_swap *out) {
    least own, others; /* of the newcomer's layer; of layers that can spare one */
    double best = 0;
    least_clear(s, &others);
    for (int32_t layer = 0; layer < s->model->num_moe_layers && !s->budget.per_layer; layer++)
        if (s->size[layer] > s->model->top_k && warm(s, layer)) least_add(s, &others, layer);
    for (int32_t layer = 0; layer < s->model->num_moe_layers; layer++) {
        if (!warm(s, layer)) continue;
        least_clear(s, &own);
        least_add(s, &own, layer);
        for (int32_t i = first_of(s, layer); i < first_of(s, layer + 1); i++) {
            if (s->inside[i]) continue;
            int32_t leaver = leaver_for(s, &own, &others, i);
            double gain = leaver >= 0 ? s->worth[i] - s->worth[leaver] : 0;
            if (gain <= best || !gains_enough(s, gain, leaver)) continue;
            best = gain;
            *out = (moe_virtual_swap){expert_of(s, i), expert_of(s, leaver)};
        }
    }
    return best > 0;
}

void moe_virtual_sets_swap(moe_virtual_sets *s, const moe_virtual_swap *swap) {
    int32_t comes = number(s, swap->comes), leaves = number(s, swap->leaves);
    MOE_ASSERT(!s->inside[comes] && s->inside[leaves]);
    s->inside[comes] = true;
    s->inside[leaves] = false;
    s->used[s->home[comes]]++;
    s->used[s->home[leaves]]--;
    list_members(s, swap->comes.layer);
    list_members(s, swap->leaves.layer);
}
