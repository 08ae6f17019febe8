#include "router/inference.h"

#include "common/metrics.h"
#include "common/random.h"

static moe_status check_room(const moe_inference *inference, moe_error *err) {
    moe_inference_view view;
    inference->ops->view(inference->ctx, &view);
    if (!view.has_map)
        return moe_fail(err, MOE_UNAVAILABLE, "the cluster has no placement map yet: its workers are still joining");
    if (view.waiting >= inference->max_waiting)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%d requests are queued, which is the limit: try again later", view.waiting);
    return MOE_OK;
}

moe_status moe_inference_admit(const moe_inference *inference, moe_error *err) {
    moe_status status = check_room(inference, err);
    if (status != MOE_OK) moe_metric_add(MOE_METRIC_REQUESTS_REJECTED, 1); /* the engine counts those that it refuses itself */
    return status;
}

void moe_inference_default_sampling(const moe_inference *inference, moe_sampling_params *out) {
    const moe_generation_config *generation = &inference->generation;
    *out = (moe_sampling_params){
        .temperature = generation->do_sample ? generation->temperature : 0.0f,
        .top_p = generation->top_p,
        .top_k = generation->top_k,
        .min_p = generation->min_p,
        .repetition_penalty = generation->repetition_penalty,
        .seed = moe_random_identity(),
        .max_tokens = inference->max_model_len,
        .logprobs = -1,
        .prompt_logprobs = -1,
        .skip_special_tokens = true,
    };
}
