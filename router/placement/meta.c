#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/digest.h"
#include "router/placement/controller_internal.h"

#define HEX_BYTES 17

moe_status moe_meta_to_json(const moe_meta *meta, moe_buf *out, moe_error *err) {
    char map_digest[HEX_BYTES], model_digest[HEX_BYTES];
    snprintf(map_digest, sizeof map_digest, "%016llx", (unsigned long long)meta->map_digest);
    snprintf(model_digest, sizeof model_digest, "%016llx", (unsigned long long)meta->model_digest);
    json_t *root = json_pack("{s:s, s:I, s:I, s:s, s:s, s:s, s:i}", "uuid", meta->uuid, "epoch", (json_int_t)meta->epoch, "fence",
                             (json_int_t)meta->fence, "leader", meta->leader, "map_digest", map_digest, "model_digest",
                             model_digest, "replicas", meta->replicas);
    char *text = root ? json_dumps(root, JSON_COMPACT) : NULL;
    json_decref(root);
    moe_buf_clear(out);
    if (text) moe_buf_append_text(out, text);
    free(text);
    return text && !out->failed ? MOE_OK : moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the text of meta");
}

static bool get_text(const json_t *root, const char *key, char *out, size_t capacity) {
    const char *text = json_string_value(json_object_get(root, key));
    if (!text || strlen(text) >= capacity) return false;
    memcpy(out, text, strlen(text) + 1);
    return true;
}

static bool get_hex(const json_t *root, const char *key, uint64_t *out) {
    const char *text = json_string_value(json_object_get(root, key));
    if (!text || strlen(text) != HEX_BYTES - 1 || strspn(text, "0123456789abcdef") != HEX_BYTES - 1) return false;
    *out = strtoull(text, NULL, 16);
    return true;
}

static bool get_count(const json_t *root, const char *key, uint64_t limit, uint64_t *out) {
    const json_t *value = json_object_get(root, key);
    if (!json_is_integer(value) || json_integer_value(value) < 0 || (uint64_t)json_integer_value(value) > limit) return false;
    *out = (uint64_t)json_integer_value(value);
    return true;
}

moe_status moe_meta_from_json(const char *text, size_t size, moe_meta *out, moe_error *err) {
    json_t *root = json_loadb(text, size, JSON_REJECT_DUPLICATES, NULL);
    uint64_t replicas = 0;
    *out = (moe_meta){0};
    bool ok = get_text(root, "uuid", out->uuid, sizeof out->uuid) && out->uuid[0] &&
              get_count(root, "epoch", INT64_MAX / 2, &out->epoch) && get_count(root, "fence", INT64_MAX / 2, &out->fence) &&
              get_text(root, "leader", out->leader, sizeof out->leader) && get_hex(root, "map_digest", &out->map_digest) &&
              get_hex(root, "model_digest", &out->model_digest) &&
              get_count(root, "replicas", MOE_PLACEMENT_MAX_REPLICAS, &replicas);
    json_decref(root);
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
