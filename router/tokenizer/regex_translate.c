/* Oniguruma's Ruby syntax to PCRE2's: only what means the same in both, or can be spelled so, passes. */
#include <ctype.h>
#include <string.h>

#include "router/tokenizer/regex.h"

/* Unicode's White_Space; PCRE2's own \s adds U+180E. */
#define WHITE_SPACE "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
/* PCRE2's own \w lacks marks and connector punctuation. */
#define WORD "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}"

typedef struct translation {
    const char *at, *end;
    const char *whole; /* the pattern, for messages */
    size_t whole_size;
    moe_buf *out;
    bool in_class;
    bool after_set; /* inside a class, the item before was a set (\s, \p{L}), with which '-' makes no range */
    moe_error *err;
} translation;

static moe_status refuse(const translation *t, const char *construct) {
    int shown = t->whole_size > 200 ? 200 : (int)t->whole_size;
    return moe_fail(t->err, MOE_UNIMPLEMENTED, "pattern '%.*s': %s at byte %zu is not supported", shown, t->whole, construct,
                    (size_t)(t->at - t->whole));
}

static bool next_is(const translation *t, const char *text) {
    size_t size = strlen(text);
    return (size_t)(t->end - t->at) >= size && memcmp(t->at, text, size) == 0;
}

static void copy(translation *t, size_t size) {
    moe_buf_append(t->out, t->at, size);
    t->at += size;
}

/* A set of characters: bare inside a class, in brackets of its own outside. */
static moe_status emit_set(translation *t, const char *set, bool negated) {
    t->after_set = true;
    moe_buf_printf(t->out, t->in_class ? "%s%s" : "[%s%s]", negated ? "^" : "", set);
    t->at++;
    return MOE_OK;
}

static bool is_general_category(const char *name, size_t size) {
    static const char *const minors[] = {"Ccfnos", "Lulmot", "Mcen", "Ndlo", "Pcdefios", "Sckmo", "Zlps"};
    if (size == 0 || size > 2) return false;
    for (size_t i = 0; i < sizeof minors / sizeof *minors; i++)
        if (name[0] == minors[i][0]) return size == 1 || strchr(minors[i] + 1, name[1]) != NULL;
    return false;
}

/* \p{Name}: general categories and these binary properties have the same name in both; any other name is a script, which PCRE2
 * would take for Script_Extensions unless told otherwise. */
static moe_status translate_property(translation *t) {
    static const char *const binary[] = {"Alphabetic", "White_Space", "Uppercase", "Lowercase", "Ideographic", "Emoji"};
    const char letter = *t->at++;
    if (t->at == t->end || *t->at != '{') return refuse(t, "a property without braces");
    const char *name = t->at + 1;
    const char *close = memchr(name, '}', (size_t)(t->end - name));
    if (!close) return refuse(t, "a property without its closing brace");
    bool negated = close > name && *name == '^';
    name += negated;
    int size = (int)(close - name);
    for (int i = 0; i < size; i++)
        if (!isalnum((unsigned char)name[i]) && name[i] != '_') return refuse(t, "this spelling of a property");
    bool same = is_general_category(name, (size_t)size);
    for (size_t i = 0; i < sizeof binary / sizeof *binary && !same; i++)
        same = strlen(binary[i]) == (size_t)size && memcmp(binary[i], name, (size_t)size) == 0;
    moe_buf_printf(t->out, "\\%c{%s%s%.*s}", letter, negated ? "^" : "", same ? "" : "sc:", size, name);
    t->at = close + 1;
    t->after_set = true;
    return MOE_OK;
}

static int hex_digits(const translation *t, const char *at, int most) {
    int count = 0;
    while (count < most && at + count < t->end && isxdigit((unsigned char)at[count])) count++;
    return count;
}

/* \xHH, \x{H…}, \uHHHH: a code point. */
static moe_status translate_code_point(translation *t) {
    bool braces = t->at[0] == 'x' && t->at + 1 < t->end && t->at[1] == '{';
    const char *digits = t->at + (braces ? 2 : 1);
    int count = hex_digits(t, digits, braces ? 8 : t->at[0] == 'u' ? 4 : 2);
    const char *after = digits + count;
    bool whole = braces            ? count > 0 && after < t->end && *after == '}'
                 : t->at[0] == 'u' ? count == 4
                                   : count == 2 && *digits < '8';
    if (!whole) return refuse(t, "this escape (a code point is \\x{H…} or \\uHHHH)");
    moe_buf_printf(t->out, "\\x{%.*s}", count, digits);
    t->at = after + braces;
    t->after_set = false;
    return MOE_OK;
}

static moe_status translate_escape(translation *t) {
    t->at++;
    if (t->at == t->end) return refuse(t, "a backslash at the end");
    char c = *t->at;
    if (c == 's') return emit_set(t, WHITE_SPACE, false);
    if (c == 'S') return t->in_class ? emit_set(t, "\\S\\x{180e}", false) : emit_set(t, WHITE_SPACE, true);
    if (c == 'w') return emit_set(t, WORD, false);
    if (c == 'W' && !t->in_class) return emit_set(t, WORD, true);
    if (c == 'd') return emit_set(t, "\\p{Nd}", false);
    if (c == 'D') return emit_set(t, "\\P{Nd}", false);
    if (c == 'p' || c == 'P') return translate_property(t);
    if (c == 'x' || c == 'u') return translate_code_point(t);
    if (!strchr("rntf", c) && !ispunct((unsigned char)c)) {
        char name[] = {'\\', c, '\0'};
        return refuse(t, name);
    }
    moe_buf_append(t->out, "\\", 1);
    copy(t, 1);
    t->after_set = false;
    return MOE_OK;
}

static moe_status translate_in_class(translation *t) {
    if (*t->at == '\\') return translate_escape(t);
    if (*t->at == '[') return refuse(t, "a class inside a class");
    if (next_is(t, "&&")) return refuse(t, "the class intersection &&");
    if (*t->at == ']') t->in_class = false;
    if (*t->at == '-' && t->after_set) moe_buf_append(t->out, "\\", 1);
    t->after_set = false;
    copy(t, 1);
    return MOE_OK;
}

static moe_status open_class(translation *t) {
    copy(t, next_is(t, "[^") ? 2 : 1);
    t->in_class = true;
    t->after_set = false;
    return t->at < t->end && *t->at == ']' ? refuse(t, "a ']' first in a class") : MOE_OK;
}

static moe_status open_group(translation *t) {
    static const char *const same[] = {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:", "(?-i:"};
    if (next_is(t, "(?i)") && t->at == t->whole) return copy(t, 4), MOE_OK;
    if (next_is(t, "(*")) return refuse(t, "'(*'");
    if (!next_is(t, "(?")) return copy(t, 1), MOE_OK;
    for (size_t i = 0; i < sizeof same / sizeof *same; i++)
        if (next_is(t, same[i])) return copy(t, strlen(same[i])), MOE_OK;
    return refuse(t, "this kind of group");
}

/* {n}, {n,} and {n,m} are the same in both, unless '+' (possessive in PCRE2 only) or, after {n}, '?' (optional in Oniguruma only)
 * follows. */
static moe_status translate_interval(translation *t) {
    const char *p = t->at + 1;
    const char *digits = p;
    while (p < t->end && isdigit((unsigned char)*p)) p++;
    if (p == digits) return refuse(t, "a '{' that begins no {n}, {n,} or {n,m}");
    bool fixed = p < t->end && *p == '}';
    if (!fixed && p < t->end && *p == ',') p++;
    while (!fixed && p < t->end && isdigit((unsigned char)*p)) p++;
    if (p >= t->end || *p != '}') return refuse(t, "a '{' that begins no {n}, {n,} or {n,m}");
    copy(t, (size_t)(p + 1 - t->at));
    if (t->at < t->end && (*t->at == '+' || (fixed && *t->at == '?'))) return refuse(t, "'+' or '?' after an interval");
    return MOE_OK;
}

static moe_status translate_outside(translation *t) {
    switch (*t->at) {
        case '\\':
            return translate_escape(t);
        case '[':
            return open_class(t);
        case '(':
            return open_group(t);
        case '{':
            return translate_interval(t);
        case '^':
        case '$':
            return refuse(t, "an anchor");
        case '\0':
            return refuse(t, "a NUL");
        default:
            return copy(t, 1), MOE_OK;
    }
}

moe_status moe_regex_translate(const char *pattern, size_t size, moe_buf *out, moe_error *err) {
    translation t = {.at = pattern, .end = pattern + size, .whole = pattern, .whole_size = size, .out = out, .err = err};
    while (t.at < t.end) {
        moe_status status = t.in_class ? translate_in_class(&t) : translate_outside(&t);
        if (status != MOE_OK) return status;
    }
    return MOE_OK;
}
