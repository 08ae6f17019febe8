/* Opening a CPU backend, its sizes, and running out of memory at every allocation. */
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "tests/support/cpu_backends.h"
#include "tests/support/reference_driver.h"
#include "tests/support/test.h"

#define MAX_EXPERTS 64

static void isa_names(void **state) {
    moe_backend *backend;
    moe_error err;
    (void)state;
    assert_int_equal(moe_cpu_open(&(moe_cpu_config){.isa = "sse9"}, &backend, &err), MOE_INVALID_ARGUMENT);
    assert_non_null(strstr(err.message, "sse9"));
    assert_null(backend);
    setenv("MOESAIC_CPU_ISA", "scalar", 1);
    assert_int_equal(moe_cpu_open(&(moe_cpu_config){0}, &backend, &err), MOE_OK);
    assert_string_equal(backend->ops->profile(backend), "cpu/scalar/float32");
    backend->ops->close(backend);
    setenv("MOESAIC_CPU_ISA", "nonsense", 1);
    assert_int_equal(moe_cpu_open(&(moe_cpu_config){0}, &backend, &err), MOE_INVALID_ARGUMENT);
    assert_int_equal(moe_cpu_open(&(moe_cpu_config){.isa = "auto"}, &backend, &err), MOE_OK);
    backend->ops->close(backend);
    unsetenv("MOESAIC_CPU_ISA");
    assert_int_equal(moe_cpu_ref_open(&(moe_cpu_config){0}, &backend, &err), MOE_OK);
    assert_string_equal(backend->ops->profile(backend), "cpu-ref/ref/float32");
    assert_string_equal(backend->ops->name, "cpu-ref");
    backend->ops->close(backend);
}

static void thread_counts(void **state) {
    moe_backend *backend;
    (void)state;
    assert_int_equal(moe_cpu_open(&(moe_cpu_config){.threads = -1}, &backend, NULL), MOE_INVALID_ARGUMENT);
    assert_int_equal(moe_cpu_open(&(moe_cpu_config){.threads = 1 << 20}, &backend, NULL), MOE_INVALID_ARGUMENT);
}

static moe_model *open_model(void) {
    moe_model *model;
    moe_error err;
    if (moe_model_open(SOURCE_DIR "/tests/data/checkpoints/qwen2_moe", &model, &err) != MOE_OK) fail_msg("%s", err.message);
    return model;
}

static void sizes(void **state) {
    moe_backend *backend = moe_test_cpu_open(1, 0);
    moe_model *model = open_model();
    const moe_model_config *c = &model->config;
    moe_memory_info info;
    moe_expert *expert;
    (void)state;
    assert_int_equal(backend->ops->memory_info(backend, &info, NULL), MOE_OK);
    assert_true(info.free_bytes > 0 && info.free_bytes <= info.total_bytes);
    int64_t whole = 3 * (int64_t)c->hidden * c->expert_intermediate * 2;
    assert_int_equal(backend->ops->expert_load(backend, model->experts, 0, MOE_FFN_BLOCKS, &expert, NULL), MOE_OK);
    assert_int_equal(backend->ops->expert_bytes(expert), whole);
    backend->ops->expert_free(backend, expert);
    assert_int_equal(c->head_dim % 16, 0);
    assert_int_equal(backend->ops->kv_block_bytes(backend, c),
                     c->num_layers * 2 * c->num_kv_heads * c->head_dim * MOE_KV_BLOCK_TOKENS * 4);
    moe_model_close(&model);
    backend->ops->close(backend);
}

/* ---- out of memory ---- */

typedef struct loaded {
    moe_backend *backend;
    moe_base *base;
    moe_kv *kv;
    moe_rows *rows;
    moe_expert *expert;
} loaded;

static moe_status load(const moe_model *model, loaded *l) {
    moe_status status = moe_cpu_open(&(moe_cpu_config){.isa = "auto"}, &l->backend, NULL);
    if (status != MOE_OK) return status;
    const moe_backend_ops *ops = l->backend->ops;
    status = ops->base_load(l->backend, model, NULL, NULL, &l->base, NULL);
    if (status == MOE_OK) status = ops->kv_create(l->backend, l->base, 4, &l->kv, NULL);
    if (status == MOE_OK) status = ops->rows_create(l->backend, l->base, 8, &l->rows, NULL);
    if (status == MOE_OK) status = ops->expert_load(l->backend, model->experts, 0, MOE_FFN_BLOCKS, &l->expert, NULL);
    return status;
}

static void unload(loaded *l) {
    if (!l->backend) return;
    l->backend->ops->expert_free(l->backend, l->expert);
    l->backend->ops->rows_free(l->backend, l->rows);
    l->backend->ops->kv_free(l->backend, l->kv);
    if (l->base) l->backend->ops->base_free(l->backend, l->base);
    l->backend->ops->close(l->backend);
    *l = (loaded){0};
}

static void loading_without_memory(void **state) {
    moe_model *model = open_model();
    int32_t failures = 0;
    moe_status status;
    (void)state;
    do {
        loaded l = {0};
        moe_alloc_fail_after(failures + 1);
        status = load(model, &l);
        moe_alloc_fail_after(0);
        unload(&l);
        if (status != MOE_OK) assert_int_equal(status, MOE_RESOURCE_EXHAUSTED);
        failures += status != MOE_OK;
        assert_true(failures < 10000);
    } while (status != MOE_OK);
    assert_true(failures > 30); /* the base has ten packed tensors a layer */
    moe_model_close(&model);
}

static void keep_status(moe_job *job) { (void)job; }

static void jobs_without_memory(void **state) {
    moe_model *model = open_model();
    loaded l = {0};
    float x[64] = {0}, out[64];
    int32_t zero = 0;
    (void)state;
    assert_int_equal(load(model, &l), MOE_OK);
    moe_ffn_group group = {.expert = l.expert, .count = 1};
    moe_ffn_batch batch = {
        .x = x, .num_rows = 1, .groups = &group, .num_groups = 1, .assignment_rows = &zero, .num_assignments = 1};
    batch.block_hi = MOE_FFN_BLOCKS;
    batch.out = out;
    moe_kv_view view = {.blocks = &zero, .num_blocks = 1};
    moe_segment segment = {.num_rows = 1, .rows = l.rows, .kv = l.kv, .token_ids = &zero, .positions = &zero, .sequences = &zero};
    segment.views = &view;
    segment.num_views = 1;
    segment.activations = x;
    for (int failing = 1; failing >= 0; failing--) {
        moe_job ffn_job = {.done = keep_status}, segment_job = {.done = keep_status};
        moe_alloc_fail_after(failing);
        l.backend->ops->ffn_submit(l.backend, &batch, &ffn_job);
        moe_alloc_fail_after(failing);
        l.backend->ops->segment_submit(l.backend, l.base, &segment, &segment_job);
        moe_alloc_fail_after(0);
        assert_int_equal(ffn_job.status, failing ? MOE_RESOURCE_EXHAUSTED : MOE_OK);
        assert_int_equal(segment_job.status, failing ? MOE_RESOURCE_EXHAUSTED : MOE_OK);
        assert_int_equal(strlen(ffn_job.message) > 0, failing);
    }
    unload(&l);
    moe_model_close(&model);
}

/* Expert outputs that stay with the rows: made by the first job that needs them, or its failure; a segment finds them or fails. */
static void layer_jobs_without_memory(void **state) {
    moe_model *model = open_model();
    loaded l = {0};
    moe_expert *handles[MAX_EXPERTS];
    int32_t experts[MOE_MAX_TOP_K], zero = 0, counts[] = {model->config.top_k}, failures = 0;
    float weights[MOE_MAX_TOP_K] = {0};
    (void)state;
    assert_in_range(model->config.num_experts, model->config.top_k, MAX_EXPERTS);
    assert_int_equal(load(model, &l), MOE_OK);
    for (int32_t e = 0; e < model->config.num_experts; e++) handles[e] = l.expert;
    for (int32_t j = 0; j < model->config.top_k; j++) experts[j] = j;
    const moe_layer_ffn ffn = {.rows = l.rows, .num_rows = 1, .experts = experts, .handles = handles};
    moe_kv_view view = {.blocks = &zero, .num_blocks = 1};
    moe_segment segment = {.index = 1, .num_rows = 1, .rows = l.rows, .kv = l.kv, .token_ids = &zero, .positions = &zero};
    segment.sequences = &zero;
    segment.views = &view;
    segment.num_views = 1;
    segment.combine = (moe_combine){NULL, MOE_F32, weights, counts};
    moe_job job = {.done = keep_status}, segment_job = {.done = keep_status};
    l.backend->ops->segment_submit(l.backend, l.base, &segment, &segment_job);
    assert_int_equal(segment_job.status, MOE_FAILED_PRECONDITION);
    do {
        moe_alloc_fail_after(failures + 1);
        l.backend->ops->layer_ffn_submit(l.backend, l.base, &ffn, &job);
        moe_alloc_fail_after(0);
        if (job.status != MOE_OK) assert_int_equal(job.status, MOE_RESOURCE_EXHAUSTED);
        failures += job.status != MOE_OK;
        assert_true(failures < 100);
    } while (job.status != MOE_OK);
    assert_true(failures >= 2); /* the outputs, and working memory */
    l.backend->ops->segment_submit(l.backend, l.base, &segment, &segment_job);
    assert_int_equal(segment_job.status, MOE_OK);
    unload(&l);
    moe_model_close(&model);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(isa_names),
        cmocka_unit_test(thread_counts),
        cmocka_unit_test(sizes),
        cmocka_unit_test(loading_without_memory),
        cmocka_unit_test(jobs_without_memory),
        cmocka_unit_test(layer_jobs_without_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
