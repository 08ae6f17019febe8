/* Added tokens: spellings that are one token wherever they stand in the text, whatever the model would make of them. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

#define MOE_MAX_ADDED_TOKENS 65536

typedef struct moe_added_token {
    char *text; /* owned by the set */
    size_t size;
    int32_t id;
    bool single_word;    /* not between or beside word characters */
    bool lstrip, rstrip; /* white space before, after belongs to it */
} moe_added_token;

typedef struct moe_added_tokens {
    moe_added_token *tokens; /* [count], ascending by text once sealed */
    size_t count, capacity;
    bool may_begin[256]; /* some token begins with this byte */
} moe_added_tokens;

/* Copies the text; an empty one never matches and is left out. RESOURCE_EXHAUSTED. */
moe_status moe_added_tokens_add(moe_added_tokens *set, const char *text, size_t size, const moe_added_token *like,
                                moe_error *err);
void moe_added_tokens_seal(moe_added_tokens *set); /* before the first walk, after the last add */
void moe_added_tokens_free(moe_added_tokens *set);

/* Walks the tokens in well-formed text from left to right: leftmost, of those longest. Set text and size, zero the rest. */
typedef struct moe_added_walk {
    const char *text;
    size_t size;
    size_t done;       /* everything before is dealt with: the end of the last match, white space included */
    size_t start, end; /* the match, white space included */
    int32_t id;
} moe_added_walk;
bool moe_added_tokens_next(const moe_added_tokens *set, moe_added_walk *walk); /* false: none is left */
