#include "common/digest.h"
#include "common/json.h"
#include "router/placement/controller_internal.h"

moe_status moe_meta_to_json(const moe_meta *meta, moe_buf *out, moe_error *err) {
    moe_buf_clear(out);
    json_t *root = json_pack("{s:s, s:I, s:I, s:s, s:o, s:o, s:i}", "uuid", meta->uuid, "epoch", (json_int_t)meta->epoch, "fence",
                             (json_int_t)meta->fence, "leader", meta->leader, "map_digest", moe_json_hex(meta->map_digest),
                             "model_digest", moe_json_hex(meta->model_digest), "replicas", meta->replicas);
    if (moe_json_write(root, out)) return MOE_OK;
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the text of meta");
}

moe_status moe_meta_from_json(const char *text, size_t size, moe_meta *out, moe_error *err) {
    json_t *root = json_loadb(text, size, JSON_REJECT_DUPLICATES, NULL);
    int64_t epoch = 0, fence = 0, replicas = 0;
    *out = (moe_meta){0};
    bool ok =
        moe_json_get_text(root, "uuid", out->uuid, sizeof out->uuid) && out->uuid[0] &&
        moe_json_get_count(root, "epoch", MOE_MAX_EPOCH, &epoch) && moe_json_get_count(root, "fence", MOE_MAX_EPOCH, &fence) &&
        moe_json_get_text(root, "leader", out->leader, sizeof out->leader) &&
        moe_json_get_hex(root, "map_digest", &out->map_digest) && moe_json_get_hex(root, "model_digest", &out->model_digest) &&
        moe_json_get_count(root, "replicas", MOE_PLACEMENT_MAX_REPLICAS, &replicas);
    json_decref(root);
    out->epoch = (uint64_t)epoch;
    out->fence = (uint64_t)fence;
    out->replicas = (int32_t)replicas;
    return ok ? MOE_OK : moe_fail(err, MOE_INVALID_ARGUMENT, "the store's key meta is damaged");
}

uint64_t moe_text_digest(const char *text, size_t size) {
    uint8_t digest[MOE_SHA256_BYTES];
    moe_sha256 *sha = moe_sha256_new();
    if (!sha) return 0;
    moe_sha256_update(sha, text, size);
    moe_sha256_finish(&sha, digest);
    return moe_sha256_short(digest);
}
