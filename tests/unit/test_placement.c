/* The placement map: references, JSON (also hostile), and the layouts, checked exhaustively over small shapes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/alloc.h"
#include "common/model/config.h"
#include "common/random.h"
#include "router/placement/placement.h"
#include "tests/support/test.h"

static moe_placement *make(int32_t layers, int32_t experts, int32_t workers) {
    moe_placement *p = moe_placement_new(layers, experts, workers);
    assert_non_null(p);
    for (int32_t w = 0; w < workers; w++) {
        snprintf(p->workers[w].id, sizeof p->workers[w].id, "w%d", w);
        snprintf(p->workers[w].endpoint, sizeof p->workers[w].endpoint, "ipc:///run/\"%d\".sock", w);
        p->workers[w].incarnation = moe_mix64((uint64_t)w);
    }
    return p;
}

static void check_range(const int32_t *counts, int32_t n, int32_t total) {
    for (int32_t i = 0; i < n; i++) assert_in_range(counts[i], total / n, (total + n - 1) / n);
}

/* Every expert has `replicas` distinct READY workers, totals within one, and in every layer too where `by_layer`. */
static void check_layout(const moe_placement *p, int32_t replicas, bool by_layer) {
    int32_t total[MOE_PLACEMENT_MAX_WORKERS] = {0};
    for (int32_t l = 0; l < p->num_layers; l++) {
        int32_t layer[MOE_PLACEMENT_MAX_WORKERS] = {0};
        for (int32_t e = 0; e < p->num_experts; e++) {
            const moe_placement_entry *entry = moe_placement_at(p, l, e);
            assert_int_equal(entry->num_replicas, replicas);
            for (int32_t r = 0; r < replicas; r++) {
                int32_t w = entry->replicas[r].worker;
                assert_true(w < p->num_workers);
                assert_int_equal(entry->replicas[r].state, MOE_REPLICA_READY);
                for (int32_t q = 0; q < r; q++) assert_int_not_equal(entry->replicas[q].worker, w);
                layer[w]++;
                total[w]++;
            }
        }
        if (by_layer) check_range(layer, p->num_workers, p->num_experts * replicas);
    }
    check_range(total, p->num_workers, p->num_layers * p->num_experts * replicas);
}

static void test_layouts(void **state) {
    (void)state;
    static const int32_t layers[] = {1, 2, 3, 8}, experts[] = {1, 2, 3, 4, 5, 7, 8, 16, 61};
    int shapes = 0;
    for (size_t i = 0; i < 4; i++) {
        for (size_t j = 0; j < 9; j++) {
            for (int32_t workers = 1; workers <= 12; workers++) {
                for (int32_t replicas = 1; replicas <= workers && replicas <= MOE_PLACEMENT_MAX_REPLICAS; replicas++, shapes++) {
                    moe_placement *p = make(layers[i], experts[j], workers);
                    assert_int_equal(moe_placement_layout(p, MOE_PLACEMENT_BALANCED, 0, NULL, replicas, NULL), MOE_OK);
                    check_layout(p, replicas, true);
                    for (uint64_t seed = 0; seed < 3; seed++) {
                        assert_int_equal(moe_placement_layout(p, MOE_PLACEMENT_RANDOM, seed, NULL, replicas, NULL), MOE_OK);
                        check_layout(p, replicas, false);
                    }
                    moe_placement_unref(&p);
                }
            }
        }
    }
    assert_int_equal(shapes, 36 * 68);
}

/* The same seed gives the same layout, another seed another one. */
static void test_random_is_seeded(void **state) {
    (void)state;
    moe_placement *p[3];
    for (int i = 0; i < 3; i++) {
        p[i] = make(4, 16, 5);
        assert_int_equal(moe_placement_layout(p[i], MOE_PLACEMENT_RANDOM, i == 2 ? 9 : 7, NULL, 2, NULL), MOE_OK);
    }
    size_t bytes = 4 * 16 * sizeof(moe_placement_entry);
    assert_memory_equal(p[0]->entries, p[1]->entries, bytes);
    assert_int_not_equal(memcmp(p[0]->entries, p[2]->entries, bytes), 0);
    for (int i = 0; i < 3; i++) moe_placement_unref(&p[i]);
}

static void test_too_many_replicas(void **state) {
    (void)state;
    moe_placement *p = make(1, 4, 2);
    moe_error err;
    assert_int_equal(moe_placement_layout(p, MOE_PLACEMENT_BALANCED, 0, NULL, 3, &err), MOE_INVALID_ARGUMENT);
    assert_non_null(strstr(err.message, "3 replicas of every expert need 3 workers, there are 2"));
    assert_int_equal(moe_placement_layout(p, MOE_PLACEMENT_BALANCED, 0, NULL, 0, &err), MOE_INVALID_ARGUMENT);
    moe_placement_unref(&p);
    p = make(1, 4, 20);
    assert_int_equal(moe_placement_layout(p, MOE_PLACEMENT_BALANCED, 0, NULL, 9, &err), MOE_INVALID_ARGUMENT);
    moe_placement_unref(&p);
}

static void test_file(void **state) {
    (void)state;
    static const struct {
        const char *text, *error; /* error NULL: accepted */
    } cases[] = {
        {"{\"layers\": [[[\"w0\"], [\"w1\",\"w0\"]], [[\"w1\"], [\"w1\"]]]}", NULL},
        {"{\"layers\": [[[\"w0\"], [\"w1\"]]]}", "2 MoE layers"},
        {"{\"layers\": [[[\"w0\"]], [[\"w1\"], [\"w1\"]]]}", "layer 0: an array of 2 experts"},
        {"{\"layers\": [[[\"w0\"], [\"w1\"]], [[\"w1\"], []]]}", "layer 1 expert 1: a list"},
        {"{\"layers\": [[[\"w0\"], [\"w1\"]], [[\"w1\"], [\"w9\"]]]}", "\"w9\" is no registered worker"},
        {"{\"layers\": [[[\"w0\"], [\"w1\"]], [[\"w1\"], [7]]]}", "no registered worker"},
        {"{\"layers\": [[[\"w0\",\"w0\"], [\"w1\"]], [[\"w1\"], [\"w1\"]]]}", "stands twice"},
        {"{\"layers\": ", "line 1"},
        {"[]", "2 MoE layers"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char path[] = "/tmp/moe-placement-XXXXXX";
        int fd = mkstemp(path);
        assert_true(fd >= 0 && write(fd, cases[i].text, strlen(cases[i].text)) > 0);
        close(fd);
        moe_placement *p = make(2, 2, 2);
        moe_error err = {0};
        moe_status status = moe_placement_layout(p, MOE_PLACEMENT_FILE, 0, path, 1, &err);
        assert_int_equal(status, cases[i].error ? MOE_INVALID_ARGUMENT : MOE_OK);
        if (cases[i].error) {
            assert_non_null(strstr(err.message, cases[i].error));
            assert_non_null(strstr(err.message, path));
        } else {
            assert_int_equal(moe_placement_at(p, 0, 1)->num_replicas, 2);
            assert_int_equal(moe_placement_at(p, 0, 1)->replicas[0].worker, 1);
            assert_int_equal(moe_placement_at(p, 1, 0)->replicas[0].worker, 1);
        }
        moe_placement_unref(&p);
        unlink(path);
    }
    moe_placement *p = make(2, 2, 2);
    assert_int_equal(moe_placement_layout(p, MOE_PLACEMENT_FILE, 0, "/nonexistent/file", 1, NULL), MOE_INVALID_ARGUMENT);
    moe_placement_unref(&p);
}

static moe_placement *example(void) {
    moe_placement *p = make(3, 8, 4);
    assert_int_equal(moe_placement_layout(p, MOE_PLACEMENT_RANDOM, 5, NULL, 2, NULL), MOE_OK);
    p->epoch = 41;
    p->fence = 7;
    p->model_digest = UINT64_C(0xfedcba9876543210);
    for (int32_t i = 0; i < 24; i++) p->entries[i].digest = moe_mix64((uint64_t)i);
    p->entries[3].replicas[1].state = MOE_REPLICA_DRAINING;
    memset(p->workers[2].public_key, 'k', 40);
    p->workers[1].cost = (moe_placement_cost){70000, 900};
    p->workers[3].cost = (moe_placement_cost){0, MOE_COST_MAX_NS};
    return p;
}

static void test_json_round_trip(void **state) {
    (void)state;
    moe_placement *p = example(), *q = NULL;
    moe_buf text = {0}, again = {0};
    moe_error err;
    assert_int_equal(moe_placement_to_json(p, &text, &err), MOE_OK);
    assert_int_equal(moe_placement_from_json(text.data, text.size, &q, &err), MOE_OK);
    assert_true(q->epoch == 41 && q->fence == 7 && q->model_digest == p->model_digest);
    assert_true(q->num_layers == 3 && q->num_experts == 8 && q->num_workers == 4);
    assert_memory_equal(q->workers, p->workers, 4 * sizeof *p->workers);
    assert_memory_equal(q->entries, p->entries, 24 * sizeof *p->entries);
    assert_int_equal(moe_placement_to_json(q, &again, &err), MOE_OK);
    assert_string_equal(text.data, again.data);
    moe_placement *copy = moe_placement_copy(p);
    moe_placement_unref(&p);
    assert_memory_equal(q->entries, copy->entries, 24 * sizeof *copy->entries);
    moe_placement *second = moe_placement_ref(copy);
    moe_placement_unref(&copy);
    assert_null(copy);
    assert_int_equal(second->epoch, 41);
    moe_placement_unref(&second);
    moe_placement_unref(&second);
    moe_placement_unref(&q);
    moe_buf_free(&text);
    moe_buf_free(&again);
}

/* Medians of what was measured; a guess where nothing was. */
static void test_unit_cost(void **state) {
    (void)state;
    moe_placement *p = make(1, 1, 4);
    moe_placement_cost cost = moe_placement_unit_cost(p);
    assert_true(cost.per_expert == MOE_COST_DEFAULT.per_expert && cost.per_row == MOE_COST_DEFAULT.per_row);
    p->workers[3].cost = (moe_placement_cost){500, 7};
    cost = moe_placement_unit_cost(p);
    assert_true(cost.per_expert == 500 && cost.per_row == 7);
    p->workers[0].cost = (moe_placement_cost){90000, 2};
    p->workers[2].cost = (moe_placement_cost){600, 5};
    cost = moe_placement_unit_cost(p);
    assert_true(cost.per_expert == 600 && cost.per_row == 5);
    moe_placement_unref(&p);
}

/* Every prefix, and every single-byte change to a set of likely characters, is either refused or yields a map within the limits.
 */
static void test_json_hostile(void **state) {
    (void)state;
    moe_placement *p = example();
    moe_buf text = {0};
    moe_error err;
    assert_int_equal(moe_placement_to_json(p, &text, &err), MOE_OK);
    for (size_t n = 0; n < text.size; n++) {
        moe_placement *q = NULL;
        assert_int_equal(moe_placement_from_json(text.data, n, &q, &err), MOE_INVALID_ARGUMENT);
        assert_null(q);
    }
    int accepted = 0, refused = 0;
    for (size_t n = 0; n < text.size; n++) {
        static const char letters[] = "09-]}[{\",xz.";
        for (size_t c = 0; letters[c]; c++) {
            char kept = text.data[n];
            text.data[n] = letters[c];
            moe_placement *q = NULL;
            if (moe_placement_from_json(text.data, text.size, &q, &err) == MOE_OK) {
                accepted++;
                for (int32_t i = 0; i < q->num_layers * q->num_experts; i++) {
                    assert_true(q->entries[i].num_replicas <= MOE_PLACEMENT_MAX_REPLICAS);
                    for (int r = 0; r < q->entries[i].num_replicas; r++) {
                        assert_true(q->entries[i].replicas[r].worker < q->num_workers);
                    }
                }
            } else {
                refused++;
            }
            moe_placement_unref(&q);
            text.data[n] = kept;
        }
    }
    assert_true(accepted > 0 && refused > accepted);
    moe_buf_free(&text);
    moe_placement_unref(&p);
}

static void test_json_refusals(void **state) {
    (void)state;
#define HEAD "{\"epoch\":1,\"fence\":1,\"model_digest\":\"0000000000000001\","
#define WORKER "{\"id\":\"a\",\"incarnation\":\"0000000000000001\",\"endpoint\":\"e\",\"public_key\":\"\",\"cost\":[5,1]}"
#define BAD_COST "{\"id\":\"a\",\"incarnation\":\"0000000000000001\",\"endpoint\":\"e\",\"public_key\":\"\",\"cost\":[5,-1]}"
    static const struct {
        const char *text;
        bool ok;
    } cases[] = {
        {HEAD "\"num_layers\":1,\"num_experts\":1,\"workers\":[" WORKER "],\"layers\":[[[\"0000000000000000\",0,1]]]}", true},
        {HEAD "\"num_layers\":1,\"num_experts\":1,\"workers\":[" WORKER "],\"layers\":[[[\"0000000000000000\",1,1]]]}", false},
        {HEAD "\"num_layers\":1,\"num_experts\":1,\"workers\":[" WORKER "],\"layers\":[[[\"0000000000000000\",0,3]]]}", false},
        {HEAD "\"num_layers\":1,\"num_experts\":1,\"workers\":[" WORKER "],\"layers\":[[[\"0000000000000000\",0,1,0,1]]]}",
         false},
        {HEAD "\"num_layers\":1,\"num_experts\":1,\"workers\":[" WORKER "," WORKER "],\"layers\":[[[\"0000000000000000\",0,1]]]}",
         false},
        {HEAD "\"num_layers\":1,\"num_experts\":1,\"workers\":[" BAD_COST "],\"layers\":[[[\"0000000000000000\",0,1]]]}", false},
        {HEAD "\"num_layers\":1,\"num_experts\":2000000000,\"workers\":[" WORKER "],\"layers\":[[]]}", false},
        {HEAD "\"num_layers\":-1,\"num_experts\":1,\"workers\":[" WORKER "],\"layers\":[]}", false},
        {HEAD "\"num_layers\":0,\"num_experts\":1024,\"workers\":[" WORKER "],\"layers\":[]}", true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        moe_placement *q = NULL;
        moe_status status = moe_placement_from_json(cases[i].text, strlen(cases[i].text), &q, NULL);
        assert_int_equal(status, cases[i].ok ? MOE_OK : MOE_INVALID_ARGUMENT);
        moe_placement_unref(&q);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layouts),       cmocka_unit_test(test_random_is_seeded), cmocka_unit_test(test_too_many_replicas),
        cmocka_unit_test(test_file),          cmocka_unit_test(test_json_round_trip),  cmocka_unit_test(test_json_hostile),
        cmocka_unit_test(test_json_refusals), cmocka_unit_test(test_unit_cost),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
