#include "router/tokenizer/regex_sets.h"

#include <string.h>

#include "router/tokenizer/unicode_additions.h"

/* Unicode's White_Space; PCRE2's own \s adds U+180E. */
#define WHITE_SPACE "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"

void moe_regex_white_space(moe_buf *out) { moe_buf_append_text(out, WHITE_SPACE); }

static bool is_general_category(const char *name, size_t size) {
    static const char *const minors[] = {"Ccfnos", "Lulmot", "Mcen", "Ndlo", "Pcdefios", "Sckmo", "Zlps"};
    if (size == 0 || size > 2) return false;
    for (size_t i = 0; i < sizeof minors / sizeof *minors; i++)
        if (name[0] == minors[i][0]) return size == 1 || strchr(minors[i] + 1, name[1]) != NULL;
    return false;
}

/* A category of one letter is the union of those of two that begin with it. */
static void append_category(const char *name, size_t size, moe_buf *out) {
    moe_buf_printf(out, "\\p{%.*s}", (int)size, name);
    for (size_t i = 0; i < moe_num_unicode_additions; i++) {
        const moe_unicode_addition *row = &moe_unicode_additions[i];
        if (strlen(row->name) == 2 && memcmp(row->name, name, size) == 0) moe_buf_append_text(out, row->ranges);
    }
}

static void append_categories(const char *const names[], size_t count, moe_buf *out) {
    for (size_t i = 0; i < count; i++) append_category(names[i], strlen(names[i]), out);
}

static bool same_name(const char *known, const char *name, size_t size) {
    return strlen(known) == size && strncasecmp(known, name, size) == 0;
}

static void append_additions(const char *name, size_t size, moe_buf *out) {
    for (size_t i = 0; i < moe_num_unicode_additions; i++) {
        const moe_unicode_addition *row = &moe_unicode_additions[i];
        if (same_name(row->name, name, size) || same_name(row->alias, name, size)) {
            moe_buf_append_text(out, row->ranges);
            return;
        }
    }
}

void moe_regex_digit(moe_buf *out) { append_category("Nd", 2, out); }

/* PCRE2's own \w lacks marks and connector punctuation. */
void moe_regex_word(moe_buf *out) {
    static const char *const categories[] = {"M", "Nd", "Pc"};
    moe_buf_append_text(out, "\\p{Alphabetic}");
    append_additions("Alphabetic", strlen("Alphabetic"), out);
    append_categories(categories, sizeof categories / sizeof *categories, out);
}

/* Binary properties have the same name in both; any other name is a script, which PCRE2 would take for Script_Extensions unless
 * told otherwise. */
static void append_other(const char *name, size_t size, moe_buf *out) {
    static const char *const binary[] = {"Alphabetic", "White_Space", "Uppercase", "Lowercase", "Ideographic", "Emoji"};
    bool known = false;
    for (size_t i = 0; i < sizeof binary / sizeof *binary && !known; i++) known = same_name(binary[i], name, size);
    moe_buf_printf(out, "\\p{%s%.*s}", known ? "" : "sc:", (int)size, name);
    append_additions(name, size, out);
}

void moe_regex_property(const char *name, size_t size, moe_buf *out, bool *complement) {
    /* What was assigned since is no longer in Cn, so that C and Cn are spelled as what is left of all the others. */
    static const char *const others[] = {"L", "M", "N", "P", "S", "Z", "Cc", "Cf", "Co", "Cs"};
    size_t num_others = sizeof others / sizeof *others;
    *complement = is_general_category(name, size) && name[0] == 'C' && (size == 1 || name[1] == 'n');
    if (*complement)
        append_categories(others, size == 1 ? 6 : num_others, out);
    else if (is_general_category(name, size))
        append_category(name, size, out);
    else
        append_other(name, size, out);
}
