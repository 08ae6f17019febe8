/* config.json and generation_config.json: both spellings of the keys, and every refusal by name. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/model/config.h"
#include "common/model/family.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test.h"

#define FIXTURES SOURCE_DIR "/tests/data/checkpoints/"

typedef struct change { /* of a fixture's file; text NULL removes the key */
    const char *key, *text;
} change;

/* Writes `file` of a fixture with changes into the folder. */
static void write_changed(const moe_test_dir *dir, const char *fixture, const char *file, const change *changes) {
    char path[512];
    snprintf(path, sizeof path, FIXTURES "%s/%s", fixture, file);
    json_t *root = json_load_file(path, 0, NULL);
    assert_non_null(root);
    for (; changes && changes->key; changes++) {
        if (!changes->text) {
            json_object_del(root, changes->key);
            continue;
        }
        json_t *value = json_loads(changes->text, JSON_DECODE_ANY, NULL);
        assert_non_null(value);
        json_object_set_new(root, changes->key, value);
    }
    char *text = json_dumps(root, 0);
    moe_test_write_file(dir, file, text, strlen(text));
    free(text);
    json_decref(root);
}

static moe_status read_changed(const char *fixture, const change *changes, moe_model_config *out, moe_error *err) {
    moe_test_dir dir = moe_test_dir_new();
    write_changed(&dir, fixture, "config.json", changes);
    moe_status status = moe_model_config_read(dir.path, out, err);
    moe_test_dir_free(&dir);
    return status;
}

static moe_model_config read_good(const char *fixture, const change *changes) {
    moe_model_config c;
    moe_error err = {0};
    if (read_changed(fixture, changes, &c, &err) != MOE_OK) fail_msg("%s: %s", fixture, err.message);
    return c;
}

static void reads_the_fixtures(void **state) {
    (void)state;
    moe_model_config c = read_good("qwen3_moe", NULL);
    assert_string_equal(c.family->model_type, "qwen3_moe");
    assert_int_equal(c.head_dim, 24);
    assert_int_equal(c.num_experts, 16);
    assert_int_equal(c.top_k, 4);
    assert_int_equal(c.expert_intermediate, 48);
    assert_int_equal(c.dense_intermediate, 0);
    assert_int_equal(c.qk_norm, MOE_QK_NORM_HEAD);
    assert_true(c.norm_topk && !c.qkv_bias && !c.o_bias && !c.tied_embeddings);
    assert_int_equal(c.sliding_window, 0);

    c = read_good("qwen2_moe", NULL);
    assert_int_equal(c.head_dim, 16);
    assert_int_equal(c.shared_intermediate, 80);
    assert_true(c.shared_gated && c.qkv_bias && !c.o_bias && !c.norm_topk);

    c = read_good("mixtral", NULL);
    assert_int_equal(c.num_experts, 8);
    assert_int_equal(c.expert_intermediate, 96);
    assert_true(c.norm_topk);
    assert_float_equal(c.rope_theta, 1e6, 0);

    c = read_good("olmoe", NULL);
    assert_int_equal(c.qk_norm, MOE_QK_NORM_FULL);
    assert_int_equal(c.expert_intermediate, 48);
    assert_float_equal(c.clip_qkv, 0, 0);

    c = read_good("llama_dense", NULL);
    assert_int_equal(c.dense_intermediate, 128);
    assert_int_equal(c.num_experts, 0);
    assert_int_equal(c.num_moe_layers, 0);
    assert_int_equal(c.num_layers, 3);
    assert_int_equal(c.vocab, 320);
    assert_int_equal(c.max_positions, 256);
    assert_float_equal(c.rms_eps, 1e-6f, 0);
}

static void both_spellings_read_alike(void **state) {
    (void)state;
    static const change qwen[] = {
        {"rope_parameters", NULL},      {"rope_theta", "10000.0"},   {"rope_scaling", "null"}, {"dtype", NULL},
        {"torch_dtype", "\"float16\""}, {"num_local_experts", NULL}, {"num_experts", "16"},    {NULL, NULL}};
    static const change nulls[] = {
        {"num_experts", "null"}, {"rope_theta", "null"},  {"hidden_act", "null"},      {"tie_word_embeddings", "null"},
        {"clip_qkv", "null"},    {"layer_types", "null"}, {"mlp_only_layers", "null"}, {NULL, NULL}};
    static const change legacy_rope[] = {
        {"rope_parameters", NULL}, {"rope_theta", "10000"}, {"rope_scaling", "{\"type\":\"default\"}"}, {NULL, NULL}};
    moe_model_config plain = read_good("qwen3_moe", NULL), other = read_good("qwen3_moe", qwen);
    assert_memory_equal(&plain, &other, sizeof plain);
    other = read_good("qwen3_moe", nulls);
    assert_memory_equal(&plain, &other, sizeof plain);
    other = read_good("qwen3_moe", legacy_rope);
    assert_memory_equal(&plain, &other, sizeof plain);
}

static void absent_keys_take_the_family_default(void **state) {
    (void)state;
    static const change absent[] = {{"rope_parameters", NULL},     {"hidden_act", NULL}, {"tie_word_embeddings", NULL},
                                    {"num_key_value_heads", NULL}, {"qkv_bias", NULL},   {NULL, NULL}};
    assert_float_equal(read_good("mixtral", absent).rope_theta, 1e6, 0);
    assert_int_equal(read_good("olmoe", absent).num_kv_heads, 4);
    assert_true(read_good("qwen2_moe", absent).qkv_bias);
    assert_float_equal(read_good("qwen2_moe", absent).rope_theta, 1e4, 0);
}

static void reads_options(void **state) {
    (void)state;
    assert_int_equal(read_good("mixtral", (change[]){{"sliding_window", "16"}, {NULL, NULL}}).sliding_window, 16);
    assert_int_equal(read_good("qwen2_moe", (change[]){{"sliding_window", "4096"}, {NULL, NULL}}).sliding_window, 0);
    assert_float_equal(read_good("olmoe", (change[]){{"clip_qkv", "8.5"}, {NULL, NULL}}).clip_qkv, 8.5, 0);
    moe_model_config c =
        read_good("llama_dense", (change[]){{"attention_bias", "true"}, {"tie_word_embeddings", "true"}, {NULL, NULL}});
    assert_true(c.qkv_bias && c.o_bias && c.tied_embeddings);
    assert_false(read_good("qwen2_moe", (change[]){{"qkv_bias", "false"}, {NULL, NULL}}).qkv_bias);
    assert_int_equal(read_good("qwen3_moe", (change[]){{"head_dim", "null"}, {NULL, NULL}}).head_dim, 16);
}

static void dense_layers_of_moe_families(void **state) {
    (void)state;
    moe_model_config c = read_good("qwen3_moe", (change[]){{"decoder_sparse_step", "2"}, {NULL, NULL}});
    assert_int_equal(c.num_moe_layers, 1); /* layer 1: (layer + 1) is a multiple of 2 */
    assert_int_equal(c.moe_layers[0], 1);
    assert_int_equal(c.dense_intermediate, 96);
    c = read_good("qwen2_moe", (change[]){{"mlp_only_layers", "[1]"}, {NULL, NULL}});
    assert_int_equal(c.num_moe_layers, 2);
    assert_int_equal(c.moe_layers[1], 2);
    assert_true(c.layer_is_moe[0] && !c.layer_is_moe[1] && c.layer_is_moe[2]);
    c = read_good("qwen2_moe", (change[]){{"mlp_only_layers", "[0,1,2]"}, {NULL, NULL}});
    assert_int_equal(c.num_moe_layers, 0);
    assert_int_equal(c.num_experts, 0);
    c = read_good("mixtral", (change[]){{"mlp_only_layers", "[1]"}, {NULL, NULL}}); /* not a key of that family */
    assert_int_equal(c.num_moe_layers, 3);
    c = read_good("switch_decoder", (change[]){{"hidden_act", NULL}, {"norm_topk_prob", NULL}, {NULL, NULL}});
    assert_true(c.num_moe_layers == 2 && c.moe_layers[1] == 3 && c.top_k == 1 && !c.norm_topk);
    assert_true(c.dense_intermediate == 64 && c.expert_intermediate == 64 && c.qk_norm == MOE_QK_NORM_NONE && !c.qkv_bias);
}

static void refuses_what_is_wrong(void **state) {
    (void)state;
    static const struct {
        const char *fixture;
        change change;
        moe_status code;
        const char *what;
    } rows[] = {
        {"qwen3_moe",
         {"model_type", "\"gpt_oss\""},
         MOE_UNIMPLEMENTED,
         "\"gpt_oss\" is not supported; known are qwen3_moe, qwen2_moe, mixtral, olmoe, llama"},
        {"qwen3_moe", {"model_type", NULL}, MOE_INVALID_ARGUMENT, "model_type is missing"},
        {"qwen3_moe", {"model_type", "7"}, MOE_INVALID_ARGUMENT, "model_type is not a string"},
        {"qwen3_moe", {"use_sliding_window", "true"}, MOE_UNIMPLEMENTED, "use_sliding_window"},
        {"qwen2_moe",
         {"layer_types", "[\"full_attention\",\"sliding_attention\"]"},
         MOE_UNIMPLEMENTED,
         "layer_types \"sliding_attention\""},
        {"llama_dense", {"hidden_act", "\"gelu\""}, MOE_UNIMPLEMENTED, "hidden_act \"gelu\""},
        {"qwen3_moe", {"hidden_act", "\"relu\""}, MOE_UNIMPLEMENTED, "of qwen3_moe only silu"},
        {"switch_decoder", {"hidden_act", "\"silu\""}, MOE_UNIMPLEMENTED, "of switch_decoder only relu"},
        {"llama_dense", {"mlp_bias", "true"}, MOE_UNIMPLEMENTED, "mlp_bias"},
        {"llama_dense", {"quantization_config", "{\"bits\":4}"}, MOE_UNIMPLEMENTED, "quantization_config"},
        {"llama_dense",
         {"rope_scaling", "{\"rope_type\":\"llama3\",\"factor\":8}"},
         MOE_UNIMPLEMENTED,
         "rope_scaling: rope type \"llama3\""},
        {"llama_dense", {"rope_scaling", "{\"type\":\"linear\",\"factor\":2}"}, MOE_UNIMPLEMENTED, "rope type \"linear\""},
        {"qwen3_moe",
         {"rope_parameters", "{\"rope_theta\":1e4,\"rope_type\":\"yarn\"}"},
         MOE_UNIMPLEMENTED,
         "rope_parameters: rope type \"yarn\""},
        {"qwen3_moe",
         {"rope_parameters", "{\"full_attention\":{\"rope_theta\":1e4}}"},
         MOE_UNIMPLEMENTED,
         "rope_parameters.full_attention"},
        {"qwen3_moe", {"rope_parameters", "[]"}, MOE_INVALID_ARGUMENT, "rope_parameters is not an object"},
        {"qwen3_moe", {"rope_parameters", "{\"rope_theta\":0}"}, MOE_INVALID_ARGUMENT, "rope_theta is 0"},
        {"llama_dense", {"partial_rotary_factor", "0.5"}, MOE_UNIMPLEMENTED, "partial_rotary_factor"},
        {"qwen3_moe", {"hidden_size", "0"}, MOE_INVALID_ARGUMENT, "hidden_size is 0"},
        {"qwen3_moe", {"hidden_size", "-64"}, MOE_INVALID_ARGUMENT, "hidden_size is -64"},
        {"qwen3_moe", {"hidden_size", "64.0"}, MOE_INVALID_ARGUMENT, "hidden_size is not an integer"},
        {"qwen3_moe", {"hidden_size", "9223372036854775807"}, MOE_INVALID_ARGUMENT, "hidden_size is 9223372036854775807"},
        {"qwen3_moe", {"hidden_size", NULL}, MOE_INVALID_ARGUMENT, "hidden_size is missing"},
        {"qwen3_moe", {"num_hidden_layers", "513"}, MOE_INVALID_ARGUMENT, "num_hidden_layers is 513"},
        {"qwen3_moe", {"num_hidden_layers", "0"}, MOE_INVALID_ARGUMENT, "num_hidden_layers is 0"},
        {"qwen3_moe", {"num_attention_heads", "0"}, MOE_INVALID_ARGUMENT, "num_attention_heads is 0"},
        {"qwen3_moe", {"num_key_value_heads", "0"}, MOE_INVALID_ARGUMENT, "num_key_value_heads is 0"},
        {"qwen3_moe", {"num_key_value_heads", "3"}, MOE_INVALID_ARGUMENT, "not a multiple of num_key_value_heads 3"},
        {"qwen2_moe", {"hidden_size", "63"}, MOE_INVALID_ARGUMENT, "hidden_size 63 is not a multiple"},
        {"qwen3_moe", {"head_dim", "23"}, MOE_INVALID_ARGUMENT, "head_dim 23 is odd"},
        {"qwen2_moe", {"hidden_size", "8192"}, MOE_INVALID_ARGUMENT, "head_dim 2048"},
        {"qwen3_moe", {"num_local_experts", "1025"}, MOE_INVALID_ARGUMENT, "num_local_experts is 1025"},
        {"qwen3_moe", {"num_local_experts", NULL}, MOE_INVALID_ARGUMENT, "num_experts is missing"},
        {"qwen3_moe", {"num_local_experts", "3"}, MOE_INVALID_ARGUMENT, "num_experts_per_tok 4 is above"},
        {"qwen3_moe", {"num_experts_per_tok", "0"}, MOE_INVALID_ARGUMENT, "num_experts_per_tok is 0"},
        {"qwen3_moe", {"num_experts_per_tok", "33"}, MOE_INVALID_ARGUMENT, "num_experts_per_tok is 33"},
        {"qwen3_moe", {"moe_intermediate_size", NULL}, MOE_INVALID_ARGUMENT, "moe_intermediate_size is missing"},
        {"qwen2_moe",
         {"shared_expert_intermediate_size", NULL},
         MOE_INVALID_ARGUMENT,
         "shared_expert_intermediate_size is missing"},
        {"llama_dense", {"intermediate_size", NULL}, MOE_INVALID_ARGUMENT, "intermediate_size is missing"},
        {"qwen3_moe", {"norm_topk_prob", "1"}, MOE_INVALID_ARGUMENT, "norm_topk_prob is neither"},
        {"qwen3_moe", {"decoder_sparse_step", "0"}, MOE_INVALID_ARGUMENT, "decoder_sparse_step is 0"},
        {"qwen3_moe", {"mlp_only_layers", "[3]"}, MOE_INVALID_ARGUMENT, "mlp_only_layers"},
        {"qwen3_moe", {"mlp_only_layers", "\"all\""}, MOE_INVALID_ARGUMENT, "mlp_only_layers is not a list"},
        {"qwen3_moe", {"rms_norm_eps", NULL}, MOE_INVALID_ARGUMENT, "rms_norm_eps is missing"},
        {"qwen3_moe", {"rms_norm_eps", "2"}, MOE_INVALID_ARGUMENT, "rms_norm_eps is 2"},
        {"qwen3_moe", {"vocab_size", "0"}, MOE_INVALID_ARGUMENT, "vocab_size is 0"},
        {"qwen3_moe", {"max_position_embeddings", NULL}, MOE_INVALID_ARGUMENT, "max_position_embeddings is missing"},
        {"mixtral", {"sliding_window", "0"}, MOE_INVALID_ARGUMENT, "sliding_window is 0"},
        {"olmoe", {"clip_qkv", "-1"}, MOE_INVALID_ARGUMENT, "clip_qkv is -1"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        moe_model_config c;
        moe_error err = {0};
        const change changes[] = {rows[i].change, {NULL, NULL}};
        moe_status status = read_changed(rows[i].fixture, changes, &c, &err);
        if (status != rows[i].code || !strstr(err.message, rows[i].what))
            fail_msg("row %zu: status %d, \"%s\"; expected %d, \"%s\"", i, status, err.message, rows[i].code, rows[i].what);
    }
}

static void refuses_files_that_are_not_json(void **state) {
    (void)state;
    moe_test_dir dir = moe_test_dir_new();
    moe_model_config c;
    moe_error err = {0};
    assert_int_equal(moe_model_config_read(dir.path, &c, &err), MOE_NOT_FOUND);
    assert_non_null(strstr(err.message, "config.json"));
    static const char *const texts[] = {"", "{", "[]", "{\"model_type\":\"llama\",\"model_type\":\"mixtral\"}",
                                        "{\"rope_theta\":NaN}"};
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        moe_test_write_file(&dir, "config.json", texts[i], strlen(texts[i]));
        assert_int_equal(moe_model_config_read(dir.path, &c, NULL), MOE_INVALID_ARGUMENT);
    }
    moe_test_dir_free(&dir);
}

static void reads_generation_defaults(void **state) {
    (void)state;
    moe_generation_config g;
    assert_int_equal(moe_generation_config_read(SOURCE_DIR "/models/demo", &g, NULL), MOE_OK);
    assert_true(g.do_sample);
    assert_float_equal(g.temperature, 0.7f, 0);
    assert_float_equal(g.top_p, 0.9f, 0);
    assert_int_equal(g.top_k, 40);
    assert_float_equal(g.repetition_penalty, 1, 0);
    assert_int_equal(g.num_eos, 2);
    assert_int_equal(g.eos_ids[0], 2);
    assert_int_equal(g.eos_ids[1], 0);
    assert_int_equal(moe_generation_config_read(FIXTURES "llama_dense", &g, NULL), MOE_OK);
    assert_true(!g.do_sample && g.top_k == 0 && g.num_eos == 1 && g.eos_ids[0] == 2);
    assert_float_equal(g.temperature, 1, 0);
}

static void generation_config_may_be_absent(void **state) {
    (void)state;
    moe_test_dir dir = moe_test_dir_new();
    moe_generation_config g;
    write_changed(&dir, "llama_dense", "config.json", (change[]){{"eos_token_id", "[5,6,7]"}, {NULL, NULL}});
    assert_int_equal(moe_generation_config_read(dir.path, &g, NULL), MOE_OK);
    assert_int_equal(g.num_eos, 3);
    assert_int_equal(g.eos_ids[2], 7);
    write_changed(&dir, "llama_dense", "config.json", (change[]){{"eos_token_id", "null"}, {NULL, NULL}});
    assert_int_equal(moe_generation_config_read(dir.path, &g, NULL), MOE_OK);
    assert_int_equal(g.num_eos, 0);
    moe_test_dir_free(&dir);
}

static void refuses_bad_generation_configs(void **state) {
    (void)state;
    static const struct {
        change change;
        const char *what;
    } rows[] = {
        {{"temperature", "-1"}, "temperature is -1"},
        {{"temperature", "\"hot\""}, "temperature is not a number"},
        {{"top_p", "0"}, "top_p is 0"},
        {{"top_p", "1.5"}, "top_p is 1.5"},
        {{"top_k", "-1"}, "top_k is -1"},
        {{"repetition_penalty", "0"}, "repetition_penalty is 0"},
        {{"do_sample", "1"}, "do_sample is neither"},
        {{"eos_token_id", "-1"}, "eos_token_id"},
        {{"eos_token_id", "[1,\"x\"]"}, "eos_token_id"},
        {{"eos_token_id", "[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]"}, "more than 16"},
    };
    moe_test_dir dir = moe_test_dir_new();
    write_changed(&dir, "llama_dense", "config.json", NULL);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        moe_generation_config g;
        moe_error err = {0};
        write_changed(&dir, "llama_dense", "generation_config.json", (change[]){rows[i].change, {NULL, NULL}});
        assert_int_equal(moe_generation_config_read(dir.path, &g, &err), MOE_INVALID_ARGUMENT);
        if (!strstr(err.message, rows[i].what)) fail_msg("\"%s\" lacks \"%s\"", err.message, rows[i].what);
    }
    moe_test_dir_free(&dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_the_fixtures),
        cmocka_unit_test(both_spellings_read_alike),
        cmocka_unit_test(absent_keys_take_the_family_default),
        cmocka_unit_test(reads_options),
        cmocka_unit_test(dense_layers_of_moe_families),
        cmocka_unit_test(refuses_what_is_wrong),
        cmocka_unit_test(refuses_files_that_are_not_json),
        cmocka_unit_test(reads_generation_defaults),
        cmocka_unit_test(generation_config_may_be_absent),
        cmocka_unit_test(refuses_bad_generation_configs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
