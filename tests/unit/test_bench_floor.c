/* The floor of a forward step: counted by hand for a small model, and for a large shape beside figures from elsewhere. */
#include <math.h>
#include <string.h>

#include "cli/bench_floor.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test.h"

static moe_model *open_dummy(const char *dir) {
    moe_model *m = NULL;
    moe_error err = {0};
    if (moe_model_open_dummy(dir, &(moe_dummy_options){0}, &m, &err) != MOE_OK) fail_msg("%s: %s", dir, err.message);
    return m;
}

static void expect_near(double is, double wanted, double relative) {
    if (fabs(is - wanted) > relative * wanted) fail_msg("%.9g, expected %.9g", is, wanted);
}

/* A dense layer, then one with 4 experts (2 chosen) and a shared one; all weights 2 bytes. */
static const char config[] =
    "{\"model_type\": \"qwen2_moe\", \"hidden_size\": 32, \"num_attention_heads\": 4, \"num_key_value_heads\": 2, "
    "\"num_hidden_layers\": 2, \"rms_norm_eps\": 1e-6, \"num_experts\": 4, \"num_experts_per_tok\": 2, "
    "\"moe_intermediate_size\": 24, \"shared_expert_intermediate_size\": 40, \"intermediate_size\": 48, \"vocab_size\": 50, "
    "\"mlp_only_layers\": [0], \"max_position_embeddings\": 64}";

static void counted_by_hand(void **state) {
    moe_test_dir dir = moe_test_dir_new();
    moe_test_write_file(&dir, "config.json", config, strlen(config));
    moe_model *m = open_dummy(dir.path);
    moe_bench_step step = {.rows = 5, .logit_rows = 3, .attended = 70, .kv_tokens = 60, .layer_experts = 3};
    double attention = 32 * 32 + 2 * 16 * 32 + 32 * 32, base = 2 * attention + 3 * 48 * 32 + 4 * 32 + 3 * 40 * 32 + 32;
    double expert = 3 * 24 * 32, head = 50 * 32, kv_flop = 2 * 4.0 * 70 * 32;
    (void)state;
    moe_bench_work work = moe_bench_floor(m, 128, &step, &(moe_bench_bounds){0});
    expect_near(work.weight_bytes, 2 * (base + 3 * expert + head), 1e-12);
    expect_near(work.kv_bytes, 60 * 128, 1e-12);
    expect_near(work.flop, 2 * 5 * base + 2 * 5 * 2 * expert + 2 * 3 * head + kv_flop, 1e-12);
    assert_true(work.seconds == 0);
    work = moe_bench_floor(m, 128, &step, &(moe_bench_bounds){1e9, 1e18}); /* reading alone counts */
    expect_near(work.seconds, (work.weight_bytes + work.kv_bytes) / 1e9, 1e-9);
    work = moe_bench_floor(m, 128, &step, &(moe_bench_bounds){1e18, 1e9}); /* computing alone */
    expect_near(work.seconds, work.flop / 1e9, 1e-9);
    /* 5 rows: 5 FLOP a byte in base products, 3 in the head, 10/3 in experts; attention 17920 FLOP on 7680 bytes. At 4 FLOP a
     * byte the base products compute and the rest reads. */
    work = moe_bench_floor(m, 128, &step, &(moe_bench_bounds){1, 4});
    expect_near(work.seconds, 2 * 5 * base / 4 + 2 * 3 * expert + 2 * head + 60 * 128, 1e-9);
    moe_model_close(&m);
    moe_test_dir_free(&dir);
}

/* 6.1 GB of active weights and 2.0 ms at 3.0 TB/s for a token of Qwen3 30B-A3B; the published 30.5 G parameters in all. */
static void a_known_shape(void **state) {
    moe_model *m = open_dummy(SOURCE_DIR "/models/shapes/qwen3-30b-a3b");
    moe_bench_step step = {.rows = 1, .logit_rows = 1, .layer_experts = 8};
    (void)state;
    moe_bench_work work = moe_bench_floor(m, 98304, &step, &(moe_bench_bounds){3.0e12, 798e12});
    expect_near(work.weight_bytes, 6.1e9, 0.01);
    expect_near(work.seconds, 2.0e-3, 0.02);
    step.layer_experts = 128;
    work = moe_bench_floor(m, 98304, &step, &(moe_bench_bounds){0});
    expect_near(work.weight_bytes / 2 + 151936.0 * 2048, 30.53e9, 0.001);
    moe_model_close(&m);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(counted_by_hand), cmocka_unit_test(a_known_shape)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
