/* Identities of a model revision and of an expert. */
#include "common/model/checkpoint_digest.h"

#include <ctype.h>
#include <string.h>

#include "common/alloc.h"
#include "common/digest.h"
#include "common/model/dummy.h"

#define DIGITS "0123456789"

static void add_header(moe_sha256 *sha, const moe_safetensor *t) {
    const char *dtype = moe_dtype_name(t->dtype);
    int64_t num_dims = t->num_dims;
    moe_sha256_update(sha, t->name, strlen(t->name) + 1); /* with the NUL, so that no two lists of tensors read alike */
    moe_sha256_update(sha, dtype, strlen(dtype) + 1);
    moe_sha256_update(sha, &num_dims, sizeof num_dims);
    moe_sha256_update(sha, t->dims, (size_t)t->num_dims * sizeof t->dims[0]);
}

static uint64_t finish(moe_sha256 *sha) {
    uint8_t digest[MOE_SHA256_BYTES];
    moe_sha256_finish(&sha, digest);
    return moe_sha256_short(digest);
}

/* Whether two names are alike but for the numbers in them. */
static bool same_kind(const char *a, const char *b) {
    while (*a && *b) {
        if (isdigit((unsigned char)*a) && isdigit((unsigned char)*b)) {
            a += strspn(a, DIGITS);
            b += strspn(b, DIGITS);
        } else if (*a++ != *b++) {
            return false;
        }
    }
    return *a == *b;
}

/* Marks the first and the last tensor of each kind. A kind has at most a few dozen members in a family, so `last`, the newest
 * tensor of each kind so far, is searched from end to end. */
static void choose_samples(const moe_safetensors *checkpoint, bool *sampled, int64_t *last) {
    int64_t num_kinds = 0;
    for (int64_t i = 0; i < moe_safetensors_count(checkpoint); i++) {
        const char *name = moe_safetensors_at(checkpoint, i)->name;
        int64_t kind = 0;
        while (kind < num_kinds && !same_kind(moe_safetensors_at(checkpoint, last[kind])->name, name)) kind++;
        sampled[i] = kind == num_kinds;
        if (kind == num_kinds) num_kinds++;
        last[kind] = i;
    }
    for (int64_t kind = 0; kind < num_kinds; kind++) sampled[last[kind]] = true;
}

static void add_sample(moe_sha256 *sha, const moe_safetensors *checkpoint, const moe_safetensor *t) {
    size_t bytes = t->bytes < MOE_DIGEST_SAMPLE_BYTES ? t->bytes : MOE_DIGEST_SAMPLE_BYTES;
    moe_sha256_update(sha, t->data, bytes);
    moe_safetensors_release(checkpoint, t->data, bytes);
}

static uint64_t hash_all(moe_sha256 *sha, const moe_safetensors *checkpoint, const bool *sampled) {
    for (int64_t i = 0; i < moe_safetensors_count(checkpoint); i++) {
        const moe_safetensor *t = moe_safetensors_at(checkpoint, i);
        add_header(sha, t);
        if (sampled[i]) add_sample(sha, checkpoint, t);
    }
    return finish(sha);
}

moe_status moe_checkpoint_digest(const moe_safetensors *checkpoint, uint64_t *out, moe_error *err) {
    size_t count = (size_t)moe_safetensors_count(checkpoint);
    bool *sampled = moe_calloc(count, sizeof *sampled);
    int64_t *last = moe_calloc(count, sizeof *last);
    moe_sha256 *sha = sampled && last ? moe_sha256_new() : NULL;
    if (sha) {
        choose_samples(checkpoint, sampled, last);
        *out = hash_all(sha, checkpoint, sampled);
    }
    moe_free(sampled);
    moe_free(last);
    return sha ? MOE_OK : moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the model's digest");
}

static void add_contents(moe_sha256 *sha, const moe_tensor *t) {
    if (!moe_tensor_present(t)) return;
    if (t->data)
        moe_sha256_update(sha, t->data, moe_tensor_bytes(t));
    else
        moe_dummy_digest_tensor(sha, t);
}

moe_status moe_expert_digest(const moe_ffn_weights *expert, uint64_t *out, moe_error *err) {
    moe_sha256 *sha = moe_sha256_new();
    if (!sha) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for an expert's digest");
    add_contents(sha, &expert->gate);
    add_contents(sha, &expert->up);
    add_contents(sha, &expert->down);
    *out = finish(sha);
    return MOE_OK;
}
