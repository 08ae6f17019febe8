#include "cpu/copier.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "common/clock.h"

typedef struct piece {
    uint8_t *to;
    const moe_slot_fill *fill;
    moe_job *job;
} piece;

struct moe_cpu_copier {
    bool threaded;
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    piece queue[MOE_MAX_SLOT_FILLS]; /* a ring, guarded by mutex as the rest */
    int first, count;
    bool stop;
};

static void copy(const piece *p) {
    const moe_slot_fill *f = p->fill;
    int64_t start_ns = moe_now_ns(moe_clock_real());
    memcpy(p->to + f->offset, (const uint8_t *)f->image + f->offset, (size_t)f->bytes);
    p->job->copy_ns = moe_now_ns(moe_clock_real()) - start_ns;
    p->job->compute_ns = 0;
    p->job->status = MOE_OK;
    p->job->done(p->job);
}

static void *run(void *arg) {
    moe_cpu_copier *c = arg;
    pthread_mutex_lock(&c->mutex);
    for (;;) {
        while (c->count == 0 && !c->stop) pthread_cond_wait(&c->changed, &c->mutex);
        if (c->count == 0) break;
        piece next = c->queue[c->first];
        c->first = (c->first + 1) % MOE_MAX_SLOT_FILLS;
        c->count--;
        pthread_mutex_unlock(&c->mutex);
        copy(&next);
        pthread_mutex_lock(&c->mutex);
    }
    pthread_mutex_unlock(&c->mutex);
    return NULL;
}

moe_status moe_cpu_copier_open(bool threaded, moe_cpu_copier **out, moe_error *err) {
    moe_cpu_copier *c = *out = moe_calloc(1, sizeof *c);
    if (!c) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for copies");
    if (!threaded) return MOE_OK;
    pthread_mutex_init(&c->mutex, NULL);
    pthread_cond_init(&c->changed, NULL);
    sigset_t all, before;
    sigfillset(&all); /* signals are the main thread's */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    c->threaded = pthread_create(&c->thread, NULL, run, c) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (c->threaded) return MOE_OK;
    pthread_mutex_destroy(&c->mutex);
    pthread_cond_destroy(&c->changed);
    moe_free(c);
    *out = NULL;
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "could not start the copying thread");
}

void moe_cpu_copier_close(moe_cpu_copier **copier) {
    moe_cpu_copier *c = *copier;
    *copier = NULL;
    if (!c) return;
    if (c->threaded) {
        pthread_mutex_lock(&c->mutex);
        c->stop = true;
        pthread_cond_signal(&c->changed);
        pthread_mutex_unlock(&c->mutex);
        pthread_join(c->thread, NULL);
        pthread_mutex_destroy(&c->mutex);
        pthread_cond_destroy(&c->changed);
    }
    moe_free(c);
}

static void refuse(moe_job *job) {
    job->status = MOE_RESOURCE_EXHAUSTED;
    job->compute_ns = job->copy_ns = 0;
    snprintf(job->message, sizeof job->message, "%d pieces are on their way into slots, the most that may be", MOE_MAX_SLOT_FILLS);
    job->done(job);
}

void moe_cpu_copier_submit(moe_cpu_copier *c, uint8_t *to, const moe_slot_fill *fill, moe_job *job) {
    const piece p = {to, fill, job};
    if (!c->threaded) {
        copy(&p);
        return;
    }
    pthread_mutex_lock(&c->mutex);
    bool full = c->count == MOE_MAX_SLOT_FILLS;
    if (!full) {
        c->queue[(c->first + c->count++) % MOE_MAX_SLOT_FILLS] = p;
        pthread_cond_signal(&c->changed);
    }
    pthread_mutex_unlock(&c->mutex);
    if (full) refuse(job);
}
