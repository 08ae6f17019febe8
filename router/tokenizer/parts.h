/* What a loaded tokenizer is made of; for this folder only. */
#pragma once
#include "router/tokenizer/added_tokens.h"
#include "router/tokenizer/bpe.h"
#include "router/tokenizer/decode.h"
#include "router/tokenizer/normalize.h"
#include "router/tokenizer/postprocess.h"
#include "router/tokenizer/pretokenize.h"
#include "router/tokenizer/tokenizer.h"

struct moe_tokenizer {
    moe_vocab vocab;                   /* the model's tokens and the added ones */
    moe_added_tokens raw_added;        /* looked for in the text as it came */
    moe_added_tokens normalized_added; /* their normalized spelling is looked for in the normalized text */
    moe_normalizer normalizer;
    moe_pretokenizer pretokenizer;
    moe_bpe bpe;
    moe_postprocessor postprocessor;
    moe_decoder decoder;
};
