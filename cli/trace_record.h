/* Fills a trace while texts pass through an engine: an observer, with one micro-batch. */
#pragma once
#include "cli/trace.h"
#include "router/engine/engine.h"

typedef struct moe_trace_recorder {
    moe_trace *trace;  /* num_layers … num_planes are set; texts are made as they come */
    bool pre_gate;     /* this pass fills MOE_TRACE_PRE_GATE; else the others */
    int32_t max_texts; /* room in trace->texts */
    moe_status status; /* of the first failure; what follows it is not recorded */
    moe_error error;
} moe_trace_recorder;

void moe_trace_on_layer(void *recorder, const moe_layer_view *view); /* on_layer of the engine */
