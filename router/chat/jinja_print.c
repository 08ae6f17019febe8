/* Values as text: Python's str and repr, and json.dumps as transformers' tojson calls it. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "common/alloc.h"
#include "router/chat/jinja_run.h"

static void put(jinja_run *run, moe_buf *out, const char *text) { moe_jinja_append(run, out, text, strlen(text)); }

/* The shortest digits that read back as the same number; with an exponent below 1e-4 and from 1e16 on. */
void moe_jinja_print_float(double number, char out[40]) {
    if (isnan(number) || isinf(number)) {
        snprintf(out, 40, "%s", isnan(number) ? "nan" : number > 0 ? "inf" : "-inf");
        return;
    }
    int precision = 0;
    do snprintf(out, 40, "%.*e", precision, number);
    while (strtod(out, NULL) != number && ++precision < 17);
    int exponent = (int)strtol(strchr(out, 'e') + 1, NULL, 10);
    if (exponent >= -4 && exponent < 16) {
        int decimals = precision - exponent;
        snprintf(out, 40, "%.*f", decimals > 0 ? decimals : 1, number);
    }
}

/* ---- str and repr ---- */

static bool printable(uint32_t c) {
    if (c < 0x7f) return c >= 0x20;
    switch (utf8proc_category((utf8proc_int32_t)c)) {
        case UTF8PROC_CATEGORY_CN:
        case UTF8PROC_CATEGORY_CC:
        case UTF8PROC_CATEGORY_CF:
        case UTF8PROC_CATEGORY_CS:
        case UTF8PROC_CATEGORY_CO:
        case UTF8PROC_CATEGORY_ZL:
        case UTF8PROC_CATEGORY_ZP:
        case UTF8PROC_CATEGORY_ZS:
            return false;
        default:
            return true;
    }
}

static void repr_character(uint32_t c, char quote, const char *bytes, size_t size, char out[16]) {
    if (c == '\n' || c == '\r' || c == '\t') {
        snprintf(out, 16, "\\%c", c == '\n' ? 'n' : c == '\r' ? 'r' : 't');
    } else if (c == '\\' || c == (unsigned char)quote) {
        snprintf(out, 16, "\\%c", (char)c);
    } else if (printable(c)) {
        snprintf(out, 16, "%.*s", (int)size, bytes);
    } else {
        snprintf(out, 16, c < 0x100 ? "\\x%02x" : c < 0x10000 ? "\\u%04x" : "\\U%08x", c);
    }
}

static void repr_string(jinja_run *run, jinja_text text, moe_buf *out) {
    bool single = text.size && memchr(text.data, '\'', text.size), twice = text.size && memchr(text.data, '"', text.size);
    const char quote[2] = {single && !twice ? '"' : '\'', '\0'};
    put(run, out, quote);
    for (size_t at = 0; at < text.size && !run->failed;) {
        char piece[16];
        size_t start = at;
        uint32_t c = moe_jinja_utf8_next(text.data, text.size, &at);
        if (c == 0)
            snprintf(piece, sizeof piece, "\\x00");
        else
            repr_character(c, *quote, text.data + start, at - start, piece);
        put(run, out, piece);
    }
    put(run, out, quote);
}

static void repr_list(jinja_run *run, jinja_value value, moe_buf *out) {
    bool tuple = value.kind == JINJA_TUPLE;
    put(run, out, tuple ? "(" : "[");
    for (size_t i = 0; i < value.list.count && !run->failed; i++) {
        if (i) put(run, out, ", ");
        moe_jinja_repr(run, value.list.items[i], out);
    }
    put(run, out, tuple ? value.list.count == 1 ? ",)" : ")" : "]");
}

static void repr_dict(jinja_run *run, const jinja_dict *dict, moe_buf *out) {
    put(run, out, "{");
    for (size_t i = 0; i < dict->count && !run->failed; i++) {
        if (i) put(run, out, ", ");
        moe_jinja_repr(run, dict->pairs[i].key, out);
        put(run, out, ": ");
        moe_jinja_repr(run, dict->pairs[i].value, out);
    }
    put(run, out, "}");
}

static void repr_scalar(jinja_run *run, jinja_value value, moe_buf *out) {
    char number[40];
    if (value.kind == JINJA_INT) {
        snprintf(number, sizeof number, "%lld", (long long)value.integer);
    } else {
        moe_jinja_print_float(value.number, number);
    }
    put(run, out, number);
}

void moe_jinja_repr(jinja_run *run, jinja_value value, moe_buf *out) {
    if (!moe_jinja_charge(run, 1)) return;
    if (run->depth >= MOE_JINJA_MAX_DEPTH) {
        moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "a value is nested too deep to print");
        return;
    }
    run->depth++;
    switch (value.kind) {
        case JINJA_UNDEFINED:
            put(run, out, "Undefined");
            break;
        case JINJA_NONE:
            put(run, out, "None");
            break;
        case JINJA_BOOL:
            put(run, out, value.boolean ? "True" : "False");
            break;
        case JINJA_INT:
        case JINJA_FLOAT:
            repr_scalar(run, value, out);
            break;
        case JINJA_STRING:
            repr_string(run, value.text, out);
            break;
        case JINJA_LIST:
        case JINJA_TUPLE:
            repr_list(run, value, out);
            break;
        case JINJA_DICT:
            repr_dict(run, value.dict, out);
            break;
        default:
            moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "a %s cannot be printed", moe_jinja_kind_name(value.kind));
    }
    run->depth--;
}

void moe_jinja_print(jinja_run *run, jinja_value value, moe_buf *out) {
    if (value.kind == JINJA_STRING)
        moe_jinja_append(run, out, value.text.data, value.text.size);
    else if (value.kind != JINJA_UNDEFINED)
        moe_jinja_repr(run, value, out);
}

jinja_text moe_jinja_str(jinja_run *run, jinja_value value) {
    moe_buf text = {0};
    if (value.kind == JINJA_STRING) return value.text;
    moe_jinja_print(run, value, &text);
    jinja_value string = moe_jinja_take(run, &text);
    return string.kind == JINJA_STRING ? string.text : (jinja_text){"", 0};
}

/* ---- JSON ---- */

static void json_unicode_escape(uint32_t c, char out[16]) {
    if (c < 0x10000)
        snprintf(out, 16, "\\u%04x", c);
    else
        snprintf(out, 16, "\\u%04x\\u%04x", 0xd800 + ((c - 0x10000) >> 10), 0xdc00 + ((c - 0x10000) & 0x3ff));
}

static void json_string_text(jinja_run *run, jinja_text text, bool ascii, moe_buf *out) {
    static const char from[] = "\"\\\n\r\t\f\b", to[] = "\"\\nrtfb";
    put(run, out, "\"");
    for (size_t at = 0; at < text.size && !run->failed;) {
        char piece[16];
        size_t start = at;
        uint32_t c = moe_jinja_utf8_next(text.data, text.size, &at);
        const char *escaped = c && c < 0x80 ? strchr(from, (int)c) : NULL;
        if (escaped) {
            snprintf(piece, sizeof piece, "\\%c", to[escaped - from]);
        } else if (c < 0x20 || (ascii && c > 0x7e)) {
            json_unicode_escape(c, piece);
        } else {
            snprintf(piece, sizeof piece, "%.*s", (int)(at - start), text.data + start);
        }
        put(run, out, piece);
    }
    put(run, out, "\"");
}

static void json_scalar(jinja_run *run, jinja_value value, moe_buf *out) {
    if (value.kind == JINJA_NONE)
        put(run, out, "null");
    else if (value.kind == JINJA_BOOL)
        put(run, out, value.boolean ? "true" : "false");
    else if (value.kind == JINJA_FLOAT && isnan(value.number))
        put(run, out, "NaN");
    else if (value.kind == JINJA_FLOAT && isinf(value.number))
        put(run, out, value.number > 0 ? "Infinity" : "-Infinity");
    else if (value.kind == JINJA_INT || value.kind == JINJA_FLOAT)
        repr_scalar(run, value, out);
    else
        moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "%s cannot be written as JSON", moe_jinja_kind_name(value.kind));
}

static void json_newline(jinja_run *run, const jinja_json_style *style, int level, moe_buf *out) {
    if (!style->indent) return;
    put(run, out, "\n");
    for (int i = 0; i < level && !run->failed; i++) moe_jinja_append(run, out, style->indent->data, style->indent->size);
}

static int by_key(const void *left, const void *right) {
    const jinja_pair *a = left, *b = right;
    if (a->key.kind != JINJA_STRING || b->key.kind != JINJA_STRING) return 0;
    size_t common = a->key.text.size < b->key.text.size ? a->key.text.size : b->key.text.size;
    int order = common ? memcmp(a->key.text.data, b->key.text.data, common) : 0;
    return order ? order : (a->key.text.size > b->key.text.size) - (a->key.text.size < b->key.text.size);
}

static void json_key(jinja_run *run, jinja_value key, bool ascii, moe_buf *out) {
    moe_buf text = {0};
    if (key.kind == JINJA_STRING) {
        json_string_text(run, key.text, ascii, out);
        return;
    }
    json_scalar(run, key, &text);
    json_string_text(run, (jinja_text){moe_buf_text(&text), text.size}, ascii, out);
    moe_buf_free(&text);
}

static void json_dict(jinja_run *run, const jinja_dict *dict, const jinja_json_style *style, int level, moe_buf *out) {
    const jinja_pair *pairs = dict->pairs;
    if (style->sort_keys) {
        jinja_pair *sorted = moe_jinja_alloc(run, dict->count, sizeof *sorted);
        if (!sorted) return;
        if (dict->count) memcpy(sorted, pairs, dict->count * sizeof *sorted);
        qsort(sorted, dict->count, sizeof *sorted, by_key);
        pairs = sorted;
    }
    put(run, out, "{");
    for (size_t i = 0; i < dict->count && !run->failed; i++) {
        if (i) moe_jinja_append(run, out, style->item_separator.data, style->item_separator.size);
        json_newline(run, style, level + 1, out);
        json_key(run, pairs[i].key, style->ensure_ascii, out);
        moe_jinja_append(run, out, style->key_separator.data, style->key_separator.size);
        moe_jinja_dump_json(run, pairs[i].value, style, level + 1, out);
    }
    if (dict->count) json_newline(run, style, level, out);
    put(run, out, "}");
}

static void json_list(jinja_run *run, jinja_list list, const jinja_json_style *style, int level, moe_buf *out) {
    put(run, out, "[");
    for (size_t i = 0; i < list.count && !run->failed; i++) {
        if (i) moe_jinja_append(run, out, style->item_separator.data, style->item_separator.size);
        json_newline(run, style, level + 1, out);
        moe_jinja_dump_json(run, list.items[i], style, level + 1, out);
    }
    if (list.count) json_newline(run, style, level, out);
    put(run, out, "]");
}

void moe_jinja_dump_json(jinja_run *run, jinja_value value, const jinja_json_style *style, int level, moe_buf *out) {
    if (!moe_jinja_charge(run, 1)) return;
    if (level >= MOE_JINJA_MAX_DEPTH) {
        moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "a value is nested too deep for JSON");
    } else if (value.kind == JINJA_STRING) {
        json_string_text(run, value.text, style->ensure_ascii, out);
    } else if (value.kind == JINJA_LIST || value.kind == JINJA_TUPLE) {
        json_list(run, value.list, style, level, out);
    } else if (value.kind == JINJA_DICT) {
        json_dict(run, value.dict, style, level, out);
    } else {
        json_scalar(run, value, out);
    }
}
