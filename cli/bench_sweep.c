#include "cli/bench_sweep.h"

#include <stdio.h>
#include <string.h>

#include "cli/node_options.h"

#define BLANKS " \t"

/* Which of three names, in the order of their enumeration, a word's value is. */
static moe_status take_choice(const char *name, const char *value, const char *const names[3], int *choice, char text[16],
                              moe_error *err) {
    for (*choice = 0; *choice < 3; ++*choice) {
        if (strcmp(value, names[*choice]) != 0) continue;
        snprintf(text, 16, "%s", value);
        return MOE_OK;
    }
    return moe_fail(err, MOE_INVALID_ARGUMENT, "%s=%s: %s, %s and %s there are", name, value, names[0], names[1], names[2]);
}

static moe_status take_gating(const char *value, moe_bench_setting *s, moe_error *err) {
    static const char *const names[] = {"gate", "hint", "pre-gate"};
    int choice;
    moe_status status = take_choice("gating", value, names, &choice, s->gating, err);
    if (status == MOE_OK) s->node.gating = (moe_gating)choice;
    return status;
}

static moe_status take_cold(const char *value, moe_bench_setting *s, moe_error *err) {
    static const char *const names[] = {"fetch", "host", "auto"};
    int choice;
    moe_status status = take_choice("cold-experts", value, names, &choice, s->cold_experts, err);
    if (status == MOE_OK) s->node.cold = (moe_cold_experts)choice;
    return status;
}

static bool is(const char *word, size_t length, const char *name) { return length == strlen(name) && strncmp(word, name, length) == 0; }

static moe_status take_word(const moe_options *o, const char *word, moe_bench_setting *s, moe_error *err) {
    const char *value = strchr(word, '=');
    size_t name = value ? (size_t)(value++ - word) : 0;
    if (is(word, name, "gating")) return take_gating(value, s, err);
    if (is(word, name, "cold-experts")) return take_cold(value, s, err);
    if (is(word, name, "device-memory")) {
        snprintf(s->device_memory, sizeof s->device_memory, "%s", value);
        return moe_memory_limit_parse("device-memory", value, &s->node.device, err);
    }
    if (is(word, name, "dummy-routing")) {
        snprintf(s->dummy_routing, sizeof s->dummy_routing, "%s", value);
        return moe_dummy_routing_text(o, value, &s->node.dummy_routing, err);
    }
    return moe_fail(err, MOE_INVALID_ARGUMENT, "'%s' is none of gating=HOW, device-memory=SIZE, cold-experts=HOW, dummy-routing=HOW",
                    word);
}

static moe_status from_options(const moe_options *o, moe_bench_setting *s, moe_error *err) {
    const char *device = moe_option_text(o, "device-memory"), *dummy = moe_option_text(o, "dummy-routing");
    moe_tier_options tiers;
    *s = (moe_bench_setting){.node = {.gating = moe_gating_option(o)}};
    snprintf(s->gating, sizeof s->gating, "%s", moe_option_text(o, "gating"));
    snprintf(s->cold_experts, sizeof s->cold_experts, "%s", moe_option_text(o, "cold-experts"));
    snprintf(s->device_memory, sizeof s->device_memory, "%s", device ? device : "");
    snprintf(s->dummy_routing, sizeof s->dummy_routing, "%s", dummy ? dummy : "");
    moe_status status = moe_tier_option(o, &tiers, err);
    s->node.device = tiers.device;
    s->node.cold = tiers.cold;
    return status == MOE_OK ? moe_dummy_routing_option(o, &s->node.dummy_routing, err) : status;
}

/* The setting that `text`, of `length` bytes, describes. */
static moe_status read_setting(const moe_options *o, const char *text, size_t length, moe_bench_setting *s, moe_error *err) {
    char words[4 * MOE_BENCH_SETTING_BYTES], *rest = NULL;
    if (length >= sizeof words) return moe_fail(err, MOE_INVALID_ARGUMENT, "'%.*s' is too long", (int)length, text);
    snprintf(words, sizeof words, "%.*s", (int)length, text);
    moe_status status = from_options(o, s, err);
    for (char *word = strtok_r(words, BLANKS, &rest); word && status == MOE_OK; word = strtok_r(NULL, BLANKS, &rest)) {
        if (strlen(word) >= MOE_BENCH_SETTING_BYTES) return moe_fail(err, MOE_INVALID_ARGUMENT, "'%s' is too long", word);
        status = take_word(o, word, s, err);
    }
    return status;
}

moe_status moe_bench_settings(const moe_options *o, moe_bench_setting settings[MOE_BENCH_MAX_SETTINGS], int32_t *count,
                              moe_error *err) {
    const char *text = moe_option_text(o, "sweep");
    *count = 1;
    if (!text) return from_options(o, &settings[0], err);
    for (*count = 0;;) {
        size_t length = strcspn(text, ";");
        if (*count == MOE_BENCH_MAX_SETTINGS) return moe_fail(err, MOE_INVALID_ARGUMENT, "--sweep: more than %d settings", *count);
        moe_bench_setting *s = &settings[(*count)++];
        if (read_setting(o, text, length, s, err) != MOE_OK) return moe_fail_prefix(err, MOE_INVALID_ARGUMENT, "--sweep");
        if (moe_memory_limited(s->node.device) != moe_memory_limited(settings[0].node.device))
            return moe_fail(err, MOE_INVALID_ARGUMENT, "--sweep: give every setting a device-memory, such as 100%%, or none");
        if (!text[length]) return MOE_OK;
        text += length + 1;
    }
}
