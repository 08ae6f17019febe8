/* Routed experts on a micro-batch where it is: what they are given and what comes out never leaves the device. */
#pragma once
#include "cuda/rows.h"

/* As layer_ffn_submit of backend.h. */
void moe_cuda_layer_ffn_submit(moe_cuda *cuda, const moe_base *base, const moe_layer_ffn *ffn, moe_job *job);
