#include <string.h>

#include "common/alloc.h"
#include "router/tokenizer/component.h"
#include "router/tokenizer/pretokenize.h"

/* GPT-2's pattern, which ByteLevel uses by itself. */
#define GPT2_PATTERN "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
/* Rust's is_ascii_punctuation or category P. */
#define PUNCTUATION_PATTERN "[\\p{P}$+<=>^`|~]"

static moe_status add_step(moe_pretokenizer *out, moe_pretokenizer_step step, moe_error *err) {
    if (out->num_steps == MOE_PRETOKENIZER_MAX_STEPS) {
        moe_regex_free(&step.pattern);
        moe_free(step.replacement);
        return moe_fail(err, MOE_UNIMPLEMENTED, "a pre-tokenizer of more than %d steps", MOE_PRETOKENIZER_MAX_STEPS);
    }
    out->steps[out->num_steps++] = step;
    return MOE_OK;
}

static moe_status add_split(const char *pattern, size_t size, bool literal, moe_split_behavior behavior, bool invert,
                            moe_pretokenizer *out, moe_error *err) {
    moe_pretokenizer_step step = {.kind = MOE_PRETOKENIZE_SPLIT, .behavior = behavior, .invert = invert};
    moe_status status = moe_regex_compile(pattern, size, literal, &step.pattern, err);
    return status == MOE_OK ? add_step(out, step, err) : status;
}

static moe_status read_behavior(const json_t *json, moe_split_behavior fallback, moe_split_behavior *out, moe_error *err) {
    static const char *const names[] = {[MOE_SPLIT_REMOVED] = "Removed",
                                        [MOE_SPLIT_ISOLATED] = "Isolated",
                                        [MOE_SPLIT_CONTIGUOUS] = "Contiguous",
                                        [MOE_SPLIT_MERGED_WITH_PREVIOUS] = "MergedWithPrevious",
                                        [MOE_SPLIT_MERGED_WITH_NEXT] = "MergedWithNext"};
    const char *name = NULL;
    moe_status status = moe_json_text(json, "behavior", &name, err);
    if (status != MOE_OK) return status;
    *out = fallback;
    if (!name) return MOE_OK;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(names[i], name) == 0) return *out = (moe_split_behavior)i, MOE_OK;
    return moe_fail(err, MOE_UNIMPLEMENTED, "'behavior' '%s' is not supported", name);
}

static moe_status load_split(const json_t *json, void *out, moe_error *err) {
    const char *pattern;
    size_t size;
    bool literal, invert;
    moe_split_behavior behavior;
    moe_status status = moe_json_pattern(json, &pattern, &size, &literal, err);
    if (status == MOE_OK) status = moe_json_bool(json, "invert", false, &invert, err);
    if (status == MOE_OK) status = read_behavior(json, MOE_SPLIT_ISOLATED, &behavior, err);
    return status == MOE_OK ? add_split(pattern, size, literal, behavior, invert, out, err) : status;
}

static moe_status load_byte_level(const json_t *json, void *out, moe_error *err) {
    bool prefix_space, use_regex;
    moe_status status = moe_json_bool(json, "add_prefix_space", true, &prefix_space, err);
    if (status == MOE_OK) status = moe_json_bool(json, "use_regex", true, &use_regex, err);
    if (status == MOE_OK && prefix_space)
        status = add_step(out, (moe_pretokenizer_step){.kind = MOE_PRETOKENIZE_PREFIX_SPACE}, err);
    if (status == MOE_OK && use_regex)
        status = add_split(GPT2_PATTERN, strlen(GPT2_PATTERN), false, MOE_SPLIT_ISOLATED, false, out, err);
    return status == MOE_OK ? add_step(out, (moe_pretokenizer_step){.kind = MOE_PRETOKENIZE_BYTES}, err) : status;
}

static moe_status load_digits(const json_t *json, void *out, moe_error *err) {
    bool individual;
    moe_status status = moe_json_bool(json, "individual_digits", false, &individual, err);
    if (status != MOE_OK) return status;
    return add_split("\\p{N}", 5, false, individual ? MOE_SPLIT_ISOLATED : MOE_SPLIT_CONTIGUOUS, false, out, err);
}

static moe_status load_punctuation(const json_t *json, void *out, moe_error *err) {
    moe_split_behavior behavior;
    moe_status status = read_behavior(json, MOE_SPLIT_ISOLATED, &behavior, err);
    if (status != MOE_OK) return status;
    return add_split(PUNCTUATION_PATTERN, strlen(PUNCTUATION_PATTERN), false, behavior, false, out, err);
}

static moe_status load_whitespace(const json_t *json, void *out, moe_error *err) {
    (void)json;
    /* Here \w is Rust's, which counts the joiners as word characters. */
    static const char pattern[] = "[\\w\\x{200c}\\x{200d}]+|[^\\w\\s\\x{200c}\\x{200d}]+";
    return add_split(pattern, sizeof pattern - 1, false, MOE_SPLIT_REMOVED, true, out, err);
}

static moe_status load_whitespace_split(const json_t *json, void *out, moe_error *err) {
    (void)json;
    return add_split("\\s", 2, false, MOE_SPLIT_REMOVED, false, out, err);
}

static moe_status read_prepend_scheme(const json_t *json, moe_prepend_scheme *out, moe_error *err) {
    const char *name = NULL;
    bool prefix_space;
    moe_status status = moe_json_text(json, "prepend_scheme", &name, err);
    if (status == MOE_OK) status = moe_json_bool(json, "add_prefix_space", true, &prefix_space, err);
    if (status != MOE_OK) return status;
    if (!name) name = prefix_space ? "always" : "never";
    *out = strcmp(name, "always") == 0 ? MOE_PREPEND_ALWAYS : strcmp(name, "first") == 0 ? MOE_PREPEND_FIRST : MOE_PREPEND_NEVER;
    if (*out == MOE_PREPEND_NEVER && strcmp(name, "never") != 0)
        return moe_fail(err, MOE_UNIMPLEMENTED, "'prepend_scheme' '%s' is not supported", name);
    return MOE_OK;
}

static moe_status load_metaspace(const json_t *json, void *out, moe_error *err) {
    moe_pretokenizer_step step = {.kind = MOE_PRETOKENIZE_METASPACE};
    const char *replacement = NULL;
    bool splits;
    moe_status status = moe_json_text(json, "replacement", &replacement, err);
    if (status == MOE_OK) status = moe_json_bool(json, "split", true, &splits, err);
    if (status == MOE_OK) status = read_prepend_scheme(json, &step.prepend, err);
    if (status != MOE_OK) return status;
    if (!replacement || !*replacement) return moe_fail(err, MOE_INVALID_ARGUMENT, "'replacement' is missing");
    step.replacement = moe_strdup(replacement);
    if (!step.replacement) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    status = add_step(out, step, err);
    if (status != MOE_OK || !splits) return status;
    return add_split(replacement, strlen(replacement), true, MOE_SPLIT_MERGED_WITH_NEXT, false, out, err);
}

static const moe_component_row rows[] = {{"ByteLevel", load_byte_level},
                                         {"Digits", load_digits},
                                         {"Metaspace", load_metaspace},
                                         {"Punctuation", load_punctuation},
                                         {"Split", load_split},
                                         {"Whitespace", load_whitespace},
                                         {"WhitespaceSplit", load_whitespace_split}};
static const moe_component_table table = {"pretokenizers", rows, sizeof rows / sizeof *rows};

moe_status moe_pretokenizer_load(const json_t *json, moe_pretokenizer *out, moe_error *err) {
    moe_status status = !json || json_is_null(json) ? MOE_OK : moe_component_load(&table, json, out, err);
    if (status == MOE_OK) return MOE_OK;
    moe_pretokenizer_free(out);
    return moe_fail_prefix(err, status, "pre_tokenizer");
}

void moe_pretokenizer_free(moe_pretokenizer *pretokenizer) {
    for (int i = 0; i < pretokenizer->num_steps; i++) {
        moe_regex_free(&pretokenizer->steps[i].pattern);
        moe_free(pretokenizer->steps[i].replacement);
    }
    *pretokenizer = (moe_pretokenizer){0};
}
