/* The pre-tokenizer of a tokenizer.json: cuts text into the pieces that BPE then works on one by one. Every type is loaded as one
 * or more of the few steps below, which run over all pieces in turn. */
#pragma once
#include <jansson.h>

#include "router/tokenizer/regex.h"

#define MOE_PRETOKENIZER_MAX_STEPS 32

typedef enum moe_pretokenizer_kind {
    MOE_PRETOKENIZE_SPLIT,        /* cut at the matches of a pattern */
    MOE_PRETOKENIZE_PREFIX_SPACE, /* a space before every piece that has none */
    MOE_PRETOKENIZE_BYTES,        /* bytes become characters of the byte-level alphabet */
    MOE_PRETOKENIZE_METASPACE     /* spaces become U+2581 (or another), with one before the piece */
} moe_pretokenizer_kind;

typedef enum moe_split_behavior {
    MOE_SPLIT_REMOVED,
    MOE_SPLIT_ISOLATED,
    MOE_SPLIT_CONTIGUOUS,
    MOE_SPLIT_MERGED_WITH_PREVIOUS,
    MOE_SPLIT_MERGED_WITH_NEXT
} moe_split_behavior;

typedef enum moe_prepend_scheme { MOE_PREPEND_ALWAYS, MOE_PREPEND_FIRST, MOE_PREPEND_NEVER } moe_prepend_scheme;

typedef struct moe_pretokenizer_step {
    moe_pretokenizer_kind kind;
    moe_regex *pattern; /* SPLIT: owned */
    moe_split_behavior behavior;
    bool invert;       /* SPLIT: what lies between matches counts as the match */
    char *replacement; /* METASPACE: owned, one character */
    moe_prepend_scheme prepend;
} moe_pretokenizer_step;

typedef struct moe_pretokenizer {
    moe_pretokenizer_step steps[MOE_PRETOKENIZER_MAX_STEPS];
    int num_steps; /* 0: the text is one piece */
} moe_pretokenizer;

/* `json`: the "pre_tokenizer" field, NULL or null for none. UNIMPLEMENTED naming the type. */
moe_status moe_pretokenizer_load(const json_t *json, moe_pretokenizer *out, moe_error *err);
void moe_pretokenizer_free(moe_pretokenizer *pretokenizer);

typedef struct moe_piece {
    size_t start, size;
} moe_piece;

/* Pieces of a text of their own, in order, none empty. Zero before first use. */
typedef struct moe_pieces {
    moe_buf text;
    moe_piece *items; /* [count] */
    size_t count, capacity;
    bool failed; /* out of memory */
} moe_pieces;

void moe_pieces_free(moe_pieces *pieces);

/* Cuts well-formed text into `out` (cleared first); `spare` is working memory. `at_start`: the input text begins here (an added
 * token did not come before). RESOURCE_EXHAUSTED. */
moe_status moe_pretokenize(const moe_pretokenizer *pretokenizer, moe_regex_scratch *scratch, const char *text, size_t size,
                           bool at_start, moe_pieces *out, moe_pieces *spare, moe_error *err);
