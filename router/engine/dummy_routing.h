/* Routing for generated weights. Their gates route almost evenly and without memory, which no cache of experts can live with;
 * this chooses experts instead as gates of trained models do: some often, others rarely, and often those of the token before.
 *
 * Each of a token's top-k choices at a layer is with probability `locality` that of the token before in its sequence, else drawn
 * from a Zipf distribution over the layer's experts, whose order of popularity is a seeded permutation. Choices that are made
 * already are drawn again. The result is a pure function of seed, sequence, position and layer: the same whatever is computed
 * together, whoever computes it, and however often. Some thousand places are drawn at the start; each sequence walks through them from one
 * of its own on, so that a step looks up what it would take longer to draw than a GPU to compute. */
#pragma once
#include "common/status.h"

#define MOE_DUMMY_ROUTING_DEFAULT_LOCALITY 0.3
#define MOE_DUMMY_ROUTING_MAX_SKEW 8.0
#define MOE_DUMMY_ROUTING_MAX_LOCALITY 0.99

typedef struct moe_dummy_routing_spec {
    bool on;
    double skew;     /* Zipf's exponent: the expert of rank r is drawn r^-skew times as often as the first; 0: evenly */
    double locality; /* of each choice, to be that of the token before */
    double recall;   /* of hints: the part of what they name that will be chosen; under pre-gate it is always all */
    uint64_t seed;
} moe_dummy_routing_spec;

/* "zipf:1.0", or with any of ",locality:0.6", ",recall:0.9", ",seed:7" behind it. INVALID_ARGUMENT. */
moe_status moe_dummy_routing_parse(const char *text, moe_dummy_routing_spec *out, moe_error *err);

typedef struct moe_dummy_routing moe_dummy_routing;

/* spec->on; top_k at most num_experts. RESOURCE_EXHAUSTED. */
moe_status moe_dummy_routing_new(const moe_dummy_routing_spec *spec, int32_t num_layers, int32_t num_experts, int32_t top_k,
                                 moe_dummy_routing **out, moe_error *err);
void moe_dummy_routing_free(moe_dummy_routing **routing); /* NULLs; idempotent */

/* What a sequence is known by: the same for the same prompt, in every process. */
uint64_t moe_dummy_routing_sequence(const int32_t *prompt, int32_t num_tokens);
/* experts [top_k]: distinct, ascending. */
void moe_dummy_routing_choose(const moe_dummy_routing *routing, uint64_t sequence, int32_t position, int32_t layer, int32_t *experts);
/* What a hint names: those, but for the part that recall leaves out, in whose place are experts that will not be chosen. */
void moe_dummy_routing_hint(const moe_dummy_routing *routing, uint64_t sequence, int32_t position, int32_t layer, int32_t *experts);
