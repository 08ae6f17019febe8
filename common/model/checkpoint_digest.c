/* Identities of a model revision and of an expert, and giving back the pages that were read. */
#include "common/model/checkpoint_digest.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/digest.h"

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

moe_status moe_checkpoint_digest(const moe_safetensors *checkpoint, uint64_t *out, moe_error *err) {
    moe_sha256 *sha = moe_sha256_new();
    if (!sha) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the model's digest");
    moe_safetensors_expect_scattered(checkpoint, true);
    for (int64_t i = 0; i < moe_safetensors_count(checkpoint); i++) {
        const moe_safetensor *t = moe_safetensors_at(checkpoint, i);
        add_header(sha, t);
        moe_sha256_update(sha, t->data, t->bytes < MOE_DIGEST_SAMPLE_BYTES ? t->bytes : MOE_DIGEST_SAMPLE_BYTES);
    }
    moe_safetensors_expect_scattered(checkpoint, false);
    *out = finish(sha);
    return MOE_OK;
}

moe_status moe_expert_digest(const moe_ffn_weights *expert, uint64_t *out, moe_error *err) {
    moe_sha256 *sha = moe_sha256_new();
    if (!sha) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for an expert's digest");
    moe_sha256_update(sha, expert->gate.data, moe_tensor_bytes(&expert->gate));
    moe_sha256_update(sha, expert->up.data, moe_tensor_bytes(&expert->up));
    moe_sha256_update(sha, expert->down.data, moe_tensor_bytes(&expert->down));
    *out = finish(sha);
    return MOE_OK;
}

/* Whole pages only: those at the ends are shared with the neighbours. */
static void release(const moe_tensor *t) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = ((uintptr_t)t->data + page - 1) / page * page;
    uintptr_t end = ((uintptr_t)t->data + moe_tensor_bytes(t)) / page * page;
    if (moe_tensor_present(t) && begin < end) (void)madvise((void *)begin, end - begin, MADV_DONTNEED);
}

void moe_ffn_weights_release_pages(const moe_ffn_weights *weights) {
    release(&weights->gate);
    release(&weights->up);
    release(&weights->down);
}
