/* What a front (HTTP, RPC) sees of the engine: a small vtable, so that tests plug a scripted engine in, and the description of
 * the model served. */
#pragma once
#include "common/model/config.h"
#include "router/chat/chat_template.h"
#include "router/engine/engine.h"
#include "router/engine/request.h"

#define MOE_MODEL_NAME_BYTES 256

typedef struct moe_inference_view {
    bool has_map;             /* a placement map is in use: requests can be tried */
    bool ready;               /* and every expert in it has a connected replica */
    int32_t running, waiting; /* requests */
} moe_inference_view;

/* Each function: any thread, never blocks. submit and cancel as moe_engine_submit and moe_engine_cancel. */
typedef struct moe_inference_ops {
    moe_status (*submit)(void *ctx, const moe_request *request, moe_on_output on_output, void *output_ctx, uint64_t *id,
                         moe_error *err);
    void (*cancel)(void *ctx, uint64_t id);
    void (*view)(void *ctx, moe_inference_view *out);
} moe_inference_ops;

/* Immutable while a front runs; borrowed by it. */
typedef struct moe_inference {
    const moe_inference_ops *ops;
    void *ctx;
    const char *model;                      /* the name served */
    int32_t max_model_len;                  /* tokens, prompt and output */
    int32_t vocab;                          /* ids are below */
    int32_t max_waiting;                    /* with that many queued, fronts refuse before they tokenize */
    const moe_tokenizer *tokenizer;         /* NULL: token ids only (--skip-tokenizer-init) */
    const moe_chat_template *chat_template; /* NULL: no chat */
    moe_generation_config generation;       /* defaults of requests */
    const char *lossy; /* follows this version's name in system_fingerprint where replies are not the whole model's: "budget25"; NULL */
} moe_inference;

/* The engine behind that vtable; pass the engine as ctx. */
const moe_inference_ops *moe_inference_engine_ops(void);

/* Whether one more request may come in now, asked before the work of tokenizing: UNAVAILABLE without a placement map,
 * RESOURCE_EXHAUSTED with max_waiting queued. */
moe_status moe_inference_admit(const moe_inference *inference, moe_error *err);

/* The sampling of a request that says nothing, from the model's generation_config; max_tokens is max_model_len (the engine
 * lowers it to what is left), the seed is drawn anew. */
void moe_inference_default_sampling(const moe_inference *inference, moe_sampling_params *out);
