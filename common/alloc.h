/* The one allocation site, so that tests can fail any allocation. Every pointer here is freed by moe_free. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MOE_ALIGNMENT_BYTES 64 /* a cache line, and the widest SIMD register */

/* Zeroed memory for count × size bytes, 16-byte aligned; NULL when out of memory or the product overflows. */
void *moe_calloc(size_t count, size_t size);

/* Like realloc for count × size bytes; the new part is not zeroed. NULL leaves `old` as it was. */
void *moe_realloc(void *old, size_t count, size_t size);

/* Zeroed, MOE_ALIGNMENT_BYTES-aligned memory for tensors. The pages of large blocks take no memory until they are touched. */
void *moe_alloc_aligned(size_t count, size_t size);

char *moe_strdup(const char *text);
char *moe_strndup(const char *text, size_t length);

/* Frees memory from any of the above; NULL is allowed. */
void moe_free(void *memory);

/* Gives memory that was freed back to the system, which the allocator otherwise keeps for later: after large blocks were freed for
 * good. Takes some milliseconds at most. */
void moe_alloc_give_back(void);

/* Test hook: the `countdown`-th allocation from now fails (1 = the next), once; 0 turns it off. Process-wide. */
void moe_alloc_fail_after(int64_t countdown);

/* Test hook: how many allocations were asked for since the process began. */
int64_t moe_alloc_count(void);

/* Checked arithmetic for sizes that come from outside: false when the result does not fit, *out untouched then. */
static inline bool moe_size_add(size_t a, size_t b, size_t *out) { return !__builtin_add_overflow(a, b, out); }
static inline bool moe_size_mul(size_t a, size_t b, size_t *out) { return !__builtin_mul_overflow(a, b, out); }
