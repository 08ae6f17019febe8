/* The compute pool and the job runner: every index once, jobs of several submitters, jobs that submit jobs. */
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>

#include "cpu/pool.h"
#include "cpu/runner.h"
#include "tests/support/test.h"

#define LOOPS 2000
#define MAX_TASKS 97
#define SUBMITTERS 4
#define JOBS 200

typedef struct loop {
    _Atomic int32_t ran[MAX_TASKS];
    int32_t threads;
    _Atomic int32_t bad_thread;
} loop;

static void mark(void *ctx, int32_t index, int32_t thread) {
    loop *l = ctx;
    atomic_fetch_add(&l->ran[index], 1);
    if (thread < 0 || thread >= l->threads) atomic_store(&l->bad_thread, 1);
}

static void every_index_once(void **state) {
    (void)state;
    for (int32_t helpers = 0; helpers < 4; helpers++) {
        moe_cpu_pool *pool;
        assert_int_equal(moe_cpu_pool_open(helpers, &pool, NULL), MOE_OK);
        assert_int_equal(moe_cpu_pool_threads(pool), helpers + 1);
        _Atomic uint64_t progress = 0;
        uint64_t expected = 0;
        for (int32_t i = 0; i < LOOPS; i++) {
            loop l = {.threads = helpers + 1};
            int32_t count = i % (MAX_TASKS + 1);
            moe_cpu_parallel_for(pool, count, mark, &l, &progress);
            for (int32_t t = 0; t < MAX_TASKS; t++) assert_int_equal(atomic_load(&l.ran[t]), t < count);
            assert_int_equal(atomic_load(&l.bad_thread), 0);
            expected += (uint64_t)count;
        }
        assert_int_equal(atomic_load(&progress), expected);
        moe_cpu_pool_close(&pool);
        assert_null(pool);
        moe_cpu_pool_close(&pool);
    }
}

/* A job's request: adds up the squares below `count` in parallel. */
typedef struct request {
    int32_t count;
    _Atomic int64_t sum;
    moe_job job;
    sem_t done;
    moe_cpu_runner *runner;
    struct request *then; /* submitted by this one's done */
    bool brief;
} request;

static void add_square(void *ctx, int32_t index, int32_t thread) {
    request *r = ctx;
    (void)thread;
    atomic_fetch_add(&r->sum, (int64_t)index * index);
}

static moe_status work(const moe_cpu_run *run, void *backend, const void *base, const void *data, moe_error *err) {
    request *r = (request *)(uintptr_t)data;
    if (backend != &add_square || base != r) return moe_fail(err, MOE_INTERNAL, "wrong arguments");
    if (r->count < 0) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "a message of the work: %d", r->count);
    moe_cpu_parallel_for(run->pool, r->count, add_square, r, run->progress);
    return MOE_OK;
}

static void submit(request *r) { moe_cpu_runner_submit(r->runner, work, (void *)&add_square, r, r, r->brief, &r->job); }

static void done(moe_job *job) {
    request *r = job->owner;
    if (r->then) submit(r->then);
    sem_post(&r->done);
}

static void make(request *r, moe_cpu_runner *runner, int32_t count) {
    *r = (request){.count = count, .runner = runner, .job = {.done = done, .owner = r}};
    sem_init(&r->done, 0, 0);
}

static void wait_and_check(request *r) {
    while (sem_wait(&r->done) != 0) continue;
    sem_destroy(&r->done);
    int64_t n = r->count;
    assert_int_equal(r->job.status, MOE_OK);
    assert_int_equal(r->sum, (n - 1) * n * (2 * n - 1) / 6);
    assert_int_equal(atomic_load(&r->job.progress), n);
}

static void *submitter(void *arg) {
    request *pair = calloc(2, sizeof *pair);
    for (int32_t i = 1; i <= JOBS; i++) {
        make(&pair[0], arg, i);
        make(&pair[1], arg, 2 * i);
        pair[0].then = &pair[1];
        pair[0].brief = i % 3 == 0;
        pair[1].brief = i % 2 == 0;
        submit(&pair[0]);
        wait_and_check(&pair[0]);
        wait_and_check(&pair[1]);
    }
    free(pair);
    return NULL;
}

static void several_submitters(void **state) {
    (void)state;
    for (int32_t threads = 0; threads < 4; threads++) {
        moe_cpu_runner *runner;
        pthread_t ids[SUBMITTERS];
        assert_int_equal(moe_cpu_runner_open(threads, &runner, NULL), MOE_OK);
        for (int i = 0; i < SUBMITTERS; i++) assert_int_equal(pthread_create(&ids[i], NULL, submitter, runner), 0);
        for (int i = 0; i < SUBMITTERS; i++) pthread_join(ids[i], NULL);
        moe_cpu_runner_close(&runner);
        assert_null(runner);
    }
}

static void without_threads_done_comes_inside_submit(void **state) {
    moe_cpu_runner *runner;
    request r;
    (void)state;
    assert_int_equal(moe_cpu_runner_open(0, &runner, NULL), MOE_OK);
    make(&r, runner, 3);
    submit(&r);
    assert_int_equal(sem_trywait(&r.done), 0);
    sem_post(&r.done);
    wait_and_check(&r);
    moe_cpu_runner_close(&runner);
}

static void brief_work_runs_inside_submit(void **state) {
    (void)state;
    for (int32_t threads = 1; threads < 4; threads++) {
        moe_cpu_runner *runner;
        request r;
        assert_int_equal(moe_cpu_runner_open(threads, &runner, NULL), MOE_OK);
        make(&r, runner, 100);
        r.brief = true;
        submit(&r);
        assert_int_equal(sem_trywait(&r.done), 0);
        sem_post(&r.done);
        wait_and_check(&r);
        moe_cpu_runner_close(&runner);
    }
}

static void a_failure_is_reported(void **state) {
    (void)state;
    for (int32_t threads = 0; threads < 2; threads++) {
        moe_cpu_runner *runner;
        request r;
        assert_int_equal(moe_cpu_runner_open(threads, &runner, NULL), MOE_OK);
        make(&r, runner, -5);
        submit(&r);
        while (sem_wait(&r.done) != 0) continue;
        assert_int_equal(r.job.status, MOE_RESOURCE_EXHAUSTED);
        assert_string_equal(r.job.message, "a message of the work: -5");
        sem_destroy(&r.done);
        moe_cpu_runner_close(&runner);
    }
}

/* Close ends what was submitted. */
static void close_ends_the_queue(void **state) {
    enum { COUNT = 50 };
    moe_cpu_runner *runner;
    request *r = calloc(COUNT, sizeof *r);
    (void)state;
    assert_int_equal(moe_cpu_runner_open(2, &runner, NULL), MOE_OK);
    for (int i = 0; i < COUNT; i++) {
        make(&r[i], runner, 100);
        submit(&r[i]);
    }
    moe_cpu_runner_close(&runner);
    for (int i = 0; i < COUNT; i++) wait_and_check(&r[i]);
    free(r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_index_once),      cmocka_unit_test(several_submitters),
        cmocka_unit_test(a_failure_is_reported), cmocka_unit_test(without_threads_done_comes_inside_submit),
        cmocka_unit_test(close_ends_the_queue),  cmocka_unit_test(brief_work_runs_inside_submit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
