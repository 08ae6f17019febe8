/* Opening models: every supported family's fixture and the demo model, packed experts, and the refusals by tensor name. */
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/model/model.h"
#include "common/model/pre_gates.h"
#include "common/model/safetensors.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test.h"

#define FIXTURES SOURCE_DIR "/tests/data/checkpoints/"
#define SINGLE "model.safetensors"
#define MAX_TENSORS 256

static moe_model *open_good(const char *dir) {
    moe_model *m = NULL;
    moe_error err = {0};
    if (moe_model_open(dir, &m, &err) != MOE_OK) fail_msg("%s: %s", dir, err.message);
    return m;
}

static void expect_refused(const char *dir, moe_status code, const char *what) {
    moe_model *m = NULL;
    moe_error err = {0};
    moe_status status = moe_model_open(dir, &m, &err);
    if (status != code || !strstr(err.message, what))
        fail_msg("status %d, message \"%s\"; expected %d, \"%s\"", status, err.message, code, what);
    assert_null(m);
}

static void expect_shape(const moe_tensor *t, int64_t rows, int64_t cols) {
    assert_true(moe_tensor_present(t));
    assert_int_equal(t->dtype, MOE_BF16);
    assert_int_equal(t->rows, rows);
    assert_int_equal(t->cols, cols);
}

static void expect_ffn(const moe_ffn_weights *w, int64_t width, int64_t hidden) {
    assert_true(moe_ffn_gated(w) && moe_ffn_present(w) && !moe_ffn_generated(w));
    expect_shape(&w->gate, width, hidden);
    expect_shape(&w->up, width, hidden);
    expect_shape(&w->down, hidden, width);
}

static void expect_layer(const moe_model *m, int32_t layer) {
    const moe_model_config *c = &m->config;
    const moe_layer_weights *w = &m->layers[layer];
    int64_t q = c->num_heads * c->head_dim, kv = c->num_kv_heads * c->head_dim;
    expect_shape(&w->input_norm, 1, c->hidden);
    expect_shape(&w->post_norm, 1, c->hidden);
    expect_shape(&w->q, q, c->hidden);
    expect_shape(&w->k, kv, c->hidden);
    expect_shape(&w->v, kv, c->hidden);
    expect_shape(&w->o, c->hidden, q);
    assert_int_equal(moe_tensor_present(&w->q_bias), c->qkv_bias);
    if (c->qkv_bias) expect_shape(&w->q_bias, 1, q);
    if (c->qkv_bias) expect_shape(&w->k_bias, 1, kv);
    if (c->qkv_bias) expect_shape(&w->v_bias, 1, kv);
    assert_int_equal(moe_tensor_present(&w->o_bias), c->o_bias);
    assert_int_equal(moe_tensor_present(&w->q_norm), c->qk_norm != MOE_QK_NORM_NONE);
    if (c->qk_norm == MOE_QK_NORM_HEAD) expect_shape(&w->k_norm, 1, c->head_dim);
    if (c->qk_norm == MOE_QK_NORM_FULL) expect_shape(&w->k_norm, 1, kv);
    if (c->layer_is_moe[layer])
        expect_shape(&w->gate, c->num_experts, c->hidden);
    else
        expect_ffn(&w->dense, c->dense_intermediate, c->hidden);
    assert_int_equal(moe_tensor_present(&w->shared.gate), c->shared_intermediate > 0);
    if (c->shared_intermediate > 0) expect_ffn(&w->shared, c->shared_intermediate, c->hidden);
    if (c->shared_gated) expect_shape(&w->shared_gate, 1, c->hidden);
}

static void opens_every_family(void **state) {
    (void)state;
    /* The digests are from Python's hashlib over the same files, read by a few lines of Python that share nothing with the
     * reader. */
    static const struct {
        const char *dir;
        uint64_t digest, expert_digest; /* of the model; of expert 3 of the MoE layer in layer 2 */
        bool has_pre_gates;
    } rows[] = {
        {FIXTURES "llama_dense", UINT64_C(0xcbe009d2f9c99272), 0, false},
        {FIXTURES "mixtral", UINT64_C(0x2b63430dbbcd6b0a), UINT64_C(0xafe9646a9310f224), false},
        {FIXTURES "olmoe", UINT64_C(0xbfb3e148ea731d64), UINT64_C(0x288190f67282f03d), false},
        {FIXTURES "qwen2_moe", UINT64_C(0x1db947bbccb6dac0), UINT64_C(0x40cf31b162cc8d29), false},
        {FIXTURES "qwen3_moe", UINT64_C(0x7f1c8ba27574212d), UINT64_C(0x7c5c184877c41cf1), false},
        {SOURCE_DIR "/models/demo", UINT64_C(0x36686a121b7718bf), UINT64_C(0x1edcebb0d3a586b3), true},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        moe_model *m = open_good(rows[i].dir);
        const moe_model_config *c = &m->config;
        assert_string_equal(m->dir, rows[i].dir);
        assert_true(m->digest == rows[i].digest);
        assert_int_equal(m->has_pre_gates, rows[i].has_pre_gates);
        expect_shape(&m->embed, c->vocab, c->hidden);
        expect_shape(&m->lm_head, c->vocab, c->hidden);
        expect_shape(&m->final_norm, 1, c->hidden);
        assert_int_equal(m->lm_head.data == m->embed.data, c->tied_embeddings);
        for (int32_t layer = 0; layer < c->num_layers; layer++) expect_layer(m, layer);
        for (int32_t j = 0; j < c->num_moe_layers; j++)
            for (int32_t e = 0; e < c->num_experts; e++) expect_ffn(moe_model_expert(m, j, e), c->expert_intermediate, c->hidden);
        if (c->num_experts > 0) {
            uint64_t digest = 0;
            const moe_ffn_weights *expert = moe_model_expert(m, 2, 3);
            moe_model_expert_will_need(m, expert);
            moe_model_expert_release(m, expert);
            assert_int_equal(moe_expert_digest(expert, &digest, NULL), MOE_OK);
            assert_true(digest == rows[i].expert_digest);
        }
        moe_model_close(&m);
        moe_model_close(&m);
        assert_null(m);
    }
}

/* Networks of two matrices, dense ones and experts; digests as above, of an expert over wi and wo alone. */
static void opens_networks_without_gates(void **state) {
    moe_model *m = open_good(FIXTURES "switch_decoder");
    const moe_model_config *c = &m->config;
    uint64_t digest = 0;
    (void)state;
    assert_true(m->digest == UINT64_C(0xfbe1e2f399cb1b60));
    assert_true(c->num_moe_layers == 2 && c->moe_layers[0] == 1 && c->moe_layers[1] == 3);
    for (int32_t i = 0; i < 2 + 2 * c->num_experts; i++) {
        const moe_ffn_weights *w = i < 2 ? &m->layers[2 * i].dense : &m->experts[i - 2];
        int64_t width = i < 2 ? c->dense_intermediate : c->expert_intermediate;
        assert_true(moe_ffn_present(w) && !moe_ffn_gated(w) && !moe_ffn_generated(w));
        expect_shape(&w->up, width, c->hidden);
        expect_shape(&w->down, c->hidden, width);
    }
    assert_false(moe_ffn_present(&m->layers[1].dense) || moe_ffn_present(&m->layers[0].shared));
    assert_int_equal(moe_expert_digest(moe_model_expert(m, 1, 3), &digest, NULL), MOE_OK);
    assert_true(digest == UINT64_C(0x3b54cf276b39a4e1));
    int64_t attention = 64 * (64 + 32 + 32 + 64) + 2 * 64, dense = 2 * 64 * 64, gate = 4 * 64;
    assert_int_equal(moe_model_base_bytes(m), 2 * (160 * 64 + 64 + 4 * attention + 2 * dense + 2 * gate));
    moe_model_close(&m);
}

/* A fixture whose tensors a test changes before they are written as one file into a folder of its own. */
typedef struct edited {
    moe_safetensors *source;
    moe_safetensor tensors[MAX_TENSORS];
    int64_t count;
    moe_test_dir dir;
} edited;

static void edit_begin(edited *e, const char *fixture) {
    assert_int_equal(moe_safetensors_open(fixture, &e->source, NULL), MOE_OK);
    e->count = moe_safetensors_count(e->source);
    assert_true(e->count <= MAX_TENSORS - 8);
    for (int64_t i = 0; i < e->count; i++) e->tensors[i] = *moe_safetensors_at(e->source, i);
    char path[512];
    e->dir = moe_test_dir_new();
    snprintf(path, sizeof path, "%s/config.json", fixture);
    moe_test_copy_file(&e->dir, "config.json", path);
}

static void edit_write(const edited *e) { moe_test_write_tensors(&e->dir, SINGLE, e->tensors, e->count); }

static void edit_end(edited *e) {
    moe_safetensors_close(&e->source);
    moe_test_dir_free(&e->dir);
}

static void set_config(const edited *e, const char *from, const char *to) {
    char path[512], text[4096] = "";
    size_t size;
    snprintf(path, sizeof path, "%s/config.json", e->dir.path);
    char *old = moe_test_read_file(path, &size);
    char *at = memmem(old, size, from, strlen(from));
    assert_non_null(at);
    snprintf(text, sizeof text, "%.*s%s%.*s", (int)(at - old), old, to, (int)(old + size - at - strlen(from)), at + strlen(from));
    moe_test_write_file(&e->dir, "config.json", text, strlen(text));
    free(old);
}

static void refuses_each_missing_tensor(void **state) {
    (void)state;
    static const char *const fixtures[] = {FIXTURES "llama_dense", FIXTURES "qwen2_moe"};
    for (size_t f = 0; f < 2; f++) {
        edited e;
        edit_begin(&e, fixtures[f]);
        for (int64_t i = 0; i < e.count; i++) {
            char what[256];
            moe_safetensor gone = e.tensors[i];
            snprintf(what, sizeof what, "tensor %s is missing", gone.name);
            e.tensors[i] = e.tensors[--e.count];
            edit_write(&e);
            expect_refused(e.dir.path, MOE_INVALID_ARGUMENT, what);
            e.tensors[e.count++] = e.tensors[i];
            e.tensors[i] = gone;
        }
        edit_end(&e);
    }
}

static void refuses_each_wrong_shape(void **state) {
    (void)state;
    edited e;
    edit_begin(&e, FIXTURES "qwen2_moe");
    for (int64_t i = 0; i < e.count; i++) {
        char what[256];
        moe_safetensor right = e.tensors[i], *t = &e.tensors[i];
        snprintf(what, sizeof what, "tensor %s has the shape", right.name);
        t->dims[0] = right.dims[0] - 1; /* one row less; [1, H] becomes an empty tensor */
        edit_write(&e);
        expect_refused(e.dir.path, MOE_INVALID_ARGUMENT, what);
        t->num_dims++; /* the same bytes with one dimension more: [1, …] */
        memmove(t->dims + 1, right.dims, (size_t)right.num_dims * sizeof t->dims[0]);
        t->dims[0] = 1;
        edit_write(&e);
        expect_refused(e.dir.path, MOE_INVALID_ARGUMENT, what);
        *t = right;
    }
    edit_write(&e);
    moe_model *m = open_good(e.dir.path);
    moe_model_close(&m);
    edit_end(&e);
}

static void refuses_unused_tensors_unless_ignorable(void **state) {
    (void)state;
    static const char *const unused[] = {"model.layers.3.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias",
                                         "model.layers.0.mlp.gate.weight", "extra", "rotary_emb.inv_freq.x"};
    static const uint16_t data[1] = {0};
    edited e;
    edit_begin(&e, FIXTURES "llama_dense");
    e.tensors[e.count++] = (moe_safetensor){.dtype = MOE_BF16, .num_dims = 1, .dims = {1}, .data = data};
    moe_safetensor *added = &e.tensors[e.count - 1];
    for (size_t i = 0; i < sizeof unused / sizeof unused[0]; i++) {
        added->name = unused[i];
        edit_write(&e);
        expect_refused(e.dir.path, MOE_INVALID_ARGUMENT, unused[i]);
    }
    added->name = "model.layers.0.self_attn.rotary_emb.inv_freq";
    edit_write(&e);
    moe_model *m = open_good(e.dir.path);
    moe_model_close(&m);
    edit_end(&e);
}

static void tied_embeddings_ignore_a_stored_lm_head(void **state) {
    (void)state;
    edited e;
    edit_begin(&e, FIXTURES "llama_dense");
    set_config(&e, "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
    edit_write(&e);
    moe_model *m = open_good(e.dir.path);
    assert_ptr_equal(m->lm_head.data, m->embed.data);
    moe_model_close(&m);
    edit_end(&e);
}

static void refuses_a_damaged_checkpoint_or_none(void **state) {
    (void)state;
    expect_refused("/nonexistent/moesaic", MOE_NOT_FOUND, "config.json");
    edited e;
    edit_begin(&e, FIXTURES "llama_dense");
    expect_refused(e.dir.path, MOE_NOT_FOUND, "neither");
    edit_write(&e);
    moe_test_truncate_file(&e.dir, SINGLE, 5000);
    expect_refused(e.dir.path, MOE_INVALID_ARGUMENT, SINGLE);
    edit_end(&e);
}

/* Replaces the per-expert tensors of each layer by transformers 5's packed ones; returns the memory behind them. */
static uint8_t *pack_experts(edited *e, const moe_model *m) {
    const moe_model_config *c = &m->config;
    size_t matrix = (size_t)c->expert_intermediate * (size_t)c->hidden * 2, layer_bytes = 3 * matrix * (size_t)c->num_experts;
    uint8_t *memory = malloc(layer_bytes * (size_t)c->num_moe_layers);
    static char names[MAX_TENSORS][64];
    int64_t kept = 0;
    for (int64_t i = 0; i < e->count; i++)
        if (!strstr(e->tensors[i].name, ".experts.")) e->tensors[kept++] = e->tensors[i];
    e->count = kept;
    for (int32_t j = 0; j < c->num_moe_layers; j++) {
        uint8_t *gate_up = memory + (size_t)j * layer_bytes, *down = gate_up + 2 * matrix * (size_t)c->num_experts;
        for (int32_t x = 0; x < c->num_experts; x++) {
            const moe_ffn_weights *w = moe_model_expert(m, j, x);
            memcpy(gate_up + (size_t)x * 2 * matrix, w->gate.data, matrix);
            memcpy(gate_up + (size_t)x * 2 * matrix + matrix, w->up.data, matrix);
            memcpy(down + (size_t)x * matrix, w->down.data, matrix);
        }
        snprintf(names[2 * j], sizeof names[0], "model.layers.%d.mlp.experts.gate_up_proj", c->moe_layers[j]);
        snprintf(names[2 * j + 1], sizeof names[0], "model.layers.%d.mlp.experts.down_proj", c->moe_layers[j]);
        e->tensors[e->count++] = (moe_safetensor){.name = names[2 * j],
                                                  .dtype = MOE_BF16,
                                                  .num_dims = 3,
                                                  .data = gate_up,
                                                  .dims = {c->num_experts, 2 * c->expert_intermediate, c->hidden}};
        e->tensors[e->count++] = (moe_safetensor){.name = names[2 * j + 1],
                                                  .dtype = MOE_BF16,
                                                  .num_dims = 3,
                                                  .data = down,
                                                  .dims = {c->num_experts, c->hidden, c->expert_intermediate}};
    }
    return memory;
}

/* Mixtral's gate moves with the packed experts: block_sparse_moe.gate → mlp.gate. */
static void rename_gates(edited *e) {
    static char names[8][64];
    int found = 0;
    for (int64_t i = 0; i < e->count; i++) {
        int layer;
        if (!strstr(e->tensors[i].name, ".block_sparse_moe.gate.")) continue;
        assert_int_equal(sscanf(e->tensors[i].name, "model.layers.%d.", &layer), 1);
        snprintf(names[found], sizeof names[0], "model.layers.%d.mlp.gate.weight", layer);
        e->tensors[i].name = names[found++];
    }
}

static void packed_experts_equal_single_ones(void **state) {
    (void)state;
    static const char *const fixtures[] = {FIXTURES "qwen3_moe", FIXTURES "mixtral", FIXTURES "olmoe", FIXTURES "qwen2_moe"};
    for (size_t f = 0; f < 4; f++) {
        edited e;
        edit_begin(&e, fixtures[f]);
        moe_model *single = open_good(fixtures[f]);
        uint8_t *memory = pack_experts(&e, single);
        rename_gates(&e);
        edit_write(&e);
        moe_model *packed = open_good(e.dir.path);
        for (int32_t i = 0; i < single->config.num_moe_layers * single->config.num_experts; i++) {
            const moe_ffn_weights *a = &single->experts[i], *b = &packed->experts[i];
            expect_ffn(b, single->config.expert_intermediate, single->config.hidden);
            assert_memory_equal(a->gate.data, b->gate.data, moe_tensor_bytes(&a->gate));
            assert_memory_equal(a->up.data, b->up.data, moe_tensor_bytes(&a->up));
            assert_memory_equal(a->down.data, b->down.data, moe_tensor_bytes(&a->down));
        }
        moe_model_close(&packed);
        e.count--; /* the last layer's packed down projection is gone */
        edit_write(&e);
        expect_refused(e.dir.path, MOE_INVALID_ARGUMENT, "mlp.experts.down_proj is missing");
        moe_model_close(&single);
        free(memory);
        edit_end(&e);
    }
}

static void pre_gates_are_optional(void **state) {
    (void)state;
    static const char *const names[] = {"model.layers.0.mlp.pre_gate.weight", "model.layers.1.mlp.pre_gate.weight"};
    edited e;
    edit_begin(&e, FIXTURES "qwen2_moe");
    for (int i = 0; i < 2; i++) {
        const moe_safetensor *gate = moe_safetensors_find(e.source, "model.layers.0.mlp.gate.weight");
        e.tensors[e.count] = *gate;
        e.tensors[e.count++].name = names[i];
        edit_write(&e);
        moe_model *m = open_good(e.dir.path);
        assert_int_equal(m->has_pre_gates, i == 1); /* each MoE layer but the last needs one */
        expect_shape(&m->layers[i].pre_gate, 8, 64);
        assert_false(moe_tensor_present(&m->layers[2].pre_gate));
        moe_model_close(&m);
    }
    e.tensors[e.count - 1].dims[0]--;
    edit_write(&e);
    expect_refused(e.dir.path, MOE_INVALID_ARGUMENT, names[1]);
    edit_end(&e);
}

static void digest_depends_on_content_but_not_on_sharding(void **state) {
    (void)state;
    edited e;
    edit_begin(&e, FIXTURES "mixtral");
    moe_model *sharded = open_good(FIXTURES "mixtral");
    edit_write(&e);
    moe_model *whole = open_good(e.dir.path);
    assert_true(sharded->digest == whole->digest);
    moe_model_close(&whole);
    uint8_t changed[128];
    for (int64_t i = 0; i < e.count; i++) {
        if (strcmp(e.tensors[i].name, "model.norm.weight") != 0) continue;
        memcpy(changed, e.tensors[i].data, sizeof changed);
        changed[127] ^= 1;
        e.tensors[i].data = changed;
    }
    edit_write(&e);
    whole = open_good(e.dir.path);
    assert_true(sharded->digest != whole->digest);
    moe_model_close(&whole);
    moe_model_close(&sharded);
    edit_end(&e);
}

static void survives_every_failed_allocation(void **state) {
    (void)state;
    int failures = 0;
    for (int64_t n = 1;; n++) {
        moe_model *m = NULL;
        moe_alloc_fail_after(n);
        moe_status status = moe_model_open(FIXTURES "llama_dense", &m, NULL);
        moe_alloc_fail_after(0);
        if (status == MOE_OK) {
            moe_model_close(&m);
            break;
        }
        assert_int_equal(status, MOE_RESOURCE_EXHAUSTED);
        assert_null(m);
        failures++;
    }
    assert_true(failures > 30);
}

/* Pre-gates of a file of their own take the place of the checkpoint's; a wrong file is refused, naming it. */
static void pre_gates_beside_a_checkpoint(void **state) {
    (void)state;
    enum { MOE_LAYERS = 6, EXPERTS = 16, HIDDEN = 256, SIZE = EXPERTS * HIDDEN };
    static float weights[(MOE_LAYERS - 1) * SIZE], read[SIZE];
    moe_test_dir dir = moe_test_dir_new();
    moe_model *m = open_good(SOURCE_DIR "/models/demo"), *other = open_good(FIXTURES "qwen2_moe");
    uint64_t digest = m->digest;
    moe_error err = {0};
    char path[PATH_MAX], absent[PATH_MAX];
    snprintf(path, sizeof path, "%s/pre_gates.safetensors", dir.path);
    snprintf(absent, sizeof absent, "%s/absent/pre_gates.safetensors", dir.path);
    for (int i = 0; i < (MOE_LAYERS - 1) * SIZE; i++) weights[i] = (float)i;
    assert_int_equal(moe_pre_gates_write(absent, &m->config, weights, &err), MOE_PERMISSION_DENIED);
    assert_int_equal(moe_pre_gates_write(path, &m->config, weights, &err), MOE_OK);
    assert_int_equal(moe_model_use_pre_gates(m, path, &err), MOE_OK);
    assert_true(m->has_pre_gates);
    for (int i = 0; i < MOE_LAYERS - 1; i++) {
        moe_tensor_read_f32(&m->layers[i].pre_gate, 0, SIZE, read);
        assert_memory_equal(read, weights + i * SIZE, sizeof read);
    }
    assert_int_equal(m->digest, digest);
    assert_int_equal(moe_model_use_pre_gates(other, path, &err), MOE_INVALID_ARGUMENT);
    assert_non_null(strstr(err.message, "pre_gate.weight"));
    assert_false(other->has_pre_gates);
    moe_model_close(&other);
    other = open_good(FIXTURES "qwen2_moe");
    assert_int_equal(moe_model_use_pre_gates(other, absent, &err), MOE_NOT_FOUND);
    assert_int_equal(moe_model_use_pre_gates(other, MOE_PRE_GATES_NEXT_GATE, &err), MOE_OK);
    for (int i = 0; i + 1 < other->config.num_moe_layers; i++)
        assert_ptr_equal(other->layers[other->config.moe_layers[i]].pre_gate.data,
                         other->layers[other->config.moe_layers[i + 1]].gate.data);
    moe_model_close(&m);
    moe_model_close(&other);
    moe_test_dir_free(&dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(opens_every_family),
        cmocka_unit_test(opens_networks_without_gates),
        cmocka_unit_test(refuses_each_missing_tensor),
        cmocka_unit_test(refuses_each_wrong_shape),
        cmocka_unit_test(refuses_unused_tensors_unless_ignorable),
        cmocka_unit_test(tied_embeddings_ignore_a_stored_lm_head),
        cmocka_unit_test(refuses_a_damaged_checkpoint_or_none),
        cmocka_unit_test(packed_experts_equal_single_ones),
        cmocka_unit_test(pre_gates_are_optional),
        cmocka_unit_test(pre_gates_beside_a_checkpoint),
        cmocka_unit_test(digest_depends_on_content_but_not_on_sharding),
        cmocka_unit_test(survives_every_failed_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
