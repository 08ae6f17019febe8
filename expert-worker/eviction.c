#include "expert-worker/eviction.h"

#include <math.h>
#include <string.h>

#include "common/alloc.h"

/* What few batches say of an expert is not certain: to those that were, so many are added, some of which used it. */
#define DOUBT_BATCHES 2.0
#define DOUBT_USES 0.5
#define EQUAL 1e-6 /* layers: no later than another */
#define REBASE_HALVINGS 512 /* of the first uses, before all weights are scaled down */

/* What a policy is: how uses and loads change an expert's rank, and which rank goes first. */
typedef struct policy {
    const char *name, *about;
    void (*used)(moe_eviction *e, int32_t expert, int64_t now);
    void (*loaded)(moe_eviction *e, int32_t expert, int64_t now); /* NULL: it changes nothing */
    bool foresees;    /* the latest next use goes first, what hints announced last; else the lowest rank */
    bool counts_uses; /* ranks are logarithms of counts; else times; where it does not foresee */
} policy;

typedef struct hint {
    int32_t expert;
    uint64_t step;
    int64_t until;
} hint;

typedef struct expert_state {
    double rank;       /* -INFINITY: never used; where the policy foresees: weights of its uses, 0 at first */
    int32_t announced; /* its entries in hints */
    uint16_t layer;
    uint8_t class; /* who is of a higher one goes before: see classify */
    bool retired;
} expert_state;

/* Of the batches that used any expert of the layer; counted where the policy foresees. */
typedef struct layer_state {
    double batches;         /* their weights */
    int64_t last;           /* one's time */
    int32_t announced;      /* of its experts' hints */
    double offset, per_use; /* an expert's next use: offset + per_use / (weights of its uses and DOUBT_USES) layers from now */
} layer_state;

struct moe_eviction {
    const policy *policy;
    int32_t num_experts, num_layers;
    double half_life;
    expert_state *experts; /* [num_experts] */
    layer_state *layers;   /* [num_layers] */
    int32_t layer;         /* the last one that ran */
    int64_t now, base;     /* the latest time; a use then weighs `weight` = 2^((now - base) / half_life) */
    double weight;
    double *limits;                 /* [num_layers] scratch: see set_limits */
    hint *hints;                    /* [MOE_EVICTION_MAX_HINTS], a ring */
    int32_t num_hints, oldest_hint; /* the oldest one's place */
};

static void rank_by_time(moe_eviction *e, int32_t expert, int64_t now) { e->experts[expert].rank = (double)now; }

/* The decayed count of uses Σ 2^((t_i - now) / half_life) falls for all experts alike as `now` rises, so they are ranked by
 * log2 Σ 2^(t_i / half_life), which only a use changes. */
static void rank_by_decayed_uses(moe_eviction *e, int32_t expert, int64_t now) {
    double was = e->experts[expert].rank, use = (double)now / e->half_life;
    double high = was > use ? was : use, low = was > use ? use : was;
    e->experts[expert].rank = high + log2(1 + exp2(low - high));
}

/* ---- the time to the next use ---- */

/* An expert that p of its layer's batches used is wanted, on average, 1/p - 1 rounds over all layers after its layer comes next; p is
 * its uses by the batches of its layer, both decayed. */
static void foresee(moe_eviction *e) {
    for (int32_t i = 0; i < e->num_layers; i++) {
        layer_state *l = &e->layers[i];
        int32_t ahead = i > e->layer ? i - e->layer : i - e->layer + e->num_layers; /* the layer that runs now has just passed */
        l->offset = ahead - e->num_layers;
        l->per_use = e->num_layers * (l->batches + DOUBT_BATCHES * e->weight);
    }
}

static void set_time(moe_eviction *e, int64_t now) {
    e->now = now;
    if ((double)(now - e->base) > REBASE_HALVINGS * e->half_life) {
        double scale = exp2((double)(e->base - now) / e->half_life);
        for (int32_t i = 0; i < e->num_experts; i++) e->experts[i].rank *= scale;
        for (int32_t i = 0; i < e->num_layers; i++) e->layers[i].batches *= scale;
        e->base = now;
    }
    e->weight = exp2((double)(now - e->base) / e->half_life);
}

static void come_to(moe_eviction *e, int32_t layer, int64_t now) {
    if (layer == e->layer && now == e->now) return;
    e->layer = layer;
    if (now != e->now) set_time(e, now);
    foresee(e);
}

static void count_use(moe_eviction *e, int32_t expert, int64_t now) {
    expert_state *x = &e->experts[expert];
    layer_state *l = &e->layers[x->layer];
    come_to(e, x->layer, now);
    if (l->last != now) {
        l->last = now;
        l->batches += e->weight;
        foresee(e);
    }
    x->rank += e->weight;
}

/* Layers until the layer comes for an expert, less a round. What hints do not name while they name others of the layer, it will not want
 * yet. */
static double next_turn(const moe_eviction *e, const layer_state *l, bool announced) {
    return l->offset + (!announced && l->announced > 0 ? e->num_layers : 0);
}

static double next_use(const moe_eviction *e, const expert_state *x) {
    const layer_state *l = &e->layers[x->layer];
    return next_turn(e, l, x->announced > 0) + l->per_use / (x->rank + DOUBT_USES * e->weight);
}

static double uses_a_batch(const moe_eviction *e, const expert_state *x) {
    return (x->rank + DOUBT_USES * e->weight) / (e->layers[x->layer].batches + DOUBT_BATCHES * e->weight);
}

/* Retired experts go first; where the policy foresees, announced ones last. */
static void classify(moe_eviction *e, int32_t expert) {
    expert_state *x = &e->experts[expert];
    x->class = (uint8_t)(e->policy->foresees ? 2 * x->retired + (x->announced == 0) : x->retired);
}

static void set_retired(moe_eviction *e, int32_t expert, bool retired) {
    e->experts[expert].retired = retired;
    classify(e, expert);
}

static const policy policies[] = {
    {"lru", "the expert that was used or loaded longest ago", rank_by_time, rank_by_time, false, false},
    {"lfu-decay", "the expert with the fewest uses, old uses counting less", rank_by_decayed_uses, NULL, false, true},
    {"hint-aware", "the expert whose next use is expected last, by uses and the order of layers; what a hint announced goes last",
     count_use, NULL, true, true},
};
#define NUM_POLICIES ((int32_t)(sizeof policies / sizeof *policies))

const char *moe_eviction_policy_name(int32_t index) { return index < NUM_POLICIES ? policies[index].name : NULL; }
const char *moe_eviction_policy_about(int32_t index) { return index < NUM_POLICIES ? policies[index].about : NULL; }

static const policy *policy_of(const char *name) {
    for (int32_t i = 0; i < NUM_POLICIES; i++)
        if (strcmp(policies[i].name, name) == 0) return &policies[i];
    return NULL;
}

moe_status moe_eviction_new(const moe_eviction_config *config, moe_eviction **out, moe_error *err) {
    MOE_ASSERT(config->num_layers > 0 && config->num_layers <= UINT16_MAX && config->num_experts > 0 && config->half_life > 0);
    MOE_ASSERT(config->num_experts % config->num_layers == 0);
    *out = NULL;
    const policy *p = policy_of(config->policy);
    if (!p)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "no eviction policy is called '%s'; there are %s", config->policy,
                        MOE_EVICTION_POLICIES);
    moe_eviction *e = moe_calloc(1, sizeof *e);
    if (!e) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    *e = (moe_eviction){.policy = p,
                        .num_experts = config->num_experts,
                        .num_layers = config->num_layers,
                        .half_life = (double)config->half_life,
                        .layer = config->num_layers - 1,
                        .weight = 1};
    e->experts = moe_calloc((size_t)e->num_experts, sizeof *e->experts);
    e->layers = moe_calloc((size_t)e->num_layers, sizeof *e->layers);
    e->limits = moe_calloc((size_t)e->num_layers, sizeof *e->limits);
    e->hints = moe_calloc(MOE_EVICTION_MAX_HINTS, sizeof *e->hints);
    if (!e->experts || !e->layers || !e->limits || !e->hints) {
        moe_eviction_free(&e);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    }
    for (int32_t i = 0; i < e->num_experts; i++) {
        e->experts[i] = (expert_state){.rank = p->foresees ? 0 : -INFINITY,
                                       .layer = (uint16_t)(i / (e->num_experts / e->num_layers))};
        classify(e, i);
    }
    for (int32_t i = 0; i < e->num_layers; i++) e->layers[i].last = INT64_MIN;
    foresee(e);
    *out = e;
    return MOE_OK;
}

void moe_eviction_free(moe_eviction **eviction) {
    moe_eviction *e = *eviction;
    if (!e) return;
    moe_free(e->experts);
    moe_free(e->layers);
    moe_free(e->limits);
    moe_free(e->hints);
    moe_free(e);
    *eviction = NULL;
}

void moe_eviction_loaded(moe_eviction *e, int32_t expert, int64_t now) {
    set_retired(e, expert, false);
    if (e->policy->loaded) e->policy->loaded(e, expert, now);
}

void moe_eviction_used(moe_eviction *e, int32_t expert, int64_t now) { e->policy->used(e, expert, now); }

void moe_eviction_retired(moe_eviction *e, int32_t expert) { set_retired(e, expert, true); }

static void count_hint(moe_eviction *e, int32_t expert, int32_t more) {
    e->experts[expert].announced += more;
    e->layers[e->experts[expert].layer].announced += more;
    classify(e, expert);
}

static hint *hint_at(const moe_eviction *e, int32_t index) { return &e->hints[(e->oldest_hint + index) % MOE_EVICTION_MAX_HINTS]; }

void moe_eviction_hinted(moe_eviction *e, int32_t expert, uint64_t step, int64_t until) {
    if (e->num_hints == MOE_EVICTION_MAX_HINTS) {
        count_hint(e, hint_at(e, 0)->expert, -1);
        e->oldest_hint = (e->oldest_hint + 1) % MOE_EVICTION_MAX_HINTS;
        e->num_hints--;
    }
    set_retired(e, expert, false);
    count_hint(e, expert, 1);
    *hint_at(e, e->num_hints++) = (hint){expert, step, until};
}

void moe_eviction_ran(moe_eviction *e, uint64_t step, int32_t first, int32_t count, int64_t now) {
    int32_t kept = 0;
    for (int32_t i = 0; i < e->num_hints; i++) {
        const hint h = *hint_at(e, i);
        bool over = h.step == step && h.expert >= first && h.expert - first < count;
        if (over || h.until <= now)
            count_hint(e, h.expert, -1);
        else
            *hint_at(e, kept++) = h;
    }
    e->num_hints = kept;
    if (e->policy->foresees && count > 0) come_to(e, e->experts[first + count - 1].layer, now);
}

bool moe_eviction_announced(const moe_eviction *e, int32_t expert) { return e->experts[expert].announced > 0; }

bool moe_eviction_hotter(const moe_eviction *e, int32_t cold, int32_t other) {
    const expert_state *c = &e->experts[cold], *o = &e->experts[other];
    if (o->retired) return true;
    if (e->policy->foresees) return uses_a_batch(e, c) > 1.5 * uses_a_batch(e, o);
    return c->rank > o->rank + (e->policy->counts_uses ? log2(1.5) : e->half_life / 4); /* -INFINITY: the other was never used */
}

double moe_eviction_rank(const moe_eviction *e, int32_t expert) { return e->experts[expert].rank; }

/* Of experts of the class of `best` those go before it whose rank is below their layer's limit: so each is looked at without a division. */
static void set_limits(const moe_eviction *e, const expert_state *best) {
    bool foresees = e->policy->foresees;
    double than = foresees ? next_use(e, best) + EQUAL : 0;
    for (int32_t i = 0; i < e->num_layers; i++) {
        const layer_state *l = &e->layers[i];
        double after = than - next_turn(e, l, best->announced > 0);
        double limit = after > 0 ? l->per_use / after - DOUBT_USES * e->weight : INFINITY;
        e->limits[i] = foresees ? limit : best->rank;
    }
}

int32_t moe_eviction_victim(const moe_eviction *e, const int32_t *expert_in, int32_t num_slots, bool (*may_go)(void *ctx, int32_t slot),
                            void *ctx) {
    int32_t victim = -1;
    int class = -1; /* the victim's */
    for (int32_t slot = 0; slot < num_slots; slot++) {
        if (expert_in[slot] < 0) continue;
        const expert_state *x = &e->experts[expert_in[slot]];
        if (x->class <= class && (x->class < class || x->rank >= e->limits[x->layer])) continue;
        if (!may_go(ctx, slot)) continue;
        victim = slot;
        class = x->class;
        set_limits(e, x);
    }
    return victim;
}
