#include "router/engine/dummy_routing.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/model/config.h"
#include "common/random.h"
#include "router/engine/internal.h"

#define MAX_DRAWS 64 /* of one choice; then the most popular expert that is left */
#define PLACES 8192  /* a sequence begins at one of these and walks on, around: choices are made at the start, looked up in a step */

struct moe_dummy_routing {
    moe_dummy_routing_spec spec;
    int32_t num_layers, num_experts, top_k;
    double *cumulated; /* [num_experts]: probability of this rank or a lower one */
    int32_t *expert;   /* [num_layers, num_experts]: of each rank */
    int32_t *chosen;   /* [num_layers, PLACES, top_k], ascending */
};

/* ---- the option ---- */

static moe_status read_field(const char *field, size_t length, moe_dummy_routing_spec *out, moe_error *err) {
    const struct {
        const char *name;
        double *value;
        double most;
    } fields[] = {{"zipf:", &out->skew, MOE_DUMMY_ROUTING_MAX_SKEW},
                  {"locality:", &out->locality, MOE_DUMMY_ROUTING_MAX_LOCALITY},
                  {"recall:", &out->recall, 1}};
    char *end;
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        size_t name = strlen(fields[i].name);
        if (strncmp(field, fields[i].name, name) != 0) continue;
        double value = strtod(field + name, &end);
        if (end == field + name || end != field + length || !(value >= 0 && value <= fields[i].most))
            return moe_fail(err, MOE_INVALID_ARGUMENT, "'%.*s': a number from 0 to %g is needed", (int)length, field, fields[i].most);
        *fields[i].value = value;
        return MOE_OK;
    }
    if (strncmp(field, "seed:", 5) == 0) {
        out->seed = strtoull(field + 5, &end, 10);
        if (end != field + 5 && end == field + length && field[5] != '-') return MOE_OK;
    }
    return moe_fail(err, MOE_INVALID_ARGUMENT, "'%.*s' is none of zipf:S, locality:P, recall:R, seed:N", (int)length, field);
}

moe_status moe_dummy_routing_parse(const char *text, moe_dummy_routing_spec *out, moe_error *err) {
    *out = (moe_dummy_routing_spec){.on = true, .locality = MOE_DUMMY_ROUTING_DEFAULT_LOCALITY, .recall = 1};
    if (strncmp(text, "zipf:", 5) != 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "'%s' does not begin with zipf:S, such as zipf:1.0", text);
    for (;;) {
        size_t length = strcspn(text, ",");
        moe_status status = read_field(text, length, out, err);
        if (status != MOE_OK || !text[length]) return status;
        text += length + 1;
    }
}

/* ---- choices ---- */

/* The random numbers of one choice at one place. The first says whether it is made anew; then come its draws. */
static moe_random stream(const moe_dummy_routing *r, uint64_t key, int32_t position, int32_t layer, int32_t choice) {
    uint64_t place = (uint64_t)(uint32_t)position << 32 | (uint64_t)(uint32_t)layer << 16 | (uint64_t)(uint32_t)choice;
    return (moe_random){moe_mix64(moe_mix64(r->spec.seed ^ moe_mix64(key)) ^ moe_mix64(place))};
}

static bool has(const int32_t *experts, int32_t count, int32_t expert) {
    for (int32_t i = 0; i < count; i++)
        if (experts[i] == expert) return true;
    return false;
}

static int32_t draw_rank(const moe_dummy_routing *r, moe_random *random) {
    double u = moe_random_unit(random);
    int32_t low = 0, high = r->num_experts - 1;
    while (low < high) { /* the first rank that is above u */
        int32_t middle = (low + high) / 2;
        if (r->cumulated[middle] > u)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static int32_t draw(const moe_dummy_routing *r, moe_random random, int32_t layer, const int32_t *taken, int32_t num_taken) {
    const int32_t *expert = r->expert + (int64_t)layer * r->num_experts;
    moe_random_next(&random);
    for (int i = 0; i < MAX_DRAWS; i++) {
        int32_t drawn = expert[draw_rank(r, &random)];
        if (!has(taken, num_taken, drawn)) return drawn;
    }
    int32_t rank = 0;
    while (has(taken, num_taken, expert[rank])) rank++;
    return expert[rank];
}

static int ascending(const void *a, const void *b) { return *(const int32_t *)a - *(const int32_t *)b; }

/* choices [top_k]: those of the place before become those of this one. What stays comes first, so that new ones change nothing of it. */
static void walk(const moe_dummy_routing *r, int32_t layer, int32_t place, int32_t *choices) {
    int32_t taken[MOE_MAX_TOP_K], num_taken = 0;
    bool stays[MOE_MAX_TOP_K];
    for (int32_t c = 0; c < r->top_k; c++) {
        moe_random random = stream(r, 0, place, layer, c);
        stays[c] = moe_random_unit(&random) < r->spec.locality && place > 0;
        if (stays[c]) taken[num_taken++] = choices[c];
    }
    for (int32_t c = 0; c < r->top_k; c++)
        if (!stays[c]) choices[c] = taken[num_taken] = draw(r, stream(r, 0, place, layer, c), layer, taken, num_taken), num_taken++;
}

static void choose_all(moe_dummy_routing *r, int32_t layer) {
    int32_t choices[MOE_MAX_TOP_K], *to = r->chosen + (int64_t)layer * PLACES * r->top_k;
    for (int32_t place = 0; place < PLACES; place++, to += r->top_k) {
        walk(r, layer, place, choices);
        memcpy(to, choices, (size_t)r->top_k * sizeof *to);
        qsort(to, (size_t)r->top_k, sizeof *to, ascending);
    }
}

/* ---- tables ---- */

static void shuffle(int32_t *experts, int32_t count, moe_random random) {
    for (int32_t i = 0; i < count; i++) experts[i] = i;
    for (int32_t i = count - 1; i > 0; i--) {
        int32_t j = (int32_t)moe_random_below(&random, (uint64_t)i + 1), kept = experts[i];
        experts[i] = experts[j];
        experts[j] = kept;
    }
}

moe_status moe_dummy_routing_new(const moe_dummy_routing_spec *spec, int32_t num_layers, int32_t num_experts, int32_t top_k,
                                 moe_dummy_routing **out, moe_error *err) {
    MOE_ASSERT(spec->on && top_k > 0 && top_k <= num_experts && top_k <= MOE_MAX_TOP_K);
    moe_dummy_routing *r = *out = moe_calloc(1, sizeof *r);
    if (!r) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    *r = (moe_dummy_routing){.spec = *spec, .num_layers = num_layers, .num_experts = num_experts, .top_k = top_k};
    r->cumulated = moe_calloc((size_t)num_experts, sizeof *r->cumulated);
    r->expert = moe_calloc((size_t)num_layers * (size_t)num_experts, sizeof *r->expert);
    r->chosen = moe_calloc((size_t)num_layers * PLACES * (size_t)top_k, sizeof *r->chosen);
    if (!r->cumulated || !r->expert || !r->chosen) {
        moe_dummy_routing_free(out);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the popularity of %d experts", num_experts);
    }
    double sum = 0;
    for (int32_t i = 0; i < num_experts; i++) r->cumulated[i] = sum += pow(i + 1, -spec->skew);
    for (int32_t i = 0; i < num_experts; i++) r->cumulated[i] /= sum;
    for (int32_t layer = 0; layer < num_layers; layer++)
        shuffle(r->expert + (int64_t)layer * num_experts, num_experts, (moe_random){moe_mix64(spec->seed ^ moe_mix64((uint64_t)layer))});
    for (int32_t layer = 0; layer < num_layers; layer++) choose_all(r, layer);
    return MOE_OK;
}

void moe_dummy_routing_free(moe_dummy_routing **routing) {
    moe_dummy_routing *r = *routing;
    *routing = NULL;
    if (!r) return;
    moe_free(r->cumulated);
    moe_free(r->expert);
    moe_free(r->chosen);
    moe_free(r);
}

uint64_t moe_dummy_routing_sequence(const int32_t *prompt, int32_t num_tokens) {
    uint64_t hash = (uint64_t)num_tokens;
    for (int32_t i = 0; i < num_tokens; i++) hash = moe_mix64(hash ^ (uint32_t)prompt[i]);
    return hash;
}

void moe_dummy_routing_choose(const moe_dummy_routing *r, uint64_t key, int32_t position, int32_t layer, int32_t *experts) {
    uint64_t place = (moe_mix64(r->spec.seed ^ moe_mix64(key)) + (uint64_t)position) % PLACES;
    memcpy(experts, r->chosen + ((int64_t)layer * PLACES + (int64_t)place) * r->top_k, (size_t)r->top_k * sizeof *experts);
}

void moe_dummy_routing_hint(const moe_dummy_routing *r, uint64_t key, int32_t position, int32_t layer, int32_t *experts) {
    int32_t chosen[MOE_MAX_TOP_K], wrong = 0;
    moe_dummy_routing_choose(r, key, position, layer, chosen);
    memcpy(experts, chosen, (size_t)r->top_k * sizeof *experts);
    if (r->spec.recall >= 1) return;
    for (int32_t i = 0; i < r->top_k && wrong < r->num_experts - r->top_k; i++) {
        moe_random random = stream(r, ~key, position, layer, i); /* of its own: no choice depends on recall */
        if (moe_random_unit(&random) < r->spec.recall) continue;
        int32_t other = (int32_t)moe_random_below(&random, (uint64_t)r->num_experts);
        while (has(chosen, r->top_k, other) || has(experts, r->top_k, other)) other = (other + 1) % r->num_experts;
        experts[i] = other;
        wrong++;
    }
    qsort(experts, (size_t)r->top_k, sizeof *experts, ascending);
}

/* ---- in the forward step ---- */

void dummy_routing_apply(const micro_batch *b) {
    const moe_engine *e = b->engine;
    const moe_segment *s = &b->segment;
    for (int32_t t = 0; t < b->num_rows; t++) {
        uint64_t key = b->seqs[b->row_seq[t]].seq->routing_key;
        int32_t *here = b->route.experts + (int64_t)t * e->model->top_k, *next = b->spare_route.experts + (int64_t)t * e->model->top_k;
        if (s->want_gate) moe_dummy_routing_choose(e->dummy_routing, key, b->positions[t], s->index, here);
        if (s->want_next == MOE_ROUTE_NONE) continue;
        if (e->config.gating == MOE_GATING_PRE_GATE)
            moe_dummy_routing_choose(e->dummy_routing, key, b->positions[t], s->index + 1, next);
        else
            moe_dummy_routing_hint(e->dummy_routing, key, b->positions[t], s->index + 1, next);
    }
}
