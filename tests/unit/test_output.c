/* The output processor: stop strings however the tokens split them, stop tokens, limits. */
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
#include "router/engine/output.h"
#include "router/tokenizer/utf8.h"

static moe_tokenizer *demo;

static int load_demo(void **state) {
    (void)state;
    return moe_tokenizer_load(SOURCE_DIR "/models/demo", &demo, NULL) == MOE_OK ? 0 : 1;
}

static int free_demo(void **state) {
    (void)state;
    moe_tokenizer_free(&demo);
    return 0;
}

/* A tokenizer of all substrings of a text, so that any of its splits can be fed. */
static moe_tokenizer *substring_tokenizer(const char *text) {
    char folder[] = "/tmp/moesaic-output-XXXXXX", path[64], seen[4096] = " ";
    size_t size = strlen(text);
    int id = 0;
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/tokenizer.json", folder);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fprintf(file, "{\"model\": {\"type\": \"BPE\", \"merges\": [], \"vocab\": {");
    for (size_t from = 0; from < size; from++) {
        for (size_t length = 1; from + length <= size; length++) {
            char word[64];
            snprintf(word, sizeof word, " %.*s ", (int)length, text + from);
            if (strstr(seen, word)) continue;
            assert_true(strlen(seen) + strlen(word) < sizeof seen);
            memcpy(seen + strlen(seen), word, strlen(word) + 1);
            fprintf(file, "%s\"%.*s\": %d", id ? ", " : "", (int)length, text + from, id);
            id++;
        }
    }
    fprintf(file, "}}, \"decoder\": {\"type\": \"Fuse\"}}");
    fclose(file);
    moe_tokenizer *tokenizer;
    moe_error err = {0};
    if (moe_tokenizer_load(folder, &tokenizer, &err) != MOE_OK) fail_msg("%s", err.message);
    unlink(path);
    rmdir(folder);
    return tokenizer;
}

typedef struct stop_case {
    const char *text;
    const char *stops[3];
    bool include;
    const char *expected; /* what the client gets */
    const char *reason;   /* NULL: ended by length */
} stop_case;

static const stop_case stop_cases[] = {
    {"abSTOPcd", {"STOP"}, false, "ab", "STOP"},
    {"abSTOPcd", {"STOP"}, true, "abSTOP", "STOP"},
    {"abSTOcd", {"STOP"}, false, "abSTOcd", NULL},
    {"abSTO", {"STOP"}, false, "abSTO", NULL}, /* held back, then let go at the end */
    {"STOPabc", {"STOP"}, false, "", "STOP"},
    {"abcdSTOP", {"STOP"}, false, "abcd", "STOP"},
    {"aaaabaaab", {"aaab"}, false, "a", "aaab"},
    {"abababac", {"ababac"}, false, "ab", "ababac"},
    {"abcdefg", {"abcdx", "bc"}, false, "a", "bc"},      /* another stop ended the one that had begun */
    {"abcdefg", {"bcde", "cd", "d"}, false, "ab", "cd"}, /* complete together with "d": the longer */
    {"abcdefg", {"bcdef", "cd"}, true, "abcd", "cd"},    /* complete first */
    {"xSTOPyz", {"zz", "STOP", "TO"}, false, "xS", "TO"},
    {"abcabcab", {"b"}, false, "a", "b"},
};

/* The least text that must be out after `text`: all but the longest end that could become a stop string. */
static size_t certain_bytes(const stop_case *c, const char *text, size_t size) {
    size_t held = 0;
    for (int i = 0; i < 3 && c->stops[i]; i++)
        for (size_t n = strlen(c->stops[i]) - 1; n > held; n--)
            if (n <= size && memcmp(text + size - n, c->stops[i], n) == 0) held = n;
    return size - held;
}

static moe_output_processor *open_processor(const moe_tokenizer *tokenizer, const moe_sampling_params *sampling,
                                            const char *const *stops, int32_t num_stops, bool include) {
    static const int32_t eos[] = {2, 0};
    moe_output_config config = {.tokenizer = tokenizer,
                                .sampling = sampling,
                                .eos_ids = eos,
                                .num_eos = 2,
                                .stop = stops,
                                .num_stop = num_stops,
                                .include_stop_in_output = include};
    moe_output_processor *processor;
    moe_error err = {0};
    if (moe_output_processor_new(&config, &processor, &err) != MOE_OK) fail_msg("%s", err.message);
    return processor;
}

static int32_t count_stops(const char *const *stops) {
    int32_t count = 0;
    while (count < 3 && stops[count]) count++;
    return count;
}

/* Feeds the text cut where `cuts` has a bit (bit i: after byte i). */
static void feed_split(const stop_case *c, const moe_tokenizer *tokenizer, unsigned cuts) {
    size_t size = strlen(c->text), from = 0;
    int pieces = __builtin_popcount(cuts) + 1;
    moe_sampling_params sampling = {.max_tokens = pieces, .ignore_eos = true};
    moe_output_processor *p = open_processor(tokenizer, &sampling, c->stops, count_stops(c->stops), c->include);
    moe_buf got = {0};
    moe_output out = {0};
    for (size_t at = 0; at < size && out.finish == MOE_FINISH_NONE; at++) {
        if (at + 1 < size && !(cuts >> at & 1)) continue;
        char word[64];
        snprintf(word, sizeof word, "%.*s", (int)(at + 1 - from), c->text + from);
        from = at + 1;
        int32_t id = moe_tokenizer_id_of(tokenizer, word);
        assert_true(id >= 0);
        moe_output_processor_feed(p, id, &out);
        assert_int_equal(out.num_tokens, 1);
        assert_int_equal(out.token_ids[0], id);
        assert_int_equal(out.stop_token_id, -1);
        moe_buf_append(&got, out.text, out.text_bytes);
        if (out.finish == MOE_FINISH_NONE) assert_int_equal(got.size, certain_bytes(c, c->text, from));
    }
    if (strcmp(moe_buf_text(&got), c->expected) != 0)
        fail_msg("'%s' cut by %x: '%s' instead of '%s'", c->text, cuts, moe_buf_text(&got), c->expected);
    assert_int_equal(out.finish, c->reason ? MOE_FINISH_STOP : MOE_FINISH_LENGTH);
    if (c->reason)
        assert_string_equal(out.stop_reason, c->reason);
    else
        assert_null(out.stop_reason);
    moe_buf_free(&got);
    moe_output_processor_free(&p);
}

static void stop_strings_split_at_every_position(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof stop_cases / sizeof *stop_cases; i++) {
        moe_tokenizer *tokenizer = substring_tokenizer(stop_cases[i].text);
        for (unsigned cuts = 0; cuts < 1u << (strlen(stop_cases[i].text) - 1); cuts++)
            feed_split(&stop_cases[i], tokenizer, cuts);
        moe_tokenizer_free(&tokenizer);
    }
}

/* The demo model's token of one byte. */
static int32_t byte_token(unsigned char byte) {
    for (int32_t id = 3; id < 259; id++) {
        moe_buf bytes = {0};
        moe_tokenizer_token_bytes(demo, id, &bytes);
        bool same = bytes.size == 1 && (unsigned char)bytes.data[0] == byte;
        moe_buf_free(&bytes);
        if (same) return id;
    }
    fail_msg("no token of byte %d", byte);
    return -1;
}

static void parts_are_whole_characters(void **state) {
    (void)state;
    static const char text[] = "caf\xc3\xa9 \xf0\x9f\x98\x80\xe2\x82\xac \xff!\xe2\x82";
    static const char expected[] = "caf\xc3\xa9 \xf0\x9f\x98\x80\xe2\x82\xac \xef\xbf\xbd!\xef\xbf\xbd";
    static const char *const stops[] = {"\xe2\x82\xac!", "\xf0\x9f\x98\x81"};
    moe_sampling_params sampling = {.max_tokens = sizeof text - 1};
    moe_output_processor *p = open_processor(demo, &sampling, stops, 2, false);
    moe_buf got = {0};
    moe_output out;
    for (size_t i = 0; i < sizeof text - 1; i++) {
        moe_buf same = {0};
        moe_output_processor_feed(p, byte_token((unsigned char)text[i]), &out);
        moe_utf8_append_lossy(out.text, out.text_bytes, &same);
        assert_int_equal(same.size, out.text_bytes);
        if (same.size) assert_memory_equal(same.data, out.text, same.size);
        moe_buf_append(&got, out.text, out.text_bytes);
        moe_buf_free(&same);
    }
    assert_int_equal(out.finish, MOE_FINISH_LENGTH);
    assert_string_equal(got.data, expected);
    moe_buf_free(&got);
    moe_output_processor_free(&p);
}

static void stop_tokens_end_and_add_no_text(void **state) {
    (void)state;
    int32_t a = byte_token('a'), b = byte_token('b');
    const struct {
        moe_sampling_params sampling;
        int32_t ids[4];
        int ends_at; /* which of the ids ends it */
        int32_t stop_token;
        const char *text;
        bool include;
    } cases[] = {
        {{.max_tokens = 9}, {a, 2}, 1, 2, "a", false},
        {{.max_tokens = 9}, {a, 0}, 1, 0, "a", false},
        {{.max_tokens = 9, .stop_token_ids = {b}, .num_stop_token_ids = 1}, {a, b}, 1, b, "a", false},
        {{.max_tokens = 9, .stop_token_ids = {b}, .num_stop_token_ids = 1}, {a, b}, 1, b, "ab", true},
        {{.max_tokens = 9, .skip_special_tokens = true}, {a, 2}, 1, 2, "a", true},
        {{.max_tokens = 9}, {a, 2}, 1, 2, "a<|im_end|>", true},
        {{.max_tokens = 3, .ignore_eos = true}, {2, a, 2}, 2, -1, "<|im_end|>a<|im_end|>", false},
        {{.max_tokens = 3, .ignore_eos = true, .skip_special_tokens = true}, {2, a, 2}, 2, -1, "a", false},
        {{.max_tokens = 9, .ignore_eos = true, .stop_token_ids = {2}, .num_stop_token_ids = 1}, {a, 2}, 1, 2, "a", false},
        {{.max_tokens = 9, .min_tokens = 2, .stop_token_ids = {b}, .num_stop_token_ids = 1}, {a, b, b}, 2, b, "ab", false},
        {{.max_tokens = 2}, {a, 2}, 1, 2, "a", false}, /* both: the token is the reason */
        {{.max_tokens = 1}, {a}, 0, -1, "a", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        moe_output_processor *p = open_processor(demo, &cases[i].sampling, NULL, 0, cases[i].include);
        moe_buf got = {0};
        for (int at = 0; at <= cases[i].ends_at; at++) {
            moe_output out;
            moe_output_processor_feed(p, cases[i].ids[at], &out);
            moe_buf_append(&got, out.text, out.text_bytes);
            moe_finish_reason last = cases[i].stop_token >= 0 ? MOE_FINISH_STOP : MOE_FINISH_LENGTH;
            assert_int_equal(out.finish, at == cases[i].ends_at ? last : MOE_FINISH_NONE);
            assert_int_equal(out.stop_token_id, at == cases[i].ends_at ? cases[i].stop_token : -1);
            assert_null(out.stop_reason);
        }
        assert_string_equal(moe_buf_text(&got), cases[i].text);
        moe_buf_free(&got);
        moe_output_processor_free(&p);
    }
}

static void stop_strings_wait_for_min_tokens(void **state) {
    (void)state;
    moe_sampling_params sampling = {.max_tokens = 10, .min_tokens = 2};
    static const char *const stops[] = {"ab"};
    static const char text[] = "ababab";
    moe_output_processor *p = open_processor(demo, &sampling, stops, 1, false);
    moe_buf got = {0};
    moe_output out = {0};
    int fed = 0;
    while (out.finish == MOE_FINISH_NONE && text[fed]) {
        moe_output_processor_feed(p, byte_token((unsigned char)text[fed++]), &out);
        moe_buf_append(&got, out.text, out.text_bytes);
    }
    assert_int_equal(fed, 4);
    assert_string_equal(got.data, "ab");
    assert_string_equal(out.stop_reason, "ab");
    moe_buf_free(&got);
    moe_output_processor_free(&p);
}

static void without_a_tokenizer_there_is_no_text(void **state) {
    (void)state;
    moe_sampling_params sampling = {.max_tokens = 3};
    moe_output_processor *p = open_processor(NULL, &sampling, NULL, 0, false);
    moe_output out;
    moe_output_processor_feed(p, 5, &out);
    assert_int_equal(out.finish, MOE_FINISH_NONE);
    assert_int_equal(out.text_bytes, 0);
    assert_string_equal(out.text, "");
    moe_output_processor_feed(p, 2, &out);
    assert_int_equal(out.finish, MOE_FINISH_STOP);
    assert_int_equal(out.stop_token_id, 2);
    moe_output_processor_free(&p);
    moe_output_processor_free(&p);
}

static void bad_stop_strings_are_refused(void **state) {
    (void)state;
    char long_stop[MOE_MAX_STOP_STRING_BYTES + 2];
    memset(long_stop, 'a', sizeof long_stop - 1);
    long_stop[sizeof long_stop - 1] = '\0';
    const char *const stops[MOE_MAX_STOP_STRINGS + 1] = {"a", "", long_stop};
    moe_sampling_params sampling = {.max_tokens = 1};
    const struct {
        const moe_tokenizer *tokenizer;
        int first;
        int32_t count;
    } cases[] = {{NULL, 0, 1}, {demo, 0, 2}, {demo, 2, 1}, {demo, 0, MOE_MAX_STOP_STRINGS + 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        moe_output_config config = {
            .tokenizer = cases[i].tokenizer, .sampling = &sampling, .stop = stops + cases[i].first, .num_stop = cases[i].count};
        moe_output_processor *p;
        moe_error err = {0};
        assert_int_equal(moe_output_processor_new(&config, &p, &err), MOE_INVALID_ARGUMENT);
        assert_null(p);
    }
}

static void out_of_memory_ends_the_request(void **state) {
    (void)state;
    moe_sampling_params sampling = {.max_tokens = 9};
    static const char *const stops[] = {"x", "y"};
    moe_output_config config = {.tokenizer = demo, .sampling = &sampling, .stop = stops, .num_stop = 2};
    moe_output_processor *p;
    for (int64_t countdown = 1; countdown <= 3; countdown++) {
        moe_alloc_fail_after(countdown);
        assert_int_equal(moe_output_processor_new(&config, &p, NULL), MOE_RESOURCE_EXHAUSTED);
        moe_alloc_fail_after(0);
        assert_null(p);
    }
    assert_int_equal(moe_output_processor_new(&config, &p, NULL), MOE_OK);
    int32_t token = byte_token('a');
    moe_output out;
    moe_alloc_fail_after(1);
    moe_output_processor_feed(p, token, &out);
    moe_alloc_fail_after(0);
    assert_int_equal(out.finish, MOE_FINISH_ERROR);
    assert_int_equal(out.status, MOE_RESOURCE_EXHAUSTED);
    assert_string_not_equal(out.message, "");
    moe_output_processor_free(&p);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(stop_strings_split_at_every_position), cmocka_unit_test(parts_are_whole_characters),
        cmocka_unit_test(stop_tokens_end_and_add_no_text),      cmocka_unit_test(stop_strings_wait_for_min_tokens),
        cmocka_unit_test(without_a_tokenizer_there_is_no_text), cmocka_unit_test(bad_stop_strings_are_refused),
        cmocka_unit_test(out_of_memory_ends_the_request),
    };
    return cmocka_run_group_tests(tests, load_demo, free_demo);
}
