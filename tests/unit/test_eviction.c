/* Eviction policies: which expert goes first, what hints protect, and random histories beside a model that keeps all of them. */
#include "expert-worker/eviction.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/random.h"
#include "tests/support/test.h"

#define EXPERTS 24
#define LAYERS 3
#define PER_LAYER (EXPERTS / LAYERS)
#define SLOTS 7
#define HALF_LIFE 10
#define EVENTS 400

typedef struct slots {
    int32_t expert[SLOTS]; /* -1: it must stay */
} slots;

static bool in_use[SLOTS];
static bool may_go(void *ctx, int32_t slot) {
    assert_true(((const slots *)ctx)->expert[slot] >= 0);
    return !in_use[slot];
}
static int32_t victim_of(const moe_eviction *e, const slots *s) { return moe_eviction_victim(e, s->expert, SLOTS, may_go, (void *)(uintptr_t)s); }

static moe_eviction *make(const char *policy) {
    moe_eviction_config config = {.policy = policy, .num_experts = EXPERTS, .num_layers = LAYERS, .half_life = HALF_LIFE};
    moe_eviction *e;
    moe_error err;
    assert_int_equal(moe_eviction_new(&config, &e, &err), MOE_OK);
    return e;
}

static void test_unknown_policy(void **state) {
    (void)state;
    moe_eviction_config config = {.policy = "fifo", .num_experts = EXPERTS, .num_layers = LAYERS, .half_life = HALF_LIFE};
    moe_eviction *e;
    moe_error err;
    assert_int_equal(moe_eviction_new(&config, &e, &err), MOE_INVALID_ARGUMENT);
    assert_null(e);
    assert_non_null(strstr(err.message, MOE_EVICTION_POLICIES));
    char names[128] = "";
    for (int32_t i = 0; moe_eviction_policy_name(i); i++) {
        size_t length = strlen(names);
        snprintf(names + length, sizeof names - length, "%s%s", i ? "|" : "", moe_eviction_policy_name(i));
        assert_non_null(moe_eviction_policy_about(i));
    }
    assert_string_equal(names, MOE_EVICTION_POLICIES);
}

static void test_recency_and_frequency(void **state) {
    (void)state;
    moe_eviction *lru = make("lru"), *lfu = make("lfu-decay");
    slots s = {{3, 1, 2, -1, -1, -1, -1}};
    for (int64_t t = 1; t <= 4; t++) { /* expert 1 often, but long ago */
        moe_eviction_used(lru, 1, t);
        moe_eviction_used(lfu, 1, t);
    }
    for (int32_t x = 2; x <= 3; x++) {
        moe_eviction_used(lru, x, 3 + x);
        moe_eviction_used(lfu, x, 3 + x);
    }
    assert_int_equal(victim_of(lru, &s), 1);
    assert_int_equal(victim_of(lfu, &s), 2); /* one use each, 2's is older */
    moe_eviction_used(lfu, 2, 100);
    moe_eviction_used(lfu, 3, 101);
    assert_int_equal(victim_of(lfu, &s), 1); /* four uses, but nine half-lives ago */
    moe_eviction_loaded(lru, 1, 200);
    assert_int_equal(victim_of(lru, &s), 2);
    memset(&s, -1, sizeof s);
    assert_int_equal(victim_of(lru, &s), -1);
    moe_eviction_free(&lru);
    moe_eviction_free(&lru);
    moe_eviction_free(&lfu);
}

static void test_hints_protect_until_their_layer_ran(void **state) {
    (void)state;
    moe_eviction *e = make("hint-aware");
    slots s = {{4, 5, -1, -1, -1, -1, -1}};
    moe_eviction_used(e, 5, 1);
    assert_int_equal(victim_of(e, &s), 0); /* never used */
    moe_eviction_hinted(e, 4, 1, 100);
    moe_eviction_hinted(e, 4, 2, 100);
    assert_int_equal(victim_of(e, &s), 1);
    moe_eviction_ran(e, 1, 0, 4, 2); /* another layer */
    moe_eviction_ran(e, 1, 4, 4, 3);
    assert_true(moe_eviction_announced(e, 4)); /* step 2 still wants it */
    moe_eviction_hinted(e, 5, 2, 50);
    assert_int_equal(victim_of(e, &s), 0); /* both are announced */
    moe_eviction_ran(e, 9, 0, 1, 50);
    assert_false(moe_eviction_announced(e, 5)); /* its step never came */
    moe_eviction_ran(e, 2, 4, 4, 51);
    assert_false(moe_eviction_announced(e, 4));
    moe_eviction_free(&e);
}

static void test_full_table_forgets_the_oldest_hint(void **state) {
    (void)state;
    moe_eviction *e = make("hint-aware");
    moe_eviction_hinted(e, 0, 1, 10);
    for (int i = 0; i < MOE_EVICTION_MAX_HINTS; i++) {
        assert_true(moe_eviction_announced(e, 0));
        moe_eviction_hinted(e, 1, 1, 10);
    }
    assert_false(moe_eviction_announced(e, 0));
    moe_eviction_ran(e, 1, 1, 1, 2);
    assert_false(moe_eviction_announced(e, 1));
    moe_eviction_free(&e);
}

/* The same popularity: the layer that has just run comes last; then popularity, by the batches of the expert's own layer; then what
 * hints pass over while they name others of its layer. */
static void test_the_next_use_is_foreseen(void **state) {
    (void)state;
    moe_eviction *e = make("hint-aware");
    slots s = {{0, 8, 16, -1, -1, -1, -1}};
    for (int64_t t = 0; t < 9; t++) moe_eviction_used(e, (int32_t)(t % 3) * PER_LAYER, t);
    for (int32_t layer = 0; layer < LAYERS; layer++) {
        moe_eviction_ran(e, 1, layer * PER_LAYER, PER_LAYER, 9);
        assert_int_equal(victim_of(e, &s), layer);
    }
    for (int64_t t = 9; t < 12; t++) moe_eviction_used(e, 1 + (int32_t)(t % 3) * PER_LAYER, t);
    s.expert[0] = 1; /* of the next layer, but once in four batches alone */
    assert_int_equal(victim_of(e, &s), 0);
    assert_true(moe_eviction_hotter(e, 0, 1));
    assert_false(moe_eviction_hotter(e, 0, 8));
    assert_false(moe_eviction_hotter(e, 1, 0));
    moe_eviction_used(e, 16, 12);
    s.expert[0] = 0;
    assert_int_equal(victim_of(e, &s), 2);
    moe_eviction_hinted(e, 3, 2, 100);
    s.expert[2] = -1;
    assert_int_equal(victim_of(e, &s), 0); /* layer 0 comes first, but without it */
    moe_eviction_ran(e, 2, 0, PER_LAYER, 13);
    assert_int_equal(victim_of(e, &s), 0); /* has just run */
    moe_eviction_ran(e, 2, PER_LAYER, PER_LAYER, 14);
    assert_int_equal(victim_of(e, &s), 1);
    moe_eviction_free(&e);
}

/* The model: every use and every hint that was, looked at anew for each question. */
typedef struct event {
    int32_t expert;
    int64_t at;
} event;
typedef struct announcement {
    int32_t expert;
    uint64_t step;
    int64_t until;
} announcement;
static event uses[EVENTS];
static announcement hints[EVENTS];
static int num_uses, num_hints;
static bool retired[EXPERTS];
static int32_t last_layer;  /* that ran or was used, */
static int64_t last_at;     /* and when */

static bool layer_announced(int32_t layer) {
    for (int i = 0; i < num_hints; i++)
        if (hints[i].expert / PER_LAYER == layer) return true;
    return false;
}

static bool is_announced(int32_t expert);

/* Layers until the next use, at the pace of the layer's batches so far and two more, half of one of which used it. */
static double next_use(int32_t expert) {
    int32_t layer = expert / PER_LAYER;
    double used = 0.5, batches = 2, ahead = layer > last_layer ? layer - last_layer : layer - last_layer + LAYERS;
    int64_t counted = -1;
    for (int i = 0; i < num_uses; i++) {
        double weight = exp2((double)(uses[i].at - last_at) / HALF_LIFE);
        if (uses[i].expert == expert) used += weight;
        if (uses[i].expert / PER_LAYER != layer || uses[i].at == counted) continue;
        batches += weight;
        counted = uses[i].at;
    }
    if (layer_announced(layer) && !is_announced(expert)) ahead += LAYERS;
    return ahead + (batches / used - 1) * LAYERS;
}

/* Who has less of it goes first. */
static double score(const char *policy, int32_t expert, int64_t now) {
    double sum = 0, last = -INFINITY;
    for (int i = 0; i < num_uses; i++) {
        if (uses[i].expert != expert) continue;
        sum += exp2((double)(uses[i].at - now) / HALF_LIFE);
        last = (double)uses[i].at;
    }
    if (strcmp(policy, "hint-aware") == 0) return -next_use(expert);
    return strcmp(policy, "lru") == 0 ? last : sum;
}

static bool is_announced(int32_t expert) {
    for (int i = 0; i < num_hints; i++)
        if (hints[i].expert == expert) return true;
    return false;
}

static void end_hints(uint64_t step, int32_t first, int32_t count, int64_t now) {
    int kept = 0;
    for (int i = 0; i < num_hints; i++) {
        announcement h = hints[i];
        if (h.until > now && !(h.step == step && h.expert >= first && h.expert < first + count)) hints[kept++] = h;
    }
    num_hints = kept;
}

/* That no evictable slot ranks before the named one; near ties are either's. */
static void check_victim(const moe_eviction *e, const char *policy, const slots *s, int64_t now) {
    bool heeds = strcmp(policy, "hint-aware") == 0;
    int32_t victim = victim_of(e, s);
    bool any = false;
    for (int i = 0; i < SLOTS; i++) any |= s->expert[i] >= 0 && !in_use[i];
    assert_int_equal(victim >= 0, any);
    if (!any) return;
    int32_t chosen = s->expert[victim];
    assert_true(chosen >= 0 && !in_use[victim]);
    for (int i = 0; i < SLOTS; i++) {
        int32_t other = s->expert[i];
        if (other < 0 || in_use[i]) continue;
        if (retired[other]) assert_true(retired[chosen]);
        if (retired[chosen] && !retired[other]) continue;
        if (heeds && is_announced(chosen)) assert_true(is_announced(other));
        if (heeds && is_announced(other) && !is_announced(chosen)) continue;
        double mine = score(policy, chosen, now), its = score(policy, other, now);
        assert_true(mine == its || mine <= its + 1e-9 * fabs(its) + (heeds ? 2e-6 : 0));
    }
}

static void test_random_histories(void **state) {
    (void)state;
    static const char *const names[] = {"lru", "lfu-decay", "hint-aware"};
    for (uint64_t seed = 0; seed < 60; seed++) {
        const char *policy = names[seed % 3];
        moe_random random = {seed};
        moe_eviction *e = make(policy);
        num_uses = num_hints = 0;
        last_layer = LAYERS - 1;
        last_at = 0;
        memset(retired, 0, sizeof retired);
        int64_t now = 0;
        for (int i = 0; i < EVENTS; i++) {
            now += (int64_t)moe_random_below(&random, 4);
            if (moe_random_below(&random, 100) == 0) now += (int64_t)moe_random_below(&random, 1000) * HALF_LIFE; /* all is forgotten */
            int32_t expert = (int32_t)moe_random_below(&random, EXPERTS);
            uint64_t step = moe_random_below(&random, 3);
            switch (moe_random_below(&random, 6)) {
                case 4:
                    retired[expert] = true;
                    moe_eviction_retired(e, expert);
                    break;
                case 5: /* loaded: a use, for lru */
                    retired[expert] = false;
                    if (strcmp(policy, "lru") == 0) uses[num_uses++] = (event){expert, now};
                    moe_eviction_loaded(e, expert, now);
                    break;
                case 0:
                    retired[expert] = false;
                    hints[num_hints++] = (announcement){expert, step, now + 30};
                    moe_eviction_hinted(e, expert, step, now + 30);
                    break;
                case 1:
                    end_hints(step, expert / PER_LAYER * PER_LAYER, PER_LAYER, now);
                    moe_eviction_ran(e, step, expert / PER_LAYER * PER_LAYER, PER_LAYER, now);
                    last_layer = expert / PER_LAYER;
                    last_at = now;
                    break;
                default:
                    uses[num_uses++] = (event){expert, now};
                    moe_eviction_used(e, expert, now);
                    last_layer = expert / PER_LAYER;
                    last_at = now;
            }
            slots s;
            for (int j = 0; j < SLOTS; j++) s.expert[j] = (int32_t)moe_random_below(&random, EXPERTS + 8) - 8;
            for (int j = 0; j < SLOTS; j++) s.expert[j] = s.expert[j] < 0 ? -1 : s.expert[j];
            for (int j = 0; j < SLOTS; j++) in_use[j] = moe_random_below(&random, 4) == 0;
            for (int32_t x = 0; x < EXPERTS; x++) assert_int_equal(moe_eviction_announced(e, x), is_announced(x));
            check_victim(e, policy, &s, now);
        }
        moe_eviction_free(&e);
    }
    memset(in_use, 0, sizeof in_use);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_unknown_policy),
        cmocka_unit_test(test_recency_and_frequency),
        cmocka_unit_test(test_hints_protect_until_their_layer_ran),
        cmocka_unit_test(test_full_table_forgets_the_oldest_hint),
        cmocka_unit_test(test_the_next_use_is_foreseen),
        cmocka_unit_test(test_random_histories),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
