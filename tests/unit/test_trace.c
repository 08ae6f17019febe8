/* Routing traces: files, whole and damaged; the replay beside what can be counted by hand, and beside a plain LRU cache. */
#include "cli/trace.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/trace_replay.h"
#include "common/alloc.h"
#include "common/random.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test.h"

#define LAYERS 3
#define EXPERTS 8
#define ALL (LAYERS * EXPERTS)

/* Random texts. Hints are right with that chance; pre-gates choose as gates do. */
static moe_trace make(int32_t texts, int32_t top_k, double right, uint64_t seed) {
    moe_random random = {seed};
    moe_error err;
    moe_trace t = {.num_layers = LAYERS, .num_experts = EXPERTS, .top_k = top_k, .num_planes = 3, .expert_bytes = 1000};
    t.texts = moe_calloc((size_t)texts, sizeof *t.texts);
    t.num_texts = texts;
    for (int32_t i = 0; i < texts; i++) {
        assert_int_equal(moe_trace_resize(&t, i, (int32_t)moe_random_below(&random, 50), &err), MOE_OK);
        for (int32_t at = 0; at < t.texts[i].num_tokens * LAYERS; at++) {
            uint16_t first = (uint16_t)(moe_random_unit(&random) * moe_random_unit(&random) * EXPERTS); /* low ones more often */
            uint16_t guess = moe_random_unit(&random) < right ? first : (uint16_t)moe_random_below(&random, EXPERTS);
            for (int32_t j = 0; j < top_k; j++) {
                t.texts[i].routes[MOE_TRACE_GATE][at * top_k + j] = (uint16_t)((first + j) % EXPERTS);
                t.texts[i].routes[MOE_TRACE_HINT][at * top_k + j] = (uint16_t)((guess + j) % EXPERTS);
                t.texts[i].routes[MOE_TRACE_PRE_GATE][at * top_k + j] = (uint16_t)((first + j) % EXPERTS);
            }
        }
    }
    return t;
}

static moe_replay_result play(const moe_trace *t, moe_gating gating, const char *policy, int32_t slots, int32_t requests) {
    moe_replay_config config = {.gating = gating, .policy = policy, .part = (double)slots / ALL, .requests = requests};
    moe_replay_result result;
    moe_error err;
    if (moe_replay(t, &config, &result, &err) != MOE_OK) fail_msg("%s", err.message);
    assert_int_equal(result.slots, slots);
    assert_true(result.hits <= result.uses && result.wasted_copies <= result.copies);
    return result;
}

static void test_file(void **state) {
    (void)state;
    moe_test_dir dir = moe_test_dir_new();
    moe_trace t = make(4, 2, 0.8, 1), back;
    moe_error err;
    char path[PATH_MAX];
    size_t size;
    snprintf(path, sizeof path, "%s/t.trace", dir.path);
    assert_int_equal(moe_trace_write(&t, path, &err), MOE_OK);
    assert_int_equal(moe_trace_read(path, &back, &err), MOE_OK);
    assert_int_equal(back.num_texts, t.num_texts);
    assert_int_equal(back.expert_bytes, t.expert_bytes);
    for (int32_t i = 0; i < t.num_texts; i++) {
        assert_int_equal(back.texts[i].num_tokens, t.texts[i].num_tokens);
        for (int plane = 0; plane < 3; plane++)
            if (t.texts[i].num_tokens)
                assert_memory_equal(back.texts[i].routes[plane], t.texts[i].routes[plane],
                                    (size_t)t.texts[i].num_tokens * LAYERS * 2 * sizeof(uint16_t));
    }
    moe_trace_free(&back);
    uint8_t *bytes = moe_test_read_file(path, &size);
    for (size_t cut = 0; cut < size; cut += cut < 100 ? 1 : 37) {
        moe_test_write_file(&dir, "t.trace", bytes, cut);
        assert_int_equal(moe_trace_read(path, &back, &err), MOE_INVALID_ARGUMENT);
        assert_null(back.texts);
    }
    for (size_t at = 0; at < 36; at++) { /* magic, version, counts: nothing breaks, and what is read is in range */
        bytes[at] ^= 0x41;
        moe_test_write_file(&dir, "t.trace", bytes, size);
        if (moe_trace_read(path, &back, &err) == MOE_OK) moe_trace_free(&back);
        bytes[at] ^= 0x41;
    }
    bytes[size - 1] = 1; /* expert 256 and more, of 8 */
    moe_test_write_file(&dir, "t.trace", bytes, size);
    assert_int_equal(moe_trace_read(path, &back, &err), MOE_INVALID_ARGUMENT);
    assert_non_null(strstr(err.message, "of 8"));
    moe_test_remove_file(&dir, "t.trace");
    assert_int_equal(moe_trace_read(path, &back, &err), MOE_NOT_FOUND);
    free(bytes);
    moe_trace_free(&t);
    moe_test_dir_free(&dir);
}

static void test_all_experts_have_slots(void **state) {
    (void)state;
    moe_trace t = make(20, 2, 0.5, 2);
    bool seen[ALL] = {false};
    int64_t tokens = 0, distinct = 0;
    for (int32_t i = 0; i < t.num_texts; i++) {
        tokens += t.texts[i].num_tokens;
        for (int32_t at = 0; at < t.texts[i].num_tokens * LAYERS * 2; at++)
            seen[at / 2 % LAYERS * EXPERTS + t.texts[i].routes[MOE_TRACE_GATE][at]] = true;
    }
    for (int i = 0; i < ALL; i++) distinct += seen[i];
    moe_replay_result r = play(&t, MOE_GATING_GATE, "lru", ALL, 1);
    assert_int_equal(r.tokens, tokens);
    assert_int_equal(r.uses, tokens * LAYERS * 2);
    assert_int_equal(r.copies, distinct);
    assert_int_equal(r.hits, r.uses - distinct);
    assert_int_equal(play(&t, MOE_GATING_GATE, "lru", ALL, 7).tokens, tokens);
    moe_trace_free(&t);
}

/* One expert a token: the replay is a plain cache, which a list in order of last use simulates. */
static void test_beside_a_plain_lru_cache(void **state) {
    (void)state;
    moe_trace t = make(30, 1, 0.5, 3);
    for (int32_t slots = 2; slots < ALL; slots += 3) {
        int32_t list[ALL], count = 0;
        int64_t hits = 0;
        for (int32_t i = 0; i < t.num_texts; i++)
            for (int32_t at = 0; at < t.texts[i].num_tokens * LAYERS; at++) {
                int32_t expert = at % LAYERS * EXPERTS + t.texts[i].routes[MOE_TRACE_GATE][at], place = 0;
                while (place < count && list[place] != expert) place++;
                hits += place < count;
                if (place == count && count < slots) count++;
                if (place == count) place--;
                memmove(list + 1, list, (size_t)place * sizeof *list);
                list[0] = expert;
            }
        assert_int_equal(play(&t, MOE_GATING_GATE, "lru", slots, 1).hits, hits);
    }
    moe_trace_free(&t);
}

/* Pre-gates are always right, so with room for two layers' experts only layer 0 misses. */
static void test_pre_gates_foretell_all_but_the_first_layer(void **state) {
    (void)state;
    moe_trace t = make(30, 2, 0.5, 4);
    static const char *const policies[] = {"lru", "hint-aware"}; /* lfu-decay takes what came ahead of its use for the next victim */
    for (int i = 0; i < 2; i++) {
        moe_replay_result r = play(&t, MOE_GATING_PRE_GATE, policies[i], 4, 1);
        assert_true(r.hits >= r.uses * (LAYERS - 1) / LAYERS);
        assert_int_equal(r.wasted_copies, 0);
        assert_true(r.hits > play(&t, MOE_GATING_GATE, policies[i], 4, 1).hits);
    }
    moe_replay_result right = play(&t, MOE_GATING_HINT, "hint-aware", 8, 1);
    assert_true(right.wasted_copies > 0); /* half of the hints are guesses */
    moe_trace_free(&t);
}

/* More experts in a layer than slots: still every use is served. */
static void test_more_experts_than_slots(void **state) {
    (void)state;
    moe_trace t = make(60, 2, 0.5, 5);
    for (int gating = MOE_GATING_GATE; gating <= MOE_GATING_PRE_GATE; gating++) {
        moe_replay_result r = play(&t, (moe_gating)gating, "hint-aware", 3, 40);
        assert_true(r.copies >= r.uses - r.hits);
    }
    moe_replay_config config = {.gating = MOE_GATING_PRE_GATE, .policy = "lru", .part = 1, .requests = 1};
    moe_replay_result result;
    moe_error err;
    t.num_planes = 2;
    assert_int_equal(moe_replay(&t, &config, &result, &err), MOE_FAILED_PRECONDITION);
    t.num_planes = 3;
    config.policy = "none";
    assert_int_equal(moe_replay(&t, &config, &result, &err), MOE_INVALID_ARGUMENT);
    assert_int_equal(moe_replay_slots(&t, 0.001), 3); /* top-k and one for copying */
    moe_trace_free(&t);
}

/* Texts that are decoded together want every expert of every layer in each step, as a prefill does: of a cycle the best cache keeps
 * all but one of its slots. What was used longest ago is what comes next. */
static void test_cyclic_use_keeps_most_slots(void **state) {
    (void)state;
    moe_trace t = {.num_layers = LAYERS, .num_experts = EXPERTS, .top_k = 2, .num_planes = 1, .expert_bytes = 1000};
    moe_error err;
    t.texts = moe_calloc(EXPERTS / 2, sizeof *t.texts);
    t.num_texts = EXPERTS / 2;
    for (int32_t i = 0; i < t.num_texts; i++) {
        assert_int_equal(moe_trace_resize(&t, i, 200, &err), MOE_OK);
        for (int32_t at = 0; at < 200 * LAYERS * 2; at++) t.texts[i].routes[MOE_TRACE_GATE][at] = (uint16_t)(2 * i + at % 2);
    }
    for (int32_t slots = 4; slots < ALL; slots++) {
        moe_replay_result foresees = play(&t, MOE_GATING_GATE, "hint-aware", slots, t.num_texts);
        assert_int_equal(foresees.uses, 200 * ALL);
        double best = (double)foresees.uses * (slots - 1) / ALL;
        if ((double)foresees.hits < 0.95 * best) fail_msg("%d slots: %lld hits of %.0f", slots, (long long)foresees.hits, best);
        if (slots <= ALL - EXPERTS) assert_int_equal(play(&t, MOE_GATING_GATE, "lru", slots, t.num_texts).hits, 0);
    }
    moe_trace_free(&t);
}

/* Few tokens and experts of uneven popularity, other ones in each layer. */
static void test_skewed_use_keeps_the_popular(void **state) {
    (void)state;
    moe_trace t = make(200, 2, 0.5, 6);
    for (int32_t i = 0; i < t.num_texts; i++)
        for (int32_t at = 0; at < t.texts[i].num_tokens * LAYERS * 2; at++) {
            uint16_t *expert = &t.texts[i].routes[MOE_TRACE_GATE][at];
            *expert = (uint16_t)((*expert + at / 2 % LAYERS * 3) % EXPERTS);
        }
    for (int32_t requests = 1; requests <= 4; requests *= 2)
        for (int32_t slots = 4; slots < ALL; slots++) {
            int64_t foresees = play(&t, MOE_GATING_GATE, "hint-aware", slots, requests).hits;
            int64_t counts = play(&t, MOE_GATING_GATE, "lfu-decay", slots, requests).hits;
            if ((double)foresees < 0.995 * (double)counts)
                fail_msg("%d slots: %lld hits, %lld by counts", slots, (long long)foresees, (long long)counts);
        }
    moe_trace_free(&t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_file),
        cmocka_unit_test(test_all_experts_have_slots),
        cmocka_unit_test(test_beside_a_plain_lru_cache),
        cmocka_unit_test(test_pre_gates_foretell_all_but_the_first_layer),
        cmocka_unit_test(test_more_experts_than_slots),
        cmocka_unit_test(test_cyclic_use_keeps_most_slots),
        cmocka_unit_test(test_skewed_use_keeps_the_popular),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
