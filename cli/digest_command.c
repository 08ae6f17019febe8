/* `moesaic digest MODEL`: the manifest of expert digests. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>

#include "cli/commands.h"
#include "cli/node_options.h"
#include "common/alloc.h"
#include "common/model/expert_digests.h"
#include "common/progress.h"
#include "expert-worker/loader.h"

#define POLL_NS (20 * MOE_NS_PER_MS)
#define MAX_THREADS 64
#define MAX_PATH_BYTES 4096

typedef struct hashing {
    const moe_model *model;
    int32_t total;
    uint64_t *digests; /* [total] */
    _Atomic int32_t next, done;
    _Atomic int64_t bytes;
    _Atomic bool failed;
    pthread_mutex_t mutex; /* of what the first failure was */
    moe_status status;
    moe_error error;
} hashing;

static void note_failure(hashing *h, moe_status status, const moe_error *err) {
    pthread_mutex_lock(&h->mutex);
    if (h->status == MOE_OK) {
        h->status = status;
        h->error = *err;
    }
    pthread_mutex_unlock(&h->mutex);
    atomic_store(&h->failed, true);
}

/* Takes the next expert again and again; its pages are given back, so that a model larger than memory can be hashed. */
static void *hash_experts(void *ctx) {
    hashing *h = ctx;
    moe_error err;
    for (int32_t i; (i = atomic_fetch_add(&h->next, 1)) < h->total && !atomic_load(&h->failed);) {
        const moe_ffn_weights *expert = &h->model->experts[i];
        moe_status status = moe_expert_digest(expert, &h->digests[i], &err);
        if (status != MOE_OK) note_failure(h, status, &err);
        moe_model_expert_release(h->model, expert);
        atomic_fetch_add(&h->bytes, moe_expert_canonical_bytes(expert));
        atomic_fetch_add(&h->done, 1);
    }
    return NULL;
}

static moe_status hash_all(hashing *h, int32_t wanted, moe_error *err) {
    pthread_t threads[MAX_THREADS];
    int32_t count = 0;
    moe_progress progress;
    moe_progress_begin(&progress, "hashing", "experts", moe_clock_real());
    while (count < wanted && count < MAX_THREADS && pthread_create(&threads[count], NULL, hash_experts, h) == 0) count++;
    if (count == 0) hash_experts(h);
    while (atomic_load(&h->done) < h->total && !atomic_load(&h->failed)) {
        moe_progress_update(&progress, atomic_load(&h->done), h->total, atomic_load(&h->bytes));
        nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    }
    for (int32_t i = 0; i < count; i++) pthread_join(threads[i], NULL);
    moe_progress_update(&progress, atomic_load(&h->done), h->total, atomic_load(&h->bytes));
    moe_progress_end(&progress);
    return h->status ? moe_fail(err, h->status, "%s", h->error.message) : MOE_OK;
}

static moe_status digest_model(const moe_model *model, int32_t threads, const char *path, moe_error *err) {
    const moe_model_config *c = &model->config;
    hashing h = {.model = model, .total = c->num_moe_layers * c->num_experts};
    if (h.total == 0) return moe_fail(err, MOE_FAILED_PRECONDITION, "%s: this model has no experts", model->dir);
    h.digests = moe_calloc((size_t)h.total, sizeof *h.digests);
    if (!h.digests) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for %d digests", h.total);
    pthread_mutex_init(&h.mutex, NULL);
    moe_status status = hash_all(&h, threads, err);
    if (status == MOE_OK)
        status = moe_expert_digests_write(path, model->digest, c->num_moe_layers, c->num_experts, h.digests, err);
    if (status == MOE_OK) printf("%s: %d experts\n", path, h.total);
    pthread_mutex_destroy(&h.mutex);
    moe_free(h.digests);
    return status;
}

int moe_command_digest(const moe_options *o) {
    const char *dir = moe_options_positional(o), *output = moe_option_text(o, "output");
    char beside[MAX_PATH_BYTES];
    moe_model *model;
    moe_error err;
    snprintf(beside, sizeof beside, "%s/" MOE_EXPERT_DIGESTS_FILE, dir);
    moe_status status = moe_model_open(dir, &model, &err);
    if (status != MOE_OK) return moe_command_failed(&err);
    status = digest_model(model, moe_threads_option(o), output ? output : beside, &err);
    moe_model_close(&model);
    return status == MOE_OK ? 0 : moe_command_failed(&err);
}
