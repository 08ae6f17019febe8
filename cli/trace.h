/* Routing traces: which experts the tokens of real texts were sent to. Recorded token by token, so that a replay can put any
 * number of requests beside each other. A token's routing does not depend on what else is computed with it (docs/architecture.md,
 * "Numeric profile"), so texts are recorded by prefill.
 *
 * File: little-endian; magic "MOETRACE", u32 version 1, layers, experts, top_k, planes, texts, u64 bytes of an expert; then for
 * each text u32 tokens and for each plane u16 [tokens, layers, top_k]. */
#pragma once
#include "common/status.h"

#define MOE_TRACE_MAX_TOKENS (1 << 20) /* of a text */
#define MOE_TRACE_MAX_TEXTS (1 << 20)

typedef enum moe_trace_plane {
    MOE_TRACE_GATE,     /* what gates chose */
    MOE_TRACE_HINT,     /* what was foretold of it one MoE layer earlier; of layer 0, what its gate chose */
    MOE_TRACE_PRE_GATE, /* what pre-gates chose where they decide; not there without pre-gates */
    MOE_TRACE_PLANES
} moe_trace_plane;

typedef struct moe_trace_text {
    int32_t num_tokens;
    uint16_t *routes[MOE_TRACE_PLANES]; /* [num_tokens, layers, top_k]; owned */
} moe_trace_text;

typedef struct moe_trace {
    int32_t num_layers, num_experts, top_k; /* MoE layers */
    int32_t num_planes;                     /* 2, or 3 with MOE_TRACE_PRE_GATE */
    int64_t expert_bytes;                   /* as stored */
    int32_t num_texts;
    moe_trace_text *texts; /* owned */
} moe_trace;

static inline const uint16_t *moe_trace_at(const moe_trace *t, int32_t text, moe_trace_plane plane, int32_t token,
                                           int32_t layer) {
    return t->texts[text].routes[plane] + ((int64_t)token * t->num_layers + layer) * t->top_k;
}

/* The text's planes with room for `num_tokens`, those there are kept, new ones zero. RESOURCE_EXHAUSTED. */
moe_status moe_trace_resize(moe_trace *trace, int32_t text, int32_t num_tokens, moe_error *err);
void moe_trace_free(moe_trace *trace); /* what it owns; idempotent */

/* The file appears whole or not at all. PERMISSION_DENIED, DATA_LOSS. */
moe_status moe_trace_write(const moe_trace *trace, const char *file, moe_error *err);
/* *out is the caller's to free. NOT_FOUND; INVALID_ARGUMENT for what is no trace, or damaged; RESOURCE_EXHAUSTED. */
moe_status moe_trace_read(const char *file, moe_trace *out, moe_error *err);
