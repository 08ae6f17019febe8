#include "cpu/runner.h"

#include <pthread.h>
#include <stdio.h>

#include "common/alloc.h"
#include "common/clock.h"

typedef struct item {
    struct item *next;
    moe_cpu_work work;
    void *backend;
    const void *weights, *request;
    moe_job *job;
} item;

struct moe_cpu_runner {
    moe_cpu_pool *pool;
    bool has_thread;
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    item *first, **last; /* guarded by mutex, as are the next two */
    bool busy;           /* a job runs, on whichever thread */
    bool stop;
};

static void finish(moe_job *job, moe_status status, const char *message) {
    job->status = status;
    job->message[0] = '\0';
    if (status != MOE_OK) snprintf(job->message, sizeof job->message, "%.*s", (int)sizeof job->message - 1, message);
    job->done(job);
}

static void run(moe_cpu_runner *runner, const item *i) {
    moe_error err = {.code = MOE_OK};
    int64_t start_ns = moe_now_ns(moe_clock_real());
    moe_cpu_run context = {.pool = runner->pool, .progress = &i->job->progress, .job = i->job};
    i->job->combine_ns = i->job->logits_ns = i->job->expert_ns = 0;
    moe_status status = i->work(&context, i->backend, i->weights, i->request, &err);
    i->job->compute_ns = moe_now_ns(moe_clock_real()) - start_ns;
    finish(i->job, status, err.message);
}

/* The next job, once no other runs; NULL: the runner stops and the queue is empty. */
static item *next_item(moe_cpu_runner *runner) {
    pthread_mutex_lock(&runner->mutex);
    while (runner->first ? runner->busy : !runner->stop) pthread_cond_wait(&runner->wake, &runner->mutex);
    item *i = runner->first;
    if (i) {
        runner->first = i->next;
        if (!runner->first) runner->last = &runner->first;
        runner->busy = true;
    }
    pthread_mutex_unlock(&runner->mutex);
    return i;
}

static void end_busy(moe_cpu_runner *runner) {
    pthread_mutex_lock(&runner->mutex);
    runner->busy = false;
    if (runner->first) pthread_cond_signal(&runner->wake);
    pthread_mutex_unlock(&runner->mutex);
}

static void *runner_main(void *arg) {
    moe_cpu_runner *runner = arg;
    item *i;
    while ((i = next_item(runner))) {
        run(runner, i);
        end_busy(runner);
        moe_free(i);
    }
    return NULL;
}

static bool become_busy(moe_cpu_runner *runner) {
    pthread_mutex_lock(&runner->mutex);
    bool idle = !runner->busy && !runner->first;
    if (idle) runner->busy = true;
    pthread_mutex_unlock(&runner->mutex);
    return idle;
}

static void queue(moe_cpu_runner *runner, item *i) {
    pthread_mutex_lock(&runner->mutex);
    *runner->last = i;
    runner->last = &i->next;
    if (!runner->busy) pthread_cond_signal(&runner->wake);
    pthread_mutex_unlock(&runner->mutex);
}

void moe_cpu_runner_submit(moe_cpu_runner *runner, moe_cpu_work work, void *backend, const void *weights, const void *request,
                           bool brief, moe_job *job) {
    item inside = {.work = work, .backend = backend, .weights = weights, .request = request, .job = job};
    atomic_store(&job->progress, 0);
    if (!runner->has_thread) {
        run(runner, &inside);
        return;
    }
    if (brief && become_busy(runner)) {
        run(runner, &inside);
        end_busy(runner);
        return;
    }
    item *i = moe_calloc(1, sizeof *i);
    if (!i) {
        job->compute_ns = 0;
        finish(job, MOE_RESOURCE_EXHAUSTED, "out of memory for a compute job");
        return;
    }
    *i = inside;
    queue(runner, i);
}

moe_status moe_cpu_runner_open(int32_t threads, moe_cpu_runner **out, moe_error *err) {
    moe_cpu_runner *runner = moe_calloc(1, sizeof *runner);
    *out = NULL;
    if (!runner) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the compute runner");
    runner->last = &runner->first;
    pthread_mutex_init(&runner->mutex, NULL);
    pthread_cond_init(&runner->wake, NULL);
    moe_status status = moe_cpu_pool_open(threads > 1 ? threads - 1 : 0, &runner->pool, err);
    if (status == MOE_OK && threads > 0) {
        runner->has_thread = pthread_create(&runner->thread, NULL, runner_main, runner) == 0;
        if (!runner->has_thread) status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "could not start the compute thread");
    }
    if (status != MOE_OK) moe_cpu_runner_close(&runner);
    *out = runner;
    return status;
}

void moe_cpu_runner_close(moe_cpu_runner **at) {
    moe_cpu_runner *runner = *at;
    if (!runner) return;
    if (runner->has_thread) {
        pthread_mutex_lock(&runner->mutex);
        runner->stop = true;
        pthread_cond_signal(&runner->wake);
        pthread_mutex_unlock(&runner->mutex);
        pthread_join(runner->thread, NULL);
    }
    moe_cpu_pool_close(&runner->pool);
    pthread_mutex_destroy(&runner->mutex);
    pthread_cond_destroy(&runner->wake);
    moe_free(runner);
    *at = NULL;
}
