/* The highest logits of a row beside a sort of all, with ties, at every length; rows that are not finite. */
#include <math.h>
#include <stdlib.h>

#include "common/backend.h"
#include "common/random.h"
#include "cpu/top_logits.h"
#include "tests/support/test.h"

#define MAX_COUNT 700

static const float *sorted_by;

static int by_logit(const void *a, const void *b) {
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    if (sorted_by[x] != sorted_by[y]) return sorted_by[x] > sorted_by[y] ? -1 : 1;
    return (x > y) - (x < y);
}

static void as_a_sort_gives_them(void **state) {
    moe_random random = {.state = 2};
    float logits[MAX_COUNT], top[MOE_MAX_TOP_LOGITS];
    int32_t ids[MOE_MAX_TOP_LOGITS], want[MAX_COUNT];
    (void)state;
    for (int32_t n = 0; n < 3000; n++) {
        int32_t count = 1 + (int32_t)moe_random_below(&random, MAX_COUNT), levels = 1 + n % 40 * n;
        int32_t most = count < MOE_MAX_TOP_LOGITS ? count : MOE_MAX_TOP_LOGITS;
        int32_t wanted = 1 + (int32_t)moe_random_below(&random, (uint64_t)most);
        for (int32_t i = 0; i < count; i++) {
            int32_t level = n % 3 ? (int32_t)moe_random_below(&random, (uint64_t)levels) : n % 2 ? i : -i; /* also in order */
            logits[i] = (float)level - (float)levels / 2;
            want[i] = i;
        }
        moe_cpu_top_logits(logits, count, wanted, ids, top);
        sorted_by = logits;
        qsort(want, (size_t)count, sizeof *want, by_logit);
        for (int32_t j = 0; j < wanted; j++) {
            assert_int_equal(ids[j], want[j]);
            assert_true(top[j] == logits[want[j]]);
        }
    }
}

static void rows_that_are_not_finite(void **state) {
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    float logits[MAX_COUNT] = {0}, top[5];
    int32_t ids[5];
    (void)state;
    for (int b = 0; b < 3; b++)
        for (int32_t i = 0; i < MAX_COUNT; i++) {
            logits[i] = bad[b];
            moe_cpu_top_logits(logits, MAX_COUNT, 5, ids, top);
            for (int j = 0; j < 5; j++) assert_int_equal(ids[j], -1);
            logits[i] = 0;
        }
    moe_cpu_top_logits(logits, MAX_COUNT, 5, ids, top);
    for (int j = 0; j < 5; j++) assert_int_equal(ids[j], j);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(as_a_sort_gives_them), cmocka_unit_test(rows_that_are_not_finite)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
