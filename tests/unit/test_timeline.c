/* The ring of a timeline, and its picture: events in order, the newest kept; text that XML minds is quoted. */
#include "common/timeline.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/timeline_svg.h"
#include "tests/support/test.h"

static void test_the_newest_are_kept(void **state) {
    (void)state;
    moe_timeline *t;
    moe_error err;
    assert_int_equal(moe_timeline_new(moe_clock_real(), 3, &t, &err), MOE_OK);
    for (int32_t i = 0; i < 8; i++) {
        assert_int_equal(moe_timeline_count(t), i < 3 ? i : 3);
        assert_int_equal(moe_timeline_whole(t), i <= 3);
        moe_timeline_span(t, MOE_TIMELINE_PASS, i, 2, 10 * i, 10 * i + 5);
        for (int32_t j = 0; j < moe_timeline_count(t); j++) {
            int32_t expected = i < 3 ? j : i - 2 + j;
            assert_int_equal(moe_timeline_at(t, j)->layer, expected);
            assert_int_equal(moe_timeline_at(t, j)->end_ns, 10 * expected + 5);
        }
    }
    int64_t before = moe_timeline_now(t);
    moe_timeline_add(t, MOE_TIMELINE_STALL, 1, 0, before);
    assert_true(before > 0 && moe_timeline_at(t, 2)->end_ns >= before);
    moe_timeline_free(&t);
    moe_timeline_free(&t);
    moe_timeline_add(NULL, MOE_TIMELINE_PASS, 0, 0, 0); /* nothing is kept */
    assert_int_equal(moe_timeline_now(NULL), 0);
}

static char *draw(const moe_timeline *t, const char *title, int32_t layers) {
    char *text;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    assert_non_null(out);
    moe_timeline_draw(out, &(moe_timeline_picture){.timeline = t, .title = title, .num_moe_layers = layers});
    fclose(out);
    return text;
}

static int32_t times(const char *text, const char *part) {
    int32_t count = 0;
    for (; (text = strstr(text, part)); text++) count++;
    return count;
}

/* Two steps of one layer, each of two segments and a pass; beside the second pass a copy, half of it. What was before is cut off. */
static void test_picture(void **state) {
    (void)state;
    const int64_t us = MOE_NS_PER_US;
    moe_timeline *t;
    moe_error err;
    assert_int_equal(moe_timeline_new(moe_clock_real(), 100, &t, &err), MOE_OK);
    char *empty = draw(t, "a <b> & c", 1);
    assert_non_null(strstr(empty, "a &#60;b&#62; &#38; c"));
    assert_int_equal(times(empty, "<title>"), 0);
    free(empty);
    for (int64_t step = 0; step < 3; step++) {
        int64_t at = (1000 + 100 * step) * us;
        moe_timeline_span(t, MOE_TIMELINE_SEGMENT, 0, 1, at, at + 20 * us);
        moe_timeline_span(t, MOE_TIMELINE_PASS, 0, 2, at + 20 * us, at + 60 * us);
        if (step == 2) moe_timeline_span(t, MOE_TIMELINE_AHEAD, 0, 7, at + 50 * us, at + 70 * us);
        moe_timeline_span(t, MOE_TIMELINE_SEGMENT, 1, 1, at + 70 * us, at + 100 * us);
    }
    char *text = draw(t, "two steps", 1);
    assert_int_equal(times(text, "<title>segment layer 0"), 2);
    assert_int_equal(times(text, "<title>segment logits"), 2);
    assert_int_equal(times(text, "<title>pass layer 0 experts 2"), 2);
    assert_non_null(strstr(text, "<title>ahead layer 0 expert 7: 0.1500 to 0.1700 ms"));
    assert_non_null(strstr(text, "Copies run for 0.020 ms of the 0.200 ms shown, 50 % of that beside computation"));
    assert_int_equal(times(text, "on the host"), 0); /* a lane that nothing is in */
    free(text);
    moe_timeline_free(&t);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_the_newest_are_kept), cmocka_unit_test(test_picture)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
