/* Reusable working memory for jobs: a buffer a running job, kept for the next one. */
#pragma once
#include <pthread.h>
#include <stddef.h>

typedef struct moe_cpu_scratch {
    struct moe_cpu_scratch *next;
    void *data; /* 64-byte aligned */
    size_t bytes;
} moe_cpu_scratch;

typedef struct moe_cpu_scratch_list {
    pthread_mutex_t mutex;
    moe_cpu_scratch *free; /* guarded by mutex */
} moe_cpu_scratch_list;

void moe_cpu_scratch_list_init(moe_cpu_scratch_list *list);
void moe_cpu_scratch_list_free(moe_cpu_scratch_list *list); /* all buffers were given back */

/* A buffer of at least `bytes`, contents undefined; NULL when out of memory. Any thread. */
moe_cpu_scratch *moe_cpu_scratch_take(moe_cpu_scratch_list *list, size_t bytes);
void moe_cpu_scratch_give_back(moe_cpu_scratch_list *list, moe_cpu_scratch *scratch);

/* The next part of a block, `count` × `size` bytes, on cache lines of its own; *at counts the bytes. Called over the same parts twice:
 * with block NULL (returns NULL) for the sum of their sizes, then for their addresses. */
void *moe_cpu_scratch_part(void *block, size_t *at, size_t count, size_t size);
