#include "common/model/dummy.h"

#include <limits.h>
#include <stdio.h>

#include "common/model/json_fields.h"
#include "common/random.h"

#define DEFAULT_RANGE 0.02
#define SQRT_3 1.7320508075688772 /* half the width of a uniform distribution whose standard deviation is 1 */

static moe_dtype read_dtype(moe_fields *f) {
    const char *name = moe_fields_text(f, "dtype", moe_fields_text(f, "torch_dtype", moe_dtype_name(MOE_BF16)));
    for (int i = 0; i < MOE_DTYPE_COUNT; i++)
        if (strcmp(name, moe_dtype_name((moe_dtype)i)) == 0) return (moe_dtype)i;
    moe_fields_fail(f, MOE_UNIMPLEMENTED, "dtype \"%.64s\": weights are float32, bfloat16 or float16", name);
    return MOE_BF16;
}

moe_status moe_dummy_begin(const char *dir, uint64_t seed, moe_dummy *out, moe_error *err) {
    char path[PATH_MAX];
    json_t *root = NULL;
    *out = (moe_dummy){.seed = seed};
    if (snprintf(path, sizeof path, "%s/config.json", dir) >= (int)sizeof path)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%.128s…: the path is too long", dir);
    moe_status status = moe_json_read_file(path, MOE_JSON_MAX_CONFIG_BYTES, &root, err);
    if (status != MOE_OK) return status;
    moe_fields f = {.object = root, .name = path, .err = err};
    out->dtype = read_dtype(&f);
    out->half_width = (float)(SQRT_3 * moe_fields_number(&f, "initializer_range", 0, 1, DEFAULT_RANGE));
    json_decref(root);
    if (f.status != MOE_OK) return f.status;
    out->sha = moe_sha256_new();
    if (!out->sha) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the model's digest");
    moe_sha256_update(out->sha, "dummy", sizeof "dummy"); /* with the NUL: no checkpoint's digest begins so */
    moe_sha256_update(out->sha, &seed, sizeof seed);
    return MOE_OK;
}

/* FNV-1a (Fowler, Noll, Vo), mixed with the seed; never 0. */
static uint64_t tensor_seed(const char *name, uint64_t seed) {
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (const char *p = name; *p; p++) hash = (hash ^ (uint8_t)*p) * UINT64_C(0x100000001b3);
    hash = moe_mix64(hash ^ moe_mix64(seed));
    return hash ? hash : 1;
}

void moe_dummy_digest_tensor(moe_sha256 *sha, const moe_tensor *t) {
    const moe_generator *g = &t->generated;
    const char *dtype = moe_dtype_name(t->dtype);
    moe_sha256_update(sha, &g->seed, sizeof g->seed);
    moe_sha256_update(sha, &g->first, sizeof g->first);
    moe_sha256_update(sha, &g->center, sizeof g->center);
    moe_sha256_update(sha, &g->half_width, sizeof g->half_width);
    moe_sha256_update(sha, dtype, strlen(dtype) + 1);
    moe_sha256_update(sha, &t->rows, sizeof t->rows);
    moe_sha256_update(sha, &t->cols, sizeof t->cols);
}

moe_tensor moe_dummy_tensor(moe_dummy *d, const char *name, moe_dummy_role role, int64_t rows, int64_t cols) {
    moe_tensor t = {.dtype = d->dtype, .rows = rows, .cols = cols};
    t.generated.seed = tensor_seed(name, d->seed);
    t.generated.center = role == MOE_DUMMY_NORM ? 1 : 0;
    t.generated.half_width = role == MOE_DUMMY_MATRIX ? d->half_width : 0;
    moe_sha256_update(d->sha, name, strlen(name) + 1);
    moe_dummy_digest_tensor(d->sha, &t);
    return t;
}

uint64_t moe_dummy_end(moe_dummy *d) {
    uint8_t digest[MOE_SHA256_BYTES];
    moe_sha256_finish(&d->sha, digest);
    return moe_sha256_short(digest);
}
