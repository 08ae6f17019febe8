/* Token spelling ↔ id: an arena of spellings with a hash table over it. Built once, then immutable. */
#pragma once
#include "common/buf.h"
#include "common/status.h"

#define MOE_VOCAB_MAX_TOKENS (4 << 20)
#define MOE_VOCAB_MAX_TEXT_BYTES (256u << 20)

typedef struct moe_vocab_entry {
    uint32_t offset, size; /* bytes in text; the spelling is followed by a NUL */
    bool used, special;
} moe_vocab_entry;

typedef struct moe_vocab {
    moe_buf text;
    moe_vocab_entry *entries; /* [num_entries], by id */
    int32_t num_entries;      /* highest id + 1 */
    int32_t *slots;           /* [num_slots], ids, -1: empty; open addressing */
    uint32_t num_slots;       /* a power of two */
} moe_vocab;

/* Room for ids 0 … num_entries - 1 and num_spellings spellings. RESOURCE_EXHAUSTED. */
moe_status moe_vocab_init(moe_vocab *vocab, int32_t num_entries, size_t num_spellings, moe_error *err);
void moe_vocab_free(moe_vocab *vocab);

/* INVALID_ARGUMENT: the id is taken or out of range, or the spelling has an id already. */
moe_status moe_vocab_add(moe_vocab *vocab, const char *token, size_t size, int32_t id, moe_error *err);

/* The id of text[0 … size), or -1. */
int32_t moe_vocab_find(const moe_vocab *vocab, const char *text, size_t size);

/* NULL for an id out of range or unused. */
static inline const moe_vocab_entry *moe_vocab_entry_of(const moe_vocab *vocab, int32_t id) {
    return id >= 0 && id < vocab->num_entries && vocab->entries[id].used ? &vocab->entries[id] : NULL;
}

static inline const char *moe_vocab_text(const moe_vocab *vocab, const moe_vocab_entry *entry) {
    return vocab->text.data + entry->offset;
}
