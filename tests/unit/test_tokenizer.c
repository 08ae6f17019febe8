/* The tokenizer against cases made by Hugging Face's (tests/golden/tokenizer/make_cases.mjs), and what it must refuse. */
#include <jansson.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* It needs the headers above. */
#include <cmocka.h>

#include "common/alloc.h"
#include "common/random.h"
#include "router/tokenizer/normalize_form.h"
#include "router/tokenizer/regex.h"
#include "router/tokenizer/tokenizer.h"
#include "router/tokenizer/utf8.h"

static moe_tokenizer *demo;

static json_t *read_json(const char *path) {
    json_error_t error;
    json_t *json = json_load_file(path, JSON_ALLOW_NUL, &error);
    if (!json) fail_msg("%s: line %d: %s", path, error.line, error.text);
    return json;
}

/* Loads a tokenizer.json from a folder made for it. */
static moe_status load_text(const char *text, moe_tokenizer **out, moe_error *err) {
    char folder[] = "/tmp/moesaic-tokenizer-XXXXXX", path[64];
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/tokenizer.json", folder);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
    moe_status status = moe_tokenizer_load(folder, out, err);
    unlink(path);
    rmdir(folder);
    return status;
}

static moe_status load_json(const json_t *json, moe_tokenizer **out, moe_error *err) {
    char *text = json_dumps(json, JSON_COMPACT);
    moe_status status = load_text(text, out, err);
    free(text);
    return status;
}

static int load_demo(void **state) {
    (void)state;
    moe_error err = {0};
    if (moe_tokenizer_load(SOURCE_DIR "/models/demo", &demo, &err) == MOE_OK) return 0;
    fprintf(stderr, "%s\n", err.message);
    return 1;
}

static int free_demo(void **state) {
    (void)state;
    moe_tokenizer_free(&demo);
    moe_tokenizer_free(&demo);
    return 0;
}

static void check_encode(const char *what, const moe_tokenizer *tokenizer, const json_t *text, bool add_special,
                         const json_t *expected) {
    moe_token_ids ids;
    moe_error err = {0};
    moe_status status =
        moe_tokenizer_encode(tokenizer, json_string_value(text), json_string_length(text), add_special, &ids, &err);
    if (status != MOE_OK) fail_msg("%s: '%s': %s", what, json_string_value(text), err.message);
    bool same = (size_t)ids.count == json_array_size(expected);
    for (int32_t i = 0; i < ids.count && same; i++) same = ids.ids[i] == json_integer_value(json_array_get(expected, (size_t)i));
    if (!same) fail_msg("%s: '%s' is encoded differently", what, json_string_value(text));
    moe_free(ids.ids);
}

static void check_decode(const char *what, const moe_tokenizer *tokenizer, const json_t *ids, bool skip_special,
                         const json_t *expected) {
    int32_t list[512];
    size_t count = json_array_size(ids);
    assert_true(count <= 512);
    for (size_t i = 0; i < count; i++) list[i] = (int32_t)json_integer_value(json_array_get(ids, i));
    moe_buf text = {0};
    moe_tokenizer_decode(tokenizer, list, (int32_t)count, skip_special, &text);
    assert_false(text.failed);
    if (text.size != json_string_length(expected) || memcmp(moe_buf_text(&text), json_string_value(expected), text.size) != 0)
        fail_msg("%s: decoded '%s' instead of '%s'", what, moe_buf_text(&text), json_string_value(expected));
    moe_buf_free(&text);
}

static void demo_cases_of_the_reference(void **state) {
    (void)state;
    json_t *file = read_json(SOURCE_DIR "/tests/data/tokenizer/demo_cases.json"), *one;
    size_t i;
    assert_true(json_array_size(json_object_get(file, "encode")) > 300);
    json_array_foreach(json_object_get(file, "encode"), i, one) {
        check_encode("demo", demo, json_array_get(one, 0), false, json_array_get(one, 1));
    }
    assert_true(json_array_size(json_object_get(file, "decode")) > 300);
    json_array_foreach(json_object_get(file, "decode"), i, one) {
        check_decode("demo", demo, json_array_get(one, 0), json_is_true(json_array_get(one, 1)), json_array_get(one, 2));
    }
    json_decref(file);
}

static void prompts_of_the_golden_file(void **state) {
    (void)state;
    json_t *file = read_json(SOURCE_DIR "/models/demo/golden.json"), *one;
    size_t i;
    assert_int_equal(json_array_size(json_object_get(file, "cases")), 8);
    json_array_foreach(json_object_get(file, "cases"), i, one) {
        check_encode("golden.json", demo, json_object_get(one, "prompt"), true, json_object_get(one, "ids"));
    }
    json_decref(file);
}

static void check_variant(const json_t *base, const json_t *variant) {
    const char *name = json_string_value(json_object_get(variant, "name"));
    json_t *json = json_copy((json_t *)base), *one;
    json_object_update(json, json_object_get(variant, "change"));
    json_t *model = json_copy(json_object_get(json, "model"));
    if (json_object_get(variant, "model")) json_object_update(model, json_object_get(variant, "model"));
    json_object_set_new(json, "model", model);
    moe_tokenizer *tokenizer;
    moe_error err = {0};
    if (load_json(json, &tokenizer, &err) != MOE_OK) fail_msg("%s: %s", name, err.message);
    size_t i;
    assert_true(json_array_size(json_object_get(variant, "encode")) > 10);
    json_array_foreach(json_object_get(variant, "encode"), i, one) {
        check_encode(name, tokenizer, json_array_get(one, 0), json_is_true(json_array_get(one, 1)), json_array_get(one, 2));
    }
    json_array_foreach(json_object_get(variant, "decode"), i, one) {
        check_decode(name, tokenizer, json_array_get(one, 0), true, json_array_get(one, 1));
    }
    moe_tokenizer_free(&tokenizer);
    json_decref(json);
}

static void variant_cases_of_the_reference(void **state) {
    (void)state;
    json_t *base = read_json(SOURCE_DIR "/models/demo/tokenizer.json");
    json_t *file = read_json(SOURCE_DIR "/tests/data/tokenizer/variant_cases.json"), *variant;
    size_t i;
    assert_true(json_array_size(json_object_get(file, "variants")) > 30);
    json_array_foreach(json_object_get(file, "variants"), i, variant) { check_variant(base, variant); }
    json_decref(file);
    json_decref(base);
}

static void texts_come_back(void **state) {
    (void)state;
    FILE *file = fopen(SOURCE_DIR "/tests/data/valid.jsonl", "r");
    assert_non_null(file);
    char *line = NULL;
    size_t capacity = 0;
    int count = 0;
    for (ssize_t size; (size = getline(&line, &capacity, file)) > 0; count++) {
        json_t *json = json_loadb(line, (size_t)size, 0, NULL), *text = json_object_get(json, "text");
        moe_token_ids ids;
        moe_buf out = {0};
        assert_int_equal(moe_tokenizer_encode(demo, json_string_value(text), json_string_length(text), false, &ids, NULL),
                         MOE_OK);
        moe_tokenizer_decode(demo, ids.ids, ids.count, false, &out);
        assert_int_equal(out.size, json_string_length(text));
        assert_memory_equal(out.data, json_string_value(text), out.size);
        moe_buf_free(&out);
        moe_free(ids.ids);
        json_decref(json);
    }
    assert_int_equal(count, 899);
    free(line);
    fclose(file);
}

static bool is_utf8(const char *text, size_t size) {
    moe_buf same = {0};
    moe_utf8_append_lossy(text, size, &same);
    bool equal = same.size == size && memcmp(moe_buf_text(&same), text, size) == 0;
    moe_buf_free(&same);
    return equal;
}

static void streamed_parts_are_whole_characters(void **state) {
    (void)state;
    moe_random random = {.state = 1};
    for (int round = 0; round < 2000; round++) {
        int32_t ids[40], count = (int32_t)moe_random_below(&random, 40);
        bool skip_special = round % 2;
        /* Low ids are single bytes: mostly ill-formed text. */
        for (int32_t i = 0; i < count; i++) ids[i] = (int32_t)moe_random_below(&random, round % 3 ? 300 : 8192);
        moe_buf whole = {0}, parts = {0};
        moe_tokenizer_decode(demo, ids, count, skip_special, &whole);
        moe_detokenizer d;
        moe_detokenizer_init(&d, demo, skip_special);
        for (int32_t i = 0; i <= count; i++) {
            size_t before = parts.size;
            if (i < count)
                moe_detokenizer_feed(&d, ids[i], &parts);
            else
                moe_detokenizer_finish(&d, &parts);
            assert_true(is_utf8(moe_buf_text(&parts) + before, parts.size - before));
        }
        assert_int_equal(whole.size, parts.size);
        assert_memory_equal(moe_buf_text(&whole), moe_buf_text(&parts), whole.size);
        moe_buf_free(&whole);
        moe_buf_free(&parts);
    }
}

/* From the Unicode Standard, chapter 3, tables 3-8 to 3-11, and the edges of table 3-7. */
static void ill_formed_utf8_is_replaced(void **state) {
    (void)state;
#define R MOE_UTF8_REPLACEMENT
    static const struct {
        const char *bytes, *expected;
    } cases[] = {
        {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", R R R R R R R R "A"},
        {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", R R R R R R R R "A"},
        {"\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", R R R R R "A" R R "B"},
        {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", R R R R "A"},
        {"\x80", R},
        {"\xe2\x82", R},
        {"\xe2\x82\xac\xe2", "\xe2\x82\xac" R},
        {"\xf4\x8f\xbf\xbf\xf4\x90", "\xf4\x8f\xbf\xbf" R R},
        {"\xed\x9f\xbf\xee\x80\x80", "\xed\x9f\xbf\xee\x80\x80"},
        {"\xf0\x90\x80\x80\xc2\x80", "\xf0\x90\x80\x80\xc2\x80"},
        {"\xe0\x9f\xbf\xf0\x8f\xbf\xbf", R R R R R R R},
    };
#undef R
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        moe_buf out = {0};
        moe_token_ids ours, clean;
        moe_utf8_append_lossy(cases[i].bytes, strlen(cases[i].bytes), &out);
        assert_string_equal(moe_buf_text(&out), cases[i].expected);
        assert_int_equal(moe_tokenizer_encode(demo, cases[i].bytes, strlen(cases[i].bytes), false, &ours, NULL), MOE_OK);
        assert_int_equal(moe_tokenizer_encode(demo, out.data, out.size, false, &clean, NULL), MOE_OK);
        assert_int_equal(ours.count, clean.count);
        assert_memory_equal(ours.ids, clean.ids, (size_t)ours.count * sizeof *ours.ids);
        moe_free(ours.ids);
        moe_free(clean.ids);
        moe_buf_free(&out);
    }
}

static void lookups(void **state) {
    (void)state;
    assert_int_equal(moe_tokenizer_vocab(demo), 8192);
    assert_int_equal(moe_tokenizer_id_of(demo, "<|im_end|>"), 2);
    assert_int_equal(moe_tokenizer_id_of(demo, "no such token"), -1);
    assert_string_equal(moe_tokenizer_token(demo, 1), "<|im_start|>");
    assert_string_equal(moe_tokenizer_token(demo, moe_tokenizer_id_of(demo, "\xc4\xa0the")), "\xc4\xa0the");
    assert_null(moe_tokenizer_token(demo, -1));
    assert_null(moe_tokenizer_token(demo, 8192));
    assert_true(moe_tokenizer_is_special(demo, 0));
    assert_false(moe_tokenizer_is_special(demo, 3));
    assert_false(moe_tokenizer_is_special(demo, INT32_MAX));
    moe_buf bytes = {0};
    moe_tokenizer_token_bytes(demo, moe_tokenizer_id_of(demo, "\xc4\xa0the"), &bytes);
    moe_tokenizer_token_bytes(demo, 8192, &bytes);
    moe_tokenizer_token_bytes(demo, -1, &bytes);
    assert_string_equal(moe_buf_text(&bytes), " the");
    moe_buf_free(&bytes);
}

/* Time must grow about as the length does, whatever the text: a quadratic step would take minutes here. */
static void long_texts(void **state) {
    (void)state;
    static const char *const units[] = {"a", "ab", " ", "\n", "\xc3\xa9", "<|im_", "1", "-", "'s", "\xe2\x80\x8d"};
    for (size_t u = 0; u < sizeof units / sizeof *units; u++) {
        moe_buf text = {0}, back = {0};
        while (text.size < 300000) moe_buf_append_text(&text, units[u]);
        moe_token_ids ids;
        moe_error err = {0};
        if (moe_tokenizer_encode(demo, text.data, text.size, false, &ids, &err) != MOE_OK) fail_msg("%s", err.message);
        moe_tokenizer_decode(demo, ids.ids, ids.count, false, &back);
        assert_int_equal(back.size, text.size);
        assert_memory_equal(back.data, text.data, text.size);
        moe_free(ids.ids);
        moe_buf_free(&text);
        moe_buf_free(&back);
    }
}

static const char *const small_file =
    "{'added_tokens': [], 'normalizer': null, 'pre_tokenizer': null, 'post_processor': null, 'decoder': {'type': 'Fuse'},"
    " 'model': {'type': 'BPE', 'vocab': {'a': 0, 'b': 1, 'ab': 2}, 'merges': ['a b']}}";

/* JSON with ' for " */
static json_t *parse(const char *text) {
    char *quoted = moe_strdup(text);
    for (char *c = quoted; *c; c++)
        if (*c == '\'') *c = '"';
    json_t *json = json_loads(quoted, 0, NULL);
    if (!json) fail_msg("%s is not JSON", quoted);
    moe_free(quoted);
    return json;
}

/* The small file with fields of `change` in place of its own. */
static json_t *small_json(const char *change) {
    json_t *json = parse(small_file), *changes = parse(change);
    json_object_update(json, changes);
    json_decref(changes);
    return json;
}

#define BPE(rest) "{'model': {'type': 'BPE', " rest "}}"
#define PRE(rest) "{'pre_tokenizer': {'type': " rest "}}"
#define POST(rest) "{'post_processor': {'type': " rest "}}"

static const struct refusal {
    const char *change;
    moe_status status;
    const char *says;
} refusals[] = {
    {"{'model': {'type': 'Unigram'}}", MOE_UNIMPLEMENTED, "'Unigram'"},
    {BPE("'vocab': [], 'merges': []"), MOE_INVALID_ARGUMENT, "'vocab'"},
    {BPE("'vocab': {'a': -1}, 'merges': []"), MOE_INVALID_ARGUMENT, "'a'"},
    {BPE("'vocab': {'a': 1.5}, 'merges': []"), MOE_INVALID_ARGUMENT, "'a'"},
    {BPE("'vocab': {'a': 2000000000}, 'merges': []"), MOE_INVALID_ARGUMENT, "'a'"},
    {BPE("'vocab': {'a': 1, 'b': 1}, 'merges': []"), MOE_INVALID_ARGUMENT, "id 1"},
    {BPE("'vocab': {'a': 0}, 'merges': ['a b']"), MOE_INVALID_ARGUMENT, "merge 0"},
    {BPE("'vocab': {'a': 0}, 'merges': ['a b c']"), MOE_INVALID_ARGUMENT, "merge 0"},
    {BPE("'vocab': {'a': 0}, 'merges': [['a']]"), MOE_INVALID_ARGUMENT, "merge 0"},
    {BPE("'vocab': {'a': 0}, 'merges': {}"), MOE_INVALID_ARGUMENT, "'merges'"},
    {BPE("'vocab': {'a': 0}, 'merges': [], 'dropout': 0.1"), MOE_UNIMPLEMENTED, "'dropout'"},
    {BPE("'vocab': {'a': 0}, 'merges': [], 'unk_token': 'u'"), MOE_INVALID_ARGUMENT, "'u'"},
    {BPE("'vocab': {'a': 0}, 'merges': [], 'end_of_word_suffix': '</w>'"), MOE_UNIMPLEMENTED, "'end_of_word_suffix'"},
    {BPE("'vocab': {'a': 0}, 'merges': [], 'byte_fallback': 1"), MOE_INVALID_ARGUMENT, "'byte_fallback'"},
    {"{'added_tokens': [{'id': 7, 'content': 'a'}]}", MOE_INVALID_ARGUMENT, "'a'"},
    {"{'added_tokens': [{'id': 1, 'content': 'c'}]}", MOE_INVALID_ARGUMENT, "id 1"},
    {"{'added_tokens': [{'id': 7}]}", MOE_INVALID_ARGUMENT, "'content'"},
    {"{'added_tokens': [{'id': 7, 'content': 'c', 'lstrip': 'yes'}]}", MOE_INVALID_ARGUMENT, "'lstrip'"},
    {"{'normalizer': {'type': 'Precompiled'}}", MOE_UNIMPLEMENTED, "normalizer: type 'Precompiled'"},
    {"{'normalizer': {'type': 'Sequence'}}", MOE_INVALID_ARGUMENT, "'normalizers'"},
    {PRE("'BertPreTokenizer'"), MOE_UNIMPLEMENTED, "pre_tokenizer: type 'BertPreTokenizer'"},
    {PRE("'Split', 'pattern': {}"), MOE_INVALID_ARGUMENT, "'pattern'"},
    {PRE("'Split', 'pattern': {'String': ' '}, 'behavior': 'Odd'"), MOE_UNIMPLEMENTED, "'Odd'"},
    {PRE("'Split', 'pattern': {'Regex': '(a'}, 'behavior': 'Isolated'"), MOE_INVALID_ARGUMENT, "'(a'"},
    {PRE("'Split', 'pattern': {'Regex': '[a&&]'}, 'behavior': 'Isolated'"), MOE_UNIMPLEMENTED, "class"},
    {POST("'BertProcessing'"), MOE_UNIMPLEMENTED, "post_processor: type 'BertProcessing'"},
    {POST("'TemplateProcessing', 'single': []"), MOE_UNIMPLEMENTED, "template"},
    {POST("'TemplateProcessing', 'single': [{'SpecialToken': {'id': 'x'}}]"), MOE_INVALID_ARGUMENT, "'x'"},
    {"{'decoder': null}", MOE_UNIMPLEMENTED, "decoder"},
    {"{'decoder': {'type': 'WordPiece'}}", MOE_UNIMPLEMENTED, "decoder: type 'WordPiece'"},
    {"{'decoder': {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}}", MOE_UNIMPLEMENTED, "Strip"},
};

static void what_is_not_built_is_refused_by_name(void **state) {
    (void)state;
    moe_tokenizer *tokenizer;
    moe_error err;
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        json_t *json = small_json(refusals[i].change);
        moe_status status = load_json(json, &tokenizer, &err);
        if (status != refusals[i].status || !strstr(err.message, refusals[i].says))
            fail_msg("%s: %s '%s'", refusals[i].change, moe_status_name(status), status ? err.message : "");
        assert_null(tokenizer);
        json_decref(json);
    }
    assert_int_equal(moe_tokenizer_load(SOURCE_DIR "/tests", &tokenizer, &err), MOE_NOT_FOUND);
    assert_int_equal(load_text("{", &tokenizer, &err), MOE_INVALID_ARGUMENT);
    assert_int_equal(load_text("[]", &tokenizer, &err), MOE_UNIMPLEMENTED);
    json_t *good = parse(small_file);
    assert_int_equal(load_json(good, &tokenizer, &err), MOE_OK);
    moe_tokenizer_free(&tokenizer);
    json_decref(good);
}

static void patterns_that_would_mean_something_else_are_refused(void **state) {
    (void)state;
    static const char *const patterns[] = {
        "[[:alpha:]]", "\\h+",    "\\v",
        "\\R",         "\\b",     "\\G",
        "\\K",         "\\1",     "(?m:a)",
        "(?s)a",       "(?<n>a)", "(?#c)",
        "(*F)",        "^a",      "a$",
        "a{,3}",       "a{2}+",   "a{2}?",
        "a{x",         "[]a]",    "[a",
        "[a[b]",       "[a&&]",   "[&&a]",
        "[a-\\d]",     "[a-[b]]", "[[[[[[[[[[[[[[[[[a]]]]]]]]]]]]]]]]]",
        "a(?i)",       "\\pL",    "\\p{L l}",
        "\\x80",       "\\u12",   "\\p{L",
        "\\",
    };
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        moe_regex *regex;
        moe_error err = {0};
        moe_status status = moe_regex_compile(patterns[i], strlen(patterns[i]), false, &regex, &err);
        if (status != MOE_UNIMPLEMENTED) fail_msg("'%s': %s", patterns[i], moe_status_name(status));
        assert_non_null(strstr(err.message, patterns[i]));
        assert_null(regex);
    }
}

/* Backtracking that would take forever ends with an error. */
static void runaway_patterns_end(void **state) {
    (void)state;
    moe_regex *regex;
    moe_regex_scratch *scratch = moe_regex_scratch_new();
    moe_error err = {0};
    char text[64];
    memset(text, 'a', sizeof text - 1);
    text[sizeof text - 1] = 'c';
    bool found;
    assert_int_equal(moe_regex_compile("(?:a+)+(?:b|d)", 14, false, &regex, &err), MOE_OK);
    moe_regex_walk walk = {.text = text, .size = sizeof text};
    assert_int_equal(moe_regex_next(regex, scratch, &walk, &found, &err), MOE_RESOURCE_EXHAUSTED);
    moe_regex_free(&regex);
    moe_regex_scratch_free(&scratch);
}

static void combining_marks_without_end_are_refused(void **state) {
    (void)state;
    json_t *json = small_json("{'normalizer': {'type': 'NFC'}}");
    moe_tokenizer *tokenizer;
    moe_token_ids ids;
    moe_error err = {0};
    assert_int_equal(load_json(json, &tokenizer, &err), MOE_OK);
    moe_buf text = {0};
    for (int i = 0; i < 5000; i++) moe_buf_append_text(&text, i % 2 ? "\xcc\x81" : "\xcc\xa3");
    assert_int_equal(moe_tokenizer_encode(tokenizer, text.data, (size_t)4000 * 2, false, &ids, &err), MOE_OK);
    moe_free(ids.ids);
    assert_int_equal(moe_tokenizer_encode(tokenizer, text.data, text.size, false, &ids, &err), MOE_INVALID_ARGUMENT);
    moe_buf_free(&text);
    moe_tokenizer_free(&tokenizer);
    json_decref(json);
}

/* Every allocation of a load and an encode fails in turn: an error each time, and nothing leaks (the sanitizers look). */
static void allocations_may_fail(void **state) {
    (void)state;
    json_t *json = small_json(
        "{'normalizer': {'type': 'Sequence', 'normalizers': [{'type': 'NFC'}, {'type': 'Replace', 'pattern': {'Regex': 'c+'},"
        " 'content': 'ab'}]}, 'added_tokens': [{'id': 3, 'content': 'x'}, {'id': 4, 'content': 'y', 'special': true}],"
        " 'pre_tokenizer': {'type': 'ByteLevel'}, 'decoder': {'type': 'ByteLevel'}}");
    char *text = json_dumps(json, JSON_COMPACT);
    static const char input[] =
        "abc xy \xc3\xa9"
        "ccab";
    const int num_ids = 6; /* ab ab x y ab ab: the rest is outside the vocabulary */
    int failures = 0;
    for (int64_t countdown = 1; countdown < 1000; countdown++) {
        moe_tokenizer *tokenizer;
        moe_token_ids ids = {0};
        moe_error err = {0};
        int64_t before = moe_alloc_count();
        moe_alloc_fail_after(countdown);
        moe_status status = load_text(text, &tokenizer, &err);
        if (status == MOE_OK) status = moe_tokenizer_encode(tokenizer, input, sizeof input - 1, true, &ids, &err);
        moe_alloc_fail_after(0);
        bool none_failed = moe_alloc_count() - before < countdown;
        if (status == MOE_OK) assert_int_equal(ids.count, num_ids);
        moe_free(ids.ids);
        moe_tokenizer_free(&tokenizer);
        if (none_failed) break;
        if (status == MOE_OK) continue; /* PCRE2's JIT had no memory: the interpreter matches the same */
        assert_int_equal(status, MOE_RESOURCE_EXHAUSTED);
        failures++;
    }
    assert_in_range(failures, 20, 900);
    free(text);
    json_decref(json);
}

static void *encode_often(void *out) {
    static const char text[] = "The quick brown fox, 123 times: caf\xc3\xa9 \xf0\x9f\x98\x80!\n\n<|im_end|>";
    for (int i = 0; i < 200; i++) {
        moe_token_ids ids;
        if (moe_tokenizer_encode(demo, text, sizeof text - 1, false, &ids, NULL) != MOE_OK) return out;
        moe_free(((moe_token_ids *)out)->ids);
        *(moe_token_ids *)out = ids;
    }
    return NULL;
}

static void threads_share_a_tokenizer(void **state) {
    (void)state;
    pthread_t threads[3];
    moe_token_ids ids[3] = {0};
    for (int i = 0; i < 3; i++) assert_int_equal(pthread_create(&threads[i], NULL, encode_often, &ids[i]), 0);
    for (int i = 0; i < 3; i++) {
        void *failed;
        pthread_join(threads[i], &failed);
        assert_null(failed);
        assert_int_equal(ids[i].count, ids[0].count);
        if (i) assert_memory_equal(ids[i].ids, ids[0].ids, (size_t)ids[0].count * sizeof *ids[0].ids);
    }
    for (int i = 0; i < 3; i++) moe_free(ids[i].ids);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(demo_cases_of_the_reference),
        cmocka_unit_test(prompts_of_the_golden_file),
        cmocka_unit_test(variant_cases_of_the_reference),
        cmocka_unit_test(texts_come_back),
        cmocka_unit_test(streamed_parts_are_whole_characters),
        cmocka_unit_test(ill_formed_utf8_is_replaced),
        cmocka_unit_test(lookups),
        cmocka_unit_test(long_texts),
        cmocka_unit_test(what_is_not_built_is_refused_by_name),
        cmocka_unit_test(patterns_that_would_mean_something_else_are_refused),
        cmocka_unit_test(runaway_patterns_end),
        cmocka_unit_test(combining_marks_without_end_are_refused),
        cmocka_unit_test(allocations_may_fail),
        cmocka_unit_test(threads_share_a_tokenizer),
    };
    return cmocka_run_group_tests(tests, load_demo, free_demo);
}
