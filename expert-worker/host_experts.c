#include "expert-worker/host_experts.h"

moe_status moe_host_experts_create(moe_backend *backend, moe_backend *host, const moe_ffn_weights *weights, int32_t count,
                                   moe_host_experts **out, moe_error *err) {
    moe_image_layout layout;
    bool own = backend == host;
    *out = NULL;
    if (!host->ops->host_experts_create || (!own && !backend->ops->expert_layout))
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--cold-experts: backend %s cannot compute from images of backend %s; give fetch",
                        host->ops->name, backend->ops->name);
    if (!own) backend->ops->expert_layout(backend, weights, 0, MOE_FFN_BLOCKS, &layout);
    return host->ops->host_experts_create(host, weights, 0, MOE_FFN_BLOCKS, own ? NULL : &layout, count, out, err);
}
