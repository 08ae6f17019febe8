/* Byte pair encoding of one word (Sennrich, Haddow, Birch 2016) with the rules of Hugging Face's BPE model: the merge of the
 * least rank first, of equal ranks the leftmost. */
#pragma once
#include <jansson.h>

#include "router/tokenizer/id_list.h"
#include "router/tokenizer/vocab.h"

#define MOE_BPE_MAX_MERGES (4 << 20)

typedef struct moe_merge {
    uint64_t pair; /* left id << 32 | right id */
    int32_t rank;  /* -1: an empty slot */
    int32_t merged;
} moe_merge;

typedef struct moe_bpe {
    moe_merge *slots; /* [num_slots], open addressing */
    uint32_t num_slots;
    int32_t unk_id;        /* -1: characters outside the vocabulary vanish */
    bool fuse_unk;         /* neighbouring unknowns become one */
    bool ignore_merges;    /* a word that is a token whole is not split */
    bool byte_fallback;    /* an unknown character becomes its bytes' tokens, <0x00> … <0xFF> */
    int32_t byte_ids[256]; /* of those tokens, -1 where absent */
} moe_bpe;

/* `model`: the "model" object. INVALID_ARGUMENT, UNIMPLEMENTED naming the field, RESOURCE_EXHAUSTED. */
moe_status moe_bpe_load(const json_t *model, const moe_vocab *vocab, moe_bpe *out, moe_error *err);
void moe_bpe_free(moe_bpe *bpe);

static inline uint64_t moe_bpe_pair(int32_t left, int32_t right) { return (uint64_t)(uint32_t)left << 32 | (uint32_t)right; }
/* Enters a merge, in place of one of the same pair; for the loader, which made room for all. */
void moe_bpe_put(moe_bpe *bpe, moe_merge merge);

typedef struct moe_bpe_symbol moe_bpe_symbol;
typedef struct moe_bpe_candidate moe_bpe_candidate;

/* Working memory of one thread; zero before first use. */
typedef struct moe_bpe_scratch {
    moe_bpe_symbol *symbols;
    size_t num_symbols, symbols_capacity;
    moe_bpe_candidate *heap;
    size_t heap_size, heap_capacity;
    bool failed;
} moe_bpe_scratch;

void moe_bpe_scratch_free(moe_bpe_scratch *scratch);

/* Appends the ids of a word: `size` bytes of well-formed UTF-8, below 2^31. O(n log n). Out of memory sets scratch->failed. */
void moe_bpe_encode(const moe_bpe *bpe, const moe_vocab *vocab, moe_bpe_scratch *scratch, const char *word, size_t size,
                    moe_id_list *out);
