/* Filters on sequences and mappings. Where jinja2 yields a generator, the result here is a list. */
#include <string.h>

#include "router/chat/jinja_run.h"

#define FILTER(name) static jinja_value filter_##name(jinja_run *run, jinja_value self, const jinja_args *args)

static jinja_value *make_items(jinja_run *run, size_t count) {
    return moe_jinja_charge(run, count) ? moe_jinja_alloc(run, count, sizeof(jinja_value)) : NULL;
}

/* item.a.b for "a.b", a part of digits being an index; the item itself for an absent attribute. */
static jinja_value get_path(jinja_run *run, jinja_value item, jinja_value attribute, jinja_value fallback) {
    if (attribute.kind == JINJA_INT) return moe_jinja_item(run, item, attribute);
    if (attribute.kind != JINJA_STRING) return item;
    for (size_t at = 0; at <= attribute.text.size && !run->failed;) {
        size_t end = moe_jinja_find(attribute.text, (jinja_text){".", 1}, at);
        if (end == SIZE_MAX) end = attribute.text.size;
        jinja_text part = {attribute.text.data + at, end - at};
        int64_t index;
        bool digits = part.size > 0 && part.data[0] >= '0' && part.data[0] <= '9' && moe_jinja_parse_int(part, 10, &index);
        item = moe_jinja_item(run, item, digits ? jinja_int(index) : jinja_string(part.data, part.size));
        if (item.kind == JINJA_UNDEFINED && fallback.kind > JINJA_NONE) item = fallback;
        at = end + 1;
    }
    return item;
}

static jinja_value absent(void) { return (jinja_value){.kind = JINJA_ABSENT}; }

/* What sort, unique, min and max compare: the attribute, in lower case unless case matters. */
static jinja_value sort_key(jinja_run *run, jinja_value item, jinja_value attribute, jinja_value case_sensitive) {
    jinja_value key = get_path(run, item, attribute, absent());
    return key.kind == JINJA_STRING && !moe_jinja_truth(case_sensitive) ? moe_jinja_to_case(run, key.text, JINJA_LOWER) : key;
}

FILTER(length) {
    (void)args;
    return moe_jinja_length(run, self);
}

FILTER(list) {
    (void)args;
    jinja_list list = moe_jinja_iterate(run, self);
    return moe_jinja_list(JINJA_LIST, list.items, list.count);
}

FILTER(first) {
    (void)args;
    jinja_list list = moe_jinja_iterate(run, self);
    return list.count ? list.items[0] : jinja_undefined();
}

FILTER(last) {
    (void)args;
    jinja_list list = moe_jinja_iterate(run, self);
    return list.count ? list.items[list.count - 1] : jinja_undefined();
}

FILTER(reverse) {
    (void)args;
    jinja_list list = moe_jinja_iterate(run, self);
    jinja_value *items = make_items(run, list.count);
    for (size_t i = 0; items && i < list.count; i++) items[i] = list.items[list.count - 1 - i];
    if (!items || self.kind != JINJA_STRING) return moe_jinja_list(JINJA_LIST, items, list.count);
    moe_buf text = {0};
    for (size_t i = 0; i < list.count; i++) moe_buf_append(&text, items[i].text.data, items[i].text.size);
    return moe_jinja_take(run, &text);
}

FILTER(join) {
    jinja_list list = moe_jinja_iterate(run, self);
    jinja_text between = args->at[0].kind == JINJA_ABSENT ? (jinja_text){"", 0} : moe_jinja_str(run, args->at[0]);
    moe_buf out = {0};
    for (size_t i = 0; i < list.count && !run->failed; i++) {
        if (i) moe_jinja_append(run, &out, between.data, between.size);
        moe_jinja_print(run, get_path(run, list.items[i], args->at[1], absent()), &out);
    }
    return moe_jinja_take(run, &out);
}

FILTER(items) {
    if (self.kind == JINJA_UNDEFINED) return moe_jinja_list(JINJA_LIST, NULL, 0);
    if (self.kind != JINJA_DICT)
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "items: %s is not a mapping", moe_jinja_kind_name(self.kind));
    return moe_jinja_find_method(JINJA_DICT, (jinja_text){"items", 5})->call(run, self, args);
}

FILTER(batch) {
    jinja_list list = moe_jinja_iterate(run, self);
    if (args->at[0].kind != JINJA_INT || args->at[0].integer < 1)
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "batch: a positive integer was expected");
    size_t size = (uint64_t)args->at[0].integer < list.count ? (size_t)args->at[0].integer : list.count, count = 0;
    bool fill = args->at[1].kind > JINJA_NONE;
    if (list.count == 0) return moe_jinja_list(JINJA_LIST, NULL, 0);
    if (fill && (uint64_t)args->at[0].integer > MOE_JINJA_MAX_RANGE)
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "batch: too large");
    if (fill) size = (size_t)args->at[0].integer;
    jinja_value *batches = make_items(run, list.count / size + 1);
    for (size_t at = 0; batches && at < list.count; at += size) {
        size_t left = list.count - at < size ? list.count - at : size, filled = fill ? size : left;
        jinja_value *batch = make_items(run, filled);
        if (!batch) return jinja_undefined();
        for (size_t i = 0; i < filled; i++) batch[i] = i < left ? list.items[at + i] : args->at[1];
        batches[count++] = moe_jinja_list(JINJA_LIST, batch, filled);
    }
    return moe_jinja_list(JINJA_LIST, batches, count);
}

/* ---- order ---- */

static void merge(jinja_run *run, const jinja_pair *a, size_t na, const jinja_pair *b, size_t nb, jinja_pair *out, bool reverse) {
    for (size_t i = 0, j = 0; i < na || j < nb;) {
        bool take_b = i == na;
        if (i < na && j < nb) {
            int order = moe_jinja_compare(run, a[i].key, b[j].key);
            take_b = reverse ? order < 0 : order > 0;
        }
        *out++ = take_b ? b[j++] : a[i++];
    }
}

/* Sorts pairs by key, keeping the order of equal ones; the result is `pairs` or a new array. */
static jinja_pair *sort_pairs(jinja_run *run, jinja_pair *pairs, size_t count, bool reverse) {
    jinja_pair *other = moe_jinja_alloc(run, count, sizeof *other);
    for (size_t width = 1; other && width < count && moe_jinja_charge(run, count); width *= 2) {
        for (size_t at = 0; at < count; at += 2 * width) {
            size_t middle = at + width < count ? at + width : count, end = middle + width < count ? middle + width : count;
            merge(run, pairs + at, middle - at, pairs + middle, end - middle, other + at, reverse);
        }
        jinja_pair *swap = pairs;
        pairs = other;
        other = swap;
    }
    return pairs;
}

/* The items sorted by their keys, from keys[i] for items[i]. */
static jinja_value sorted(jinja_run *run, const jinja_value *keys, const jinja_value *items, size_t count, bool reverse) {
    jinja_pair *pairs = moe_jinja_alloc(run, count, sizeof *pairs);
    jinja_value *out = make_items(run, count);
    if (!pairs || !out) return jinja_undefined();
    for (size_t i = 0; i < count; i++) pairs[i] = (jinja_pair){keys[i], items[i]};
    pairs = sort_pairs(run, pairs, count, reverse);
    for (size_t i = 0; i < count; i++) out[i] = pairs[i].value;
    return moe_jinja_list(JINJA_LIST, out, count);
}

FILTER(sort) {
    jinja_list list = moe_jinja_iterate(run, self);
    jinja_value *keys = make_items(run, list.count);
    for (size_t i = 0; keys && i < list.count; i++) keys[i] = sort_key(run, list.items[i], args->at[2], args->at[1]);
    return keys ? sorted(run, keys, list.items, list.count, moe_jinja_truth(args->at[0])) : jinja_undefined();
}

FILTER(dictsort) {
    jinja_value items = filter_items(run, self, args), by = args->at[1];
    bool by_value = by.kind == JINJA_STRING && moe_jinja_text_is(by.text, "value");
    if (run->failed) return jinja_undefined();
    jinja_value *keys = make_items(run, items.list.count);
    for (size_t i = 0; keys && i < items.list.count; i++)
        keys[i] = sort_key(run, items.list.items[i].list.items[by_value], absent(), args->at[0]);
    return keys ? sorted(run, keys, items.list.items, items.list.count, moe_jinja_truth(args->at[2])) : jinja_undefined();
}

FILTER(unique) {
    jinja_list list = moe_jinja_iterate(run, self);
    jinja_value *keys = make_items(run, list.count), *items = make_items(run, list.count);
    size_t count = 0;
    for (size_t i = 0; keys && items && i < list.count && !run->failed; i++) {
        jinja_value key = sort_key(run, list.items[i], args->at[1], args->at[0]);
        size_t seen = 0;
        while (seen < count && !moe_jinja_equal(run, keys[seen], key)) seen++;
        if (seen < count) continue;
        keys[count] = key;
        items[count++] = list.items[i];
    }
    return moe_jinja_list(JINJA_LIST, items, count);
}

static jinja_value extreme(jinja_run *run, jinja_value self, const jinja_args *args, int sign) {
    jinja_list list = moe_jinja_iterate(run, self);
    if (list.count == 0) return jinja_undefined();
    jinja_value best = list.items[0], best_key = sort_key(run, best, args->at[1], args->at[0]);
    for (size_t i = 1; i < list.count && !run->failed; i++) {
        jinja_value key = sort_key(run, list.items[i], args->at[1], args->at[0]);
        if (moe_jinja_compare(run, key, best_key) * sign <= 0) continue;
        best = list.items[i];
        best_key = key;
    }
    return best;
}

FILTER(min) { return extreme(run, self, args, -1); }
FILTER(max) { return extreme(run, self, args, 1); }

FILTER(sum) {
    jinja_list list = moe_jinja_iterate(run, self);
    jinja_value total = args->at[1].kind == JINJA_ABSENT ? jinja_int(0) : args->at[1];
    for (size_t i = 0; i < list.count && !run->failed; i++)
        total = moe_jinja_binary(run, '+', total, get_path(run, list.items[i], args->at[0], absent()));
    return total;
}

/* ---- map, select, reject ---- */

/* The arguments after the first `skip`. */
static jinja_args rest_of(const jinja_args *args, size_t skip) {
    jinja_args rest = {.names = args->names, .named = args->named, .named_count = args->named_count};
    rest.values = args->values + skip;
    rest.count = args->count - skip;
    return rest;
}

static jinja_value apply_filter(jinja_run *run, const jinja_function *filter, jinja_value item, const jinja_args *args) {
    jinja_args rest = rest_of(args, 1);
    return moe_jinja_call_function(run, filter, item, &rest);
}

/* map("filter", …) or map(attribute="a.b", default=…). */
FILTER(map) {
    jinja_value attribute = moe_jinja_keyword(args, "attribute"), fallback = moe_jinja_keyword(args, "default");
    const jinja_function *filter = NULL;
    if (args->count > 0) {
        jinja_text name = moe_jinja_str(run, args->values[0]);
        filter = moe_jinja_find_filter(name);
        if (!filter)
            return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "the filter '%.*s' is not built", (int)name.size, name.data);
    } else if (attribute.kind == JINJA_ABSENT) {
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "map: a filter or an attribute was expected");
    }
    if (!moe_jinja_truth(self)) return moe_jinja_list(JINJA_LIST, NULL, 0);
    jinja_list list = moe_jinja_iterate(run, self);
    jinja_value *items = make_items(run, list.count);
    for (size_t i = 0; items && i < list.count && !run->failed; i++)
        items[i] = filter ? apply_filter(run, filter, list.items[i], args) : get_path(run, list.items[i], attribute, fallback);
    return moe_jinja_list(JINJA_LIST, items, list.count);
}

/* [attribute,] [test, arguments …]: the items for which the test (without one: truth) is `wanted`. */
static jinja_value choose(jinja_run *run, jinja_value self, const jinja_args *args, bool by_attribute, bool wanted) {
    size_t skip = by_attribute, count = 0;
    const jinja_function *test = NULL;
    if (args->count < skip) return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "an attribute was expected");
    if (args->count > skip) {
        jinja_text name = moe_jinja_str(run, args->values[skip]);
        test = moe_jinja_find_test(name);
        if (!test) return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "the test '%.*s' is not built", (int)name.size, name.data);
    }
    if (!moe_jinja_truth(self)) return moe_jinja_list(JINJA_LIST, NULL, 0);
    jinja_list list = moe_jinja_iterate(run, self);
    jinja_value *items = make_items(run, list.count);
    for (size_t i = 0; items && i < list.count && !run->failed; i++) {
        jinja_value subject = by_attribute ? get_path(run, list.items[i], args->values[0], absent()) : list.items[i];
        if (test) {
            jinja_args rest = rest_of(args, skip + 1);
            subject = moe_jinja_call_function(run, test, subject, &rest);
        }
        if (moe_jinja_truth(subject) == wanted) items[count++] = list.items[i];
    }
    return moe_jinja_list(JINJA_LIST, items, count);
}

FILTER(select) { return choose(run, self, args, false, true); }
FILTER(reject) { return choose(run, self, args, false, false); }
FILTER(selectattr) { return choose(run, self, args, true, true); }
FILTER(rejectattr) { return choose(run, self, args, true, false); }

const jinja_function *moe_jinja_find_sequence_filter(jinja_text name) {
    static const jinja_function filters[] = {
        {"length", "", 0, filter_length, JINJA_ABSENT},
        {"count", "", 0, filter_length, JINJA_ABSENT},
        {"list", "", 0, filter_list, JINJA_ABSENT},
        {"first", "", 0, filter_first, JINJA_ABSENT},
        {"last", "", 0, filter_last, JINJA_ABSENT},
        {"reverse", "", 0, filter_reverse, JINJA_ABSENT},
        {"join", "d attribute", 0, filter_join, JINJA_ABSENT},
        {"items", "", 0, filter_items, JINJA_ABSENT},
        {"batch", "linecount fill_with", 1, filter_batch, JINJA_ABSENT},
        {"sort", "reverse case_sensitive attribute", 0, filter_sort, JINJA_ABSENT},
        {"dictsort", "case_sensitive by reverse", 0, filter_dictsort, JINJA_ABSENT},
        {"unique", "case_sensitive attribute", 0, filter_unique, JINJA_ABSENT},
        {"min", "case_sensitive attribute", 0, filter_min, JINJA_ABSENT},
        {"max", "case_sensitive attribute", 0, filter_max, JINJA_ABSENT},
        {"sum", "attribute start", 0, filter_sum, JINJA_ABSENT},
        {"map", NULL, 0, filter_map, JINJA_ABSENT},
        {"select", NULL, 0, filter_select, JINJA_ABSENT},
        {"reject", NULL, 0, filter_reject, JINJA_ABSENT},
        {"selectattr", NULL, 0, filter_selectattr, JINJA_ABSENT},
        {"rejectattr", NULL, 0, filter_rejectattr, JINJA_ABSENT},
    };
    for (size_t i = 0; i < sizeof filters / sizeof *filters; i++)
        if (moe_jinja_text_is(name, filters[i].name)) return &filters[i];
    return NULL;
}
