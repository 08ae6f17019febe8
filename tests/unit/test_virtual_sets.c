/* Expert budgets and virtual sets: what budgets mean and refuse, sizes and homes of sets, importance, swaps, routing among a set held
 * against a reference that knows nothing of it. */
#include "router/engine/virtual_sets.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/random.h"
#include "tests/support/test.h"

enum { LAYERS = 5, EXPERTS = 16, TOP_K = 2, ALL = LAYERS * EXPERTS, ROWS = 32, HOMES = 3 };

static moe_model_config model_of(int32_t layers, int32_t experts, int32_t top_k, bool norm_topk) {
    return (moe_model_config){.num_moe_layers = layers, .num_experts = experts, .top_k = top_k, .norm_topk = norm_topk};
}

/* ---- budgets ---- */

static void budgets_are_parsed(void **state) {
    (void)state;
    static const char *const bad[] = {"", "0", "0%", "-1", "-5%", "100.1%", "2.5", "many", "25 %", "%", "25%x", "1e9", "nan", "nan%", "inf"};
    moe_expert_budget budget;
    char name[MOE_EXPERT_BUDGET_NAME_BYTES];
    moe_error err;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(moe_expert_budget_parse(bad[i], &budget, &err), MOE_INVALID_ARGUMENT);
        assert_non_null(strstr(err.message, "--expert-budget"));
    }
    assert_int_equal(moe_expert_budget_parse("37.5%", &budget, &err), MOE_OK);
    assert_true(fabs(budget.part - 0.375) < 1e-12 && budget.per_layer == 0);
    moe_expert_budget_name(budget, name);
    assert_string_equal(name, "37.5");
    assert_int_equal(moe_expert_budget_parse("100%", &budget, &err), MOE_OK);
    assert_true(budget.part == 1);
    assert_int_equal(moe_expert_budget_parse("4", &budget, &err), MOE_OK);
    assert_true(budget.part == 0 && budget.per_layer == 4);
    moe_expert_budget_name(budget, name);
    assert_string_equal(name, "4-per-layer");
}

static void what_is_too_little_is_refused_with_the_least(void **state) {
    (void)state;
    moe_error err;
    for (int32_t experts = 1; experts < 140; experts += 7)
        for (int32_t top_k = 1; top_k <= experts && top_k <= 8; top_k++) {
            const moe_model_config m = model_of(3, experts, top_k, true);
            const moe_expert_budget few = {.per_layer = top_k - 1}, many = {.per_layer = experts + 1};
            if (top_k > 1) assert_int_equal(moe_expert_budget_check(few, &m, &err), MOE_INVALID_ARGUMENT);
            assert_int_equal(moe_expert_budget_check(many, &m, &err), MOE_INVALID_ARGUMENT);
            const moe_expert_budget little = {.part = (3 * top_k - 0.5) / (3 * experts)};
            assert_int_equal(moe_expert_budget_check(little, &m, &err), MOE_INVALID_ARGUMENT);
            const char *least = strstr(err.message, "at least ");
            assert_non_null(least);
            const moe_expert_budget said = {.part = strtod(least + strlen("at least "), NULL) / 100};
            assert_int_equal(moe_expert_budget_check(said, &m, &err), MOE_OK);
            assert_int_equal(moe_expert_budget_count((moe_expert_budget){.per_layer = top_k}, &m), 3 * top_k);
        }
    const moe_model_config dense = model_of(0, 0, 0, true);
    assert_int_equal(moe_expert_budget_check((moe_expert_budget){.part = 0.5}, &dense, &err), MOE_INVALID_ARGUMENT);
}

/* ---- sets ---- */

static moe_virtual_sets *sets_of(const moe_model_config *m, moe_expert_budget budget, int32_t homes) {
    moe_virtual_sets *s;
    moe_error err;
    int32_t *home = calloc((size_t)m->num_moe_layers * (size_t)m->num_experts, sizeof *home);
    for (int32_t i = 0; i < m->num_moe_layers * m->num_experts; i++) home[i] = i % m->num_experts % homes;
    assert_int_equal(moe_expert_budget_check(budget, m, &err), MOE_OK);
    assert_int_equal(moe_virtual_sets_new(m, budget, &s, &err), MOE_OK);
    moe_virtual_sets_place(s, home, homes);
    free(home);
    return s;
}

static int32_t count_all(const moe_virtual_sets *s, const moe_model_config *m, int32_t homes, int32_t *least, int32_t at_home[HOMES]) {
    int32_t all = 0;
    *least = m->num_experts;
    memset(at_home, 0, HOMES * sizeof *at_home);
    for (int32_t layer = 0; layer < m->num_moe_layers; layer++) {
        int32_t size = 0;
        for (int32_t x = 0; x < m->num_experts; x++) {
            if (!moe_virtual_sets_has(s, layer, x)) continue;
            size++;
            at_home[x % homes]++;
        }
        assert_int_equal(size, moe_virtual_sets_size(s, layer));
        if (size < *least) *least = size;
        all += size;
    }
    return all;
}

/* Rows whose gate takes expert x of a layer as often as popular[layer, x] says. */
static void let_pass(moe_virtual_sets *s, const moe_model_config *m, const double *popular, moe_random *random) {
    int32_t experts[ROWS * TOP_K];
    float weights[ROWS * TOP_K];
    for (int32_t layer = 0; layer < m->num_moe_layers; layer++) {
        for (int32_t row = 0; row < ROWS; row++) {
            int32_t *x = experts + row * TOP_K;
            for (int32_t j = 0; j < TOP_K; j++) {
                double sum = 0, at;
                for (int32_t i = 0; i < m->num_experts; i++) sum += popular[layer * m->num_experts + i];
                at = sum * (double)moe_random_below(random, 1 << 20) / (1 << 20);
                x[j] = 0;
                while (x[j] < m->num_experts - 1 && (at -= popular[layer * m->num_experts + x[j]]) >= 0) x[j]++;
                weights[row * TOP_K + j] = j == 0 ? 0.7f : 0.3f;
            }
        }
        const moe_route route = {experts, weights};
        moe_virtual_sets_chosen(s, layer, &route, ROWS);
    }
}

static void zipf(double *popular, uint64_t seed) {
    moe_random random = {seed};
    for (int32_t layer = 0; layer < LAYERS; layer++) {
        int32_t order[EXPERTS];
        for (int32_t i = 0; i < EXPERTS; i++) order[i] = i;
        for (int32_t i = EXPERTS - 1; i > 0; i--) {
            int32_t j = (int32_t)moe_random_below(&random, (uint64_t)i + 1), kept = order[i];
            order[i] = order[j];
            order[j] = kept;
        }
        for (int32_t i = 0; i < EXPERTS; i++) popular[layer * EXPERTS + order[i]] = 1.0 / (i + 1);
    }
}

/* Swaps until there are none, letting rows pass between; returns how many. Checks what every swap keeps to. */
static int32_t settle(moe_virtual_sets *s, const moe_model_config *m, moe_expert_budget budget, int32_t homes, const double *popular,
                      moe_random *random, int32_t rounds) {
    int32_t swaps = 0, least, at_home[HOMES], room[HOMES] = {0};
    for (int32_t x = 0; x < m->num_experts; x++) room[x % homes] += m->num_moe_layers;
    for (int32_t round = 0; round < rounds; round++) {
        let_pass(s, m, popular, random);
        moe_virtual_swap swap;
        if (!moe_virtual_sets_propose(s, &swap)) continue;
        assert_false(moe_virtual_sets_has(s, swap.comes.layer, swap.comes.expert));
        assert_true(moe_virtual_sets_has(s, swap.leaves.layer, swap.leaves.expert));
        if (budget.per_layer) assert_int_equal(swap.comes.layer, swap.leaves.layer);
        moe_virtual_sets_swap(s, &swap);
        swaps++;
        assert_int_equal(count_all(s, m, homes, &least, at_home), moe_expert_budget_count(budget, m));
        assert_true(least >= (budget.per_layer ? budget.per_layer : m->top_k));
        for (int32_t h = 0; h < HOMES; h++)
            assert_true(at_home[h] <= ceil(moe_expert_budget_part(budget, m) * room[h] - 1e-6));
    }
    return swaps;
}

static void sets_keep_their_sizes_and_homes(void **state) {
    (void)state;
    const moe_model_config m = model_of(LAYERS, EXPERTS, TOP_K, true);
    static const moe_expert_budget budgets[] = {{.part = 0.125}, {.part = 0.25}, {.part = 0.6}, {.part = 1}, {.per_layer = 2}, {.per_layer = 7}};
    double popular[ALL];
    for (size_t b = 0; b < sizeof budgets / sizeof *budgets; b++)
        for (uint64_t seed = 0; seed < 8; seed++) {
            moe_random random = {seed};
            int32_t least, at_home[HOMES];
            moe_virtual_sets *s = sets_of(&m, budgets[b], HOMES);
            assert_int_equal(count_all(s, &m, HOMES, &least, at_home), moe_expert_budget_count(budgets[b], &m));
            assert_true(least >= moe_expert_budget_count(budgets[b], &m) / LAYERS); /* even at first */
            zipf(popular, seed);
            int32_t swaps = settle(s, &m, budgets[b], HOMES, popular, &random, 300);
            assert_true((swaps > 0) == (moe_expert_budget_part(budgets[b], &m) < 1));
            moe_virtual_sets_free(&s);
            assert_null(s);
        }
}

/* What the sets hold of the gates' choices comes near to what the best sets of that size would; then nothing swaps any more. */
static void sets_become_the_most_important_and_rest(void **state) {
    (void)state;
    const moe_model_config m = model_of(LAYERS, EXPERTS, TOP_K, true);
    const moe_expert_budget budget = {.per_layer = 4};
    double popular[ALL];
    for (uint64_t seed = 0; seed < 5; seed++) {
        moe_random random = {seed};
        moe_virtual_sets *s = sets_of(&m, budget, 1);
        zipf(popular, seed);
        settle(s, &m, budget, 1, popular, &random, 400);
        for (int32_t layer = 0; layer < LAYERS; layer++)
            for (int32_t x = 0; x < EXPERTS; x++)
                if (popular[layer * EXPERTS + x] > 0.3) assert_true(moe_virtual_sets_has(s, layer, x)); /* the first three */
        assert_true(settle(s, &m, budget, 1, popular, &random, 400) <= 4); /* the fourth and fifth are near each other */
        moe_virtual_sets_free(&s);
    }
}

/* Two experts that are chosen by turns as often do not take each other's place again and again. */
static void hysteresis_keeps_equals_where_they_are(void **state) {
    (void)state;
    const moe_model_config m = model_of(1, EXPERTS, TOP_K, true);
    const moe_expert_budget budget = {.per_layer = 8};
    double even[EXPERTS];
    moe_random random = {3};
    for (int32_t x = 0; x < EXPERTS; x++) even[x] = 1;
    moe_virtual_sets *s = sets_of(&m, budget, HOMES);
    settle(s, &m, budget, HOMES, even, &random, 100);
    assert_true(settle(s, &m, budget, HOMES, even, &random, 2000) <= 2);
    moe_virtual_sets_free(&s);
}

static void layers_with_more_to_lose_get_more(void **state) {
    (void)state;
    const moe_model_config m = model_of(2, EXPERTS, TOP_K, true);
    const moe_expert_budget budget = {.part = 0.5};
    double popular[2 * EXPERTS];
    moe_random random = {5};
    for (int32_t x = 0; x < EXPERTS; x++) {
        popular[x] = x < 3 ? 1 : 0.001; /* three experts do it all */
        popular[EXPERTS + x] = 1;
    }
    moe_virtual_sets *s = sets_of(&m, budget, 1);
    settle(s, &m, budget, 1, popular, &random, 300);
    assert_true(moe_virtual_sets_size(s, 0) <= 5);
    assert_int_equal(moe_virtual_sets_size(s, 0) + moe_virtual_sets_size(s, 1), EXPERTS);
    moe_virtual_sets_free(&s);
}

/* Of two experts with the same gate weights the one whose output is larger stays. */
static void output_norms_count(void **state) {
    (void)state;
    const moe_model_config m = model_of(1, 4, TOP_K, true);
    int32_t experts[ROWS * TOP_K];
    float weights[ROWS * TOP_K];
    const moe_route route = {experts, weights};
    moe_virtual_swap swap;
    moe_virtual_sets *s = sets_of(&m, (moe_expert_budget){.per_layer = 3}, 1);
    for (int32_t i = 0; i < ROWS * TOP_K; i++) {
        experts[i] = i % 4;
        weights[i] = 0.5f;
    }
    for (int32_t x = 0; x < 4; x++) moe_virtual_sets_returned(s, 0, x, x == 1 ? 0.5 : 2);
    for (int32_t i = 0; i < 10; i++) moe_virtual_sets_chosen(s, 0, &route, ROWS);
    assert_true(moe_virtual_sets_propose(s, &swap));
    assert_int_equal(swap.comes.expert, 3);
    assert_int_equal(swap.leaves.expert, 1);
    moe_virtual_sets_free(&s);
}

static void the_same_trace_gives_the_same_sets(void **state) {
    (void)state;
    const moe_model_config m = model_of(LAYERS, EXPERTS, TOP_K, true);
    const moe_expert_budget budget = {.part = 0.3};
    double popular[ALL];
    moe_virtual_sets *s[2];
    zipf(popular, 9);
    for (int i = 0; i < 2; i++) {
        moe_random random = {11};
        s[i] = sets_of(&m, budget, HOMES);
        settle(s[i], &m, budget, HOMES, popular, &random, 200);
    }
    for (int32_t i = 0; i < ALL; i++)
        assert_int_equal(moe_virtual_sets_has(s[0], i / EXPERTS, i % EXPERTS), moe_virtual_sets_has(s[1], i / EXPERTS, i % EXPERTS));
    moe_virtual_sets_free(&s[0]);
    moe_virtual_sets_free(&s[1]);
}

/* ---- routing ---- */

/* The family's rule, plainly: softmax over who is inside, its top_k, their sum as 1 where norm_topk. */
static void check_row(const moe_virtual_sets *s, const moe_model_config *m, const float *logits, const int32_t *experts,
                      const float *weights) {
    double sum = 0, chosen = 0;
    int32_t found = 0;
    for (int32_t x = 0; x < m->num_experts; x++)
        if (moe_virtual_sets_has(s, 0, x)) sum += exp((double)logits[x]);
    for (int32_t x = 0; x < m->num_experts; x++) {
        int32_t before = 0;
        if (!moe_virtual_sets_has(s, 0, x)) continue;
        for (int32_t y = 0; y < m->num_experts; y++)
            before += moe_virtual_sets_has(s, 0, y) && (logits[y] > logits[x] || (logits[y] == logits[x] && y < x));
        if (before >= m->top_k) continue;
        assert_int_equal(experts[found++], x);
        chosen += exp((double)logits[x]) / sum;
    }
    assert_int_equal(found, m->top_k);
    for (int32_t j = 0; j < m->top_k; j++) {
        double want = exp((double)logits[experts[j]]) / sum / (m->norm_topk ? chosen : 1);
        assert_true(fabs((double)weights[j] - want) < 1e-5);
    }
}

static void routes_among_the_set_alone(void **state) {
    (void)state;
    static const int32_t shapes[][3] = {{16, 2, 5}, {16, 2, 2}, {64, 8, 8}, {60, 4, 33}, {128, 8, 40}, {8, 1, 1}};
    moe_random random = {21};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int norm = 0; norm < 2; norm++) {
            const moe_model_config m = model_of(1, shapes[i][0], shapes[i][1], norm == 1);
            moe_virtual_sets *s = sets_of(&m, (moe_expert_budget){.per_layer = shapes[i][2]}, HOMES);
            float logits[ROWS * 128], weights[ROWS * 8];
            int32_t experts[ROWS * 8];
            for (int32_t at = 0; at < ROWS * m.num_experts; at++)
                logits[at] = (float)moe_random_below(&random, 64) / 8 - 4; /* with ties */
            moe_virtual_sets_route(s, 0, logits, ROWS, (moe_route){experts, weights});
            for (int32_t row = 0; row < ROWS; row++)
                check_row(s, &m, logits + row * m.num_experts, experts + row * m.top_k, weights + row * m.top_k);
            moe_virtual_sets_free(&s);
        }
}

/* Then the gate's own route stays, bit for bit. */
static void a_whole_layer_is_left_alone(void **state) {
    (void)state;
    const moe_model_config m = model_of(1, 4, 1, true);
    moe_virtual_sets *s = sets_of(&m, (moe_expert_budget){.part = 1}, 1);
    const float logits[4] = {1, 2, 3, 4};
    int32_t expert = 1;
    float weight = 0.25f;
    moe_virtual_sets_route(s, 0, logits, 1, (moe_route){&expert, &weight});
    assert_true(expert == 1 && weight == 0.25f);
    moe_virtual_sets_free(&s);
}

/* A row that is not finite chooses experts of the set all the same, and spoils no importance. */
static void values_that_are_not_finite(void **state) {
    (void)state;
    const moe_model_config m = model_of(1, 8, 2, true);
    moe_virtual_sets *s = sets_of(&m, (moe_expert_budget){.per_layer = 3}, HOMES);
    float logits[8] = {NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN}, weights[2];
    int32_t experts[2];
    const moe_route route = {experts, weights};
    moe_virtual_swap swap;
    moe_virtual_sets_route(s, 0, logits, 1, route);
    assert_true(experts[0] < experts[1] && moe_virtual_sets_has(s, 0, experts[0]) && moe_virtual_sets_has(s, 0, experts[1]));
    for (int i = 0; i < 200; i++) moe_virtual_sets_chosen(s, 0, &route, 1);
    moe_virtual_sets_returned(s, 0, 0, NAN);
    moe_virtual_sets_returned(s, 0, 0, INFINITY);
    assert_false(moe_virtual_sets_propose(s, &swap));
    moe_virtual_sets_free(&s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(budgets_are_parsed),
        cmocka_unit_test(what_is_too_little_is_refused_with_the_least),
        cmocka_unit_test(sets_keep_their_sizes_and_homes),
        cmocka_unit_test(sets_become_the_most_important_and_rest),
        cmocka_unit_test(hysteresis_keeps_equals_where_they_are),
        cmocka_unit_test(layers_with_more_to_lose_get_more),
        cmocka_unit_test(output_norms_count),
        cmocka_unit_test(the_same_trace_gives_the_same_sets),
        cmocka_unit_test(routes_among_the_set_alone),
        cmocka_unit_test(a_whole_layer_is_left_alone),
        cmocka_unit_test(values_that_are_not_finite),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
