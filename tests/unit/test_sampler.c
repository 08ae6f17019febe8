/* The sampler against exact probabilities worked out the slow way, in double. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* It needs the headers above. */
#include <cmocka.h>

#include "common/alloc.h"
#include "common/random.h"
#include "router/engine/sampler.h"

#define VOCAB 60
#define DRAWS 8000

static const moe_sampling_params neutral = {
    .temperature = 1, .top_p = 1, .repetition_penalty = 1, .logprobs = -1, .prompt_logprobs = -1, .seed = 1};

typedef struct fixture {
    moe_sampler *sampler;
    float logits[VOCAB];
    int32_t tokens[40];
    moe_logit_bias bias[4];
    int32_t eos[2];
    moe_sampling_params params;
    moe_sample_input input;
} fixture;

/* Logits as a model's: normal with deviation 2 (a sum of 12 uniforms). */
static void set_up(fixture *f, uint64_t seed) {
    *f = (fixture){.params = neutral, .eos = {7, 11}};
    moe_random random = {.state = seed};
    assert_int_equal(moe_sampler_new(VOCAB, &f->sampler, NULL), MOE_OK);
    for (int i = 0; i < VOCAB; i++) {
        double sum = -6;
        for (int j = 0; j < 12; j++) sum += moe_random_unit(&random);
        f->logits[i] = (float)(2 * sum);
    }
    f->logits[7] = f->logits[3] = 3; /* an eos and a stop token that matter */
    for (int i = 0; i < 40; i++) f->tokens[i] = (int32_t)moe_random_below(&random, VOCAB / 2);
    for (int i = 0; i < 4; i++) f->bias[i] = (moe_logit_bias){.token_id = 5 * i, .bias = (float)i - 1.5f};
    f->input = (moe_sample_input){.logits = f->logits,
                                  .params = &f->params,
                                  .logit_bias = f->bias,
                                  .num_logit_bias = 4,
                                  .tokens = f->tokens,
                                  .num_prompt = 20,
                                  .num_tokens = 40,
                                  .eos_ids = f->eos,
                                  .num_eos = 2};
}

static void tear_down(fixture *f) { moe_sampler_free(&f->sampler); }

static int32_t count_of(const int32_t *tokens, int32_t from, int32_t to, int32_t id) {
    int32_t count = 0;
    for (int32_t i = from; i < to; i++) count += tokens[i] == id;
    return count;
}

/* One token's logit after everything that comes before the temperature. */
static double adjusted(const fixture *f, int32_t id) {
    const moe_sample_input *in = &f->input;
    const moe_sampling_params *p = in->params;
    double logit = in->logits[id];
    for (int32_t i = 0; i < in->num_logit_bias; i++)
        if (in->logit_bias[i].token_id == id) logit += in->logit_bias[i].bias;
    bool stops = count_of(in->eos_ids, 0, in->num_eos, id) || count_of(p->stop_token_ids, 0, p->num_stop_token_ids, id);
    if (stops && in->num_tokens - in->num_prompt < p->min_tokens) return -INFINITY;
    if (count_of(in->tokens, 0, in->num_tokens, id))
        logit = logit > 0 ? logit / p->repetition_penalty : logit * p->repetition_penalty;
    int32_t times = count_of(in->tokens, in->num_prompt, in->num_tokens, id);
    return logit - (times ? p->presence_penalty : 0) - p->frequency_penalty * times;
}

static double sorted_logits[VOCAB];
static int by_sorted_logit(const void *a, const void *b) {
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    if (sorted_logits[x] != sorted_logits[y]) return sorted_logits[x] > sorted_logits[y] ? -1 : 1;
    return x - y;
}

/* probabilities[id] of each token to be drawn, by sorting everything. */
static void reference(const fixture *f, double probabilities[VOCAB]) {
    const moe_sampling_params *p = f->input.params;
    int32_t order[VOCAB], count = VOCAB, kept = 0;
    double weights[VOCAB], sum = 0, reached = 0, total = 0;
    for (int32_t i = 0; i < VOCAB; i++) {
        sorted_logits[i] = adjusted(f, i) / p->temperature;
        order[i] = i;
    }
    qsort(order, VOCAB, sizeof *order, by_sorted_logit);
    if (p->top_k > 0 && p->top_k < count) count = p->top_k;
    for (int32_t i = 0; i < count; i++) sum += weights[i] = exp(sorted_logits[order[i]] - sorted_logits[order[0]]);
    while (kept < count && reached < p->top_p * sum) reached += weights[kept++];
    if (p->top_p >= 1) kept = count;
    memset(probabilities, 0, VOCAB * sizeof *probabilities);
    for (int32_t i = 0; i < kept; i++)
        if (weights[i] >= p->min_p) total += probabilities[order[i]] = weights[i];
    for (int32_t i = 0; i < VOCAB; i++) probabilities[i] /= total;
}

static int32_t draw_one(fixture *f, uint64_t seed) {
    int32_t token = -1;
    moe_error err = {0};
    f->params.seed = seed;
    if (moe_sampler_sample(f->sampler, &f->input, &token, NULL, &err) != MOE_OK) fail_msg("%s", err.message);
    assert_in_range(token, 0, VOCAB - 1);
    return token;
}

/* Pearson's statistic over DRAWS draws, tokens expected fewer than 5 times pooled; *degrees: of freedom. A token that cannot be
 * drawn but was makes it infinite. */
static double chi_square(fixture *f, const double probabilities[VOCAB], int *degrees) {
    int counts[VOCAB] = {0};
    for (uint64_t i = 0; i < DRAWS; i++) counts[draw_one(f, 1000003 * i + 17)]++;
    double statistic = 0, rare_expected = 0, rare_seen = 0;
    *degrees = -1;
    for (int i = 0; i < VOCAB; i++) {
        double expected = probabilities[i] * DRAWS;
        if (expected == 0 && counts[i] > 0) return INFINITY;
        if (expected < 5) {
            rare_expected += expected;
            rare_seen += counts[i];
            continue;
        }
        statistic += (counts[i] - expected) * (counts[i] - expected) / expected;
        ++*degrees;
    }
    if (rare_expected >= 1) {
        statistic += (rare_seen - rare_expected) * (rare_seen - rare_expected) / rare_expected;
        ++*degrees;
    }
    return statistic;
}

/* The statistic that a right sampler exceeds once in a million runs (Wilson and Hilferty's approximation; z = 4.75). */
static double chi_square_bound(int degrees) {
    if (degrees == 0) return 1e-9;
    double d = 2.0 / (9.0 * degrees);
    return degrees * pow(1 - d + 4.75 * sqrt(d), 3);
}

typedef struct setting {
    const char *name;
    moe_sampling_params params;
} setting;

/* Temperature, top-p and repetition penalty are 1 where they are left out. */
#define SET(text, ...)                          \
    {                                           \
        .name = text, .params = { __VA_ARGS__ } \
    }

static const setting settings[] = {
    SET("plain", .top_k = 0),
    SET("cool", .temperature = 0.4f),
    SET("hot", .temperature = 3),
    SET("top-k 1", .top_k = 1),
    SET("top-k 5", .top_k = 5),
    SET("top-k beyond the vocabulary", .top_k = 1000),
    SET("top-p 0.5", .top_p = 0.5f),
    SET("top-p 0.95, hot", .top_p = 0.95f, .temperature = 2),
    SET("top-p next to nothing", .top_p = 1e-6f),
    SET("min-p 0.1", .min_p = 0.1f),
    SET("min-p 1", .min_p = 1),
    SET("repetition", .repetition_penalty = 1.5f),
    SET("repetition wanted", .repetition_penalty = 0.7f),
    SET("presence", .presence_penalty = 1.2f),
    SET("frequency", .frequency_penalty = 0.8f),
    SET("frequency wanted", .frequency_penalty = -0.5f),
    SET("min-tokens", .min_tokens = 21, .stop_token_ids = {3, 4}, .num_stop_token_ids = 2),
    SET("min-tokens reached", .min_tokens = 20, .stop_token_ids = {3, 4}, .num_stop_token_ids = 2),
    SET("all", .temperature = 0.8f, .top_k = 30, .top_p = 0.9f, .min_p = 0.02f, .repetition_penalty = 1.1f,
        .presence_penalty = 0.3f, .frequency_penalty = 0.2f),
};

static void draws_have_the_exact_distribution(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        fixture f;
        double probabilities[VOCAB];
        int degrees;
        set_up(&f, 5 + i % 3);
        f.params = settings[i].params;
        f.params.logprobs = -1;
        if (f.params.temperature == 0) f.params.temperature = 1;
        if (f.params.top_p == 0) f.params.top_p = 1;
        if (f.params.repetition_penalty == 0) f.params.repetition_penalty = 1;
        reference(&f, probabilities);
        double statistic = chi_square(&f, probabilities, &degrees);
        if (statistic > chi_square_bound(degrees))
            fail_msg("%s: chi-square %g of %d degrees", settings[i].name, statistic, degrees);
        tear_down(&f);
    }
}

/* The check above notices a sampler that is off by a tenth in one parameter. */
static void the_distribution_check_can_fail(void **state) {
    (void)state;
    fixture f;
    double probabilities[VOCAB];
    int degrees;
    set_up(&f, 5);
    f.params.temperature = 1.1f;
    reference(&f, probabilities);
    f.params.temperature = 1;
    double statistic = chi_square(&f, probabilities, &degrees);
    assert_true(statistic > chi_square_bound(degrees));
    tear_down(&f);
}

/* Which tokens can be drawn at all, over many random settings; at the edge of top-p and min-p rounding may decide. */
static void what_is_cut_is_never_drawn(void **state) {
    (void)state;
    moe_random random = {.state = 99};
    int outside = 0;
    for (uint64_t round = 0; round < 400; round++) {
        fixture f;
        double probabilities[VOCAB];
        set_up(&f, round);
        f.params.temperature = (float)(0.2 + 2 * moe_random_unit(&random));
        f.params.top_k = (int32_t)moe_random_below(&random, 40);
        f.params.top_p = (float)(0.05 + 0.95 * moe_random_unit(&random));
        f.params.min_p = (float)(0.2 * moe_random_unit(&random));
        f.params.repetition_penalty = (float)(0.5 + moe_random_unit(&random));
        reference(&f, probabilities);
        for (uint64_t seed = 0; seed < 50; seed++) outside += probabilities[draw_one(&f, seed)] == 0;
        tear_down(&f);
    }
    assert_int_equal(outside, 0);
}

static void a_draw_depends_on_seed_and_index_only(void **state) {
    (void)state;
    fixture f, g;
    set_up(&f, 3);
    set_up(&g, 4);
    int32_t first[30];
    int same_seed = 0;
    f.params.temperature = 2;
    for (int i = 0; i < 30; i++) {
        f.input.num_prompt = 39 - i;
        first[i] = draw_one(&f, 42);
    }
    for (int i = 29; i >= 0; i--) {
        draw_one(&g, (uint64_t)i); /* other requests come between */
        f.input.num_prompt = 39 - i;
        same_seed += draw_one(&f, 43) == first[i];
        assert_int_equal(draw_one(&f, 42), first[i]);
    }
    assert_in_range(same_seed, 0, 15);
    assert_true(first[0] != first[1] || first[1] != first[2] || first[2] != first[3]);
    tear_down(&f);
    tear_down(&g);
}

static void greedy_takes_the_lowest_of_equals_after_penalties(void **state) {
    (void)state;
    fixture f;
    set_up(&f, 1);
    f.params.temperature = 0;
    f.input.num_logit_bias = 0;
    for (int i = 0; i < VOCAB; i++) f.logits[i] = -1;
    f.logits[30] = f.logits[31] = f.logits[50] = 2;
    assert_int_equal(draw_one(&f, 1), 30);
    f.tokens[0] = 30;
    f.params.repetition_penalty = 1.01f; /* of a prompt token */
    assert_int_equal(draw_one(&f, 1), 31);
    f.tokens[39] = 31;
    f.params.repetition_penalty = 1;
    f.params.presence_penalty = 0.1f; /* not of a prompt token */
    assert_int_equal(draw_one(&f, 1), 30);
    f.tokens[38] = 30;
    assert_int_equal(draw_one(&f, 1), 50);
    f.tokens[37] = f.tokens[36] = 50;
    f.params.presence_penalty = 0;
    f.params.frequency_penalty = 0.1f;
    assert_int_equal(draw_one(&f, 1), 30);
    f.input.num_logit_bias = 1;
    f.bias[0] = (moe_logit_bias){.token_id = 59, .bias = 3}; /* -1 + 3 = 2, and 30 has 2 - 0.1 */
    assert_int_equal(draw_one(&f, 1), 59);
    tear_down(&f);
}

static void logits_that_are_no_numbers_are_an_error(void **state) {
    (void)state;
    const float bad[] = {NAN, INFINITY};
    for (int i = 0; i < VOCAB; i += 7) {
        for (int j = 0; j < 2; j++) {
            fixture f;
            moe_token_logprobs logprobs;
            int32_t token;
            moe_error err = {0};
            set_up(&f, 1);
            f.logits[i] = bad[j];
            f.params.min_tokens = 100; /* a banned token's logit counts too */
            assert_int_equal(moe_sampler_sample(f.sampler, &f.input, &token, NULL, &err), MOE_INTERNAL);
            assert_int_equal(moe_sampler_logprobs(f.sampler, f.logits, 0, 5, &logprobs, &err), MOE_INTERNAL);
            tear_down(&f);
        }
    }
}

static void no_token_left_is_an_error(void **state) {
    (void)state;
    fixture f;
    int32_t token;
    moe_error err = {0};
    set_up(&f, 1);
    f.params.min_tokens = 100;
    for (int i = 0; i < VOCAB; i++) f.logits[i] = -INFINITY;
    assert_int_equal(moe_sampler_sample(f.sampler, &f.input, &token, NULL, &err), MOE_INTERNAL);
    f.logits[7] = 1; /* eos, banned */
    for (int greedy = 0; greedy < 2; greedy++) {
        f.params.temperature = greedy ? 0 : 1;
        assert_int_equal(moe_sampler_sample(f.sampler, &f.input, &token, NULL, &err), MOE_INTERNAL);
    }
    f.logits[8] = -50;
    assert_int_equal(draw_one(&f, 5), 8);
    f.bias[0].token_id = VOCAB;
    assert_int_equal(moe_sampler_sample(f.sampler, &f.input, &token, NULL, &err), MOE_INVALID_ARGUMENT);
    tear_down(&f);
}

static void logprobs_are_of_the_raw_logits(void **state) {
    (void)state;
    for (uint64_t round = 0; round < 50; round++) {
        fixture f;
        moe_token_logprobs got;
        int32_t token, order[VOCAB];
        moe_error err = {0};
        set_up(&f, round);
        if (round % 2) /* many equal ones */
            for (int i = 0; i < VOCAB; i++) f.logits[i] = roundf(f.logits[i]);
        double sum = 0;
        for (int i = 0; i < VOCAB; i++) {
            sum += exp(sorted_logits[i] = f.logits[i]);
            order[i] = i;
        }
        qsort(order, VOCAB, sizeof *order, by_sorted_logit);
        f.params.logprobs = (int32_t)(round % 21);
        f.params.repetition_penalty = 1.3f;
        assert_int_equal(moe_sampler_sample(f.sampler, &f.input, &token, &got, &err), MOE_OK);
        assert_int_equal(got.chosen.token_id, token);
        assert_true(fabs(got.chosen.logprob - (f.logits[token] - log(sum))) < 1e-5);
        assert_int_equal(order[got.chosen.rank - 1], token);
        assert_int_equal(got.num_top, round % 21);
        for (int i = 0; i < got.num_top; i++) {
            assert_int_equal(got.top[i].token_id, order[i]);
            assert_int_equal(got.top[i].rank, i + 1);
            assert_true(fabs(got.top[i].logprob - (f.logits[order[i]] - log(sum))) < 1e-5);
        }
        tear_down(&f);
    }
}

/* Shapes on which a careless selection takes quadratic time, which here would be minutes. */
static void large_vocabularies(void **state) {
    (void)state;
    const int32_t vocab = 100000;
    moe_sampler *sampler;
    assert_int_equal(moe_sampler_new(vocab, &sampler, NULL), MOE_OK);
    float *logits = moe_calloc((size_t)vocab, sizeof *logits);
    for (int shape = 0; shape < 5; shape++) {
        for (int32_t i = 0; i < vocab; i++) {
            int32_t step = shape == 0 ? 0 : shape == 1 ? i : shape == 2 ? -i : shape == 3 ? abs(i - vocab / 2) : i % 3;
            logits[i] = (float)step * 1e-5f;
        }
        for (int mode = 0; mode < 3; mode++) {
            moe_sampling_params params = neutral;
            params.top_k = mode == 0 ? 50 : mode == 1 ? vocab / 2 : 0;
            params.top_p = mode == 2 ? 0.9f : 1;
            moe_sample_input input = {.logits = logits, .params = &params};
            int32_t token = -1;
            assert_int_equal(moe_sampler_sample(sampler, &input, &token, NULL, NULL), MOE_OK);
            assert_in_range(token, 0, vocab - 1);
            if (mode == 0 && shape == 1) assert_true(token >= vocab - 50);
            if (mode == 0 && shape == 0) assert_true(token < 50); /* of equals the lower ids */
        }
    }
    moe_free(logits);
    moe_sampler_free(&sampler);
    moe_sampler_free(&sampler);
}

#define TOP_CASES 4000

/* What a segment gives: by descending logit, of equal ones the lower id first. */
static int32_t take_top(const float *logits, int32_t vocab, int32_t n, int32_t *ids, float *top) {
    if (n > vocab) n = vocab;
    for (int32_t j = 0; j < n; j++) {
        int32_t best = -1;
        for (int32_t i = 0; i < vocab; i++) {
            bool taken = false;
            for (int32_t k = 0; k < j; k++) taken = taken || ids[k] == i;
            if (!taken && (best < 0 || logits[i] > logits[best])) best = i;
        }
        ids[j] = best;
        top[j] = logits[best];
    }
    return n;
}

/* Random parameters, logits with and without ties, vocabularies smaller and larger than what is asked for. */
static void the_highest_logits_give_the_same_token(void **state) {
    (void)state;
    moe_random random = {.state = 4};
    int32_t ids[MOE_MAX_TOP_LOGITS], sampled = 0, greedy = 0;
    float logits[300], top[MOE_MAX_TOP_LOGITS];
    for (int n = 0; n < TOP_CASES; n++) {
        int32_t vocab = 1 + (int32_t)moe_random_below(&random, 300), levels = 1 + (int32_t)moe_random_below(&random, 1000);
        moe_sampler *sampler;
        assert_int_equal(moe_sampler_new(vocab, &sampler, NULL), MOE_OK);
        for (int32_t i = 0; i < vocab; i++)
            logits[i] = (float)moe_random_below(&random, (uint64_t)levels) * 8 / (float)levels - 4;
        moe_sampling_params params = neutral;
        params.temperature = n % 4 == 0 ? 0 : (float)(0.1 + 2 * moe_random_unit(&random));
        params.top_k = 1 + (int32_t)moe_random_below(&random, MOE_MAX_TOP_LOGITS);
        params.top_p = n % 3 == 0 ? 1 : (float)(0.05 + 0.95 * moe_random_unit(&random));
        params.min_p = n % 5 == 0 ? (float)(0.5 * moe_random_unit(&random)) : 0;
        params.seed = moe_random_next(&random);
        int32_t tokens[2] = {0, 0}, whole = -1, of_top = -1;
        moe_sample_input input = {.logits = logits, .params = &params, .tokens = tokens, .num_prompt = 1, .num_tokens = 2};
        int32_t wanted = moe_sampler_num_top(&input);
        assert_int_equal(wanted, params.temperature == 0 ? 1 : params.top_k);
        assert_int_equal(moe_sampler_sample(sampler, &input, &whole, NULL, NULL), MOE_OK);
        int32_t more = wanted + (int32_t)moe_random_below(&random, (uint64_t)(MOE_MAX_TOP_LOGITS - wanted + 1));
        input.logits = NULL;
        input.top_ids = ids;
        input.top_logits = top;
        input.num_top = take_top(logits, vocab, more, ids, top);
        assert_int_equal(moe_sampler_sample(sampler, &input, &of_top, NULL, NULL), MOE_OK);
        if (whole != of_top) fail_msg("case %d: %d of all logits, %d of the highest", n, whole, of_top);
        sampled += params.temperature > 0 && whole != ids[0];
        greedy += params.temperature == 0;
        moe_sampler_free(&sampler);
    }
    assert_true(sampled > TOP_CASES / 4 && greedy > TOP_CASES / 5); /* the cases are not all the same easy one */
}

static void when_all_logits_are_needed(void **state) {
    (void)state;
    moe_logit_bias bias = {.token_id = 1, .bias = 1};
    int32_t tokens[2] = {0, 0};
    moe_sampling_params params = neutral;
    moe_sample_input input = {.params = &params, .tokens = tokens, .num_prompt = 1, .num_tokens = 2};
    assert_int_equal(moe_sampler_num_top(&input), 0); /* no top-k */
    params.top_k = MOE_MAX_TOP_LOGITS;
    assert_int_equal(moe_sampler_num_top(&input), MOE_MAX_TOP_LOGITS);
    params.top_k++;
    assert_int_equal(moe_sampler_num_top(&input), 0);
    params.temperature = 0;
    assert_int_equal(moe_sampler_num_top(&input), 1);
    moe_sampling_params plain = params;
    params.min_tokens = 1; /* as many as there are */
    assert_int_equal(moe_sampler_num_top(&input), 1);
    params.min_tokens = 2;
    assert_int_equal(moe_sampler_num_top(&input), 0);
    params = plain, params.repetition_penalty = 1.1f;
    assert_int_equal(moe_sampler_num_top(&input), 0);
    params = plain, params.presence_penalty = -0.5f;
    assert_int_equal(moe_sampler_num_top(&input), 0);
    params = plain, params.frequency_penalty = 0.5f;
    assert_int_equal(moe_sampler_num_top(&input), 0);
    params = plain, params.logprobs = 0;
    assert_int_equal(moe_sampler_num_top(&input), 0);
    params = plain, input.logit_bias = &bias, input.num_logit_bias = 1;
    assert_int_equal(moe_sampler_num_top(&input), 0);
}

static void a_row_that_is_not_finite_has_no_top(void **state) {
    (void)state;
    moe_sampler *sampler;
    moe_error err;
    const int32_t ids[2] = {-1, -1};
    const float top[2] = {0, 0};
    int32_t token;
    moe_sampling_params params = neutral;
    assert_int_equal(moe_sampler_new(VOCAB, &sampler, NULL), MOE_OK);
    for (int greedy = 0; greedy < 2; greedy++) {
        params.temperature = greedy ? 0 : 1;
        params.top_k = 2;
        moe_sample_input input = {.params = &params, .top_ids = ids, .top_logits = top, .num_top = 2};
        assert_int_equal(moe_sampler_sample(sampler, &input, &token, NULL, &err), MOE_INTERNAL);
        assert_non_null(strstr(err.message, "not finite"));
    }
    moe_sampler_free(&sampler);
}

static void allocations_may_fail(void **state) {
    (void)state;
    int failures = 0;
    for (int64_t countdown = 1; countdown < 20; countdown++) {
        moe_sampler *sampler;
        moe_alloc_fail_after(countdown);
        moe_status status = moe_sampler_new(100, &sampler, NULL);
        moe_alloc_fail_after(0);
        moe_sampler_free(&sampler);
        if (status == MOE_OK) break;
        assert_int_equal(status, MOE_RESOURCE_EXHAUSTED);
        failures++;
    }
    assert_in_range(failures, 1, 18);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(draws_have_the_exact_distribution),
        cmocka_unit_test(the_distribution_check_can_fail),
        cmocka_unit_test(what_is_cut_is_never_drawn),
        cmocka_unit_test(a_draw_depends_on_seed_and_index_only),
        cmocka_unit_test(greedy_takes_the_lowest_of_equals_after_penalties),
        cmocka_unit_test(logits_that_are_no_numbers_are_an_error),
        cmocka_unit_test(no_token_left_is_an_error),
        cmocka_unit_test(logprobs_are_of_the_raw_logits),
        cmocka_unit_test(large_vocabularies),
        cmocka_unit_test(the_highest_logits_give_the_same_token),
        cmocka_unit_test(when_all_logits_are_needed),
        cmocka_unit_test(a_row_that_is_not_finite_has_no_top),
        cmocka_unit_test(allocations_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
