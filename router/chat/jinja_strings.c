#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "router/chat/jinja_run.h"

static bool is_cased(uint32_t c) {
    utf8proc_category_t category = utf8proc_category((utf8proc_int32_t)c);
    return category == UTF8PROC_CATEGORY_LU || category == UTF8PROC_CATEGORY_LL || category == UTF8PROC_CATEGORY_LT;
}

jinja_value moe_jinja_to_case(jinja_run *run, jinja_text text, jinja_case to) {
    moe_buf out = {0};
    bool start = true;
    moe_jinja_charge(run, text.size / 16);
    for (size_t at = 0; at < text.size && !run->failed;) {
        char bytes[4];
        utf8proc_int32_t c = (utf8proc_int32_t)moe_jinja_utf8_next(text.data, text.size, &at);
        bool upper = to == JINJA_UPPER || (start && to == JINJA_CAPITALIZE), title = start && to == JINJA_TITLE;
        bool cased = is_cased((uint32_t)c);
        c = upper ? utf8proc_toupper(c) : title ? utf8proc_totitle(c) : utf8proc_tolower(c);
        start = to == JINJA_TITLE && !cased;
        moe_buf_append(&out, bytes, moe_jinja_utf8_put(bytes, (uint32_t)c));
    }
    return moe_jinja_take(run, &out);
}

/* With an empty `from`, `to` goes before each character and at the end, as in Python. */
static void replace_empty(jinja_run *run, jinja_text text, jinja_text to, int64_t count, moe_buf *out) {
    for (size_t at = 0; !run->failed;) {
        size_t start = at;
        if (count != 0) moe_jinja_append(run, out, to.data, to.size);
        if (count > 0) count--;
        if (at >= text.size) break;
        moe_jinja_utf8_next(text.data, text.size, &at);
        moe_jinja_append(run, out, text.data + start, at - start);
        moe_jinja_charge(run, 1);
    }
}

jinja_value moe_jinja_replace(jinja_run *run, jinja_text text, jinja_text from, jinja_text to, int64_t count) {
    moe_buf out = {0};
    size_t at = 0;
    if (from.size == 0) {
        replace_empty(run, text, to, count, &out);
        return moe_jinja_take(run, &out);
    }
    moe_jinja_charge(run, text.size / 64);
    for (; count != 0 && !run->failed; count -= count > 0) {
        size_t found = moe_jinja_find(text, from, at);
        if (found == SIZE_MAX) break;
        moe_jinja_append(run, &out, text.data + at, found - at);
        moe_jinja_append(run, &out, to.data, to.size);
        at = found + from.size;
    }
    moe_jinja_append(run, &out, text.data + at, text.size - at);
    return moe_jinja_take(run, &out);
}

/* Copies a number's text without the single underscores between digits; false when it cannot be one. */
static bool number_text(jinja_text text, char *out, size_t capacity) {
    text = moe_jinja_strip(text, NULL, true, true);
    size_t used = 0;
    for (size_t i = 0; i < text.size; i++) {
        char c = text.data[i];
        if (c == '_') {
            bool between = i > 0 && i + 1 < text.size && isalnum((unsigned char)text.data[i - 1]) &&
                           isalnum((unsigned char)text.data[i + 1]);
            if (!between) return false;
            continue;
        }
        if (used + 1 >= capacity || c == '\0') return false;
        out[used++] = c;
    }
    out[used] = '\0';
    return used > 0;
}

bool moe_jinja_parse_int(jinja_text text, int base, int64_t *out) {
    char digits[80], *end;
    if (!number_text(text, digits, sizeof digits) || isspace((unsigned char)*digits)) return false;
    errno = 0;
    *out = strtoll(digits, &end, base);
    return *end == '\0' && end != digits && errno == 0;
}

bool moe_jinja_parse_float(jinja_text text, double *out) {
    char digits[400], *end;
    if (!number_text(text, digits, sizeof digits) || strchr(digits, 'x') || strchr(digits, 'X')) return false;
    *out = strtod(digits, &end);
    return *end == '\0' && end != digits;
}
