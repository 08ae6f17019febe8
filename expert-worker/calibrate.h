/* What a worker's backend takes for a batch of a layer: so much for each distinct expert, whose weights are read once, and so
 * much for each row. Measured once, before the worker registers. */
#pragma once
#include "common/backend.h"
#include "expert-worker/cold.h"

#define MOE_CALIBRATE_EXPERTS 8                  /* at most, of the shape of the model's */
#define MOE_CALIBRATE_BYTES (INT64_C(256) << 20) /* of weights, as stored, for more than two */
#define MOE_CALIBRATE_ROWS 128
#define MOE_CALIBRATE_RUNS 5 /* of each batch; the fastest counts */

typedef struct moe_calibration {
    int64_t expert_ns, row_ns; /* row_ns is at least 1 */
} moe_calibration;

/* Loads some experts of zeros, computes batches of them, frees them. No other job of the backend may run. Blocks. The errors of
 * expert_load and of jobs. */
moe_status moe_calibrate(moe_backend *backend, const moe_model *model, moe_calibration *out, moe_error *err);

/* Of cold experts: copies of images into a slot of `backend`, and `host` computing from images as `backend` packs them. Likewise; leaves
 * costs->device alone. Also the errors of slots_create. */
moe_status moe_calibrate_cold(moe_backend *backend, moe_backend *host, const moe_model *model, moe_cold_costs *out, moe_error *err);
