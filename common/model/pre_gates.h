/* Pre-gates beside a checkpoint: files of them, as `moesaic train-pregate` writes. A pre-gate is a matrix [E, H], applied to what
 * its layer's gate is given; its product is the router logits of the next MoE layer. Names are a checkpoint's:
 * model.layers.{L}.mlp.pre_gate.weight, L the number among all layers. */
#pragma once
#include "common/model/model.h"

/* As a file name: the next MoE layer's own gate as pre-gate, which needs no training. */
#define MOE_PRE_GATES_NEXT_GATE "next-gate"

/* Puts the pre-gates of a safetensors file, one for each MoE layer but the last and nothing else, or the next layers' gates, in
 * the place of the checkpoint's, if it has any. Before anyone else uses the model. The model's digest stays: what workers hold is
 * the same. NOT_FOUND, INVALID_ARGUMENT (naming file and tensor), FAILED_PRECONDITION (less than two MoE layers). */
moe_status moe_model_use_pre_gates(moe_model *model, const char *file, moe_error *err);

/* Writes such a file. weights [num_moe_layers - 1, E, H]. The file appears whole or not at all. PERMISSION_DENIED, DATA_LOSS,
 * RESOURCE_EXHAUSTED, with the file's name. */
moe_status moe_pre_gates_write(const char *file, const moe_model_config *config, const float *weights, moe_error *err);
