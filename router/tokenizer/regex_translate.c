/* Oniguruma's Ruby syntax to PCRE2's: only what means the same in both, or can be spelled so, passes. */
#include <ctype.h>
#include <string.h>

#include "router/tokenizer/regex.h"
#include "router/tokenizer/regex_sets.h"

#define MAX_CLASS_DEPTH 16 /* classes inside classes */

typedef enum class_item { ITEM_NONE, ITEM_CHARACTER, ITEM_RANGE_OPEN, ITEM_RANGE, ITEM_SET } class_item;

/* One operand of && (or the whole of a class without it): a union. */
typedef struct class_operand {
    moe_buf simple; /* what PCRE2 takes between brackets */
    moe_buf others; /* "|x" for each member that it does not: negated sets, classes inside */
    class_item last;
} class_operand;

typedef struct translation {
    const char *at, *end;
    const char *whole; /* the pattern, for messages */
    size_t whole_size;
    moe_buf *out;
    class_operand *operand; /* inside a class; else NULL */
    int depth;              /* of classes inside classes */
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

/* A set of characters: in brackets of its own outside of a class, and where it is negated inside of one. Takes the buffer. */
static moe_status emit_set(translation *t, moe_buf *set, bool negated) {
    class_operand *operand = t->operand;
    if (!operand) {
        moe_buf_printf(t->out, "[%s%s]", negated ? "^" : "", moe_buf_text(set));
    } else if (negated) {
        moe_buf_printf(&operand->others, "|[^%s]", moe_buf_text(set));
    } else {
        moe_buf_append(&operand->simple, moe_buf_text(set), set->size);
    }
    t->out->failed |= set->failed;
    moe_buf_free(set);
    if (!operand) return MOE_OK;
    if (operand->last == ITEM_RANGE_OPEN) return refuse(t, "a range that ends in a set");
    operand->last = ITEM_SET;
    return MOE_OK;
}

static moe_status translate_property(translation *t) {
    bool negated = *t->at++ == 'P', complement;
    if (t->at == t->end || *t->at != '{') return refuse(t, "a property without braces");
    const char *name = t->at + 1;
    const char *close = memchr(name, '}', (size_t)(t->end - name));
    if (!close) return refuse(t, "a property without its closing brace");
    if (*name == '^') {
        negated = !negated;
        name++;
    }
    for (const char *c = name; c < close; c++)
        if (!isalnum((unsigned char)*c) && *c != '_') return refuse(t, "this spelling of a property");
    if (name == close) return refuse(t, "a property without a name");
    moe_buf set = {0};
    moe_regex_property(name, (size_t)(close - name), &set, &complement);
    t->at = close + 1;
    return emit_set(t, &set, negated != complement);
}

static moe_status translate_set(translation *t, void (*append)(moe_buf *out)) {
    moe_buf set = {0};
    bool negated = isupper((unsigned char)*t->at++);
    append(&set);
    return emit_set(t, &set, negated);
}

/* After a character of a class was written. */
static void character_done(translation *t) {
    if (t->operand) t->operand->last = t->operand->last == ITEM_RANGE_OPEN ? ITEM_RANGE : ITEM_CHARACTER;
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
    moe_buf_printf(t->operand ? &t->operand->simple : t->out, "\\x{%.*s}", count, digits);
    t->at = after + braces;
    character_done(t);
    return MOE_OK;
}

static moe_status translate_escape(translation *t) {
    t->at++;
    if (t->at == t->end) return refuse(t, "a backslash at the end");
    char c = *t->at;
    if (c == 's' || c == 'S') return translate_set(t, moe_regex_white_space);
    if (c == 'w' || c == 'W') return translate_set(t, moe_regex_word);
    if (c == 'd' || c == 'D') return translate_set(t, moe_regex_digit);
    if (c == 'p' || c == 'P') return translate_property(t);
    if (c == 'x' || c == 'u') return translate_code_point(t);
    if (!strchr("rntf", c) && !ispunct((unsigned char)c)) {
        char name[] = {'\\', c, '\0'};
        return refuse(t, name);
    }
    moe_buf_printf(t->operand ? &t->operand->simple : t->out, "\\%c", c);
    t->at++;
    character_done(t);
    return MOE_OK;
}

/* ---- classes ---- */

/* '-' is a range's only between two characters. */
static void translate_dash(translation *t) {
    class_operand *operand = t->operand;
    bool range = operand->last == ITEM_CHARACTER && t->at + 1 < t->end && t->at[1] != ']';
    moe_buf_append_text(&operand->simple, range ? "-" : "\\-");
    t->at++;
    if (range)
        operand->last = ITEM_RANGE_OPEN;
    else if (operand->last != ITEM_SET)
        character_done(t);
}

static moe_status translate_class(translation *t);

static moe_status translate_inner_class(translation *t) {
    class_operand *operand = t->operand;
    if (next_is(t, "[:")) return refuse(t, "a POSIX bracket");
    if (operand->last != ITEM_NONE && operand->simple.size && moe_buf_text(&operand->simple)[operand->simple.size - 1] == '-')
        return refuse(t, "'-' before a class inside a class");
    moe_buf *outside = t->out;
    t->out = &operand->others;
    moe_buf_append_text(t->out, "|");
    moe_status status = translate_class(t);
    t->out = outside;
    t->operand = operand;
    operand->last = ITEM_SET;
    return status;
}

static moe_status translate_in_class(translation *t) {
    if (*t->at == '\\') return translate_escape(t);
    if (*t->at == '[') return translate_inner_class(t);
    if (*t->at == '-') return translate_dash(t), MOE_OK;
    if (*t->at == '\0') return refuse(t, "a NUL");
    if (*t->at == '^') moe_buf_append_text(&t->operand->simple, "\\");
    moe_buf_append(&t->operand->simple, t->at++, 1);
    if (t->at == t->end || ((unsigned char)*t->at & 0xc0) != 0x80) character_done(t);
    return MOE_OK;
}

/* Appends a union as what matches one character of it; the alternatives stand without a group around them. */
static moe_status finish_operand(translation *t, class_operand *operand, moe_buf *out) {
    if (operand->last == ITEM_NONE || operand->last == ITEM_RANGE_OPEN) return refuse(t, "an unfinished class");
    if (operand->simple.size) moe_buf_printf(out, "[%s]", moe_buf_text(&operand->simple));
    const char *others = moe_buf_text(&operand->others);
    moe_buf_append_text(out, operand->simple.size || !*others ? others : others + 1);
    out->failed |= operand->simple.failed || operand->others.failed;
    return MOE_OK;
}

/* The operands up to the ']': all but the last as lookaheads in `before`, the last left in *operand. */
static moe_status translate_operands(translation *t, class_operand *operand, moe_buf *before) {
    t->operand = operand;
    while (t->at < t->end && *t->at != ']') {
        moe_status status = MOE_OK;
        if (next_is(t, "&&")) {
            moe_buf_append_text(before, "(?=");
            status = finish_operand(t, operand, before);
            moe_buf_append_text(before, ")");
            moe_buf_clear(&operand->simple);
            moe_buf_clear(&operand->others);
            operand->last = ITEM_NONE;
            t->at += 2;
        } else {
            status = translate_in_class(t);
        }
        if (status != MOE_OK) return status;
    }
    return t->at == t->end ? refuse(t, "a class without its ']'") : MOE_OK;
}

/* A class is one of PCRE2's where it can be, else a group that matches one character. */
static moe_status emit_class(translation *t, class_operand *operand, const moe_buf *before, bool negated) {
    moe_buf *out = t->out;
    if (!before->size && !operand->others.size && operand->last != ITEM_NONE && operand->last != ITEM_RANGE_OPEN) {
        moe_buf_printf(out, "[%s%s]", negated ? "^" : "", moe_buf_text(&operand->simple));
        out->failed |= operand->simple.failed;
        return MOE_OK;
    }
    moe_buf_printf(out, negated ? "(?:(?!%s(?:" : "(?:%s(?:", moe_buf_text(before));
    moe_status status = finish_operand(t, operand, out);
    moe_buf_append_text(out, negated ? "))(?s:.))" : "))");
    out->failed |= before->failed;
    return status;
}

static moe_status translate_class(translation *t) {
    if (t->depth == MAX_CLASS_DEPTH) return refuse(t, "so deep a class");
    bool negated = next_is(t, "[^");
    t->at += negated ? 2 : 1;
    if (t->at < t->end && *t->at == ']') return refuse(t, "a ']' first in a class");
    class_operand operand = {.last = ITEM_NONE};
    moe_buf before = {0};
    t->depth++;
    moe_status status = translate_operands(t, &operand, &before);
    if (status == MOE_OK) status = emit_class(t, &operand, &before, negated);
    t->depth--;
    t->operand = NULL;
    t->at += status == MOE_OK;
    moe_buf_free(&operand.simple);
    moe_buf_free(&operand.others);
    moe_buf_free(&before);
    return status;
}

/* ---- outside of classes ---- */

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
            return translate_class(t);
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
        moe_status status = translate_outside(&t);
        if (status != MOE_OK) return status;
    }
    return MOE_OK;
}
