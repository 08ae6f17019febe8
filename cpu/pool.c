/* A loop is published as one 64-bit ticket: (generation, next index). A thread claims an index by compare-and-exchange on the
 * ticket, and then the loop's fields are known to be of that generation: they change only after every index was claimed and
 * ended, and the ticket is closed before they change. */
#include "cpu/pool.h"

#include <pthread.h>
#include <sched.h>

#include "common/alloc.h"
#include "common/clock.h"

#define SPIN_ROUNDS 400                    /* pauses before whoever waits yields its core, too: some 10 µs */
#define YIELD_PAUSES 8                     /* between two yields */
#define CLOCK_ROUNDS 16                    /* between two looks at the clock */
#define SHORT_IDLE_NS (20 * MOE_NS_PER_US) /* a helper polls at least that long before it sleeps: the gap between two loops */
#define LONG_IDLE_NS (400 * MOE_NS_PER_US) /* and at most that long: the gap between two decode steps of many requests */
#define CLOSED UINT64_C(0xffffffff)        /* index of a ticket that can't be claimed */

typedef void (*task_fn)(void *ctx, int32_t index, int32_t thread);

typedef struct helper {
    moe_cpu_pool *pool;
    pthread_t id;
    int32_t thread;
} helper;

struct moe_cpu_pool {
    _Atomic uint64_t ticket; /* generation << 32 | next index */
    _Atomic int32_t count, finished;
    _Atomic(task_fn) task;
    _Atomic(void *) ctx;
    _Atomic(_Atomic uint64_t *) progress;
    _Atomic bool stop;
    _Atomic int32_t sleepers;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    int32_t num_helpers;
    helper helpers[];
};

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void tick(_Atomic uint64_t *progress) {
    if (progress) atomic_fetch_add_explicit(progress, 1, memory_order_relaxed);
}

/* Runs tasks of the open loop until none is left; false when there was none to begin with. */
static bool run_tasks(moe_cpu_pool *pool, int32_t thread) {
    bool any = false;
    for (;;) {
        uint64_t ticket = atomic_load(&pool->ticket);
        int32_t count = atomic_load(&pool->count);
        task_fn task = atomic_load(&pool->task);
        void *ctx = atomic_load(&pool->ctx);
        _Atomic uint64_t *progress = atomic_load(&pool->progress);
        uint64_t index = ticket & CLOSED;
        if (index >= (uint64_t)count) return any;
        if (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket + 1)) continue;
        task(ctx, (int32_t)index, thread);
        tick(progress);
        atomic_fetch_add(&pool->finished, 1);
        any = true;
    }
}

static bool has_tasks(moe_cpu_pool *pool) { return (atomic_load(&pool->ticket) & CLOSED) < (uint64_t)atomic_load(&pool->count); }

/* Waits a little for the `spins`-th time; other threads get the core where they want it. */
static void wait_a_little(int32_t spins) {
    if (spins < SPIN_ROUNDS) {
        pause_briefly();
        return;
    }
    sched_yield();
    for (int i = 0; i < YIELD_PAUSES; i++) pause_briefly();
}

static void sleep_until_woken(moe_cpu_pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    while (!has_tasks(pool) && !atomic_load(&pool->stop)) pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

/* A helper that was woken soon after it went to sleep polls longer the next time, because sleeping and waking cost both sides
 * more; one that slept long polls only briefly. */
static void *helper_main(void *arg) {
    helper *self = arg;
    int64_t patience_ns = SHORT_IDLE_NS;
    while (!atomic_load(&self->pool->stop)) {
        run_tasks(self->pool, self->thread);
        int64_t idle_since_ns = moe_now_ns(moe_clock_real());
        for (int32_t spins = 0; !has_tasks(self->pool) && !atomic_load(&self->pool->stop); spins++) {
            wait_a_little(spins);
            if (spins % CLOCK_ROUNDS || moe_now_ns(moe_clock_real()) - idle_since_ns < patience_ns) continue;
            sleep_until_woken(self->pool);
            bool soon = moe_now_ns(moe_clock_real()) - idle_since_ns < LONG_IDLE_NS;
            patience_ns = soon ? LONG_IDLE_NS : SHORT_IDLE_NS;
        }
    }
    return NULL;
}

static void wake_sleepers(moe_cpu_pool *pool) {
    if (atomic_load(&pool->sleepers) == 0) return;
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

void moe_cpu_parallel_for(moe_cpu_pool *pool, int32_t count, task_fn task, void *ctx, _Atomic uint64_t *progress) {
    if (!pool || pool->num_helpers == 0 || count <= 1) {
        for (int32_t i = 0; i < count; i++) {
            task(ctx, i, 0);
            tick(progress);
        }
        return;
    }
    atomic_store_explicit(&pool->count, count, memory_order_release);
    atomic_store_explicit(&pool->task, task, memory_order_release);
    atomic_store_explicit(&pool->ctx, ctx, memory_order_release);
    atomic_store_explicit(&pool->progress, progress, memory_order_release);
    atomic_store_explicit(&pool->finished, 0, memory_order_release);
    uint64_t generation = (atomic_load(&pool->ticket) >> 32) + 1;
    atomic_store(&pool->ticket, generation << 32);
    wake_sleepers(pool);
    run_tasks(pool, 0);
    for (int32_t spins = 0; atomic_load(&pool->finished) < count; spins++) wait_a_little(spins);
    atomic_store(&pool->ticket, generation << 32 | CLOSED);
}

int32_t moe_cpu_pool_threads(const moe_cpu_pool *pool) { return pool ? pool->num_helpers + 1 : 1; }

moe_status moe_cpu_pool_open(int32_t helpers, moe_cpu_pool **out, moe_error *err) {
    MOE_ASSERT(helpers >= 0);
    moe_cpu_pool *pool = moe_calloc(1, sizeof *pool + (size_t)helpers * sizeof(helper));
    *out = NULL;
    if (!pool) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the compute pool");
    atomic_store(&pool->ticket, CLOSED);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    for (; pool->num_helpers < helpers; pool->num_helpers++) {
        helper *h = &pool->helpers[pool->num_helpers];
        *h = (helper){.pool = pool, .thread = pool->num_helpers + 1};
        if (pthread_create(&h->id, NULL, helper_main, h) != 0) {
            int32_t started = pool->num_helpers;
            moe_cpu_pool_close(&pool);
            return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "could start %d of %d compute threads; give fewer --threads", started,
                            helpers);
        }
    }
    *out = pool;
    return MOE_OK;
}

void moe_cpu_pool_close(moe_cpu_pool **at) {
    moe_cpu_pool *pool = *at;
    if (!pool) return;
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->stop, true);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int32_t i = 0; i < pool->num_helpers; i++) pthread_join(pool->helpers[i].id, NULL);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->wake);
    moe_free(pool);
    *at = NULL;
}
