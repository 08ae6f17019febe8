/* The normalizer of a tokenizer.json: steps from text to text, before the pre-tokenizer. */
#pragma once
#include <jansson.h>

#include "router/tokenizer/regex.h"

#define MOE_NORMALIZER_MAX_STEPS 16

typedef enum moe_normalizer_kind { MOE_NORMALIZE_FORM, MOE_NORMALIZE_PREPEND, MOE_NORMALIZE_REPLACE } moe_normalizer_kind;

typedef struct moe_normalizer_step {
    moe_normalizer_kind kind;
    int form;           /* FORM: utf8proc's options */
    moe_regex *pattern; /* REPLACE: owned */
    char *text;         /* PREPEND, REPLACE: owned */
} moe_normalizer_step;

typedef struct moe_normalizer {
    moe_normalizer_step steps[MOE_NORMALIZER_MAX_STEPS];
    int num_steps; /* 0: the text stays as it is */
} moe_normalizer;

/* `json`: the "normalizer" field, NULL or null for none. UNIMPLEMENTED naming the type. */
moe_status moe_normalizer_load(const json_t *json, moe_normalizer *out, moe_error *err);
void moe_normalizer_free(moe_normalizer *normalizer);

/* Puts the normalized form of well-formed text into `out` (cleared first); `spare` is working memory. */
moe_status moe_normalize(const moe_normalizer *normalizer, moe_regex_scratch *scratch, const char *text, size_t size,
                         moe_buf *out, moe_buf *spare, moe_error *err);
