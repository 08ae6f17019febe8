#include "expert-worker/eviction.h"

#include <math.h>
#include <string.h>

#include "common/alloc.h"

/* What a policy is: how uses and loads change an expert's rank (the lowest is evicted first), and whether hints protect. */
typedef struct policy {
    const char *name, *about;
    void (*used)(moe_eviction *e, int32_t expert, int64_t now);
    void (*loaded)(moe_eviction *e, int32_t expert, int64_t now); /* NULL: it changes nothing */
    bool heeds_hints;
    bool counts_uses; /* ranks are logarithms of counts; else times */
} policy;

typedef struct hint {
    int32_t expert;
    uint64_t step;
    int64_t until;
} hint;

struct moe_eviction {
    const policy *policy;
    int32_t num_experts;
    double half_life;
    double *rank;       /* [num_experts]; -INFINITY: never used */
    bool *retired;      /* [num_experts] */
    int32_t *announced; /* [num_experts]: its entries in hints */
    hint *hints;        /* [MOE_EVICTION_MAX_HINTS], the oldest first */
    int32_t num_hints;
};

static void rank_by_time(moe_eviction *e, int32_t expert, int64_t now) { e->rank[expert] = (double)now; }

/* The decayed count of uses Σ 2^((t_i - now) / half_life) falls for all experts alike as `now` rises, so they are ranked by
 * log2 Σ 2^(t_i / half_life), which only a use changes. */
static void rank_by_decayed_uses(moe_eviction *e, int32_t expert, int64_t now) {
    double was = e->rank[expert], use = (double)now / e->half_life;
    double high = was > use ? was : use, low = was > use ? use : was;
    e->rank[expert] = high + log2(1 + exp2(low - high));
}

static const policy policies[] = {
    {"lru", "the expert that was used or loaded longest ago", rank_by_time, rank_by_time, false, false},
    {"lfu-decay", "the expert with the fewest uses, old uses counting less", rank_by_decayed_uses, NULL, false, true},
    {"hint-aware", "as lfu-decay, but what a hint announced goes last", rank_by_decayed_uses, NULL, true, true},
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
    MOE_ASSERT(config->num_experts > 0 && config->half_life > 0);
    *out = NULL;
    const policy *p = policy_of(config->policy);
    if (!p)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "no eviction policy is called '%s'; there are %s", config->policy,
                        MOE_EVICTION_POLICIES);
    moe_eviction *e = moe_calloc(1, sizeof *e);
    if (!e) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    *e = (moe_eviction){.policy = p, .num_experts = config->num_experts, .half_life = (double)config->half_life};
    e->rank = moe_calloc((size_t)e->num_experts, sizeof *e->rank);
    e->announced = moe_calloc((size_t)e->num_experts, sizeof *e->announced);
    e->hints = moe_calloc(MOE_EVICTION_MAX_HINTS, sizeof *e->hints);
    e->retired = moe_calloc((size_t)e->num_experts, sizeof *e->retired);
    if (!e->rank || !e->retired || !e->announced || !e->hints) {
        moe_eviction_free(&e);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    }
    for (int32_t i = 0; i < e->num_experts; i++) e->rank[i] = -INFINITY;
    *out = e;
    return MOE_OK;
}

void moe_eviction_free(moe_eviction **eviction) {
    moe_eviction *e = *eviction;
    if (!e) return;
    moe_free(e->rank);
    moe_free(e->retired);
    moe_free(e->announced);
    moe_free(e->hints);
    moe_free(e);
    *eviction = NULL;
}

void moe_eviction_loaded(moe_eviction *e, int32_t expert, int64_t now) {
    e->retired[expert] = false;
    if (e->policy->loaded) e->policy->loaded(e, expert, now);
}

void moe_eviction_used(moe_eviction *e, int32_t expert, int64_t now) { e->policy->used(e, expert, now); }

void moe_eviction_retired(moe_eviction *e, int32_t expert) { e->retired[expert] = true; }

void moe_eviction_hinted(moe_eviction *e, int32_t expert, uint64_t step, int64_t until) {
    if (e->num_hints == MOE_EVICTION_MAX_HINTS) {
        e->announced[e->hints[0].expert]--;
        memmove(e->hints, e->hints + 1, (size_t)--e->num_hints * sizeof *e->hints);
    }
    e->retired[expert] = false;
    e->hints[e->num_hints++] = (hint){expert, step, until};
    e->announced[expert]++;
}

void moe_eviction_ran(moe_eviction *e, uint64_t step, int32_t first, int32_t count, int64_t now) {
    int32_t kept = 0;
    for (int32_t i = 0; i < e->num_hints; i++) {
        const hint h = e->hints[i];
        bool over = h.step == step && h.expert >= first && h.expert - first < count;
        if (over || h.until <= now)
            e->announced[h.expert]--;
        else
            e->hints[kept++] = h;
    }
    e->num_hints = kept;
}

bool moe_eviction_announced(const moe_eviction *e, int32_t expert) { return e->announced[expert] > 0; }

bool moe_eviction_hotter(const moe_eviction *e, int32_t cold, int32_t other) {
    double margin = e->policy->counts_uses ? log2(1.5) : e->half_life / 4;
    if (e->retired[other]) return true;
    return e->rank[cold] > e->rank[other] + margin; /* -INFINITY on the right: the other was never used */
}

double moe_eviction_rank(const moe_eviction *e, int32_t expert) { return e->rank[expert]; }

/* Who goes before whom: retired experts, then those that no hint protects, then those of lower rank. */
static bool goes_before(const moe_eviction *e, int32_t a, int32_t b) {
    bool protected_a = e->policy->heeds_hints && e->announced[a] > 0, protected_b = e->policy->heeds_hints && e->announced[b] > 0;
    if (e->retired[a] != e->retired[b]) return e->retired[a];
    return protected_a != protected_b ? protected_b : e->rank[a] < e->rank[b];
}

int32_t moe_eviction_victim(const moe_eviction *e, int32_t num_slots, int32_t (*evictable)(void *ctx, int32_t slot), void *ctx) {
    int32_t victim = -1, goes = -1;
    for (int32_t slot = 0; slot < num_slots; slot++) {
        int32_t expert = evictable(ctx, slot);
        if (expert < 0 || (victim >= 0 && !goes_before(e, expert, goes))) continue;
        victim = slot;
        goes = expert;
    }
    return victim;
}
