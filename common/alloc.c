#include "common/alloc.h"

#include <malloc.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define LAZY_BYTES ((size_t)256 << 10)

static _Atomic int64_t fail_countdown;
static _Atomic int64_t allocation_count;

void moe_alloc_fail_after(int64_t countdown) { atomic_store(&fail_countdown, countdown); }

int64_t moe_alloc_count(void) { return atomic_load(&allocation_count); }

static bool must_fail(void) {
    atomic_fetch_add_explicit(&allocation_count, 1, memory_order_relaxed);
    if (atomic_load_explicit(&fail_countdown, memory_order_relaxed) == 0) return false;
    return atomic_fetch_sub(&fail_countdown, 1) == 1;
}

void *moe_calloc(size_t count, size_t size) { return must_fail() ? NULL : calloc(count ? count : 1, size ? size : 1); }

void *moe_realloc(void *old, size_t count, size_t size) {
    size_t bytes;
    if (must_fail() || !moe_size_mul(count, size, &bytes)) return NULL;
    return realloc(old, bytes ? bytes : 1);
}

/* The whole pages of a large block are given back to the kernel, which hands out zeroed ones when they are touched: a buffer
 * sized for the worst case costs what is used of it. Refused for locked memory, which is written. */
static void zero(uint8_t *memory, size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), head = (page - (uintptr_t)memory % page) % page;
    size_t whole = bytes >= LAZY_BYTES ? (bytes - head) / page * page : 0;
    if (whole == 0 || madvise(memory + head, whole, MADV_DONTNEED) != 0) {
        memset(memory, 0, bytes);
        return;
    }
    memset(memory, 0, head);
    memset(memory + head + whole, 0, bytes - head - whole);
}

void *moe_alloc_aligned(size_t count, size_t size) {
    size_t bytes, rounded;
    if (must_fail() || !moe_size_mul(count, size, &bytes) || !moe_size_add(bytes, MOE_ALIGNMENT_BYTES, &rounded)) return NULL;
    rounded = rounded / MOE_ALIGNMENT_BYTES * MOE_ALIGNMENT_BYTES;
    uint8_t *memory = aligned_alloc(MOE_ALIGNMENT_BYTES, rounded);
    if (memory) zero(memory, rounded);
    return memory;
}

char *moe_strndup(const char *text, size_t length) {
    char *copy = moe_calloc(length + 1, 1);
    if (copy) memcpy(copy, text, length);
    return copy;
}

char *moe_strdup(const char *text) { return moe_strndup(text, strlen(text)); }

void moe_free(void *memory) { free(memory); }

void moe_alloc_give_back(void) { malloc_trim(0); }
