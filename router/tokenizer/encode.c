/* Text to ids: added tokens, then normalizer, pre-tokenizer and BPE for what lies between, then the post-processor. */
#include <string.h>

#include "router/tokenizer/parts.h"
#include "router/tokenizer/utf8.h"

#define ENCODE_MAX_TEXT_BYTES (256u << 20) /* symbol positions are 32-bit, and byte-level text is twice as long */

/* Working memory of one call. */
typedef struct encoder {
    const moe_tokenizer *tokenizer;
    moe_regex_scratch *regex;
    moe_bpe_scratch bpe;
    moe_buf clean, normalized, spare;
    moe_pieces pieces, spare_pieces;
    moe_id_list ids;
} encoder;

static moe_status encode_plain(encoder *e, const char *text, size_t size, bool at_start, moe_error *err) {
    const moe_tokenizer *t = e->tokenizer;
    moe_status status = moe_pretokenize(&t->pretokenizer, e->regex, text, size, at_start, &e->pieces, &e->spare_pieces, err);
    if (status != MOE_OK) return status;
    for (size_t i = 0; i < e->pieces.count; i++) {
        moe_piece piece = e->pieces.items[i];
        moe_bpe_encode(&t->bpe, &t->vocab, &e->bpe, e->pieces.text.data + piece.start, piece.size, &e->ids);
    }
    return MOE_OK;
}

static moe_status encode_between(encoder *e, const char *text, size_t size, bool at_start, moe_error *err) {
    if (size == 0) return MOE_OK;
    const moe_tokenizer *t = e->tokenizer;
    moe_status status = moe_normalize(&t->normalizer, e->regex, text, size, &e->normalized, &e->spare, err);
    moe_added_walk walk = {.text = moe_buf_text(&e->normalized), .size = e->normalized.size};
    size_t done = 0;
    while (status == MOE_OK && moe_added_tokens_next(&t->normalized_added, &walk)) {
        status = encode_plain(e, walk.text + done, walk.start - done, at_start && done == 0, err);
        moe_id_list_add(&e->ids, walk.id);
        done = walk.done;
    }
    return status == MOE_OK ? encode_plain(e, walk.text + done, walk.size - done, at_start && done == 0, err) : status;
}

static moe_status encode_text(encoder *e, const char *text, size_t size, moe_error *err) {
    moe_utf8_append_lossy(text, size, &e->clean);
    if (e->clean.failed) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory encoding %zu bytes of text", size);
    moe_added_walk walk = {.text = moe_buf_text(&e->clean), .size = e->clean.size};
    moe_status status = MOE_OK;
    size_t done = 0;
    while (status == MOE_OK && moe_added_tokens_next(&e->tokenizer->raw_added, &walk)) {
        status = encode_between(e, walk.text + done, walk.start - done, done == 0, err);
        moe_id_list_add(&e->ids, walk.id);
        done = walk.done;
    }
    return status == MOE_OK ? encode_between(e, walk.text + done, walk.size - done, done == 0, err) : status;
}

static moe_status run(encoder *e, const char *text, size_t size, bool add_special, moe_error *err) {
    const moe_postprocessor *post = &e->tokenizer->postprocessor;
    e->regex = moe_regex_scratch_new();
    if (!e->regex) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory encoding %zu bytes of text", size);
    for (int i = 0; i < post->num_before && add_special; i++) moe_id_list_add(&e->ids, post->before[i]);
    moe_status status = encode_text(e, text, size, err);
    for (int i = 0; i < post->num_after && add_special; i++) moe_id_list_add(&e->ids, post->after[i]);
    if (status == MOE_OK && (e->bpe.failed || e->ids.failed))
        status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory encoding %zu bytes of text", size);
    return status;
}

moe_status moe_tokenizer_encode(const moe_tokenizer *tokenizer, const char *text, size_t size, bool add_special,
                                moe_token_ids *out, moe_error *err) {
    *out = (moe_token_ids){0};
    if (size > ENCODE_MAX_TEXT_BYTES)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "a text of %zu bytes is longer than the limit of %u", size,
                        ENCODE_MAX_TEXT_BYTES);
    encoder e = {.tokenizer = tokenizer};
    moe_status status = run(&e, text, size, add_special, err);
    if (status == MOE_OK)
        *out = (moe_token_ids){.ids = e.ids.ids, .count = (int32_t)e.ids.count};
    else
        moe_free(e.ids.ids);
    moe_regex_scratch_free(&e.regex);
    moe_bpe_scratch_free(&e.bpe);
    moe_buf_free(&e.clean);
    moe_buf_free(&e.normalized);
    moe_buf_free(&e.spare);
    moe_pieces_free(&e.pieces);
    moe_pieces_free(&e.spare_pieces);
    return status;
}

int32_t moe_tokenizer_vocab(const moe_tokenizer *tokenizer) { return tokenizer->vocab.num_entries; }

int32_t moe_tokenizer_id_of(const moe_tokenizer *tokenizer, const char *token) {
    return moe_vocab_find(&tokenizer->vocab, token, strlen(token));
}

const char *moe_tokenizer_token(const moe_tokenizer *tokenizer, int32_t id) {
    const moe_vocab_entry *entry = moe_vocab_entry_of(&tokenizer->vocab, id);
    return entry ? moe_vocab_text(&tokenizer->vocab, entry) : NULL;
}

bool moe_tokenizer_is_special(const moe_tokenizer *tokenizer, int32_t id) {
    const moe_vocab_entry *entry = moe_vocab_entry_of(&tokenizer->vocab, id);
    return entry && entry->special;
}
