#include "common/alloc.h"
#include "router/chat/jinja_value.h"

#define CHUNK_BYTES ((size_t)64 << 10)
#define ARENA_ALIGNMENT_BYTES 16

typedef struct jinja_chunk {
    struct jinja_chunk *next;
    size_t padding; /* keeps what follows aligned */
} jinja_chunk;

static bool add_chunk(jinja_arena *arena, size_t need) {
    size_t bytes = need > CHUNK_BYTES ? need : CHUNK_BYTES;
    if (bytes > arena->limit_bytes - arena->used_bytes) bytes = need;
    if (bytes > arena->limit_bytes - arena->used_bytes) return false;
    jinja_chunk *chunk = moe_calloc(sizeof *chunk + bytes, 1);
    if (!chunk) return false;
    chunk->next = arena->chunks;
    arena->chunks = chunk;
    arena->used_bytes += bytes;
    arena->at = (char *)(chunk + 1);
    arena->left = bytes;
    return true;
}

void *moe_jinja_arena_alloc(jinja_arena *arena, size_t count, size_t size) {
    size_t bytes;
    if (!moe_size_mul(count, size, &bytes) || !moe_size_add(bytes, ARENA_ALIGNMENT_BYTES, &bytes)) return NULL;
    bytes = bytes / ARENA_ALIGNMENT_BYTES * ARENA_ALIGNMENT_BYTES;
    if (bytes > arena->left && !add_chunk(arena, bytes)) return NULL;
    void *memory = arena->at;
    arena->at += bytes;
    arena->left -= bytes;
    return memory;
}

void moe_jinja_arena_free(jinja_arena *arena) {
    while (arena->chunks) {
        jinja_chunk *next = arena->chunks->next;
        moe_free(arena->chunks);
        arena->chunks = next;
    }
    *arena = (jinja_arena){.limit_bytes = arena->limit_bytes};
}
