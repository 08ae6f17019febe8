/* An opened model: configuration and its weights, by role: borrowed views of a checkpoint, or generated ones for a model of which
 * there is only a config.json. Nothing is copied or converted.
 *
 * moe_model_open checks every tensor that the family needs (present, right shape, supported dtype) and refuses tensors it
 * does not know, naming them. Immutable after open; any thread. */
#pragma once
#include "common/model/config.h"
#include "common/tensor.h"

/* A feed-forward network in one of two forms: gated, three matrices, y = down · (silu(gate · x) ⊙ (up · x)); or without `gate`,
 * two matrices, y = down · relu(up · x). */
typedef struct moe_ffn_weights {
    moe_tensor gate; /* [I, H]; absent in the second form */
    moe_tensor up;   /* [I, H]; absent where there is no network */
    moe_tensor down; /* [H, I] */
} moe_ffn_weights;

static inline bool moe_ffn_present(const moe_ffn_weights *w) { return moe_tensor_present(&w->up); }

/* Which of the forms it is; every layout and computation asks this. */
static inline bool moe_ffn_gated(const moe_ffn_weights *w) { return moe_tensor_present(&w->gate); }

/* Made by a generator, so that every process has them: nothing to read or to copy. */
static inline bool moe_ffn_generated(const moe_ffn_weights *w) { return moe_ffn_present(w) && !w->up.data; }

typedef struct moe_layer_weights {
    moe_tensor input_norm;                     /* [H] */
    moe_tensor q, k, v, o;                     /* [heads·d, H], [kv·d, H], [kv·d, H], [H, heads·d] */
    moe_tensor q_bias, k_bias, v_bias, o_bias; /* absent where the family has none */
    moe_tensor q_norm, k_norm;                 /* absent unless config.qk_norm */
    moe_tensor post_norm;                      /* [H] */
    moe_ffn_weights dense;                     /* present where !layer_is_moe */
    moe_tensor gate;                           /* [E, H]; present where layer_is_moe */
    moe_tensor pre_gate;                       /* [E, H] or absent: routing of the next MoE layer from this layer's gate input */
    moe_ffn_weights shared;                    /* absent where shared_intermediate is 0 */
    moe_tensor shared_gate;                    /* [1, H]; present where shared_gated */
} moe_layer_weights;

typedef struct moe_model {
    moe_model_config config;
    moe_generation_config generation;
    const char *dir;  /* owned */
    moe_tensor embed; /* [V, H] */
    moe_tensor final_norm;
    moe_tensor lm_head;                 /* [V, H]; the embedding where tied */
    moe_layer_weights *layers;          /* [num_layers] */
    moe_ffn_weights *experts;           /* [num_moe_layers, num_experts] */
    bool has_pre_gates;                 /* every MoE layer but the last has one */
    uint64_t digest;                    /* see moe_model_digest */
    struct moe_safetensors *checkpoint; /* NULL where the weights are generated */
    struct moe_safetensors *pre_gates;  /* a file of their own; NULL: those of the checkpoint, if any (pre_gates.h) */
} moe_model;

/* Opens DIR. The caller owns *out. NOT_FOUND, INVALID_ARGUMENT, UNIMPLEMENTED, with file and tensor named. */
moe_status moe_model_open(const char *dir, moe_model **out, moe_error *err);

typedef struct moe_dummy_options {
    uint64_t seed;
    int32_t num_layers; /* the first so many layers alone; 0: all of config.json */
} moe_dummy_options;

/* A model of DIR/config.json's shape with random weights: nothing else of DIR is needed (generation_config.json is read where it
 * is there). Each tensor's elements follow from its name and the seed (common/generated.h), so that they are the same in every
 * process and on every backend, and no memory holds them. The digest covers names, shapes and seed. Errors as of
 * moe_model_open; OUT_OF_RANGE for more layers than config.json has. */
moe_status moe_model_open_dummy(const char *dir, const moe_dummy_options *options, moe_model **out, moe_error *err);

void moe_model_close(moe_model **model); /* NULLs the pointer; idempotent */

/* The weights of expert `expert` of the `moe_index`-th MoE layer (0-based among MoE layers, as in all routing). */
static inline const moe_ffn_weights *moe_model_expert(const moe_model *m, int32_t moe_index, int32_t expert) {
    return &m->experts[(int64_t)moe_index * m->config.num_experts + expert];
}

/* The identity of a model revision: SHA-256 over the sorted tensor names, dtypes and shapes, and the first
 * MOE_DIGEST_SAMPLE_BYTES of the first and the last tensor of each kind; first 8 bytes. Tensors whose names differ in numbers
 * alone (layer, expert) are of one kind. Sampled so that no process reads what it does not need; whole contents of experts are
 * covered by moe_expert_digest. Computed at open. */
#define MOE_DIGEST_SAMPLE_BYTES 1024

/* SHA-256 over the canonical bytes of one expert (gate where it has one, up, down as stored), first 8 bytes. Reads all of them.
 * Of generated weights: over what the elements follow from (seed, range, dtype, shape), since any two processes make the same of
 * it. */
moe_status moe_expert_digest(const moe_ffn_weights *expert, uint64_t *out, moe_error *err);

int64_t moe_model_base_bytes(const moe_model *model); /* of all tensors but the experts', as stored; a tied embedding once */

/* What will be read next, so that the disk works meanwhile, and what is no longer needed because it was packed elsewhere (a
 * later read maps it again). Nothing else of the checkpoint is read. Tensors that are absent or not in the checkpoint's map are
 * passed over. Any thread; none waits. */
void moe_model_tensor_will_need(const moe_model *model, const moe_tensor *tensor);
void moe_model_tensor_release(const moe_model *model, const moe_tensor *tensor);
void moe_model_expert_will_need(const moe_model *model, const moe_ffn_weights *expert);
void moe_model_expert_release(const moe_model *model, const moe_ffn_weights *expert);
void moe_model_layer_will_need(const moe_model *model, const moe_layer_weights *layer); /* all but its experts */
void moe_model_layer_release(const moe_model *model, const moe_layer_weights *layer);
