/* The chat template interpreter against what jinja2 rendered (tests/golden/chat_template_oracle.py), its limits, and loading. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "router/chat/chat_fallback.h"
#include "router/chat/chat_template.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test.h"

#define DATA SOURCE_DIR "/tests/data/chat/"

static char *read_text(const char *path) {
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    char *text = calloc(1, 1 << 16);
    assert_non_null(text);
    size_t size = fread(text, 1, (1 << 16) - 1, file);
    assert_true(size > 0 && size < (1 << 16) - 1);
    fclose(file);
    return text;
}

static char *template_file(const char *name) {
    char path[512];
    snprintf(path, sizeof path, DATA "templates/%s", name);
    return read_text(path);
}

/* Parses and renders; variables are deep-copied, as rendering adds to them. */
static moe_status render(const char *source, const json_t *variables, moe_buf *out, moe_error *err) {
    moe_chat_template *t = NULL;
    moe_status status = moe_chat_template_parse(source, &t, err);
    if (status != MOE_OK) {
        assert_null(t);
        return status;
    }
    json_t *copy = json_deep_copy(variables);
    status = moe_chat_template_render(t, copy, out, err);
    json_decref(copy);
    moe_chat_template_free(&t);
    return status;
}

/* ---- jinja2's answers ---- */

static bool replay(const json_t *cases, const json_t *c) {
    const char *name = json_string_value(json_object_get(c, "name")), *file = json_string_value(json_object_get(c, "file"));
    const char *wanted_error = json_string_value(json_object_get(c, "error"));
    const json_t *expected = json_object_get(c, "expected");
    const json_t *variables =
        json_array_get(json_object_get(cases, "variables"), json_integer_value(json_object_get(c, "variables")));
    char *own = file ? template_file(file) : NULL;
    moe_buf out = {0};
    moe_error err = {0};
    moe_status status = render(own ? own : json_string_value(json_object_get(c, "template")), variables, &out, &err);
    bool good = wanted_error ? status != MOE_OK && strstr(err.message, wanted_error)
                             : status == MOE_OK && out.size == json_string_length(expected) &&
                                   memcmp(moe_buf_text(&out), json_string_value(expected), out.size) == 0;
    if (!good)
        print_error("%s: %s\n  jinja2: %s%s\n  ours:   %s%s\n", name,
                    file ? file : json_string_value(json_object_get(c, "template")), wanted_error ? "error " : "",
                    json_string_value(wanted_error ? json_object_get(c, "jinja2_says") : expected), status ? "error " : "",
                    status ? err.message : moe_buf_text(&out));
    moe_buf_free(&out);
    free(own);
    return good;
}

static void test_against_jinja2(void **state) {
    (void)state;
    json_error_t error;
    json_t *cases = json_load_file(DATA "cases.json", 0, &error), *c;
    size_t index, wrong = 0;
    assert_non_null(cases);
    json_array_foreach(json_object_get(cases, "cases"), index, c) wrong += !replay(cases, c);
    assert_true(index > 700);
    assert_int_equal(wrong, 0);
    json_decref(cases);
}

/* ---- bad input ---- */

static json_t *conversation(void) {
    return json_pack("{s:[{s:s,s:s},{s:s,s:s}],s:b,s:s,s:s}", "messages", "role", "user", "content", "Hi", "role", "assistant",
                     "content", "<think>x</think>Ho", "add_generation_prompt", 1, "bos_token", "<s>", "eos_token", "</s>");
}

/* Every prefix, and every byte in turn replaced, is parsed and where possible rendered without harm. */
static void mutate(const char *source) {
    json_t *variables = conversation();
    size_t size = strlen(source), parsed = 0;
    char *copy = strdup(source);
    for (size_t i = 0; i <= size; i++) {
        static const char replacements[] = "}%'({|-";
        moe_buf out = {0};
        moe_error err = {0};
        copy[i] = '\0';
        parsed += render(copy, variables, &out, &err) != MOE_INVALID_ARGUMENT || !strstr(err.message, "the template ends");
        copy[i] = i < size ? replacements[i % (sizeof replacements - 1)] : '\0';
        moe_buf_clear(&out);
        render(copy, variables, &out, &err);
        copy[i] = source[i];
        moe_buf_free(&out);
    }
    assert_true(parsed > 0);
    free(copy);
    json_decref(variables);
}

static void test_mutations(void **state) {
    (void)state;
    static const char *const files[] = {"llama2.jinja",   "llama3.jinja",  "qwen3.jinja", "mistral_tools.jinja",
                                        "deepseek.jinja", "gpt_oss.jinja", "parts.jinja"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char *source = template_file(files[i]);
        mutate(source);
        free(source);
    }
}

static void refused(const char *source, moe_status wanted, const char *part) {
    json_t *variables = json_pack("{s:[i]}", "l", 1);
    moe_buf out = {0};
    moe_error err = {0};
    moe_status status = render(source, variables, &out, &err);
    if (status != wanted || !strstr(err.message, part)) fail_msg("'%.60s': %s %s", source, moe_status_name(status), err.message);
    assert_int_equal(out.size, 0);
    moe_buf_free(&out);
    json_decref(variables);
}

static void test_not_built(void **state) {
    (void)state;
    refused("a\n{% include 'x' %}", MOE_INVALID_ARGUMENT, "line 2: the tag 'include'");
    refused("{% for i in l recursive %}{% endfor %}", MOE_INVALID_ARGUMENT, "recursive loops are not built");
    refused("\n\n{{ l | urlize }}", MOE_INVALID_ARGUMENT, "line 3: the filter 'urlize' is not built");
    refused("{{ l is escaped }}", MOE_INVALID_ARGUMENT, "the test 'escaped' is not built");
    refused("{{ range(*l) }}", MOE_INVALID_ARGUMENT, "* and ** arguments are not built");
    refused("{{ '\\N{DASH}' }}", MOE_INVALID_ARGUMENT, "escape");
    refused("{{ '\\ud83d' }}", MOE_INVALID_ARGUMENT, "escape");
    refused("{{ 99999999999999999999 }}", MOE_INVALID_ARGUMENT, "64 bits");
    refused("{{ 9223372036854775807 + 1 }}", MOE_OUT_OF_RANGE, "64 bits");
    refused("\xff{{ 1 }}", MOE_INVALID_ARGUMENT, "UTF-8");
    refused("a\nb\n{{ l.append(1) }}", MOE_INVALID_ARGUMENT, "line 3: ");
}

static char *repeated(const char *before, const char *part, size_t times, const char *after) {
    moe_buf text = {0};
    moe_buf_append_text(&text, before);
    for (size_t i = 0; i < times; i++) moe_buf_append_text(&text, part);
    moe_buf_append_text(&text, after);
    assert_false(text.failed);
    return text.data;
}

static void refused_repeated(const char *before, const char *part, size_t times, const char *after, moe_status wanted,
                             const char *why) {
    char *source = repeated(before, part, times, after);
    refused(source, wanted, why);
    moe_free(source);
}

static void test_limits(void **state) {
    (void)state;
    refused("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", MOE_INVALID_ARGUMENT, "MiB");
    refused_repeated("{% for i in range(90000) %}{{ 0", "+ i", 60, "}}{% endfor %}", MOE_INVALID_ARGUMENT, "steps");
    refused("{% set ns = namespace(s='0123456789') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
            MOE_INVALID_ARGUMENT, "MiB");
    refused("{% set ns = namespace(s=[1]) %}{% for i in range(64) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
            MOE_INVALID_ARGUMENT, "steps");
    refused("{% set ns = namespace(s=[1]) %}{% for i in range(9999) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s }}",
            MOE_INVALID_ARGUMENT, "too deep");
    refused("{% set ns = namespace(s=[1]) %}{% for i in range(9999) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s | tojson }}",
            MOE_INVALID_ARGUMENT, "too deep");
    refused("{% set ns = namespace(s=[1]) %}{% for i in range(9999) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s == [ns.s] }}",
            MOE_INVALID_ARGUMENT, "too deep");
    refused("{{ 'x' * 99999999999 }}", MOE_INVALID_ARGUMENT, "too long");
    refused("{% set a = 'x' * 1000000 %}{% for i in range(99) %}{{ a }}{% endfor %}", MOE_INVALID_ARGUMENT, "output");
    refused("{% macro r(k) %}{{ r(k) }}{{ r(k) }}{% endmacro %}{{ r(0) }}", MOE_INVALID_ARGUMENT, "nested");
    refused_repeated("{{ ", "(", 5000, "1", MOE_INVALID_ARGUMENT, "nested");
    refused_repeated("{{ ", "-", 5000, "1 }}", MOE_INVALID_ARGUMENT, "nested");
    refused_repeated("{{ ", "not ", 5000, "1 }}", MOE_INVALID_ARGUMENT, "nested");
    refused_repeated("", "{% if 1 %}", 5000, "", MOE_INVALID_ARGUMENT, "nested");
    refused_repeated("{{ 1 ", "+ 1", 100000, " }}", MOE_INVALID_ARGUMENT, "nested");
    refused_repeated("{{ l", "|first", 10000, " }}", MOE_INVALID_ARGUMENT, "nested");
    refused_repeated("", "x", 2 << 20, "", MOE_INVALID_ARGUMENT, "longer than");
}

/* Each allocation in turn fails: an error, no leak (the sanitizers see), never a wrong text. */
static void test_out_of_memory(void **state) {
    (void)state;
    json_t *variables = conversation();
    char *source = template_file("qwen3.jinja");
    moe_buf whole = {0}, out = {0};
    moe_error err;
    assert_int_equal(render(source, variables, &whole, &err), MOE_OK);
    moe_status status = MOE_INTERNAL;
    int64_t failed = 0;
    for (int64_t n = 1; status != MOE_OK && n < 10000; n++) {
        moe_buf_free(&out);
        moe_alloc_fail_after(n);
        status = render(source, variables, &out, &err);
        moe_alloc_fail_after(0);
        failed += status != MOE_OK;
        if (status == MOE_OK) assert_string_equal(moe_buf_text(&out), moe_buf_text(&whole));
    }
    assert_int_equal(status, MOE_OK);
    assert_true(failed > 3);
    moe_buf_free(&out);
    moe_buf_free(&whole);
    free(source);
    json_decref(variables);
}

/* ---- loading ---- */

static void write_file(const moe_test_dir *dir, const char *name, const char *text) {
    moe_test_write_file(dir, name, text, strlen(text));
}

static void loads(const char *dir, const char *fallback, json_t *variables, const char *expected) {
    moe_chat_template *t;
    moe_error err = {0};
    moe_buf out = {0};
    if (moe_chat_template_load(dir, fallback, &t, &err) != MOE_OK) fail_msg("%s", err.message);
    if (moe_chat_template_render(t, variables, &out, &err) != MOE_OK) fail_msg("%s", err.message);
    assert_string_equal(moe_buf_text(&out), expected);
    moe_buf_free(&out);
    moe_chat_template_free(&t);
    moe_chat_template_free(&t);
    json_decref(variables);
}

static json_t *hello(void) {
    return json_pack("{s:[{s:s,s:s}],s:b}", "messages", "role", "user", "content", "Hi", "add_generation_prompt", 1);
}

static void test_load(void **state) {
    (void)state;
    moe_test_dir dir = moe_test_dir_new();
    loads(SOURCE_DIR "/models/demo", NULL, hello(), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    loads(dir.path, "chatml", hello(), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    write_file(
        &dir, "tokenizer_config.json",
        "{\"bos_token\": {\"content\": \"<B>\"}, \"eos_token\": \"<E>\", \"pad_token\": null,"
        " \"model_max_length\": 1000000000000000019884624838656,"
        " \"chat_template\": [{\"name\": \"tool_use\", \"template\": \"tools {{ tools | length }}\"},"
        " {\"name\": \"default\", \"template\": \"{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}\"}]}");
    loads(dir.path, NULL, hello(), "<B>Hi<E>");
    json_t *with_tools = hello();
    json_object_set_new(with_tools, "tools", json_pack("[i,i]", 1, 2));
    loads(dir.path, NULL, with_tools, "tools 2");
    json_t *own_bos = hello();
    json_object_set_new(own_bos, "bos_token", json_string("mine "));
    loads(dir.path, NULL, own_bos, "mine Hi<E>");
    write_file(&dir, "chat_template.jinja", "file {{ bos_token }} {{ tools is none }}\n");
    loads(dir.path, NULL, hello(), "file <B> True");
    moe_test_dir_free(&dir);
}

static void does_not_load(const char *dir, const char *fallback, moe_status wanted, const char *part) {
    moe_chat_template *t;
    moe_error err = {0};
    assert_int_equal(moe_chat_template_load(dir, fallback, &t, &err), wanted);
    assert_null(t);
    if (!strstr(err.message, part)) fail_msg("%s", err.message);
}

static void test_load_refuses(void **state) {
    (void)state;
    moe_test_dir dir = moe_test_dir_new();
    does_not_load(dir.path, NULL, MOE_NOT_FOUND, "no chat template");
    does_not_load(dir.path, "vicuna", MOE_INVALID_ARGUMENT, "chatml, llama2, llama3, mistral");
    write_file(&dir, "tokenizer_config.json", "{\"chat_template\": ");
    does_not_load(dir.path, NULL, MOE_INVALID_ARGUMENT, "tokenizer_config.json");
    write_file(&dir, "tokenizer_config.json", "{\"chat_template\": \"a\\n{% bogus %}\"}");
    does_not_load(dir.path, "chatml", MOE_INVALID_ARGUMENT, "line 2: the tag 'bogus'");
    write_file(&dir, "tokenizer_config.json", "{}");
    does_not_load(dir.path, NULL, MOE_NOT_FOUND, "no chat template");
    moe_test_dir_free(&dir);
}

static void fallback_renders(const char *name, const char *expected) {
    json_t *variables = json_pack("{s:[{s:s,s:s},{s:s,s:s},{s:s,s:s},{s:s,s:s}],s:b,s:s,s:s}", "messages", "role", "system",
                                  "content", "S", "role", "user", "content", "U", "role", "assistant", "content", "A", "role",
                                  "user", "content", "V", "add_generation_prompt", 1, "bos_token", "<s>", "eos_token", "</s>");
    moe_buf out = {0};
    moe_error err = {0};
    if (render(moe_chat_fallback_source(name), variables, &out, &err) != MOE_OK) fail_msg("%s: %s", name, err.message);
    assert_string_equal(moe_buf_text(&out), expected);
    moe_buf_free(&out);
    json_decref(variables);
}

static void test_fallbacks(void **state) {
    (void)state;
    fallback_renders("chatml",
                     "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
                     "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n");
    fallback_renders("llama2", "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST]");
    fallback_renders("llama3",
                     "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU"
                     "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user"
                     "<|end_header_id|>\n\nV<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n");
    fallback_renders("mistral", "<s> [INST] S\n\nU [/INST] A</s> [INST] V [/INST]");
    assert_null(moe_chat_fallback_source("vicuna"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_jinja2), cmocka_unit_test(test_mutations),     cmocka_unit_test(test_not_built),
        cmocka_unit_test(test_limits),         cmocka_unit_test(test_out_of_memory), cmocka_unit_test(test_load),
        cmocka_unit_test(test_load_refuses),   cmocka_unit_test(test_fallbacks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
