#include "tests/support/sim_fixture.h"

#include <jansson.h>
#include <stdlib.h>

#include "common/log.h"
#include "cpu/cpu.h"
#include "tests/support/test.h"

#define CHECKPOINT SOURCE_DIR "/tests/data/checkpoints/qwen3_moe"

sim_fixture sim_fx;

static void read_ids(const json_t *root, const char *key, int32_t *out, size_t count) {
    const json_t *ids = json_object_get(root, key);
    assert_int_equal(json_array_size(ids), count);
    for (size_t i = 0; i < count; i++) out[i] = (int32_t)json_integer_value(json_array_get(ids, i));
}

int sim_fixture_open(void **state) {
    (void)state;
    moe_error err;
    moe_log_init(getenv("MOESAIC_SIM_SHOW") ? MOE_LOG_INFO : MOE_LOG_OFF, "sim");
    json_t *expected = json_load_file(CHECKPOINT "/expected.json", 0, NULL);
    assert_non_null(expected);
    read_ids(expected, "ids", sim_fx.prompt, SIM_PROMPT_TOKENS);
    read_ids(expected, "greedy", sim_fx.greedy, SIM_GREEDY_TOKENS);
    json_decref(expected);
    assert_int_equal(moe_model_open(CHECKPOINT, &sim_fx.model, &err), MOE_OK);
    assert_int_equal(moe_cpu_open(&(moe_cpu_config){.threads = 0}, &sim_fx.backend, &err), MOE_OK);
    assert_int_equal(moe_cpu_ref_open(&(moe_cpu_config){.threads = 0}, &sim_fx.reference, &err), MOE_OK);
    return 0;
}

int sim_fixture_close(void **state) {
    (void)state;
    sim_fx.backend->ops->close(sim_fx.backend);
    sim_fx.reference->ops->close(sim_fx.reference);
    moe_model_close(&sim_fx.model);
    return 0;
}

sim_config sim_fixture_config(uint64_t seed) {
    return (sim_config){.seed = seed,
                        .model = sim_fx.model,
                        .backend = sim_fx.backend,
                        .workers = 3,
                        .replicas = 2,
                        .micro_batches = 2,
                        .max_num_batched_tokens = 64,
                        .num_kv_blocks = 128,
                        .gating = MOE_GATING_GATE,
                        .combine = MOE_COMBINE_EXACT,
                        .layout = MOE_PLACEMENT_BALANCED};
}

void sim_submit_greedy(sim_cluster *sim, int32_t count) {
    moe_status refused;
    for (int32_t i = 0; i < count; i++)
        assert_true(sim_submit(sim, 0, sim_fx.prompt, SIM_PROMPT_TOKENS, SIM_GREEDY_TOKENS, &refused) >= 0);
}

int32_t sim_check(const sim_cluster *sim, int32_t first) {
    int32_t succeeded = 0;
    assert_false(sim->epoch_fell);
    assert_false(sim->map_incomplete);
    for (int32_t i = first; i < sim->num_requests; i++) {
        const sim_request *r = &sim->requests[i];
        assert_int_equal(r->terminal_events, 1);
        assert_memory_equal(r->tokens, sim_fx.greedy, (size_t)r->num_tokens * sizeof *r->tokens);
        if (r->finish == MOE_FINISH_ERROR) {
            bool lawful = r->status == MOE_UNAVAILABLE || (r->status == MOE_CANCELLED && r->abandoned);
            if (!lawful) fail_msg("request %d: %s: %s", (int)i, moe_status_name(r->status), r->message);
            continue;
        }
        assert_int_equal(r->num_tokens, r->max_tokens);
        succeeded++;
    }
    return succeeded;
}

void sim_check_all_right(const sim_cluster *sim, int32_t first) {
    assert_int_equal(sim_check(sim, first), sim->num_requests - first);
}
