#include <math.h>
#include <string.h>

#include "router/chat/jinja_run.h"

const char *moe_jinja_kind_name(jinja_kind kind) {
    static const char *const names[] = {[JINJA_ABSENT] = "absent",       [JINJA_UNDEFINED] = "undefined",
                                        [JINJA_NONE] = "none",           [JINJA_BOOL] = "boolean",
                                        [JINJA_INT] = "integer",         [JINJA_FLOAT] = "float",
                                        [JINJA_STRING] = "string",       [JINJA_LIST] = "list",
                                        [JINJA_TUPLE] = "tuple",         [JINJA_DICT] = "mapping",
                                        [JINJA_NAMESPACE] = "namespace", [JINJA_MACRO] = "macro",
                                        [JINJA_BUILTIN] = "function",    [JINJA_LOOP] = "loop"};
    return names[kind];
}

bool moe_jinja_truth(jinja_value value) {
    switch (value.kind) {
        case JINJA_ABSENT:
        case JINJA_UNDEFINED:
        case JINJA_NONE:
            return false;
        case JINJA_BOOL:
            return value.boolean;
        case JINJA_INT:
            return value.integer != 0;
        case JINJA_FLOAT:
            return value.number != 0;
        case JINJA_STRING:
            return value.text.size > 0;
        case JINJA_LIST:
        case JINJA_TUPLE:
            return value.list.count > 0;
        case JINJA_DICT:
            return value.dict->count > 0;
        default:
            return true;
    }
}

bool moe_jinja_is_number(jinja_value value) {
    return value.kind == JINJA_INT || value.kind == JINJA_FLOAT || value.kind == JINJA_BOOL;
}

double moe_jinja_number(jinja_value value) {
    if (value.kind == JINJA_FLOAT) return value.number;
    return value.kind == JINJA_INT ? (double)value.integer : value.kind == JINJA_BOOL ? (double)value.boolean : 0;
}

jinja_value moe_jinja_list(jinja_kind kind, const jinja_value *items, size_t count) {
    return (jinja_value){.kind = kind, .list = {items, items ? count : 0}};
}

/* ---- equality and order ---- */

static int64_t integer_of(jinja_value value) { return value.kind == JINJA_BOOL ? value.boolean : value.integer; }

static int compare_numbers(jinja_value a, jinja_value b) {
    if (a.kind != JINJA_FLOAT && b.kind != JINJA_FLOAT) {
        int64_t x = integer_of(a), y = integer_of(b);
        return (x > y) - (x < y);
    }
    double x = moe_jinja_number(a), y = moe_jinja_number(b);
    return (x > y) - (x < y);
}

static bool equal_lists(jinja_run *run, jinja_list a, jinja_list b) {
    if (a.count != b.count) return false;
    for (size_t i = 0; i < a.count && !run->failed; i++)
        if (!moe_jinja_equal(run, a.items[i], b.items[i])) return false;
    return true;
}

static bool equal_dicts(jinja_run *run, const jinja_dict *a, const jinja_dict *b) {
    if (a->count != b->count) return false;
    for (size_t i = 0; i < a->count && !run->failed; i++) {
        const jinja_value *other = moe_jinja_dict_find(run, b, a->pairs[i].key);
        if (!other || !moe_jinja_equal(run, a->pairs[i].value, *other)) return false;
    }
    return true;
}

static bool equal_same_kind(jinja_run *run, jinja_value a, jinja_value b) {
    switch (a.kind) {
        case JINJA_STRING:
            return moe_jinja_text_equal(a.text, b.text);
        case JINJA_LIST:
        case JINJA_TUPLE:
            return equal_lists(run, a.list, b.list);
        case JINJA_DICT:
            return equal_dicts(run, a.dict, b.dict);
        case JINJA_NAMESPACE:
            return a.attributes == b.attributes;
        case JINJA_MACRO:
            return a.macro == b.macro;
        case JINJA_BUILTIN:
            return a.builtin == b.builtin;
        case JINJA_LOOP:
            return a.loop == b.loop;
        default:
            return true; /* none, undefined */
    }
}

bool moe_jinja_equal(jinja_run *run, jinja_value a, jinja_value b) {
    if (!moe_jinja_charge(run, 1)) return false;
    if (moe_jinja_is_number(a) && moe_jinja_is_number(b))
        return !isnan(moe_jinja_number(a)) && !isnan(moe_jinja_number(b)) && compare_numbers(a, b) == 0;
    if (a.kind != b.kind) return false;
    if (run->depth >= MOE_JINJA_MAX_DEPTH) {
        moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "values are nested too deep");
        return false;
    }
    run->depth++;
    bool equal = equal_same_kind(run, a, b);
    run->depth--;
    return equal;
}

int moe_jinja_compare(jinja_run *run, jinja_value a, jinja_value b) {
    if (!moe_jinja_charge(run, 1)) return 0;
    if (moe_jinja_is_number(a) && moe_jinja_is_number(b)) return compare_numbers(a, b);
    if (a.kind == JINJA_STRING && b.kind == JINJA_STRING) {
        size_t common = a.text.size < b.text.size ? a.text.size : b.text.size;
        int order = common ? memcmp(a.text.data, b.text.data, common) : 0;
        return order ? order : (a.text.size > b.text.size) - (a.text.size < b.text.size);
    }
    if (a.kind == b.kind && (a.kind == JINJA_LIST || a.kind == JINJA_TUPLE)) {
        size_t common = a.list.count < b.list.count ? a.list.count : b.list.count;
        for (size_t i = 0; i < common && !run->failed; i++)
            if (!moe_jinja_equal(run, a.list.items[i], b.list.items[i]))
                return run->depth < MOE_JINJA_MAX_DEPTH ? moe_jinja_compare(run, a.list.items[i], b.list.items[i]) : 0;
        return (a.list.count > b.list.count) - (a.list.count < b.list.count);
    }
    moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "%s and %s have no order", moe_jinja_kind_name(a.kind),
                   moe_jinja_kind_name(b.kind));
    return 0;
}

/* ---- containers ---- */

const jinja_value *moe_jinja_dict_find(jinja_run *run, const jinja_dict *dict, jinja_value key) {
    moe_jinja_charge(run, dict->count / 64);
    for (size_t i = 0; i < dict->count && !run->failed; i++) {
        const jinja_pair *pair = &dict->pairs[i];
        bool same = key.kind == JINJA_STRING ? pair->key.kind == JINJA_STRING && moe_jinja_text_equal(pair->key.text, key.text)
                                             : moe_jinja_equal(run, pair->key, key);
        if (same) return &pair->value;
    }
    return NULL;
}

static jinja_list characters(jinja_run *run, jinja_text text) {
    size_t count = moe_jinja_utf8_length(text), at = 0;
    jinja_value *items = moe_jinja_charge(run, count) ? moe_jinja_alloc(run, count, sizeof *items) : NULL;
    if (!items) return (jinja_list){0};
    for (size_t i = 0; i < count; i++) {
        size_t start = at;
        moe_jinja_utf8_next(text.data, text.size, &at);
        items[i] = jinja_string(text.data + start, at - start);
    }
    return (jinja_list){items, count};
}

static jinja_list keys(jinja_run *run, const jinja_dict *dict) {
    jinja_value *items = moe_jinja_charge(run, dict->count) ? moe_jinja_alloc(run, dict->count, sizeof *items) : NULL;
    if (!items) return (jinja_list){0};
    for (size_t i = 0; i < dict->count; i++) items[i] = dict->pairs[i].key;
    return (jinja_list){items, dict->count};
}

jinja_list moe_jinja_iterate(jinja_run *run, jinja_value value) {
    switch (value.kind) {
        case JINJA_LIST:
        case JINJA_TUPLE:
            return value.list;
        case JINJA_STRING:
            return characters(run, value.text);
        case JINJA_DICT:
            return keys(run, value.dict);
        case JINJA_UNDEFINED:
            return (jinja_list){0};
        default:
            moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "%s cannot be iterated over", moe_jinja_kind_name(value.kind));
            return (jinja_list){0};
    }
}

jinja_value moe_jinja_length(jinja_run *run, jinja_value value) {
    switch (value.kind) {
        case JINJA_STRING:
            return jinja_int((int64_t)moe_jinja_utf8_length(value.text));
        case JINJA_LIST:
        case JINJA_TUPLE:
            return jinja_int((int64_t)value.list.count);
        case JINJA_DICT:
            return jinja_int((int64_t)value.dict->count);
        case JINJA_UNDEFINED:
            return jinja_int(0);
        default:
            return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "%s has no length", moe_jinja_kind_name(value.kind));
    }
}

bool moe_jinja_contains(jinja_run *run, jinja_value container, jinja_value item) {
    if (container.kind == JINJA_DICT) return moe_jinja_dict_find(run, container.dict, item) != NULL;
    if (container.kind == JINJA_STRING) {
        if (item.kind == JINJA_STRING)
            return moe_jinja_charge(run, container.text.size / 64) && moe_jinja_find(container.text, item.text, 0) != SIZE_MAX;
        moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "a string can only contain a string, not %s", moe_jinja_kind_name(item.kind));
        return false;
    }
    jinja_list list = moe_jinja_iterate(run, container);
    for (size_t i = 0; i < list.count && !run->failed; i++)
        if (moe_jinja_equal(run, list.items[i], item)) return true;
    return false;
}

/* ---- attributes, items, slices ---- */

static jinja_value missing(jinja_text name) { return (jinja_value){.kind = JINJA_UNDEFINED, .text = name}; }

static bool find_method(jinja_run *run, jinja_value object, jinja_text name, jinja_value *out) {
    const jinja_function *function = moe_jinja_find_method(object.kind, name);
    if (!function) return false;
    jinja_builtin *bound = moe_jinja_alloc(run, 1, sizeof *bound);
    if (bound) *bound = (jinja_builtin){function, object};
    *out = bound ? (jinja_value){.kind = JINJA_BUILTIN, .builtin = bound} : jinja_undefined();
    return true;
}

static jinja_value sequence_item(jinja_run *run, jinja_value object, int64_t index) {
    bool text = object.kind == JINJA_STRING;
    size_t count = text ? moe_jinja_utf8_length(object.text) : object.list.count;
    if (index < 0) index += (int64_t)count;
    if (index < 0 || (uint64_t)index >= count) return missing((jinja_text){"item", 4});
    if (!text) return object.list.items[index];
    moe_jinja_charge(run, object.text.size / 64);
    size_t at = moe_jinja_utf8_offset(object.text, (size_t)index), end = at;
    moe_jinja_utf8_next(object.text.data, object.text.size, &end);
    return jinja_string(object.text.data + at, end - at);
}

static bool find_item(jinja_run *run, jinja_value object, jinja_value key, jinja_value *out) {
    const jinja_value *found = NULL;
    if (object.kind == JINJA_DICT) found = moe_jinja_dict_find(run, object.dict, key);
    if (object.kind == JINJA_NAMESPACE && key.kind == JINJA_STRING) found = moe_jinja_lookup(object.attributes, key.text);
    if (found) *out = *found;
    if (object.kind == JINJA_LOOP && key.kind == JINJA_STRING) {
        *out = moe_jinja_loop_attribute(run, object.loop, key.text);
        return true;
    }
    bool sequence = object.kind == JINJA_LIST || object.kind == JINJA_TUPLE || object.kind == JINJA_STRING;
    if (sequence && (key.kind == JINJA_INT || key.kind == JINJA_BOOL)) {
        *out = sequence_item(run, object, integer_of(key));
        return true;
    }
    return found != NULL;
}

jinja_value moe_jinja_attribute(jinja_run *run, jinja_value object, jinja_text name) {
    jinja_value out = missing(name), key = {.kind = JINJA_STRING, .text = name};
    if (object.kind == JINJA_UNDEFINED)
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "'%.*s' is undefined, so it has no '%.*s'", (int)object.text.size,
                              object.text.data, (int)name.size, name.data);
    if (object.kind == JINJA_MACRO && moe_jinja_text_is(name, "name"))
        return (jinja_value){.kind = JINJA_STRING, .text = object.macro->name};
    if (!find_method(run, object, name, &out)) find_item(run, object, key, &out);
    return out;
}

jinja_value moe_jinja_item(jinja_run *run, jinja_value object, jinja_value key) {
    jinja_value out = missing(key.kind == JINJA_STRING ? key.text : (jinja_text){"item", 4});
    if (object.kind == JINJA_UNDEFINED)
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "'%.*s' is undefined, so it has no items", (int)object.text.size,
                              object.text.data);
    if (!find_item(run, object, key, &out) && key.kind == JINJA_STRING) find_method(run, object, key.text, &out);
    return out;
}

/* Python's slice.indices for one bound. */
static int64_t clamp_bound(jinja_value bound, int64_t absent, int64_t count, int64_t least, int64_t most) {
    if (bound.kind == JINJA_ABSENT || bound.kind == JINJA_NONE) return absent;
    int64_t index = integer_of(bound);
    if (index < 0) index += count;
    return index < least ? least : index > most ? most : index;
}

static bool is_bound(jinja_value v) {
    return v.kind == JINJA_ABSENT || v.kind == JINJA_NONE || v.kind == JINJA_INT || v.kind == JINJA_BOOL;
}

static jinja_value join_characters(jinja_run *run, const jinja_value *items, size_t count) {
    moe_buf text = {0};
    for (size_t i = 0; i < count; i++) moe_buf_append(&text, items[i].text.data, items[i].text.size);
    return moe_jinja_take(run, &text);
}

jinja_value moe_jinja_slice(jinja_run *run, jinja_value object, jinja_value start, jinja_value stop, jinja_value step) {
    bool text = object.kind == JINJA_STRING;
    if (object.kind == JINJA_DICT) return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "a mapping cannot be sliced");
    if (!text && object.kind != JINJA_LIST && object.kind != JINJA_TUPLE)
        return object.kind == JINJA_UNDEFINED ? moe_jinja_item(run, object, jinja_none()) : missing((jinja_text){"slice", 5});
    if (!is_bound(start) || !is_bound(stop) || !is_bound(step))
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "a slice's bounds must be integers");
    int64_t by = step.kind == JINJA_ABSENT || step.kind == JINJA_NONE ? 1 : integer_of(step);
    if (by == 0) return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "a slice's step must not be 0");
    int64_t count = text ? (int64_t)moe_jinja_utf8_length(object.text) : (int64_t)object.list.count;
    int64_t from = clamp_bound(start, by > 0 ? 0 : count - 1, count, by > 0 ? 0 : -1, by > 0 ? count : count - 1);
    int64_t to = clamp_bound(stop, by > 0 ? count : -1, count, by > 0 ? 0 : -1, by > 0 ? count : count - 1);
    if (by > 0 ? from >= to : from <= to) return text ? jinja_string("", 0) : moe_jinja_list(object.kind, NULL, 0);
    if (text && by == 1) {
        moe_jinja_charge(run, object.text.size / 64);
        size_t begin = moe_jinja_utf8_offset(object.text, (size_t)from), end = moe_jinja_utf8_offset(object.text, (size_t)to);
        return jinja_string(object.text.data + begin, end - begin);
    }
    jinja_list source = moe_jinja_iterate(run, object);
    uint64_t distance = (uint64_t)(by > 0 ? to - from : from - to), stride = by > 0 ? (uint64_t)by : 0 - (uint64_t)by;
    size_t picked = (size_t)((distance - 1) / stride + 1);
    jinja_value *items = moe_jinja_charge(run, picked) ? moe_jinja_alloc(run, picked, sizeof *items) : NULL;
    if (!items || source.count < (size_t)count) return jinja_undefined();
    for (size_t i = 0; i < picked; i++) items[i] = source.items[from + (int64_t)i * by];
    return text ? join_characters(run, items, picked) : moe_jinja_list(object.kind, items, picked);
}

/* ---- from JSON ---- */

static jinja_value from_json_array(jinja_run *run, json_t *json) {
    size_t count = json_array_size(json);
    jinja_value *items = moe_jinja_alloc(run, count, sizeof *items);
    for (size_t i = 0; items && i < count; i++) items[i] = moe_jinja_from_json(run, json_array_get(json, i));
    return moe_jinja_list(JINJA_LIST, items, count);
}

static jinja_value from_json_object(jinja_run *run, json_t *json) {
    jinja_dict *dict = moe_jinja_alloc(run, 1, sizeof *dict);
    jinja_pair *pairs = moe_jinja_alloc(run, json_object_size(json), sizeof *pairs);
    if (!dict || !pairs) return jinja_undefined();
    dict->pairs = pairs;
    for (void *it = json_object_iter(json); it; it = json_object_iter_next(json, it)) {
        const char *key = json_object_iter_key(it);
        pairs[dict->count].key = jinja_string(key, strlen(key));
        pairs[dict->count++].value = moe_jinja_from_json(run, json_object_iter_value(it));
    }
    return (jinja_value){.kind = JINJA_DICT, .dict = dict};
}

jinja_value moe_jinja_from_json(jinja_run *run, json_t *json) {
    jinja_value value;
    if (run->failed) return jinja_undefined();
    switch (json_typeof(json)) {
        case JSON_STRING:
            return jinja_string(json_string_value(json), json_string_length(json));
        case JSON_INTEGER:
            return jinja_int(json_integer_value(json));
        case JSON_REAL:
            return jinja_float(json_real_value(json));
        case JSON_TRUE:
            return jinja_bool(true);
        case JSON_FALSE:
            return jinja_bool(false);
        case JSON_NULL:
            return jinja_none();
        default:
            break;
    }
    if (run->depth >= MOE_JINJA_MAX_DEPTH) return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "a variable is nested too deep");
    run->depth++;
    value = json_is_array(json) ? from_json_array(run, json) : from_json_object(run, json);
    run->depth--;
    return value;
}
