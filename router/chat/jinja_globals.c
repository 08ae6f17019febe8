/* The functions that transformers and jinja2 put into a chat template's global scope. */
#include <string.h>
#include <time.h>

#include "common/clock.h"
#include "router/chat/jinja_run.h"

#define MAX_TIME_BYTES 256

static jinja_value global_raise_exception(jinja_run *run, jinja_value self, const jinja_args *args) {
    (void)self;
    jinja_text what = moe_jinja_str(run, args->at[0]);
    return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "the template refuses: %.*s", (int)(what.size < 300 ? what.size : 300),
                          what.data);
}

static jinja_value global_strftime_now(jinja_run *run, jinja_value self, const jinja_args *args) {
    (void)self;
    char format[MAX_TIME_BYTES], text[MAX_TIME_BYTES];
    jinja_text wanted = moe_jinja_str(run, args->at[0]);
    time_t now = (time_t)moe_wall_clock_s();
    struct tm local;
    if (wanted.size >= sizeof format || !localtime_r(&now, &local))
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "strftime_now: the format is too long");
    memcpy(format, wanted.data, wanted.size);
    format[wanted.size] = '\0';
    size_t size = strftime(text, sizeof text, format, &local);
    return moe_jinja_copy(run, text, size);
}

static jinja_value global_range(jinja_run *run, jinja_value self, const jinja_args *args) {
    (void)self;
    int64_t bounds[3] = {0, 0, 1};
    for (size_t i = 0; i < 3 && args->at[i].kind != JINJA_ABSENT; i++) {
        if (args->at[i].kind != JINJA_INT) return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "range: integers were expected");
        bounds[i] = args->at[i].integer;
    }
    if (args->at[1].kind == JINJA_ABSENT) {
        bounds[1] = bounds[0];
        bounds[0] = 0;
    }
    int64_t from = bounds[0], to = bounds[1], by = bounds[2], distance;
    if (by == 0) return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "range: the step is 0");
    if (by > 0 ? from >= to : from <= to) return moe_jinja_list(JINJA_LIST, NULL, 0);
    bool fits = !(by > 0 ? __builtin_sub_overflow(to, from, &distance) : __builtin_sub_overflow(from, to, &distance));
    uint64_t stride = by > 0 ? (uint64_t)by : 0 - (uint64_t)by;
    uint64_t count = fits ? ((uint64_t)distance - 1) / stride + 1 : UINT64_MAX;
    if (count > MOE_JINJA_MAX_RANGE)
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "range: more than %d items", MOE_JINJA_MAX_RANGE);
    jinja_value *items = moe_jinja_charge(run, (size_t)count) ? moe_jinja_alloc(run, (size_t)count, sizeof *items) : NULL;
    for (uint64_t i = 0; items && i < count; i++) items[i] = jinja_int(from + (int64_t)i * by);
    return moe_jinja_list(JINJA_LIST, items, (size_t)count);
}

static jinja_value global_namespace(jinja_run *run, jinja_value self, const jinja_args *args) {
    (void)self;
    jinja_scope *attributes = moe_jinja_scope(run, NULL);
    if (!attributes) return jinja_undefined();
    if (args->count > 1 || (args->count == 1 && args->values[0].kind != JINJA_DICT))
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "namespace: a mapping or keyword arguments were expected");
    const jinja_dict *dict = args->count ? args->values[0].dict : NULL;
    for (size_t i = 0; dict && i < dict->count; i++)
        if (dict->pairs[i].key.kind == JINJA_STRING)
            moe_jinja_assign(run, attributes, dict->pairs[i].key.text, dict->pairs[i].value);
    for (size_t i = 0; i < args->named_count; i++) moe_jinja_assign(run, attributes, args->names[i], args->named[i]);
    return (jinja_value){.kind = JINJA_NAMESPACE, .attributes = attributes};
}

static void put_pair(jinja_dict *dict, jinja_run *run, jinja_value key, jinja_value value) {
    size_t at = 0;
    while (at < dict->count && !moe_jinja_equal(run, dict->pairs[at].key, key)) at++;
    dict->pairs[at] = (jinja_pair){key, value};
    if (at == dict->count) dict->count++;
}

static jinja_value global_dict(jinja_run *run, jinja_value self, const jinja_args *args) {
    (void)self;
    if (args->count > 1 || (args->count == 1 && args->values[0].kind != JINJA_DICT))
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "dict: a mapping or keyword arguments were expected");
    const jinja_dict *source = args->count ? args->values[0].dict : NULL;
    jinja_dict *dict = moe_jinja_alloc(run, 1, sizeof *dict);
    jinja_pair *pairs = moe_jinja_alloc(run, (source ? source->count : 0) + args->named_count, sizeof *pairs);
    if (!dict || !pairs) return jinja_undefined();
    dict->pairs = pairs;
    for (size_t i = 0; source && i < source->count && !run->failed; i++)
        put_pair(dict, run, source->pairs[i].key, source->pairs[i].value);
    for (size_t i = 0; i < args->named_count && !run->failed; i++)
        put_pair(dict, run, (jinja_value){.kind = JINJA_STRING, .text = args->names[i]}, args->named[i]);
    return (jinja_value){.kind = JINJA_DICT, .dict = dict};
}

const jinja_function *moe_jinja_find_global(jinja_text name) {
    static const jinja_function globals[] = {{"raise_exception", "message", 1, global_raise_exception, JINJA_ABSENT},
                                             {"strftime_now", "format", 1, global_strftime_now, JINJA_ABSENT},
                                             {"range", "start stop step", 1, global_range, JINJA_ABSENT},
                                             {"namespace", NULL, 0, global_namespace, JINJA_ABSENT},
                                             {"dict", NULL, 0, global_dict, JINJA_ABSENT}};
    for (size_t i = 0; i < sizeof globals / sizeof *globals; i++)
        if (moe_jinja_text_is(name, globals[i].name)) return &globals[i];
    return NULL;
}
