/* Text ↔ token ids, as a Hugging Face tokenizer.json describes: added tokens, normalizer, pre-tokenizer, byte-level BPE,
 * post-processor, decoder. A component that is not built is refused by name at load, never skipped.
 *
 * A tokenizer is immutable after load: any thread. */
#pragma once
#include "common/buf.h"
#include "common/status.h"

typedef struct moe_tokenizer moe_tokenizer;

typedef struct moe_token_ids {
    int32_t *ids; /* owned; moe_free */
    int32_t count;
} moe_token_ids;

/* Reads DIR/tokenizer.json. NOT_FOUND where there is none; INVALID_ARGUMENT or UNIMPLEMENTED naming the part. */
moe_status moe_tokenizer_load(const char *dir, moe_tokenizer **out, moe_error *err);
void moe_tokenizer_free(moe_tokenizer **tokenizer); /* NULLs the pointer; idempotent */

int32_t moe_tokenizer_vocab(const moe_tokenizer *tokenizer); /* highest id + 1 */

/* Encodes `size` bytes of UTF-8 (ill-formed bytes are replaced by U+FFFD first, as the reference does). Special tokens written
 * in the text are recognised. `add_special`: run the post-processor (bos and the like). Caller owns out->ids. */
moe_status moe_tokenizer_encode(const moe_tokenizer *tokenizer, const char *text, size_t size, bool add_special,
                                moe_token_ids *out, moe_error *err);

/* The id of a token by its exact text ("<|im_end|>"), or -1. */
int32_t moe_tokenizer_id_of(const moe_tokenizer *tokenizer, const char *token);
/* The token's own spelling in the vocabulary ("Ġthe"), or NULL for an unused id. Borrowed. */
const char *moe_tokenizer_token(const moe_tokenizer *tokenizer, int32_t id);
bool moe_tokenizer_is_special(const moe_tokenizer *tokenizer, int32_t id);
/* Appends the raw bytes that this one token stands for (perhaps a part of a UTF-8 character); nothing for an unused id. */
void moe_tokenizer_token_bytes(const moe_tokenizer *tokenizer, int32_t id, moe_buf *out);

/* Decodes a whole sequence; ill-formed UTF-8 becomes U+FFFD. */
void moe_tokenizer_decode(const moe_tokenizer *tokenizer, const int32_t *ids, int32_t count, bool skip_special, moe_buf *out);

/* Streaming decoder: feed ids one at a time; what is appended to `out` is always whole UTF-8 characters, and the appended
 * parts together equal moe_tokenizer_decode of all ids. One thread; borrows the tokenizer. */
typedef struct moe_detokenizer {
    const moe_tokenizer *tokenizer;
    bool skip_special;
    bool started;          /* something was fed: decoders that strip a leading space look at it */
    unsigned char held[4]; /* bytes of an unfinished character */
    int num_held;
} moe_detokenizer;

void moe_detokenizer_init(moe_detokenizer *d, const moe_tokenizer *tokenizer, bool skip_special);
void moe_detokenizer_feed(moe_detokenizer *d, int32_t id, moe_buf *out);
void moe_detokenizer_finish(moe_detokenizer *d, moe_buf *out); /* an unfinished character becomes U+FFFD */
