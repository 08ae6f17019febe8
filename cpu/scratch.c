#include "cpu/scratch.h"

#include "common/alloc.h"

void moe_cpu_scratch_list_init(moe_cpu_scratch_list *list) {
    list->free = NULL;
    pthread_mutex_init(&list->mutex, NULL);
}

static void scratch_free(moe_cpu_scratch *scratch) {
    moe_free(scratch->data);
    moe_free(scratch);
}

void moe_cpu_scratch_list_free(moe_cpu_scratch_list *list) {
    while (list->free) {
        moe_cpu_scratch *next = list->free->next;
        scratch_free(list->free);
        list->free = next;
    }
    pthread_mutex_destroy(&list->mutex);
}

moe_cpu_scratch *moe_cpu_scratch_take(moe_cpu_scratch_list *list, size_t bytes) {
    pthread_mutex_lock(&list->mutex);
    moe_cpu_scratch *scratch = list->free;
    if (scratch) list->free = scratch->next;
    pthread_mutex_unlock(&list->mutex);
    if (!scratch) scratch = moe_calloc(1, sizeof *scratch);
    if (!scratch || scratch->bytes >= bytes) return scratch;
    moe_free(scratch->data);
    scratch->data = moe_alloc_aligned(bytes, 1);
    scratch->bytes = scratch->data ? bytes : 0;
    if (scratch->data) return scratch;
    scratch_free(scratch);
    return NULL;
}

void *moe_cpu_scratch_part(void *block, size_t *at, size_t count, size_t size) {
    void *here = block ? (uint8_t *)block + *at : NULL;
    *at += (count * size + MOE_ALIGNMENT_BYTES - 1) / MOE_ALIGNMENT_BYTES * MOE_ALIGNMENT_BYTES;
    return here;
}

void moe_cpu_scratch_give_back(moe_cpu_scratch_list *list, moe_cpu_scratch *scratch) {
    if (!scratch) return;
    pthread_mutex_lock(&list->mutex);
    scratch->next = list->free;
    list->free = scratch;
    pthread_mutex_unlock(&list->mutex);
}
