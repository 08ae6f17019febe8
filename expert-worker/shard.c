#include "expert-worker/shard.h"

#include "common/alloc.h"
#include "expert-worker/residency.h"

moe_status moe_shard_init(moe_shard *shard, const moe_model *model, moe_backend *backend, moe_error *err) {
    size_t count = (size_t)model->config.num_moe_layers * (size_t)model->config.num_experts;
    *shard = (moe_shard){.model = model, .backend = backend, .holdings = 1, .experts = moe_calloc(count, sizeof *shard->experts)};
    if (!shard->experts) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the table of %zu experts", count);
    return MOE_OK;
}

static void free_expert(moe_shard *shard, moe_held_expert *held) {
    int32_t index = (int32_t)(held - shard->experts), num_experts = shard->model->config.num_experts;
    if (shard->residency)
        moe_residency_drop(shard->residency, index / num_experts, index % num_experts);
    else
        shard->backend->ops->expert_free(shard->backend, held->handle);
    shard->bytes -= held->bytes;
    *held = (moe_held_expert){.handle = NULL};
}

void moe_shard_free(moe_shard *shard) {
    if (!shard->experts) return;
    int64_t count = (int64_t)shard->model->config.num_moe_layers * shard->model->config.num_experts;
    for (int64_t i = 0; i < count; i++) {
        MOE_ASSERT(shard->experts[i].users == 0);
        if (shard->experts[i].held) free_expert(shard, &shard->experts[i]);
    }
    moe_free(shard->experts);
    moe_free(shard->lent);
    *shard = (moe_shard){.experts = NULL};
}

bool moe_shard_keep(moe_shard *shard, int32_t layer, int32_t expert) {
    moe_held_expert *held = moe_shard_at(shard, layer, expert);
    if (!held->held) return false;
    if (held->dropping) {
        held->dropping = false;
        shard->num_held++;
        shard->holdings++;
    }
    return true;
}

void moe_shard_adopt(moe_shard *shard, int32_t layer, int32_t expert, const moe_held_expert *loaded) {
    moe_held_expert *held = moe_shard_at(shard, layer, expert);
    MOE_ASSERT(!held->held && !loaded->handle == (shard->residency != NULL));
    *held = (moe_held_expert){.held = true, .handle = loaded->handle, .digest = loaded->digest, .bytes = loaded->bytes};
    shard->bytes += held->bytes;
    shard->num_held++;
    shard->holdings++;
}

void moe_shard_drop(moe_shard *shard, int32_t layer, int32_t expert) {
    if (!moe_shard_holds(shard, layer, expert)) return;
    moe_held_expert *held = moe_shard_at(shard, layer, expert);
    shard->num_held--;
    shard->holdings++;
    if (held->users > 0 || shard->lent)
        held->dropping = true;
    else
        free_expert(shard, held);
}

moe_expert *const *moe_shard_lend(moe_shard *shard) {
    size_t count = (size_t)shard->model->config.num_moe_layers * (size_t)shard->model->config.num_experts;
    if (count == 0 || (size_t)shard->num_held != count || shard->residency) return NULL;
    if (shard->lent) return shard->lent;
    shard->lent = moe_calloc(count, sizeof(moe_expert *));
    for (size_t i = 0; shard->lent && i < count; i++) shard->lent[i] = shard->experts[i].handle;
    return shard->lent;
}

void moe_shard_use(moe_shard *shard, int32_t layer, int32_t expert, int32_t rows) {
    MOE_ASSERT(moe_shard_holds(shard, layer, expert));
    moe_held_expert *held = moe_shard_at(shard, layer, expert);
    held->users++;
    held->calls++;
    held->rows += (uint64_t)rows;
}

void moe_shard_release(moe_shard *shard, int32_t layer, int32_t expert) {
    moe_held_expert *held = moe_shard_at(shard, layer, expert);
    MOE_ASSERT(held->users > 0);
    if (--held->users == 0 && held->dropping && !shard->lent) free_expert(shard, held);
}
