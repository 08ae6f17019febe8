#include "common/model/expert_digests.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/alloc.h"
#include "common/json.h"

#define MAX_PATH_BYTES 4096

static json_t *to_json(uint64_t model_digest, int32_t layers, int32_t experts, const uint64_t *digests) {
    json_t *rows = json_array();
    int failed = rows == NULL;
    for (int32_t l = 0; l < layers; l++) {
        json_t *row = json_array();
        for (int32_t e = 0; e < experts; e++)
            failed |= json_array_append_new(row, moe_json_hex(digests[(int64_t)l * experts + e]));
        failed |= json_array_append_new(rows, row);
    }
    json_t *root = json_pack("{s:o, s:o}", "model_digest", moe_json_hex(model_digest), "experts", rows);
    if (!failed) return root;
    json_decref(root);
    return NULL;
}

moe_status moe_expert_digests_write(const char *path, uint64_t model_digest, int32_t layers, int32_t experts,
                                    const uint64_t *digests, moe_error *err) {
    char fresh[MAX_PATH_BYTES];
    if (snprintf(fresh, sizeof fresh, "%s.new", path) >= (int)sizeof fresh)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: the path is too long", path);
    json_t *root = to_json(model_digest, layers, experts, digests);
    if (!root) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the manifest of expert digests");
    bool written = json_dump_file(root, fresh, JSON_COMPACT) == 0 && rename(fresh, path) == 0;
    int reason = errno;
    json_decref(root);
    if (written) return MOE_OK;
    unlink(fresh);
    return moe_fail(err, MOE_UNAVAILABLE, "cannot write %s: %s", path, strerror(reason));
}

static moe_status read_rows(const char *path, const json_t *rows, int32_t layers, int32_t experts, uint64_t *digests,
                            moe_error *err) {
    if (json_array_size(rows) != (size_t)layers)
        return moe_fail(err, MOE_DATA_LOSS, "%s: %zu layers, the model has %d MoE layers", path, json_array_size(rows), layers);
    for (int32_t l = 0; l < layers; l++) {
        const json_t *row = json_array_get(rows, (size_t)l);
        bool ok = json_array_size(row) == (size_t)experts;
        for (int32_t e = 0; ok && e < experts; e++)
            ok = moe_json_read_hex(json_array_get(row, (size_t)e), &digests[(int64_t)l * experts + e]);
        if (!ok) return moe_fail(err, MOE_DATA_LOSS, "%s: layer %d needs %d digests of 16 hex digits", path, l, experts);
    }
    return MOE_OK;
}

moe_status moe_expert_digests_read(const char *path, uint64_t model_digest, int32_t layers, int32_t experts, uint64_t **out,
                                   moe_error *err) {
    json_error_t where;
    uint64_t of_model, *digests = NULL;
    moe_status status = MOE_OK;
    if (access(path, F_OK) != 0 && errno == ENOENT) return moe_fail(err, MOE_NOT_FOUND, "there is no %s", path);
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &where);
    if (!root)
        status = moe_fail(err, MOE_DATA_LOSS, "%s: %s at line %d", path, where.text, where.line);
    else if (!moe_json_get_hex(root, "model_digest", &of_model))
        status = moe_fail(err, MOE_DATA_LOSS, "%s: no model_digest", path);
    else if (of_model != model_digest)
        status =
            moe_fail(err, MOE_FAILED_PRECONDITION, "%s is of model %016llx, this is %016llx: make it anew with `moesaic digest`",
                     path, (unsigned long long)of_model, (unsigned long long)model_digest);
    if (status == MOE_OK && !(digests = moe_calloc((size_t)layers * (size_t)experts, sizeof *digests)))
        status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for expert digests");
    if (status == MOE_OK) status = read_rows(path, json_object_get(root, "experts"), layers, experts, digests, err);
    json_decref(root);
    if (status == MOE_OK)
        *out = digests;
    else
        moe_free(digests);
    return status;
}
