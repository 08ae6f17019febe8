/* Filters on single values; those on sequences are in jinja_sequence_filters.c. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "router/chat/jinja_run.h"

#define MAX_INDENT_SPACES 64
#define FILTER(name) static jinja_value filter_##name(jinja_run *run, jinja_value self, const jinja_args *args)

static bool given(jinja_value value) { return value.kind != JINJA_ABSENT; }

static jinja_text text_or(jinja_run *run, jinja_value value, const char *absent) {
    return given(value) ? moe_jinja_str(run, value) : (jinja_text){absent, strlen(absent)};
}

static bool refuse_undefined(jinja_run *run, jinja_value value) {
    if (value.kind != JINJA_UNDEFINED) return false;
    moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "'%.*s' is undefined", (int)value.text.size, value.text.data);
    return true;
}

/* ---- text ---- */

FILTER(trim) {
    jinja_text text = moe_jinja_str(run, self), chars;
    if (!given(args->at[0]) || args->at[0].kind == JINJA_NONE) {
        text = moe_jinja_strip(text, NULL, true, true);
    } else {
        chars = moe_jinja_str(run, args->at[0]);
        if (moe_jinja_charge(run, chars.size / 64 * text.size)) text = moe_jinja_strip(text, &chars, true, true);
    }
    return jinja_string(text.data, text.size);
}

FILTER(upper) {
    (void)args;
    return moe_jinja_to_case(run, moe_jinja_str(run, self), JINJA_UPPER);
}

FILTER(lower) {
    (void)args;
    return moe_jinja_to_case(run, moe_jinja_str(run, self), JINJA_LOWER);
}

FILTER(capitalize) {
    (void)args;
    return moe_jinja_to_case(run, moe_jinja_str(run, self), JINJA_CAPITALIZE);
}

/* jinja2's own title: a word starts after white space, '-', '(', '{', '[' or '<'. */
FILTER(title) {
    (void)args;
    jinja_text text = moe_jinja_str(run, self);
    moe_buf out = {0};
    for (size_t at = 0; at < text.size && !run->failed;) {
        size_t end = at, next = at;
        bool separator = false;
        while (end < text.size && !separator) {
            uint32_t c = moe_jinja_utf8_next(text.data, text.size, &next);
            separator = moe_jinja_is_space(c) || (c < 0x80 && c && strchr("-({[<", (int)c));
            end = next;
        }
        jinja_text word = moe_jinja_str(run, moe_jinja_to_case(run, (jinja_text){text.data + at, end - at}, JINJA_CAPITALIZE));
        moe_jinja_append(run, &out, word.data, word.size);
        at = end;
    }
    return moe_jinja_take(run, &out);
}

FILTER(string) {
    (void)args;
    jinja_text text = moe_jinja_str(run, self);
    return jinja_string(text.data, text.size);
}

FILTER(safe) { return filter_string(run, self, args); }

FILTER(escape) {
    (void)args;
    static const char *const names[][2] = {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"'", "&#39;"}, {"\"", "&#34;"}};
    jinja_text text = moe_jinja_str(run, self);
    moe_buf out = {0};
    for (size_t at = 0; at < text.size && !run->failed; at++) {
        size_t i = 0;
        while (i < 5 && text.data[at] != *names[i][0]) i++;
        moe_jinja_append(run, &out, i < 5 ? names[i][1] : text.data + at, i < 5 ? strlen(names[i][1]) : 1);
    }
    return moe_jinja_take(run, &out);
}

FILTER(replace) {
    int64_t count = args->at[2].kind == JINJA_INT ? args->at[2].integer : -1;
    jinja_text from = moe_jinja_str(run, args->at[0]), to = moe_jinja_str(run, args->at[1]);
    return moe_jinja_replace(run, moe_jinja_str(run, self), from, to, count);
}

/* By a number of spaces or a text; the first line and empty lines only on request. */
FILTER(indent) {
    char spaces[MAX_INDENT_SPACES];
    memset(spaces, ' ', sizeof spaces);
    jinja_text text = moe_jinja_str(run, self), indent = {spaces, 4};
    if (args->at[0].kind == JINJA_STRING) indent = args->at[0].text;
    if (args->at[0].kind == JINJA_INT) {
        if (args->at[0].integer > MAX_INDENT_SPACES)
            return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "indent: more than %d spaces", MAX_INDENT_SPACES);
        indent.size = args->at[0].integer < 0 ? 0 : (size_t)args->at[0].integer;
    }
    bool first = moe_jinja_truth(args->at[1]), blank = moe_jinja_truth(args->at[2]);
    moe_buf out = {0};
    if (first) moe_jinja_append(run, &out, indent.data, indent.size);
    for (size_t at = 0, next; at < text.size && !run->failed; at = next) {
        size_t end = moe_jinja_line_end(text, at, &next);
        if (at > 0) moe_jinja_append(run, &out, "\n", 1);
        if (at > 0 && (blank || end > at)) moe_jinja_append(run, &out, indent.data, indent.size);
        moe_jinja_append(run, &out, text.data + at, end - at);
        if (next == text.size && end < next) { /* jinja2 appends a newline first, so a trailing one makes an empty last line */
            moe_jinja_append(run, &out, "\n", 1);
            if (blank) moe_jinja_append(run, &out, indent.data, indent.size);
        }
    }
    return moe_jinja_take(run, &out);
}

/* ---- numbers ---- */

FILTER(int) {
    int64_t base = args->at[1].kind == JINJA_INT ? args->at[1].integer : 10, integer;
    jinja_value fallback = given(args->at[0]) ? args->at[0] : jinja_int(0);
    double number = 0;
    if (refuse_undefined(run, self)) return jinja_undefined();
    if (self.kind == JINJA_INT) return self;
    if (self.kind == JINJA_BOOL) return jinja_int(self.boolean);
    if (self.kind == JINJA_STRING) {
        if (base != 0 && (base < 2 || base > 36)) return fallback;
        if (moe_jinja_parse_int(self.text, (int)base, &integer)) return jinja_int(integer);
        if (!moe_jinja_parse_float(self.text, &number)) return fallback;
    } else if (self.kind == JINJA_FLOAT) {
        number = self.number;
    } else {
        return fallback;
    }
    return number > -9.2e18 && number < 9.2e18 ? jinja_int((int64_t)number) : fallback;
}

FILTER(float) {
    double number;
    if (refuse_undefined(run, self)) return jinja_undefined();
    if (moe_jinja_is_number(self)) return jinja_float(moe_jinja_number(self));
    if (self.kind == JINJA_STRING && moe_jinja_parse_float(self.text, &number)) return jinja_float(number);
    return given(args->at[0]) ? args->at[0] : jinja_float(0);
}

FILTER(abs) {
    (void)args;
    if (self.kind == JINJA_FLOAT) return jinja_float(fabs(self.number));
    return moe_jinja_is_number(self) && moe_jinja_number(self) >= 0 ? moe_jinja_unary(run, '+', self)
                                                                    : moe_jinja_unary(run, '-', self);
}

FILTER(round) {
    int64_t precision = args->at[0].kind == JINJA_INT ? args->at[0].integer : 0;
    jinja_text method = text_or(run, args->at[1], "common");
    char text[400];
    if (!moe_jinja_is_number(self) || precision < 0 || precision > 15)
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "round: a number and a precision of 0 to 15 were expected");
    double number = moe_jinja_number(self), scale = pow(10, (double)precision);
    if (moe_jinja_text_is(method, "ceil")) return jinja_float(ceil(number * scale) / scale);
    if (moe_jinja_text_is(method, "floor")) return jinja_float(floor(number * scale) / scale);
    if (!moe_jinja_text_is(method, "common")) return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "round: unknown method");
    if (self.kind != JINJA_FLOAT) return moe_jinja_unary(run, '+', self);
    snprintf(text, sizeof text, "%.*f", (int)precision, number); /* rounds the exact value, halves to even, as Python does */
    return jinja_float(strtod(text, NULL));
}

/* ---- any value ---- */

FILTER(default) {
    (void)run;
    bool falsy = moe_jinja_truth(args->at[1]) && !moe_jinja_truth(self);
    if (self.kind != JINJA_UNDEFINED && !falsy) return self;
    return given(args->at[0]) ? args->at[0] : jinja_string("", 0);
}

FILTER(tojson) {
    char spaces[MAX_INDENT_SPACES];
    jinja_text indent = {spaces, 0};
    jinja_json_style style = {.item_separator = {", ", 2}, .key_separator = {": ", 2}};
    memset(spaces, ' ', sizeof spaces);
    style.ensure_ascii = moe_jinja_truth(args->at[0]);
    style.sort_keys = moe_jinja_truth(args->at[3]);
    if (args->at[1].kind == JINJA_INT) {
        if (args->at[1].integer > MAX_INDENT_SPACES)
            return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "tojson: an indent of more than %d", MAX_INDENT_SPACES);
        indent.size = args->at[1].integer < 0 ? 0 : (size_t)args->at[1].integer;
        style.indent = &indent;
    } else if (args->at[1].kind == JINJA_STRING) {
        style.indent = &args->at[1].text;
    }
    if (style.indent) style.item_separator.size = 1;
    jinja_value separators = args->at[2];
    if ((separators.kind == JINJA_TUPLE || separators.kind == JINJA_LIST) && separators.list.count == 2) {
        style.item_separator = moe_jinja_str(run, separators.list.items[0]);
        style.key_separator = moe_jinja_str(run, separators.list.items[1]);
    }
    moe_buf out = {0};
    moe_jinja_dump_json(run, self, &style, 0, &out);
    return moe_jinja_take(run, &out);
}

const jinja_function *moe_jinja_find_filter(jinja_text name) {
    static const jinja_function filters[] = {
        {"trim", "chars", 0, filter_trim, JINJA_ABSENT},
        {"upper", "", 0, filter_upper, JINJA_ABSENT},
        {"lower", "", 0, filter_lower, JINJA_ABSENT},
        {"capitalize", "", 0, filter_capitalize, JINJA_ABSENT},
        {"title", "", 0, filter_title, JINJA_ABSENT},
        {"string", "", 0, filter_string, JINJA_ABSENT},
        {"safe", "", 0, filter_safe, JINJA_ABSENT},
        {"escape", "", 0, filter_escape, JINJA_ABSENT},
        {"e", "", 0, filter_escape, JINJA_ABSENT},
        {"replace", "old new count", 2, filter_replace, JINJA_ABSENT},
        {"indent", "width first blank", 0, filter_indent, JINJA_ABSENT},
        {"int", "default base", 0, filter_int, JINJA_ABSENT},
        {"float", "default", 0, filter_float, JINJA_ABSENT},
        {"abs", "", 0, filter_abs, JINJA_ABSENT},
        {"round", "precision method", 0, filter_round, JINJA_ABSENT},
        {"default", "default_value boolean", 0, filter_default, JINJA_ABSENT},
        {"d", "default_value boolean", 0, filter_default, JINJA_ABSENT},
        {"tojson", "ensure_ascii indent separators sort_keys", 0, filter_tojson, JINJA_ABSENT},
    };
    for (size_t i = 0; i < sizeof filters / sizeof *filters; i++)
        if (moe_jinja_text_is(name, filters[i].name)) return &filters[i];
    return moe_jinja_find_sequence_filter(name);
}
