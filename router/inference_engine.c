/* The real engine behind the fronts' interface. */
#include "router/inference.h"

static moe_status engine_submit(void *ctx, const moe_request *request, moe_on_output on_output, void *output_ctx, uint64_t *id,
                                moe_error *err) {
    return moe_engine_submit(ctx, request, on_output, output_ctx, id, err);
}

static void engine_cancel(void *ctx, uint64_t id) { moe_engine_cancel(ctx, id); }

static void engine_view(void *ctx, moe_inference_view *out) {
    moe_engine_view view;
    moe_engine_get_view(ctx, &view);
    *out = (moe_inference_view){
        .has_map = view.epoch > 0 || view.ready, .ready = view.ready, .running = view.running, .waiting = view.waiting};
}

const moe_inference_ops *moe_inference_engine_ops(void) {
    static const moe_inference_ops ops = {engine_submit, engine_cancel, engine_view};
    return &ops;
}
