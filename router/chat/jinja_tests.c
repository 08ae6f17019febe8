/* `value is test(…)`. */
#include <math.h>
#include <utf8proc.h>

#include "router/chat/jinja_run.h"

#define TEST(name) static jinja_value test_##name(jinja_run *run, jinja_value self, const jinja_args *args)
#define KIND_TEST(name, condition)    \
    TEST(name) {                      \
        (void)run;                    \
        (void)args;                   \
        return jinja_bool(condition); \
    }

KIND_TEST(defined, self.kind != JINJA_UNDEFINED)
KIND_TEST(undefined, self.kind == JINJA_UNDEFINED)
KIND_TEST(none, self.kind == JINJA_NONE)
KIND_TEST(boolean, self.kind == JINJA_BOOL)
KIND_TEST(is_true, self.kind == JINJA_BOOL && self.boolean)
KIND_TEST(is_false, self.kind == JINJA_BOOL && !self.boolean)
KIND_TEST(integer, self.kind == JINJA_INT)
KIND_TEST(float, self.kind == JINJA_FLOAT)
KIND_TEST(number, moe_jinja_is_number(self))
KIND_TEST(string, self.kind == JINJA_STRING)
KIND_TEST(mapping, self.kind == JINJA_DICT)
KIND_TEST(callable, self.kind == JINJA_MACRO || self.kind == JINJA_BUILTIN)
KIND_TEST(sequence, self.kind == JINJA_STRING || self.kind == JINJA_LIST || self.kind == JINJA_TUPLE || self.kind == JINJA_DICT ||
                        self.kind == JINJA_UNDEFINED)
KIND_TEST(iterable, self.kind == JINJA_STRING || self.kind == JINJA_LIST || self.kind == JINJA_TUPLE || self.kind == JINJA_DICT ||
                        self.kind == JINJA_UNDEFINED || self.kind == JINJA_LOOP)

TEST(divisibleby) {
    jinja_value rest = moe_jinja_binary(run, '%', self, args->at[0]);
    return jinja_bool(moe_jinja_is_number(rest) && moe_jinja_number(rest) == 0);
}
TEST(odd) {
    (void)args;
    jinja_value rest = moe_jinja_binary(run, '%', self, jinja_int(2));
    return jinja_bool(moe_jinja_is_number(rest) && moe_jinja_number(rest) == 1);
}
TEST(even) {
    (void)args;
    jinja_value rest = moe_jinja_binary(run, '%', self, jinja_int(2));
    return jinja_bool(moe_jinja_is_number(rest) && moe_jinja_number(rest) == 0);
}
TEST(eq) { return jinja_bool(moe_jinja_equal(run, self, args->at[0])); }
TEST(ne) { return jinja_bool(!moe_jinja_equal(run, self, args->at[0])); }
TEST(lt) { return jinja_bool(moe_jinja_compare(run, self, args->at[0]) < 0); }
TEST(gt) { return jinja_bool(moe_jinja_compare(run, self, args->at[0]) > 0); }
TEST(le) { return jinja_bool(moe_jinja_compare(run, self, args->at[0]) <= 0); }
TEST(ge) { return jinja_bool(moe_jinja_compare(run, self, args->at[0]) >= 0); }
TEST(in) { return jinja_bool(moe_jinja_contains(run, args->at[0], self)); }

/* Python's `is`, as far as values without identity allow: the same kind and equal. */
TEST(sameas) { return jinja_bool(self.kind == args->at[0].kind && moe_jinja_equal(run, self, args->at[0])); }

static jinja_value has_case(jinja_run *run, jinja_value self, bool upper) {
    jinja_text text = moe_jinja_str(run, self);
    bool cased = false;
    moe_jinja_charge(run, text.size / 16);
    for (size_t at = 0; at < text.size;) {
        utf8proc_category_t category = utf8proc_category((utf8proc_int32_t)moe_jinja_utf8_next(text.data, text.size, &at));
        if (category == (upper ? UTF8PROC_CATEGORY_LL : UTF8PROC_CATEGORY_LU) || category == UTF8PROC_CATEGORY_LT)
            return jinja_bool(false);
        cased = cased || category == (upper ? UTF8PROC_CATEGORY_LU : UTF8PROC_CATEGORY_LL);
    }
    return jinja_bool(cased);
}
TEST(upper) {
    (void)args;
    return has_case(run, self, true);
}
TEST(lower) {
    (void)args;
    return has_case(run, self, false);
}

const jinja_function *moe_jinja_find_test(jinja_text name) {
    static const jinja_function tests[] = {
        {"defined", "", 0, test_defined, JINJA_ABSENT},
        {"undefined", "", 0, test_undefined, JINJA_ABSENT},
        {"none", "", 0, test_none, JINJA_ABSENT},
        {"boolean", "", 0, test_boolean, JINJA_ABSENT},
        {"true", "", 0, test_is_true, JINJA_ABSENT},
        {"false", "", 0, test_is_false, JINJA_ABSENT},
        {"integer", "", 0, test_integer, JINJA_ABSENT},
        {"float", "", 0, test_float, JINJA_ABSENT},
        {"number", "", 0, test_number, JINJA_ABSENT},
        {"string", "", 0, test_string, JINJA_ABSENT},
        {"mapping", "", 0, test_mapping, JINJA_ABSENT},
        {"sequence", "", 0, test_sequence, JINJA_ABSENT},
        {"iterable", "", 0, test_iterable, JINJA_ABSENT},
        {"callable", "", 0, test_callable, JINJA_ABSENT},
        {"odd", "", 0, test_odd, JINJA_ABSENT},
        {"even", "", 0, test_even, JINJA_ABSENT},
        {"upper", "", 0, test_upper, JINJA_ABSENT},
        {"lower", "", 0, test_lower, JINJA_ABSENT},
        {"divisibleby", "num", 1, test_divisibleby, JINJA_ABSENT},
        {"in", "seq", 1, test_in, JINJA_ABSENT},
        {"sameas", "other", 1, test_sameas, JINJA_ABSENT},
        {"eq", "other", 1, test_eq, JINJA_ABSENT},
        {"equalto", "other", 1, test_eq, JINJA_ABSENT},
        {"==", "other", 1, test_eq, JINJA_ABSENT},
        {"ne", "other", 1, test_ne, JINJA_ABSENT},
        {"!=", "other", 1, test_ne, JINJA_ABSENT},
        {"lt", "other", 1, test_lt, JINJA_ABSENT},
        {"lessthan", "other", 1, test_lt, JINJA_ABSENT},
        {"<", "other", 1, test_lt, JINJA_ABSENT},
        {"gt", "other", 1, test_gt, JINJA_ABSENT},
        {"greaterthan", "other", 1, test_gt, JINJA_ABSENT},
        {">", "other", 1, test_gt, JINJA_ABSENT},
        {"le", "other", 1, test_le, JINJA_ABSENT},
        {"<=", "other", 1, test_le, JINJA_ABSENT},
        {"ge", "other", 1, test_ge, JINJA_ABSENT},
        {">=", "other", 1, test_ge, JINJA_ABSENT},
    };
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++)
        if (moe_jinja_text_is(name, tests[i].name)) return &tests[i];
    return NULL;
}
