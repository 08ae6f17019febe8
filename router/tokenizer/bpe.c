#include "router/tokenizer/bpe.h"

#include <string.h>

#include "common/random.h"
#include "router/tokenizer/utf8.h"

struct moe_bpe_symbol {
    int32_t id;             /* -1: merged into the symbol before it */
    int32_t previous, next; /* -1: none */
};

struct moe_bpe_candidate {
    int32_t rank, position, merged;
};

/* The slot that holds this pair, or the empty one where it belongs. */
static moe_merge *slot_of(const moe_bpe *bpe, uint64_t pair) {
    uint32_t slot = (uint32_t)moe_mix64(pair) & (bpe->num_slots - 1);
    while (bpe->slots[slot].rank >= 0 && bpe->slots[slot].pair != pair) slot = (slot + 1) & (bpe->num_slots - 1);
    return &bpe->slots[slot];
}

void moe_bpe_put(moe_bpe *bpe, moe_merge merge) { *slot_of(bpe, merge.pair) = merge; }

static bool grow(void **items, size_t *capacity, size_t need, size_t item_bytes) {
    if (need <= *capacity) return true;
    size_t larger = *capacity ? *capacity * 2 : 64;
    if (larger < need) larger = need;
    void *grown = moe_realloc(*items, larger, item_bytes);
    if (!grown) return false;
    *items = grown;
    *capacity = larger;
    return true;
}

static bool before(const moe_bpe_candidate *a, const moe_bpe_candidate *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->position < b->position;
}

static void push(moe_bpe_scratch *s, moe_bpe_candidate candidate) {
    if (!grow((void **)&s->heap, &s->heap_capacity, s->heap_size + 1, sizeof *s->heap)) {
        s->failed = true;
        return;
    }
    size_t at = s->heap_size++;
    for (; at > 0 && before(&candidate, &s->heap[(at - 1) / 2]); at = (at - 1) / 2) s->heap[at] = s->heap[(at - 1) / 2];
    s->heap[at] = candidate;
}

static moe_bpe_candidate pop(moe_bpe_scratch *s) {
    moe_bpe_candidate top = s->heap[0], last = s->heap[--s->heap_size];
    size_t at = 0;
    for (size_t child; (child = 2 * at + 1) < s->heap_size; at = child) {
        if (child + 1 < s->heap_size && before(&s->heap[child + 1], &s->heap[child])) child++;
        if (!before(&s->heap[child], &last)) break;
        s->heap[at] = s->heap[child];
    }
    s->heap[at] = last;
    return top;
}

static void push_pair_at(const moe_bpe *bpe, moe_bpe_scratch *s, int32_t position) {
    const moe_bpe_symbol *left = &s->symbols[position];
    if (left->next < 0) return;
    const moe_merge *merge = slot_of(bpe, moe_bpe_pair(left->id, s->symbols[left->next].id));
    if (merge->rank >= 0) push(s, (moe_bpe_candidate){.rank = merge->rank, .position = position, .merged = merge->merged});
}

static void add_symbol(moe_bpe_scratch *s, int32_t id) {
    if (!grow((void **)&s->symbols, &s->symbols_capacity, s->num_symbols + 1, sizeof *s->symbols)) {
        s->failed = true;
        return;
    }
    int32_t at = (int32_t)s->num_symbols++;
    s->symbols[at] = (moe_bpe_symbol){.id = id, .previous = at - 1, .next = -1};
    if (at > 0) s->symbols[at - 1].next = at;
}

/* Of a character outside the vocabulary: its bytes' tokens if all exist. */
static bool add_bytes(const moe_bpe *bpe, moe_bpe_scratch *s, const unsigned char *character, size_t size) {
    if (!bpe->byte_fallback) return false;
    for (size_t i = 0; i < size; i++)
        if (bpe->byte_ids[character[i]] < 0) return false;
    for (size_t i = 0; i < size; i++) add_symbol(s, bpe->byte_ids[character[i]]);
    return true;
}

/* A run of unknowns is held until the next known character, as in the reference: byte tokens do not end it. */
static void split_into_symbols(const moe_bpe *bpe, const moe_vocab *vocab, moe_bpe_scratch *s, const char *word, size_t size) {
    bool unknown = false;
    for (size_t at = 0, length; at < size && !s->failed; at += length) {
        length = moe_utf8_size((unsigned char)word[at]);
        int32_t id = moe_vocab_find(vocab, word + at, length);
        if (id >= 0) {
            if (unknown) add_symbol(s, bpe->unk_id);
            unknown = false;
            add_symbol(s, id);
        } else if (!add_bytes(bpe, s, (const unsigned char *)word + at, length) && bpe->unk_id >= 0) {
            if (unknown && !bpe->fuse_unk) add_symbol(s, bpe->unk_id);
            unknown = true;
        }
    }
    if (unknown) add_symbol(s, bpe->unk_id);
}

static void merge_symbols(const moe_bpe *bpe, moe_bpe_scratch *s) {
    for (size_t i = 0; i + 1 < s->num_symbols; i++) push_pair_at(bpe, s, (int32_t)i);
    while (s->heap_size > 0 && !s->failed) {
        moe_bpe_candidate best = pop(s);
        moe_bpe_symbol *left = &s->symbols[best.position];
        if (left->id < 0 || left->next < 0) continue;
        moe_bpe_symbol *right = &s->symbols[left->next];
        const moe_merge *now = slot_of(bpe, moe_bpe_pair(left->id, right->id));
        if (now->rank < 0 || now->merged != best.merged) continue; /* an earlier merge changed the pair */
        left->id = best.merged;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0) s->symbols[left->next].previous = best.position;
        if (left->previous >= 0) push_pair_at(bpe, s, left->previous);
        push_pair_at(bpe, s, best.position);
    }
}

void moe_bpe_encode(const moe_bpe *bpe, const moe_vocab *vocab, moe_bpe_scratch *s, const char *word, size_t size,
                    moe_id_list *out) {
    int32_t whole = bpe->ignore_merges ? moe_vocab_find(vocab, word, size) : -1;
    if (whole >= 0) {
        moe_id_list_add(out, whole);
        return;
    }
    s->num_symbols = s->heap_size = 0;
    split_into_symbols(bpe, vocab, s, word, size);
    merge_symbols(bpe, s);
    if (s->failed) return;
    for (int32_t at = s->num_symbols ? 0 : -1; at >= 0; at = s->symbols[at].next) moe_id_list_add(out, s->symbols[at].id);
}

void moe_bpe_scratch_free(moe_bpe_scratch *scratch) {
    moe_free(scratch->symbols);
    moe_free(scratch->heap);
    *scratch = (moe_bpe_scratch){0};
}
