/* Makes experts ready: checks an expert's digest, packs it, has the reference compute a known answer. In threads of its own, so that
 * a load never delays a Forward call; without threads (simulation, tests) all of it happens in moe_loader_start. */
#pragma once
#include <pthread.h>

#include "expert-worker/image_pool.h"
#include "expert-worker/known_answer.h"
#include "expert-worker/shard.h"

#define MOE_LOADER_MAX_THREADS 32 /* beyond, memory is what bounds them */

/* A packed expert in host memory, to be copied into the backend's slots. */
typedef struct moe_image {
    moe_image_pool *pool; /* whose memory it gets */
    void *memory;   /* NULL until something is packed into it */
    int32_t expert; /* its number in the model's table; -1: none */
    int32_t users;  /* copies that read it */
    bool lent;      /* to a loader */
    uint64_t last_use;
} moe_image;

typedef struct moe_loader_task {
    int32_t layer, expert;
    moe_image *image; /* with tiers: pack into this; NULL: not at all */
    bool known;       /* only pack: the digest was checked when it was loaded */
    uint8_t *copied;   /* the canonical bytes, moe_expert_canonical_bytes of them; owned; NULL: read the checkpoint */
    uint64_t expected; /* digest; 0: any */
    bool verify;       /* prepare the known answer */

    /* the outcome */
    moe_status status; /* DATA_LOSS: another digest than expected; RESOURCE_EXHAUSTED */
    moe_error error;
    moe_held_expert loaded; /* where OK: handle (NULL with tiers, unless it is to be verified), digest, bytes */
    float *answer;          /* where OK and asked for: [MOE_KNOWN_ROWS, H]; owned */
} moe_loader_task;

typedef struct moe_loader_config {
    const moe_model *model;   /* borrowed, as all here */
    moe_backend *backend;     /* its expert_load is called from the loader's threads while jobs run */
    const moe_ops *reference; /* cpu-ref's operations; NULL: no known answers */
    moe_transport *transport; /* woken when a task has ended */
    int32_t threads;          /* tasks at once, MOE_LOADER_MAX_THREADS at most; 0: none, and one task */
    bool tiers; /* experts live in slots and images: one of its own is made only for a known answer */
} moe_loader_config;

typedef struct moe_loader_place {
    moe_loader_task task; /* the loader's between start and take */
    bool done;
} moe_loader_place;

typedef struct moe_loader {
    moe_loader_config config;
    bool open;
    pthread_t threads[MOE_LOADER_MAX_THREADS]; /* started when there is work for them */
    int32_t num_threads;
    pthread_mutex_t mutex; /* guards what follows */
    pthread_cond_t changed;
    moe_loader_place places[MOE_LOADER_MAX_THREADS]; /* a ring: `count` tasks in the order of their start from `first` on */
    int32_t first, count, begun;                     /* begun: so many of them have a thread, or had one */
    bool stop;
} moe_loader;

moe_status moe_loader_init(moe_loader *loader, const moe_loader_config *config, moe_error *err);
void moe_loader_close(moe_loader *loader); /* waits for the tasks under way and throws them away; idempotent */

/* The next four by one thread, the loop's. */
static inline bool moe_loader_idle(const moe_loader *loader) { return loader->count == 0; }
static inline bool moe_loader_has_room(const moe_loader *loader) {
    return loader->count < (loader->config.threads > 1 ? loader->config.threads : 1);
}
/* The loader has room. Takes over task->copied. */
void moe_loader_start(moe_loader *loader, const moe_loader_task *task);
/* Whether moe_loader_take has something to give. */
bool moe_loader_done(moe_loader *loader);
/* True when the task that was started first has ended; its contents are the caller's then, who may free `loaded` by
 * moe_loader_discard. */
bool moe_loader_take(moe_loader *loader, moe_loader_task *out);
/* Frees what an ended task owns, which its image is not; idempotent. */
void moe_loader_discard(const moe_loader *loader, moe_loader_task *task);

/* Of an expert's gate (where it has one), up and down as stored: the length of its canonical bytes. */
int64_t moe_expert_canonical_bytes(const moe_ffn_weights *weights);
