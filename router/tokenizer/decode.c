/* Ids to text, one at a time; whole sequences are decoded the same way. */
#include <string.h>

#include "router/tokenizer/parts.h"
#include "router/tokenizer/utf8.h"

void moe_tokenizer_token_bytes(const moe_tokenizer *tokenizer, int32_t id, moe_buf *out) {
    const moe_decoder *decoder = &tokenizer->decoder;
    if (!moe_vocab_entry_of(&tokenizer->vocab, id) || !decoder->bytes.data) return;
    moe_buf_append(out, decoder->bytes.data + decoder->offsets[id], decoder->offsets[id + 1] - decoder->offsets[id]);
}

void moe_tokenizer_decode(const moe_tokenizer *tokenizer, const int32_t *ids, int32_t count, bool skip_special, moe_buf *out) {
    moe_detokenizer d;
    moe_detokenizer_init(&d, tokenizer, skip_special);
    for (int32_t i = 0; i < count; i++) moe_detokenizer_feed(&d, ids[i], out);
    moe_detokenizer_finish(&d, out);
}

void moe_detokenizer_init(moe_detokenizer *d, const moe_tokenizer *tokenizer, bool skip_special) {
    *d = (moe_detokenizer){.tokenizer = tokenizer, .skip_special = skip_special};
}

/* Holds the byte until its character is whole or turns out ill-formed. */
static void feed_byte(moe_detokenizer *d, unsigned char byte, moe_buf *out) {
    d->held[d->num_held++] = byte;
    int kind = moe_utf8_classify(d->held, (size_t)d->num_held);
    if (kind == 0) return;
    bool retry = kind < 0 && d->num_held > 1; /* the byte may begin a character of its own */
    if (kind > 0)
        moe_buf_append(out, d->held, (size_t)d->num_held);
    else
        moe_buf_append_text(out, MOE_UTF8_REPLACEMENT);
    d->num_held = 0;
    if (retry) feed_byte(d, byte, out);
}

void moe_detokenizer_feed(moe_detokenizer *d, int32_t id, moe_buf *out) {
    const moe_decoder *decoder = &d->tokenizer->decoder;
    const moe_vocab_entry *entry = moe_vocab_entry_of(&d->tokenizer->vocab, id);
    if (!entry || (d->skip_special && entry->special) || !decoder->bytes.data) return;
    uint32_t at = decoder->offsets[id], end = decoder->offsets[id + 1];
    if (at < end && !d->started) {
        d->started = true;
        if ((unsigned char)decoder->bytes.data[at] == decoder->strip_first) at++;
    }
    for (; at < end; at++) feed_byte(d, (unsigned char)decoder->bytes.data[at], out);
}

void moe_detokenizer_finish(moe_detokenizer *d, moe_buf *out) {
    if (d->num_held) moe_buf_append_text(out, MOE_UTF8_REPLACEMENT);
    d->num_held = 0;
}
