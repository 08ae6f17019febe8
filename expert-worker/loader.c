#include "expert-worker/loader.h"

#include <signal.h>
#include <string.h>

#include "common/alloc.h"

int64_t moe_expert_canonical_bytes(const moe_ffn_weights *w) {
    return (int64_t)(moe_tensor_bytes(&w->gate) + moe_tensor_bytes(&w->up) + moe_tensor_bytes(&w->down));
}

/* The weights of a task: the checkpoint's, or views of the copied bytes. */
static moe_ffn_weights weights_of(const moe_loader *l, const moe_loader_task *t) {
    moe_ffn_weights w = *moe_model_expert(l->config.model, t->layer, t->expert);
    if (!t->copied) return w;
    moe_tensor *const tensors[] = {&w.gate, &w.up, &w.down};
    const uint8_t *at = t->copied;
    for (int i = 0; i < 3; i++) {
        if (!moe_tensor_present(tensors[i])) continue;
        *tensors[i] = (moe_tensor){.data = at, .dtype = tensors[i]->dtype, .rows = tensors[i]->rows, .cols = tensors[i]->cols};
        at += moe_tensor_bytes(tensors[i]);
    }
    return w;
}

static moe_status check_digest(moe_loader_task *t, const moe_ffn_weights *w) {
    moe_status status = moe_expert_digest(w, &t->loaded.digest, &t->error);
    if (status == MOE_OK && t->expected && t->loaded.digest != t->expected)
        status = moe_fail(&t->error, MOE_DATA_LOSS, "expert %d of MoE layer %d has digest %016llx here, the cluster's is %016llx",
                          t->expert, t->layer, (unsigned long long)t->loaded.digest, (unsigned long long)t->expected);
    return status;
}

static moe_status pack_image(const moe_loader *l, moe_loader_task *t, const moe_ffn_weights *w) {
    moe_backend *backend = l->config.backend;
    if (!t->image->memory) t->image->memory = moe_image_pool_take(t->image->pool);
    if (!t->image->memory)
        return moe_fail(&t->error, MOE_RESOURCE_EXHAUSTED, "no host memory for an expert's image of %lld bytes (--host-memory)",
                        (long long)t->image->pool->image_bytes);
    backend->ops->expert_pack(backend, w, 0, MOE_FFN_BLOCKS, t->image->memory);
    return MOE_OK;
}

static moe_status pack(const moe_loader *l, moe_loader_task *t, const moe_ffn_weights *w) {
    moe_backend *backend = l->config.backend;
    bool verify = t->verify && l->config.reference;
    moe_status status = t->known ? MOE_OK : check_digest(t, w);
    if (status == MOE_OK && l->config.tiers) t->loaded.bytes = backend->ops->expert_size(backend, w, 0, MOE_FFN_BLOCKS).image_bytes;
    if (status == MOE_OK && t->image) status = pack_image(l, t, w);
    if (status == MOE_OK && (!l->config.tiers || verify))
        status = backend->ops->expert_load(backend, w, 0, MOE_FFN_BLOCKS, &t->loaded.handle, &t->error);
    if (status == MOE_OK && !l->config.tiers) t->loaded.bytes = backend->ops->expert_bytes(t->loaded.handle);
    if (status == MOE_OK && verify)
        status = moe_known_answer_compute(l->config.reference, l->config.model, t->layer, t->expert, w, &t->answer, &t->error);
    return status;
}

static void run_task(const moe_loader *l, moe_loader_task *t) {
    const moe_ffn_weights *stored = moe_model_expert(l->config.model, t->layer, t->expert);
    moe_ffn_weights w = weights_of(l, t);
    if (!t->copied) moe_model_expert_will_need(l->config.model, stored);
    t->status = pack(l, t, &w);
    if (!t->copied) moe_model_expert_release(l->config.model, stored);
    moe_free(t->copied);
    t->copied = NULL;
    if (t->status != MOE_OK) moe_loader_discard(l, t);
}

static moe_loader_place *place_at(moe_loader *l, int32_t index) { return &l->places[(l->first + index) % MOE_LOADER_MAX_THREADS]; }

static void *run(void *arg) {
    moe_loader *l = arg;
    pthread_mutex_lock(&l->mutex);
    while (!l->stop) {
        if (l->begun == l->count) {
            pthread_cond_wait(&l->changed, &l->mutex);
            continue;
        }
        moe_loader_place *place = place_at(l, l->begun++);
        pthread_mutex_unlock(&l->mutex);
        run_task(l, &place->task);
        pthread_mutex_lock(&l->mutex);
        place->done = true;
        l->config.transport->ops->wake(l->config.transport);
    }
    pthread_mutex_unlock(&l->mutex);
    return NULL;
}

static int start_thread(moe_loader *l) {
    sigset_t all, before;
    sigfillset(&all); /* signals are the main thread's */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&l->threads[l->num_threads], NULL, run, l);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!failed) l->num_threads++;
    return failed;
}

moe_status moe_loader_init(moe_loader *l, const moe_loader_config *config, moe_error *err) {
    MOE_ASSERT(config->threads >= 0 && config->threads <= MOE_LOADER_MAX_THREADS);
    *l = (moe_loader){.config = *config, .open = true};
    pthread_mutex_init(&l->mutex, NULL);
    pthread_cond_init(&l->changed, NULL);
    int failed = config->threads > 0 ? start_thread(l) : 0;
    if (!failed) return MOE_OK;
    moe_loader_close(l);
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "could not start the loader's thread: %s", strerror(failed));
}

void moe_loader_close(moe_loader *l) {
    if (!l->open) return;
    l->open = false;
    pthread_mutex_lock(&l->mutex);
    l->stop = true;
    pthread_cond_broadcast(&l->changed);
    pthread_mutex_unlock(&l->mutex);
    for (int32_t i = 0; i < l->num_threads; i++) pthread_join(l->threads[i], NULL);
    for (int32_t i = 0; i < l->count; i++) moe_loader_discard(l, &place_at(l, i)->task);
    pthread_mutex_destroy(&l->mutex);
    pthread_cond_destroy(&l->changed);
    l->count = 0;
}

void moe_loader_start(moe_loader *l, const moe_loader_task *task) {
    MOE_ASSERT(moe_loader_has_room(l));
    moe_loader_place *place = place_at(l, l->count);
    *place = (moe_loader_place){.task = *task};
    if (l->config.threads == 0) {
        run_task(l, &place->task);
        place->done = true;
        l->count = l->begun = 1;
        return;
    }
    pthread_mutex_lock(&l->mutex);
    l->count++;
    pthread_cond_signal(&l->changed);
    pthread_mutex_unlock(&l->mutex);
    if (l->num_threads < l->count) start_thread(l); /* where there is none to be had, the others do it in turn */
}

bool moe_loader_done(moe_loader *l) {
    if (l->count == 0) return false;
    pthread_mutex_lock(&l->mutex);
    bool done = place_at(l, 0)->done;
    pthread_mutex_unlock(&l->mutex);
    return done;
}

bool moe_loader_take(moe_loader *l, moe_loader_task *out) {
    if (!moe_loader_done(l)) return false;
    pthread_mutex_lock(&l->mutex);
    *out = place_at(l, 0)->task;
    *place_at(l, 0) = (moe_loader_place){.done = false};
    l->first = (l->first + 1) % MOE_LOADER_MAX_THREADS;
    l->count--;
    l->begun--;
    pthread_mutex_unlock(&l->mutex);
    return true;
}

void moe_loader_discard(const moe_loader *l, moe_loader_task *t) {
    if (t->loaded.handle) l->config.backend->ops->expert_free(l->config.backend, t->loaded.handle);
    t->loaded = (moe_held_expert){.handle = NULL};
    moe_free(t->answer);
    moe_free(t->copied);
    t->answer = NULL;
    t->copied = NULL;
}
