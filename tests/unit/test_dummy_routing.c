/* Routing for generated weights: Zipf's distribution, by chi-square; distinct experts; locality and recall as asked for. Seeds are
 * fixed, so every figure is the same in every run. */
#include "router/engine/dummy_routing.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/random.h"
#include "tests/support/test.h"

#define EXPERTS 16
#define LAYERS 3
#define DRAWS 8192 /* places that a sequence walks through before it comes round */
#define CHI_SQUARE_15 37.7 /* 15 degrees of freedom: exceeded by chance once in 1000 */

static moe_dummy_routing *make(const char *text, int32_t num_experts, int32_t top_k) {
    moe_dummy_routing_spec spec;
    moe_dummy_routing *r;
    moe_error err;
    assert_int_equal(moe_dummy_routing_parse(text, &spec, &err), MOE_OK);
    assert_int_equal(moe_dummy_routing_new(&spec, LAYERS, num_experts, top_k, &r, &err), MOE_OK);
    return r;
}

/* counts [EXPERTS]: how often each expert of `layer` is chosen at the places of a sequence. */
static void count(const moe_dummy_routing *r, int32_t top_k, int32_t layer, double *counts) {
    int32_t experts[EXPERTS];
    memset(counts, 0, EXPERTS * sizeof *counts);
    for (int32_t i = 0; i < DRAWS; i++) {
        moe_dummy_routing_choose(r, 7, i, layer, experts);
        for (int32_t j = 0; j < top_k; j++) counts[experts[j]]++;
    }
}

static const double *by_counts;
static int most_first(const void *a, const void *b) {
    double x = by_counts[*(const int *)a], y = by_counts[*(const int *)b];
    return (x < y) - (x > y);
}

/* Popular experts first. */
static void find_ranks(const double *counts, int ranks[EXPERTS]) {
    for (int i = 0; i < EXPERTS; i++) ranks[i] = i;
    by_counts = counts;
    qsort(ranks, EXPERTS, sizeof *ranks, most_first);
}

static void zipf(double skew, double p[EXPERTS]) {
    double sum = 0;
    for (int i = 0; i < EXPERTS; i++) sum += p[i] = pow(i + 1, -skew);
    for (int i = 0; i < EXPERTS; i++) p[i] /= sum;
}

static void test_popularity_is_zipfs(void **state) {
    (void)state;
    static const struct {
        const char *text;
        double skew, locality;
    } cases[] = {{"zipf:0,locality:0", 0, 0}, {"zipf:1,locality:0", 1, 0}, {"zipf:1.5,locality:0.8,seed:3", 1.5, 0.8}};
    double counts[EXPERTS], p[EXPERTS];
    int ranks[EXPERTS], before[EXPERTS];
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        moe_dummy_routing *r = make(cases[c].text, EXPERTS, 1);
        zipf(cases[c].skew, p);
        for (int32_t layer = 0; layer < LAYERS; layer++) {
            double chi_square = 0;
            count(r, 1, layer, counts);
            find_ranks(counts, ranks);
            for (int i = 0; i < EXPERTS; i++) {
                double expected = DRAWS * p[i], off = counts[ranks[i]] - expected;
                chi_square += off * off / expected;
            }
            double alike = (1 + cases[c].locality) / (1 - cases[c].locality); /* places tell so much less than draws of their own */
            assert_true(chi_square / alike < CHI_SQUARE_15);
            assert_true(layer == 0 || memcmp(ranks, before, sizeof ranks) != 0); /* each layer has an order of its own */
            memcpy(before, ranks, sizeof ranks);
        }
        moe_dummy_routing_free(&r);
    }
}

/* Two of Zipf's distribution without putting back: expert i comes first, or second after any other. */
static void test_two_choices(void **state) {
    (void)state;
    double counts[EXPERTS], p[EXPERTS];
    int ranks[EXPERTS];
    moe_dummy_routing *r = make("zipf:1.2,locality:0", EXPERTS, 2);
    zipf(1.2, p);
    count(r, 2, 1, counts);
    find_ranks(counts, ranks);
    for (int i = 0; i < EXPERTS; i++) {
        double expected = p[i];
        for (int j = 0; j < EXPERTS; j++)
            if (j != i) expected += p[j] * p[i] / (1 - p[j]);
        assert_true(fabs(counts[ranks[i]] / DRAWS - expected) < 4 * sqrt(expected / DRAWS));
    }
    moe_dummy_routing_free(&r);
}

static void test_experts_are_distinct_and_ascending(void **state) {
    (void)state;
    static const int32_t shapes[][2] = {{8, 8}, {8, 2}, {128, 8}, {1, 1}, {60, 32}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        int32_t num_experts = shapes[s][0], top_k = shapes[s][1], experts[32], hint[32], again[32];
        moe_dummy_routing *r = make("zipf:8,locality:0.9,recall:0.3", num_experts, top_k);
        for (int32_t position = 0; position < 300; position++) {
            moe_dummy_routing_choose(r, 5, position, position % LAYERS, experts);
            moe_dummy_routing_hint(r, 5, position, position % LAYERS, hint);
            for (int32_t j = 0; j < top_k; j++) {
                assert_in_range(experts[j], j ? experts[j - 1] + 1 : 0, num_experts - 1);
                assert_in_range(hint[j], j ? hint[j - 1] + 1 : 0, num_experts - 1);
            }
            moe_dummy_routing_choose(r, 5, position, position % LAYERS, again);
            assert_memory_equal(experts, again, (size_t)top_k * sizeof *experts);
        }
        moe_dummy_routing_free(&r);
    }
}

static int32_t common(const int32_t *a, const int32_t *b, int32_t top_k) {
    int32_t found = 0;
    for (int32_t i = 0; i < top_k; i++)
        for (int32_t j = 0; j < top_k; j++) found += a[i] == b[j];
    return found;
}

/* Of even popularity: what stays, and what is drawn again by chance. */
static void test_locality_and_recall(void **state) {
    (void)state;
    enum { NUM = 64, TOP_K = 4, SEQUENCES = 50, TOKENS = 400 };
    static const char *const texts[] = {"zipf:0,locality:0", "zipf:0", "zipf:0,locality:0.9,recall:0.75"};
    static const double locality[] = {0, MOE_DUMMY_ROUTING_DEFAULT_LOCALITY, 0.9}, recall[] = {1, 1, 0.75};
    for (int c = 0; c < 3; c++) {
        moe_dummy_routing *r = make(texts[c], NUM, TOP_K);
        int32_t before[TOP_K], experts[TOP_K], hint[TOP_K];
        double kept = 0, right = 0;
        for (uint64_t s = 0; s < SEQUENCES; s++)
            for (int32_t position = 0; position <= TOKENS; position++) {
                moe_dummy_routing_choose(r, s, position, 2, experts);
                moe_dummy_routing_hint(r, s, position, 2, hint);
                right += position ? common(experts, hint, TOP_K) : 0;
                kept += position ? common(experts, before, TOP_K) : 0;
                memcpy(before, experts, sizeof before);
            }
        double all = (double)SEQUENCES * TOKENS * TOP_K, by_chance = (1 - locality[c]) * TOP_K / NUM;
        assert_true(fabs(kept / all - locality[c] - by_chance) < 0.02);
        assert_true(fabs(right / all - recall[c]) < 0.01);
        moe_dummy_routing_free(&r);
    }
}

static void test_sequences_and_seeds_differ(void **state) {
    (void)state;
    static const int32_t prompt[] = {5, 80, 11, 300};
    moe_dummy_routing *r = make("zipf:0.5", 128, 8), *other = make("zipf:0.5,seed:1", 128, 8);
    int32_t a[8], b[8];
    uint64_t sequence = moe_dummy_routing_sequence(prompt, 4);
    assert_true(sequence == moe_dummy_routing_sequence(prompt, 4) && sequence != moe_dummy_routing_sequence(prompt, 3));
    moe_dummy_routing_choose(r, sequence, 9, 0, a);
    moe_dummy_routing_choose(r, moe_dummy_routing_sequence(prompt, 3), 9, 0, b);
    assert_memory_not_equal(a, b, sizeof a);
    moe_dummy_routing_choose(other, sequence, 9, 0, b);
    assert_memory_not_equal(a, b, sizeof a);
    moe_dummy_routing_free(&r);
    moe_dummy_routing_free(&r);
    moe_dummy_routing_free(&other);
}

static void test_parse(void **state) {
    (void)state;
    moe_dummy_routing_spec spec;
    moe_error err;
    assert_int_equal(moe_dummy_routing_parse("zipf:1.25,seed:18446744073709551615,recall:0.5,locality:0.25", &spec, &err), MOE_OK);
    assert_true(spec.on && spec.skew == 1.25 && spec.locality == 0.25 && spec.recall == 0.5 && spec.seed == UINT64_MAX);
    assert_int_equal(moe_dummy_routing_parse("zipf:2", &spec, &err), MOE_OK);
    assert_true(spec.locality == MOE_DUMMY_ROUTING_DEFAULT_LOCALITY && spec.recall == 1 && spec.seed == 0);
    static const char *const bad[] = {"",          "zipf",           "zipf:",         "zipf:-1",         "zipf:9",      "zipf:nan",
                                      "zipf:1,",   "zipf:1,other:2", "locality:0.5",  "zipf:1,recall:2", "zipf:1 2",    "zipf:1,locality:1",
                                      "zipf:1,,",  "zipf:1,seed:",   "zipf:1,seed:-1", "zipf:1,seed:1x", "even"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) assert_int_equal(moe_dummy_routing_parse(bad[i], &spec, &err), MOE_INVALID_ARGUMENT);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_popularity_is_zipfs), cmocka_unit_test(test_two_choices),
        cmocka_unit_test(test_experts_are_distinct_and_ascending), cmocka_unit_test(test_locality_and_recall),
        cmocka_unit_test(test_sequences_and_seeds_differ), cmocka_unit_test(test_parse),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
