/* Methods of strings, lists and mappings. Those that change their object are not here: the sandbox refuses them too. */
#include <string.h>
#include <utf8proc.h>

#include "router/chat/jinja_run.h"

static bool string_argument(jinja_run *run, jinja_value value, jinja_text *out) {
    *out = value.text;
    if (value.kind == JINJA_STRING) return true;
    *out = (jinja_text){"", 0};
    moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "a string was expected, not %s", moe_jinja_kind_name(value.kind));
    return false;
}

static int64_t integer_argument(jinja_run *run, jinja_value value, int64_t absent) {
    if (value.kind == JINJA_ABSENT) return absent;
    if (value.kind == JINJA_INT) return value.integer;
    if (value.kind != JINJA_BOOL)
        moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "an integer was expected, not %s", moe_jinja_kind_name(value.kind));
    return value.kind == JINJA_BOOL && value.boolean;
}

static jinja_value string_of(jinja_text text) { return jinja_string(text.data, text.size); }

/* ---- strings ---- */

static jinja_value strip_sides(jinja_run *run, jinja_value self, const jinja_args *args, bool left, bool right) {
    jinja_text chars;
    if (args->at[0].kind == JINJA_ABSENT || args->at[0].kind == JINJA_NONE)
        return string_of(moe_jinja_strip(self.text, NULL, left, right));
    if (!string_argument(run, args->at[0], &chars) || !moe_jinja_charge(run, chars.size / 64 * self.text.size))
        return jinja_undefined();
    return string_of(moe_jinja_strip(self.text, &chars, left, right));
}

static jinja_value method_strip(jinja_run *r, jinja_value self, const jinja_args *a) {
    return strip_sides(r, self, a, true, true);
}
static jinja_value method_lstrip(jinja_run *r, jinja_value self, const jinja_args *a) {
    return strip_sides(r, self, a, true, false);
}
static jinja_value method_rstrip(jinja_run *r, jinja_value self, const jinja_args *a) {
    return strip_sides(r, self, a, false, true);
}

static bool affix(jinja_text text, jinja_text part, bool start) {
    if (part.size > text.size) return false;
    return part.size == 0 || memcmp(start ? text.data : text.data + text.size - part.size, part.data, part.size) == 0;
}

static jinja_value has_affix(jinja_run *run, jinja_value self, jinja_value wanted, bool start) {
    jinja_text part;
    if (wanted.kind != JINJA_TUPLE) return jinja_bool(string_argument(run, wanted, &part) && affix(self.text, part, start));
    for (size_t i = 0; i < wanted.list.count && string_argument(run, wanted.list.items[i], &part); i++)
        if (affix(self.text, part, start)) return jinja_bool(true);
    return jinja_bool(false);
}

static jinja_value method_startswith(jinja_run *r, jinja_value self, const jinja_args *a) {
    return has_affix(r, self, a->at[0], true);
}
static jinja_value method_endswith(jinja_run *r, jinja_value self, const jinja_args *a) {
    return has_affix(r, self, a->at[0], false);
}

static jinja_value method_removeprefix(jinja_run *run, jinja_value self, const jinja_args *args) {
    jinja_text part;
    if (!string_argument(run, args->at[0], &part) || !affix(self.text, part, true)) return self;
    return jinja_string(self.text.data + part.size, self.text.size - part.size);
}

static jinja_value method_removesuffix(jinja_run *run, jinja_value self, const jinja_args *args) {
    jinja_text part;
    if (!string_argument(run, args->at[0], &part) || !affix(self.text, part, false)) return self;
    return jinja_string(self.text.data, self.text.size - part.size);
}

static jinja_value method_upper(jinja_run *r, jinja_value self, const jinja_args *a) {
    (void)a;
    return moe_jinja_to_case(r, self.text, JINJA_UPPER);
}
static jinja_value method_lower(jinja_run *r, jinja_value self, const jinja_args *a) {
    (void)a;
    return moe_jinja_to_case(r, self.text, JINJA_LOWER);
}
static jinja_value method_capitalize(jinja_run *r, jinja_value self, const jinja_args *a) {
    (void)a;
    return moe_jinja_to_case(r, self.text, JINJA_CAPITALIZE);
}
static jinja_value method_title(jinja_run *r, jinja_value self, const jinja_args *a) {
    (void)a;
    return moe_jinja_to_case(r, self.text, JINJA_TITLE);
}

static jinja_value method_replace(jinja_run *run, jinja_value self, const jinja_args *args) {
    jinja_text from, to;
    if (!string_argument(run, args->at[0], &from) || !string_argument(run, args->at[1], &to)) return jinja_undefined();
    return moe_jinja_replace(run, self.text, from, to, integer_argument(run, args->at[2], -1));
}

static size_t count_occurrences(jinja_text text, jinja_text part) {
    size_t count = 0;
    if (part.size == 0) return moe_jinja_utf8_length(text) + 1;
    for (size_t at = 0; (at = moe_jinja_find(text, part, at)) != SIZE_MAX; at += part.size) count++;
    return count;
}

static jinja_value method_count(jinja_run *run, jinja_value self, const jinja_args *args) {
    jinja_text part;
    if (!string_argument(run, args->at[0], &part) || !moe_jinja_charge(run, self.text.size / 16)) return jinja_undefined();
    return jinja_int((int64_t)count_occurrences(self.text, part));
}

static jinja_value method_find(jinja_run *run, jinja_value self, const jinja_args *args) {
    jinja_text part;
    if (!string_argument(run, args->at[0], &part) || !moe_jinja_charge(run, self.text.size / 16)) return jinja_undefined();
    size_t found = moe_jinja_find(self.text, part, 0);
    if (found == SIZE_MAX) return jinja_int(-1);
    return jinja_int((int64_t)moe_jinja_utf8_length((jinja_text){self.text.data, found}));
}

/* Pieces of a string, in order, at most `capacity`. */
typedef struct pieces {
    jinja_value *items;
    size_t count, capacity;
} pieces;

static bool make_pieces(jinja_run *run, pieces *p, size_t capacity) {
    *p = (pieces){.capacity = capacity};
    if (moe_jinja_charge(run, capacity)) p->items = moe_jinja_alloc(run, capacity, sizeof *p->items);
    return p->items != NULL;
}

static void add_piece(pieces *p, const char *data, size_t size) {
    if (p->count < p->capacity) p->items[p->count++] = jinja_string(data, size);
}

static jinja_value split_at(jinja_run *run, jinja_text text, jinja_text separator, int64_t most) {
    pieces p;
    if (separator.size == 0) return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "split: the separator is empty");
    moe_jinja_charge(run, text.size / 16);
    if (!make_pieces(run, &p, count_occurrences(text, separator) + 1)) return jinja_undefined();
    size_t at = 0;
    for (size_t found; most != 0 && (found = moe_jinja_find(text, separator, at)) != SIZE_MAX; most -= most > 0) {
        add_piece(&p, text.data + at, found - at);
        at = found + separator.size;
    }
    add_piece(&p, text.data + at, text.size - at);
    return moe_jinja_list(JINJA_LIST, p.items, p.count);
}

/* Position of the last `part` that ends at or before `end`, or SIZE_MAX. */
static size_t find_last(jinja_text text, jinja_text part, size_t end) {
    for (size_t at = end - part.size + 1; part.size <= end && at-- > 0;)
        if (memcmp(text.data + at, part.data, part.size) == 0) return at;
    return SIZE_MAX;
}

static jinja_value rsplit_at(jinja_run *run, jinja_text text, jinja_text separator, int64_t most) {
    pieces p;
    if (separator.size == 0) return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "rsplit: the separator is empty");
    moe_jinja_charge(run, text.size / 4);
    if (!make_pieces(run, &p, count_occurrences(text, separator) + 1)) return jinja_undefined();
    size_t end = text.size;
    for (size_t found; most != 0 && (found = find_last(text, separator, end)) != SIZE_MAX; most -= most > 0) {
        add_piece(&p, text.data + found + separator.size, end - found - separator.size);
        end = found;
    }
    add_piece(&p, text.data, end);
    for (size_t i = 0; i < p.count / 2; i++) {
        jinja_value swap = p.items[i];
        p.items[i] = p.items[p.count - 1 - i];
        p.items[p.count - 1 - i] = swap;
    }
    return moe_jinja_list(JINJA_LIST, p.items, p.count);
}

/* split() without a separator: at runs of white space, none at the ends. */
static jinja_value split_words(jinja_run *run, jinja_text text, int64_t most) {
    pieces p;
    if (!make_pieces(run, &p, text.size / 2 + 1)) return jinja_undefined();
    for (text = moe_jinja_strip(text, NULL, true, false); text.size > 0; text = moe_jinja_strip(text, NULL, true, false)) {
        size_t end = 0, next = 0;
        if (most == 0) {
            text = moe_jinja_strip(text, NULL, false, true);
            add_piece(&p, text.data, text.size);
            break;
        }
        while (end < text.size && !moe_jinja_is_space(moe_jinja_utf8_next(text.data, text.size, &next))) end = next;
        add_piece(&p, text.data, end);
        text = (jinja_text){text.data + end, text.size - end};
        most -= most > 0;
    }
    return moe_jinja_list(JINJA_LIST, p.items, p.count);
}

static jinja_value split_any(jinja_run *run, jinja_value self, const jinja_args *args, bool from_right) {
    jinja_text separator;
    int64_t most = integer_argument(run, args->at[1], -1);
    if (args->at[0].kind == JINJA_ABSENT || args->at[0].kind == JINJA_NONE) {
        if (from_right && most >= 0)
            return moe_jinja_fail(run, MOE_UNIMPLEMENTED, "rsplit by white space with a limit is not built");
        return split_words(run, self.text, most);
    }
    if (!string_argument(run, args->at[0], &separator)) return jinja_undefined();
    return from_right ? rsplit_at(run, self.text, separator, most) : split_at(run, self.text, separator, most);
}

static jinja_value method_split(jinja_run *r, jinja_value self, const jinja_args *a) { return split_any(r, self, a, false); }
static jinja_value method_rsplit(jinja_run *r, jinja_value self, const jinja_args *a) { return split_any(r, self, a, true); }

static jinja_value method_splitlines(jinja_run *run, jinja_value self, const jinja_args *args) {
    pieces p;
    jinja_text text = self.text;
    bool keep = moe_jinja_truth(args->at[0]);
    if (!make_pieces(run, &p, text.size + 1)) return jinja_undefined();
    for (size_t at = 0, next; at < text.size; at = next) {
        size_t end = moe_jinja_line_end(text, at, &next);
        add_piece(&p, text.data + at, (keep ? next : end) - at);
    }
    return moe_jinja_list(JINJA_LIST, p.items, p.count);
}

static jinja_value method_join(jinja_run *run, jinja_value self, const jinja_args *args) {
    jinja_list list = moe_jinja_iterate(run, args->at[0]);
    moe_buf out = {0};
    jinja_text part;
    for (size_t i = 0; i < list.count && string_argument(run, list.items[i], &part); i++) {
        if (i) moe_jinja_append(run, &out, self.text.data, self.text.size);
        moe_jinja_append(run, &out, part.data, part.size);
    }
    return moe_jinja_take(run, &out);
}

static jinja_value every_character(jinja_run *run, jinja_text text, bool (*is)(uint32_t c)) {
    bool all = text.size > 0 && moe_jinja_charge(run, text.size / 16);
    for (size_t at = 0; all && at < text.size;) all = is(moe_jinja_utf8_next(text.data, text.size, &at));
    return jinja_bool(all);
}

static bool is_decimal(uint32_t c) { return utf8proc_category((utf8proc_int32_t)c) == UTF8PROC_CATEGORY_ND; }
static bool is_letter(uint32_t c) {
    utf8proc_category_t category = utf8proc_category((utf8proc_int32_t)c);
    return category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO;
}
static bool is_letter_or_decimal(uint32_t c) { return is_letter(c) || is_decimal(c); }

static jinja_value method_isdigit(jinja_run *r, jinja_value self, const jinja_args *a) {
    (void)a;
    return every_character(r, self.text, is_decimal);
}
static jinja_value method_isalpha(jinja_run *r, jinja_value self, const jinja_args *a) {
    (void)a;
    return every_character(r, self.text, is_letter);
}
static jinja_value method_isalnum(jinja_run *r, jinja_value self, const jinja_args *a) {
    (void)a;
    return every_character(r, self.text, is_letter_or_decimal);
}
static jinja_value method_isspace(jinja_run *r, jinja_value self, const jinja_args *a) {
    (void)a;
    return every_character(r, self.text, moe_jinja_is_space);
}

/* ---- lists ---- */

static jinja_value method_index(jinja_run *run, jinja_value self, const jinja_args *args) {
    for (size_t i = 0; i < self.list.count && !run->failed; i++)
        if (moe_jinja_equal(run, self.list.items[i], args->at[0])) return jinja_int((int64_t)i);
    return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "index: the value is not in the list");
}

static jinja_value method_list_count(jinja_run *run, jinja_value self, const jinja_args *args) {
    int64_t count = 0;
    for (size_t i = 0; i < self.list.count && !run->failed; i++) count += moe_jinja_equal(run, self.list.items[i], args->at[0]);
    return jinja_int(count);
}

/* ---- mappings ---- */

static jinja_value method_get(jinja_run *run, jinja_value self, const jinja_args *args) {
    const jinja_value *found = moe_jinja_dict_find(run, self.dict, args->at[0]);
    if (found) return *found;
    return args->at[1].kind == JINJA_ABSENT ? jinja_none() : args->at[1];
}

static jinja_value method_keys(jinja_run *run, jinja_value self, const jinja_args *args) {
    (void)args;
    jinja_list keys = moe_jinja_iterate(run, self);
    return moe_jinja_list(JINJA_LIST, keys.items, keys.count);
}

static jinja_value method_values(jinja_run *run, jinja_value self, const jinja_args *args) {
    (void)args;
    pieces p;
    if (!make_pieces(run, &p, self.dict->count)) return jinja_undefined();
    for (size_t i = 0; i < p.capacity; i++) p.items[i] = self.dict->pairs[i].value;
    return moe_jinja_list(JINJA_LIST, p.items, p.capacity);
}

static jinja_value method_items(jinja_run *run, jinja_value self, const jinja_args *args) {
    (void)args;
    pieces p, flat;
    size_t count = self.dict->count;
    if (!make_pieces(run, &p, count) || !make_pieces(run, &flat, 2 * count)) return jinja_undefined();
    for (size_t i = 0; i < count; i++) {
        flat.items[2 * i] = self.dict->pairs[i].key;
        flat.items[2 * i + 1] = self.dict->pairs[i].value;
        p.items[i] = moe_jinja_list(JINJA_TUPLE, flat.items + 2 * i, 2);
    }
    return moe_jinja_list(JINJA_LIST, p.items, count);
}

static jinja_value method_copy(jinja_run *run, jinja_value self, const jinja_args *args) {
    (void)run;
    (void)args;
    return self;
}

const jinja_function *moe_jinja_find_method(jinja_kind kind, jinja_text name) {
    static const jinja_function methods[] = {{"strip", "chars", 0, method_strip, JINJA_STRING},
                                             {"lstrip", "chars", 0, method_lstrip, JINJA_STRING},
                                             {"rstrip", "chars", 0, method_rstrip, JINJA_STRING},
                                             {"startswith", "prefix", 1, method_startswith, JINJA_STRING},
                                             {"endswith", "suffix", 1, method_endswith, JINJA_STRING},
                                             {"removeprefix", "prefix", 1, method_removeprefix, JINJA_STRING},
                                             {"removesuffix", "suffix", 1, method_removesuffix, JINJA_STRING},
                                             {"upper", "", 0, method_upper, JINJA_STRING},
                                             {"lower", "", 0, method_lower, JINJA_STRING},
                                             {"capitalize", "", 0, method_capitalize, JINJA_STRING},
                                             {"title", "", 0, method_title, JINJA_STRING},
                                             {"replace", "old new count", 2, method_replace, JINJA_STRING},
                                             {"count", "sub", 1, method_count, JINJA_STRING},
                                             {"find", "sub", 1, method_find, JINJA_STRING},
                                             {"split", "sep maxsplit", 0, method_split, JINJA_STRING},
                                             {"rsplit", "sep maxsplit", 0, method_rsplit, JINJA_STRING},
                                             {"splitlines", "keepends", 0, method_splitlines, JINJA_STRING},
                                             {"join", "iterable", 1, method_join, JINJA_STRING},
                                             {"isdigit", "", 0, method_isdigit, JINJA_STRING},
                                             {"isdecimal", "", 0, method_isdigit, JINJA_STRING},
                                             {"isalpha", "", 0, method_isalpha, JINJA_STRING},
                                             {"isalnum", "", 0, method_isalnum, JINJA_STRING},
                                             {"isspace", "", 0, method_isspace, JINJA_STRING},
                                             {"index", "value", 1, method_index, JINJA_LIST},
                                             {"count", "value", 1, method_list_count, JINJA_LIST},
                                             {"copy", "", 0, method_copy, JINJA_LIST},
                                             {"index", "value", 1, method_index, JINJA_TUPLE},
                                             {"count", "value", 1, method_list_count, JINJA_TUPLE},
                                             {"get", "key default", 1, method_get, JINJA_DICT},
                                             {"keys", "", 0, method_keys, JINJA_DICT},
                                             {"values", "", 0, method_values, JINJA_DICT},
                                             {"items", "", 0, method_items, JINJA_DICT},
                                             {"copy", "", 0, method_copy, JINJA_DICT}};
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++)
        if (methods[i].self == kind && moe_jinja_text_is(name, methods[i].name)) return &methods[i];
    return NULL;
}
