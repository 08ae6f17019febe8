/* Writes a qwen3_moe checkpoint of seeded random bf16 weights, sharded as Hugging Face does it, for tests of memory, loading and
 * growth: make_checkpoint DIR [--layers N] [--experts N] [--top-k N] [--hidden N] [--intermediate N] [--heads N] [--kv-heads N]
 * [--head-dim N] [--vocab N] [--positions N] [--shard-mib N] [--seed N]. DIR must not exist. No tokenizer: serve it with
 * --skip-tokenizer-init. Prints one JSON object with the bytes of all experts and of all other tensors. */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "common/alloc.h"
#include "common/buf.h"
#include "common/random.h"

#define CHUNK_WORDS 8192                           /* 64 KiB of random weights are made at a time */
#define BF16_ONE 0x3f80u                           /* of norm weights */
#define WEIGHT_BITS UINT64_C(0x81ff81ff81ff81ff)   /* sign, two bits of exponent, mantissa: random */
#define WEIGHT_ANCHOR UINT64_C(0x3c003c003c003c00) /* the rest of the exponent: magnitudes from 2^-7 to 2^-3 */

enum { LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB, POSITIONS, SHARD_MIB, SEED, NUM_SETTINGS };

static const char *const setting_names[NUM_SETTINGS] = {"layers",   "experts",  "top-k", "hidden",    "intermediate", "heads",
                                                        "kv-heads", "head-dim", "vocab", "positions", "shard-mib",    "seed"};

typedef struct tensor {
    char name[96];
    int64_t rows, cols; /* rows 0: a vector of ones */
    int64_t bytes;
    int32_t shard;
} tensor;

typedef struct checkpoint {
    const char *dir;
    int64_t settings[NUM_SETTINGS];
    tensor *tensors;
    int64_t count, capacity;
    int64_t expert_bytes, base_bytes, shard_bytes;
    int32_t num_shards;
    moe_random random;
} checkpoint;

static void __attribute__((noreturn, format(printf, 1, 2))) stop(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("make_checkpoint: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

static void __attribute__((format(printf, 4, 5))) add(checkpoint *c, int64_t rows, int64_t cols, const char *format, ...) {
    if (c->count == c->capacity) {
        c->capacity = c->capacity ? 2 * c->capacity : 1024;
        c->tensors = moe_realloc(c->tensors, (size_t)c->capacity, sizeof *c->tensors);
        if (!c->tensors) stop("out of memory");
    }
    tensor *t = &c->tensors[c->count++];
    va_list args;
    va_start(args, format);
    vsnprintf(t->name, sizeof t->name, format, args);
    va_end(args);
    t->rows = rows;
    t->cols = cols;
    t->bytes = (rows ? rows : 1) * cols * 2;
    if (strstr(t->name, ".experts."))
        c->expert_bytes += t->bytes;
    else
        c->base_bytes += t->bytes;
    if (c->num_shards == 0 || c->shard_bytes + t->bytes > c->settings[SHARD_MIB] << 20) {
        c->num_shards++;
        c->shard_bytes = 0;
    }
    c->shard_bytes += t->bytes;
    t->shard = c->num_shards;
}

static void add_layer(checkpoint *c, int layer) {
    const int64_t *s = c->settings;
    add(c, 0, s[HIDDEN], "model.layers.%d.input_layernorm.weight", layer);
    for (int64_t e = 0; e < s[EXPERTS]; e++) {
        add(c, s[HIDDEN], s[INTERMEDIATE], "model.layers.%d.mlp.experts.%" PRId64 ".down_proj.weight", layer, e);
        add(c, s[INTERMEDIATE], s[HIDDEN], "model.layers.%d.mlp.experts.%" PRId64 ".gate_proj.weight", layer, e);
        add(c, s[INTERMEDIATE], s[HIDDEN], "model.layers.%d.mlp.experts.%" PRId64 ".up_proj.weight", layer, e);
    }
    add(c, s[EXPERTS], s[HIDDEN], "model.layers.%d.mlp.gate.weight", layer);
    add(c, 0, s[HIDDEN], "model.layers.%d.post_attention_layernorm.weight", layer);
    add(c, 0, s[HEAD_DIM], "model.layers.%d.self_attn.k_norm.weight", layer);
    add(c, s[KV_HEADS] * s[HEAD_DIM], s[HIDDEN], "model.layers.%d.self_attn.k_proj.weight", layer);
    add(c, s[HIDDEN], s[HEADS] * s[HEAD_DIM], "model.layers.%d.self_attn.o_proj.weight", layer);
    add(c, 0, s[HEAD_DIM], "model.layers.%d.self_attn.q_norm.weight", layer);
    add(c, s[HEADS] * s[HEAD_DIM], s[HIDDEN], "model.layers.%d.self_attn.q_proj.weight", layer);
    add(c, s[KV_HEADS] * s[HEAD_DIM], s[HIDDEN], "model.layers.%d.self_attn.v_proj.weight", layer);
}

static FILE *create(const checkpoint *c, const char *name) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", c->dir, name);
    FILE *file = fopen(path, "wb");
    if (!file) stop("cannot write %s: %s", path, strerror(errno));
    return file;
}

static void put(FILE *file, const void *data, size_t size) {
    if (fwrite(data, 1, size, file) != size) stop("writing failed: %s", strerror(errno));
}

static void finish(FILE *file) {
    if (fclose(file) != 0) stop("writing failed: %s", strerror(errno));
}

static void shard_name(const checkpoint *c, int32_t shard, char name[64]) {
    snprintf(name, 64, "model-%05d-of-%05d.safetensors", shard, c->num_shards);
}

static void write_weights(checkpoint *c, FILE *file, const tensor *t) {
    static uint64_t words[CHUNK_WORDS];
    for (int64_t left = t->bytes; left > 0; left -= (int64_t)sizeof words) {
        for (size_t i = 0; i < CHUNK_WORDS; i++)
            words[i] =
                t->rows ? (moe_random_next(&c->random) & WEIGHT_BITS) | WEIGHT_ANCHOR : BF16_ONE * UINT64_C(0x0001000100010001);
        put(file, words, left < (int64_t)sizeof words ? (size_t)left : sizeof words);
    }
}

static void write_shard(checkpoint *c, int32_t shard) {
    char name[64];
    moe_buf header = {0};
    int64_t at = 0;
    for (int64_t i = 0; i < c->count; i++) {
        const tensor *t = &c->tensors[i];
        if (t->shard != shard) continue;
        moe_buf_printf(&header, "%s\"%s\":{\"dtype\":\"BF16\",\"shape\":[", at ? "," : "{", t->name);
        if (t->rows) moe_buf_printf(&header, "%" PRId64 ",", t->rows);
        moe_buf_printf(&header, "%" PRId64 "],\"data_offsets\":[%" PRId64 ",%" PRId64 "]}", t->cols, at, at + t->bytes);
        at += t->bytes;
    }
    moe_buf_append_text(&header, "}");
    while (header.size % 8) moe_buf_append_text(&header, " ");
    if (header.failed) stop("out of memory");
    uint64_t size = header.size;
    shard_name(c, shard, name);
    FILE *file = create(c, name);
    put(file, &size, sizeof size);
    put(file, header.data, header.size);
    for (int64_t i = 0; i < c->count; i++)
        if (c->tensors[i].shard == shard) write_weights(c, file, &c->tensors[i]);
    finish(file);
    moe_buf_free(&header);
}

static void write_index(const checkpoint *c) {
    FILE *file = create(c, "model.safetensors.index.json");
    fprintf(file, "{\"metadata\":{\"total_size\":%" PRId64 "},\"weight_map\":{", c->expert_bytes + c->base_bytes);
    for (int64_t i = 0; i < c->count; i++) {
        char name[64];
        shard_name(c, c->tensors[i].shard, name);
        fprintf(file, "%s\"%s\":\"%s\"", i ? ",\n" : "\n", c->tensors[i].name, name);
    }
    fputs("}}\n", file);
    finish(file);
}

static void write_config(const checkpoint *c) {
    const int64_t *s = c->settings;
    FILE *file = create(c, "config.json");
    fprintf(file,
            "{\"architectures\":[\"Qwen3MoeForCausalLM\"],\"model_type\":\"qwen3_moe\",\"vocab_size\":%" PRId64
            ",\"hidden_size\":%" PRId64 ",\"num_hidden_layers\":%" PRId64 ",\"num_attention_heads\":%" PRId64
            ",\"num_key_value_heads\":%" PRId64 ",\"head_dim\":%" PRId64 ",\"num_experts\":%" PRId64
            ",\"num_experts_per_tok\":%" PRId64 ",\"moe_intermediate_size\":%" PRId64 ",\"intermediate_size\":%" PRId64
            ",\"max_position_embeddings\":%" PRId64
            ",\"norm_topk_prob\":true,\"decoder_sparse_step\":1,\"mlp_only_layers\":[],\"rms_norm_eps\":1e-6,"
            "\"rope_theta\":10000.0,\"hidden_act\":\"silu\",\"attention_bias\":false,\"tie_word_embeddings\":false,"
            "\"bos_token_id\":0,\"eos_token_id\":0,\"torch_dtype\":\"bfloat16\"}\n",
            s[VOCAB], s[HIDDEN], s[LAYERS], s[HEADS], s[KV_HEADS], s[HEAD_DIM], s[EXPERTS], s[TOP_K], s[INTERMEDIATE],
            s[INTERMEDIATE], s[POSITIONS]);
    finish(file);
}

static void read_arguments(checkpoint *c, int argc, char **argv) {
    struct option options[NUM_SETTINGS + 1] = {0};
    int chosen;
    for (int i = 0; i < NUM_SETTINGS; i++) options[i] = (struct option){setting_names[i], required_argument, NULL, i};
    while ((chosen = getopt_long(argc, argv, "", options, NULL)) != -1) {
        char *end = "?";
        if (chosen < NUM_SETTINGS) c->settings[chosen] = strtoll(optarg, &end, 10);
        if (*end || c->settings[chosen] < 1 || c->settings[chosen] > 1 << 20) stop("a number from 1 to 2^20 is needed");
    }
    if (optind != argc - 1) stop("exactly one folder is needed");
    c->dir = argv[optind];
}

int main(int argc, char **argv) {
    checkpoint c = {.settings = {[LAYERS] = 4,
                                 [EXPERTS] = 16,
                                 [TOP_K] = 2,
                                 [HIDDEN] = 256,
                                 [INTERMEDIATE] = 192,
                                 [HEADS] = 4,
                                 [KV_HEADS] = 2,
                                 [HEAD_DIM] = 64,
                                 [VOCAB] = 8192,
                                 [POSITIONS] = 2048,
                                 [SHARD_MIB] = 512,
                                 [SEED] = 1}};
    read_arguments(&c, argc, argv);
    c.random.state = moe_mix64((uint64_t)c.settings[SEED]);
    if (mkdir(c.dir, 0700) != 0) stop("cannot make %s: %s", c.dir, strerror(errno));
    add(&c, c.settings[VOCAB], c.settings[HIDDEN], "lm_head.weight");
    add(&c, c.settings[VOCAB], c.settings[HIDDEN], "model.embed_tokens.weight");
    for (int layer = 0; layer < c.settings[LAYERS]; layer++) add_layer(&c, layer);
    add(&c, 0, c.settings[HIDDEN], "model.norm.weight");
    for (int32_t shard = 1; shard <= c.num_shards; shard++) write_shard(&c, shard);
    write_index(&c);
    write_config(&c);
    printf("{\"expert_bytes\": %" PRId64 ", \"base_bytes\": %" PRId64 ", \"shards\": %d}\n", c.expert_bytes, c.base_bytes,
           c.num_shards);
    moe_free(c.tensors);
    return 0;
}
