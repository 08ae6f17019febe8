#include "expert-worker/shard.h"

#include "common/alloc.h"

moe_status moe_shard_init(moe_shard *shard, const moe_model *model, moe_backend *backend, moe_error *err) {
    size_t count = (size_t)model->config.num_moe_layers * (size_t)model->config.num_experts;
    *shard = (moe_shard){.model = model, .backend = backend, .experts = moe_calloc(count, sizeof *shard->experts)};
    if (!shard->experts) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the table of %zu experts", count);
    return MOE_OK;
}

static void free_expert(moe_shard *shard, moe_held_expert *held) {
    shard->backend->ops->expert_free(shard->backend, held->handle);
    shard->bytes -= held->bytes;
    *held = (moe_held_expert){.handle = NULL};
}

void moe_shard_free(moe_shard *shard) {
    if (!shard->experts) return;
    int64_t count = (int64_t)shard->model->config.num_moe_layers * shard->model->config.num_experts;
    for (int64_t i = 0; i < count; i++) {
        MOE_ASSERT(shard->experts[i].users == 0);
        if (shard->experts[i].handle) free_expert(shard, &shard->experts[i]);
    }
    moe_free(shard->experts);
    *shard = (moe_shard){.experts = NULL};
}

moe_status moe_shard_load(moe_shard *shard, int32_t layer, int32_t expert, moe_error *err) {
    moe_held_expert *held = moe_shard_at(shard, layer, expert);
    if (held->handle) {
        shard->num_held += held->dropping;
        held->dropping = false;
        return MOE_OK;
    }
    const moe_ffn_weights *weights = moe_model_expert(shard->model, layer, expert);
    moe_held_expert loaded = {.handle = NULL};
    moe_model_expert_will_need(shard->model, weights);
    moe_status status = moe_expert_digest(weights, &loaded.digest, err);
    if (status == MOE_OK)
        status = shard->backend->ops->expert_load(shard->backend, weights, 0, MOE_FFN_BLOCKS, &loaded.handle, err);
    moe_model_expert_release(shard->model, weights);
    if (status != MOE_OK) return status;
    loaded.bytes = shard->backend->ops->expert_bytes(loaded.handle);
    *held = loaded;
    shard->bytes += loaded.bytes;
    shard->num_held++;
    return MOE_OK;
}

void moe_shard_drop(moe_shard *shard, int32_t layer, int32_t expert) {
    if (!moe_shard_holds(shard, layer, expert)) return;
    moe_held_expert *held = moe_shard_at(shard, layer, expert);
    shard->num_held--;
    if (held->users > 0)
        held->dropping = true;
    else
        free_expert(shard, held);
}

void moe_shard_use(moe_shard *shard, int32_t layer, int32_t expert) {
    MOE_ASSERT(moe_shard_holds(shard, layer, expert));
    moe_shard_at(shard, layer, expert)->users++;
}

void moe_shard_release(moe_shard *shard, int32_t layer, int32_t expert) {
    moe_held_expert *held = moe_shard_at(shard, layer, expert);
    MOE_ASSERT(held->users > 0);
    if (--held->users == 0 && held->dropping) free_expert(shard, held);
}
