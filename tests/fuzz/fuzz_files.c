/* Fuzz target of what is read from files and from HTTP bodies. The first byte chooses what the rest is:
 *   0 to 3  the body of a chat completion, a completion, /tokenize, /detokenize
 *   4       a safetensors file
 *   5       a safetensors index
 *   6       config.json, which generation_config.json stands in for, too
 *   7       a placement map, as in Redis and in the state folder: what was read is written and read again
 *   8       a manifest of expert digests
 *   9       `meta` of the store: what was read is written and read again
 *   10      the YAML file of --config */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/alloc.h"
#include "common/log.h"
#include "common/model/config.h"
#include "common/model/expert_digests.h"
#include "common/model/safetensors.h"
#include "common/options.h"
#include "router/http/openai_params.h"
#include "router/placement/controller_internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char folder[] = "/tmp/moesaic-fuzz-XXXXXX";

static void check(bool holds) {
    if (!holds) abort();
}

static void path_of(const char *name, char path[128]) { snprintf(path, 128, "%s/%s", folder, name); }

static void remove_folder(void) {
    static const char *const names[] = {"model.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "manifest", "options"};
    char path[128];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        path_of(names[i], path);
        unlink(path);
    }
    rmdir(folder);
}

static void put_file(const char *name, const uint8_t *data, size_t size) {
    char path[128];
    path_of(name, path);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    check(fd >= 0 && write(fd, data, size) == (ssize_t)size);
    check(close(fd) == 0);
}

static void take_away(const char *name) {
    char path[128];
    path_of(name, path);
    unlink(path);
}

static void fuzz_body(int kind, const uint8_t *data, size_t size) {
    static const moe_endpoint endpoints[] = {MOE_ENDPOINT_CHAT, MOE_ENDPOINT_COMPLETIONS, MOE_ENDPOINT_TOKENIZE,
                                             MOE_ENDPOINT_DETOKENIZE};
    static moe_inference inference = {.model = "demo", .max_model_len = 2048, .vocab = 8192};
    moe_openai_params *params = calloc(1, sizeof *params);
    moe_http_error error = {0};
    check(params != NULL);
    inference.tokenizer = (const moe_tokenizer *)&inference; /* only whether there is one matters */
    bool ok = moe_openai_params_parse((const char *)data, size, endpoints[kind], &inference, params, &error);
    if (ok) {
        check(params->num_stop >= 0 && params->num_stop <= MOE_MAX_STOP_STRINGS);
        check(params->num_logit_bias >= 0 && params->num_logit_bias <= MOE_MAX_LOGIT_BIAS);
        for (int32_t i = 0; i < params->num_logit_bias; i++)
            check(params->logit_bias[i].token_id >= 0 && params->logit_bias[i].token_id < inference.vocab);
    } else {
        check(error.http_status >= 400 && error.http_status < 600);
    }
    moe_openai_params_free(params);
    free(params);
}

static void fuzz_checkpoint(const char *name, const uint8_t *data, size_t size) {
    moe_safetensors *checkpoint = NULL;
    moe_error err;
    put_file(name, data, size);
    if (moe_safetensors_open(folder, &checkpoint, &err) == MOE_OK) check(checkpoint != NULL);
    moe_safetensors_close(&checkpoint);
    take_away(name);
}

static void fuzz_config(const uint8_t *data, size_t size) {
    static moe_model_config config;
    moe_generation_config generation;
    moe_error err;
    put_file("config.json", data, size);
    if (moe_model_config_read(folder, &config, &err) == MOE_OK) {
        check(config.num_layers >= 1 && config.num_layers <= MOE_MAX_LAYERS && config.num_experts <= MOE_MAX_EXPERTS);
        check(config.hidden >= 1 && config.vocab >= 1 && config.top_k <= config.num_experts);
        check(config.num_moe_layers >= 0 && config.num_moe_layers <= config.num_layers);
        check(moe_model_config_cut(&config, 1, &err) == MOE_OK);
    }
    put_file("generation_config.json", data, size);
    if (moe_generation_config_read(folder, &generation, &err) == MOE_OK)
        check(generation.num_eos >= 0 && generation.num_eos <= MOE_MAX_EOS);
    take_away("generation_config.json");
}

static void fuzz_map(const uint8_t *data, size_t size) {
    moe_placement *map, *again;
    moe_buf text = {0};
    moe_error err;
    if (moe_placement_from_json((const char *)data, size, &map, &err) != MOE_OK) return;
    for (int64_t i = 0; i < (int64_t)map->num_layers * map->num_experts; i++)
        for (int r = 0; r < map->entries[i].num_replicas; r++)
            check(map->entries[i].replicas[r].worker < map->num_workers);
    check(moe_placement_to_json(map, &text, &err) == MOE_OK);
    check(moe_placement_from_json(text.data, text.size, &again, &err) == MOE_OK);
    check(again->epoch == map->epoch && again->fence == map->fence && again->num_workers == map->num_workers);
    moe_buf_free(&text);
    moe_placement_unref(&again);
    moe_placement_unref(&map);
}

static void fuzz_manifest(const uint8_t *data, size_t size) {
    enum { LAYERS = 2, EXPERTS = 2 };
    char path[128];
    uint64_t *digests = NULL, sum = 0;
    moe_error err;
    path_of("manifest", path);
    put_file("manifest", data, size);
    if (moe_expert_digests_read(path, 1, LAYERS, EXPERTS, &digests, &err) == MOE_OK)
        for (int i = 0; i < LAYERS * EXPERTS; i++) sum += digests[i]; /* all of them can be read */
    moe_free(digests);
    check(sum < UINT64_MAX);
}

static void fuzz_meta(const uint8_t *data, size_t size) {
    moe_meta meta, again;
    moe_buf text = {0};
    moe_error err;
    if (moe_meta_from_json((const char *)data, size, &meta, &err) != MOE_OK) return;
    check(meta.epoch <= MOE_MAX_EPOCH && meta.fence <= MOE_MAX_EPOCH && meta.replicas <= MOE_PLACEMENT_MAX_REPLICAS);
    check(moe_meta_to_json(&meta, &text, &err) == MOE_OK);
    check(moe_meta_from_json(text.data, text.size, &again, &err) == MOE_OK);
    check(again.epoch == meta.epoch && again.fence == meta.fence && strcmp(again.uuid, meta.uuid) == 0);
    moe_buf_free(&text);
}

static void fuzz_options(const uint8_t *data, size_t size) {
    static const moe_command commands[] = {{"serve", NULL, ""}};
    static const moe_option_row rows[] = {
        {"config", MOE_OPTION_TEXT, 1, "A", NULL, 0, 0, NULL, "FILE", ""},
        {"count", MOE_OPTION_INT, 1, "A", "3", 1, 9, NULL, "N", ""},
        {"size", MOE_OPTION_BYTES, 1, "A", "1KiB", 0, 1e9, NULL, "SIZE", ""},
        {"time", MOE_OPTION_DURATION, 1, "A", "1s", 0, 60, NULL, "TIME", ""},
        {"flag", MOE_OPTION_BOOL, 1, "A", "true", 0, 0, NULL, NULL, ""},
        {"mode", MOE_OPTION_CHOICE, 1, "A", "a", 0, 0, "a|b", NULL, ""},
    };
    static const moe_option_table table = {"moesaic", commands, 1, rows, sizeof rows / sizeof *rows};
    char path[128], argument[160];
    moe_options *options;
    moe_error err;
    path_of("options", path);
    put_file("options", data, size);
    snprintf(argument, sizeof argument, "--config=%s", path);
    if (moe_options_parse(&table, 0, 1, (char *const[]){argument}, &options, &err) != MOE_OK) return;
    check(moe_option_int(options, "count") >= 1 && moe_option_int(options, "count") <= 9);
    check(moe_option_ns(options, "time") <= 60 * INT64_C(1000000000));
    moe_options_free(&options);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static bool prepared;
    if (!prepared) {
        moe_log_init(MOE_LOG_OFF, "fuzz");
        check(mkdtemp(folder) != NULL);
        atexit(remove_folder);
        prepared = true;
    }
    if (size == 0) return 0;
    int kind = data[0] % 11;
    data++, size--;
    if (kind < 4) fuzz_body(kind, data, size);
    if (kind == 4) fuzz_checkpoint("model.safetensors", data, size);
    if (kind == 5) fuzz_checkpoint("model.safetensors.index.json", data, size);
    if (kind == 6) fuzz_config(data, size);
    if (kind == 7) fuzz_map(data, size);
    if (kind == 8) fuzz_manifest(data, size);
    if (kind == 9) fuzz_meta(data, size);
    if (kind == 10) fuzz_options(data, size);
    return 0;
}
