#include "router/tokenizer/vocab.h"

#include <string.h>

#include "common/alloc.h"
#include "common/random.h"

moe_status moe_vocab_init(moe_vocab *vocab, int32_t num_entries, size_t num_spellings, moe_error *err) {
    uint32_t num_slots = 16;
    while (num_slots < 2 * num_spellings) num_slots *= 2;
    vocab->entries = moe_calloc((size_t)num_entries, sizeof *vocab->entries);
    vocab->slots = moe_calloc(num_slots, sizeof *vocab->slots);
    if (!vocab->entries || !vocab->slots) {
        moe_vocab_free(vocab);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a vocabulary of %d tokens", num_entries);
    }
    for (uint32_t i = 0; i < num_slots; i++) vocab->slots[i] = -1;
    vocab->num_entries = num_entries;
    vocab->num_slots = num_slots;
    return MOE_OK;
}

void moe_vocab_free(moe_vocab *vocab) {
    moe_buf_free(&vocab->text);
    moe_free(vocab->entries);
    moe_free(vocab->slots);
    *vocab = (moe_vocab){0};
}

static uint32_t hash_of(const char *text, size_t size) {
    uint64_t hash = size;
    for (; size >= 8; text += 8, size -= 8) {
        uint64_t word;
        memcpy(&word, text, sizeof word);
        hash = moe_mix64(hash ^ word);
    }
    uint64_t tail = 0;
    memcpy(&tail, text, size);
    return (uint32_t)moe_mix64(hash ^ tail);
}

/* The slot that holds this spelling, or the empty one where it belongs. */
static uint32_t slot_of(const moe_vocab *vocab, const char *text, size_t size) {
    uint32_t slot = hash_of(text, size) & (vocab->num_slots - 1);
    for (; vocab->slots[slot] >= 0; slot = (slot + 1) & (vocab->num_slots - 1)) {
        const moe_vocab_entry *entry = &vocab->entries[vocab->slots[slot]];
        if (entry->size == size && memcmp(moe_vocab_text(vocab, entry), text, size) == 0) break;
    }
    return slot;
}

int32_t moe_vocab_find(const moe_vocab *vocab, const char *text, size_t size) {
    return vocab->num_slots ? vocab->slots[slot_of(vocab, text, size)] : -1;
}

moe_status moe_vocab_add(moe_vocab *vocab, const char *token, size_t size, int32_t id, moe_error *err) {
    if (id < 0 || id >= vocab->num_entries) return moe_fail(err, MOE_INVALID_ARGUMENT, "token '%s' has id %d", token, id);
    moe_vocab_entry *entry = &vocab->entries[id];
    if (entry->used)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "id %d is both '%s' and '%s'", id, moe_vocab_text(vocab, entry), token);
    if (size > MOE_VOCAB_MAX_TEXT_BYTES - vocab->text.size)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "the vocabulary's text exceeds %u bytes", MOE_VOCAB_MAX_TEXT_BYTES);
    uint32_t slot = slot_of(vocab, token, size);
    if (vocab->slots[slot] >= 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "token '%s' has the ids %d and %d", token, vocab->slots[slot], id);
    uint32_t offset = (uint32_t)vocab->text.size;
    moe_buf_append(&vocab->text, token, size);
    moe_buf_append(&vocab->text, "", 1);
    if (vocab->text.failed) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the vocabulary's text");
    *entry = (moe_vocab_entry){.offset = offset, .size = (uint32_t)size, .used = true};
    vocab->slots[slot] = id;
    return MOE_OK;
}
