/* The plainest way to run a whole model on a backend: segment by segment, every expert loaded here, nothing in flight but one
 * job. For goldens and for tests that compare backends, batches and chunkings. Failures abort (MOE_ASSERT). */
#pragma once
#include "common/backend.h"

typedef struct moe_driver moe_driver;

typedef struct moe_driver_options {
    bool pre_gate;            /* layer L's pre-gate decides layer L + 1; the first MoE layer uses its own gate */
    moe_combine_mode combine; /* */
    int32_t num_sequences;    /* at least 1 */
    int32_t max_tokens;       /* of a sequence */
    int32_t max_rows;         /* of a step */
    bool local;               /* a step is one job of the backend; combine is then exact */
} moe_driver_options;

/* Loads base layers and all experts. `backend` and `model` stay open until close. */
moe_driver *moe_driver_open(moe_backend *backend, const moe_model *model, const moe_driver_options *options);
void moe_driver_close(moe_driver *driver);

/* Forgets the tokens of a sequence from position `length` on. */
void moe_driver_truncate(moe_driver *driver, int32_t sequence, int32_t length);

/* One micro-batch: row i appends token ids[i] to sequence sequences[i] (rows of a sequence stand together).
 * logits [rows, V], of every row. */
void moe_driver_step(moe_driver *driver, const int32_t *ids, const int32_t *sequences, int32_t rows, float *logits);

/* What a step is to compute, for every row. */
typedef struct moe_driver_wanted {
    float *logits; /* [rows, V] or NULL */
    int32_t num_top;
    int32_t *top_ids, *expert_rows; /* as in moe_segment and moe_local_step; expert_rows of a local step alone, may be NULL */
    float *top_logits;
} moe_driver_wanted;

void moe_driver_step_for(moe_driver *driver, const int32_t *ids, const int32_t *sequences, int32_t rows,
                         const moe_driver_wanted *want);

/* Appends `count` tokens to sequence 0 in steps of at most `chunk` rows; logits [count, V]. */
void moe_driver_prefill(moe_driver *driver, const int32_t *ids, int32_t count, int32_t chunk, float *logits);

/* The largest logit's token; the lowest id of equals. */
int32_t moe_driver_argmax(const float *logits, int32_t vocab);

/* Submits and waits; for tests that use a backend without the driver. */
void moe_driver_run_segment(moe_backend *backend, moe_base *base, const moe_segment *segment);
void moe_driver_run_ffn(moe_backend *backend, const moe_ffn_batch *batch);
