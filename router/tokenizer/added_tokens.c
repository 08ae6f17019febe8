#include "router/tokenizer/added_tokens.h"

#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "router/tokenizer/unicode.h"
#include "router/tokenizer/utf8.h"

moe_status moe_added_tokens_add(moe_added_tokens *set, const char *text, size_t size, const moe_added_token *like,
                                moe_error *err) {
    if (size == 0) return MOE_OK;
    if (set->count == set->capacity) {
        size_t capacity = set->capacity ? set->capacity * 2 : 16;
        moe_added_token *tokens = moe_realloc(set->tokens, capacity, sizeof *tokens);
        if (!tokens) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the added tokens");
        set->tokens = tokens;
        set->capacity = capacity;
    }
    moe_added_token token = *like;
    token.text = moe_strndup(text, size);
    token.size = size;
    if (!token.text) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the added tokens");
    set->tokens[set->count++] = token;
    set->may_begin[(unsigned char)text[0]] = true;
    return MOE_OK;
}

static int by_text(const void *a, const void *b) {
    const moe_added_token *left = a, *right = b;
    int order = memcmp(left->text, right->text, left->size < right->size ? left->size : right->size);
    return order ? order : (left->size > right->size) - (left->size < right->size);
}

void moe_added_tokens_seal(moe_added_tokens *set) {
    if (set->count) qsort(set->tokens, set->count, sizeof *set->tokens, by_text);
}

void moe_added_tokens_free(moe_added_tokens *set) {
    for (size_t i = 0; i < set->count; i++) moe_free(set->tokens[i].text);
    moe_free(set->tokens);
    *set = (moe_added_tokens){0};
}

/* The first token of [low, high), all alike in their first `depth` bytes, whose byte at `depth` is at least `byte`. A token that
 * ends at `depth` counts as less than every byte. */
static size_t first_at_least(const moe_added_tokens *set, size_t low, size_t high, size_t depth, int byte) {
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const moe_added_token *token = &set->tokens[middle];
        int here = token->size > depth ? (unsigned char)token->text[depth] : -1;
        if (here < byte)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The longest token that text[0 … size) begins with, or NULL: narrows the sorted tokens byte by byte. */
static const moe_added_token *longest_at(const moe_added_tokens *set, const char *text, size_t size) {
    const moe_added_token *longest = NULL;
    size_t low = 0, high = set->count;
    for (size_t depth = 0; depth < size && low < high; depth++) {
        int byte = (unsigned char)text[depth];
        low = first_at_least(set, low, high, depth, byte);
        high = first_at_least(set, low, high, depth, byte + 1);
        if (low < high && set->tokens[low].size == depth + 1) longest = &set->tokens[low];
    }
    return longest;
}

/* Where the character that ends at `end` (> 0) begins. */
static size_t character_before(const char *text, size_t end) {
    size_t at = end - 1;
    while (at > 0 && ((unsigned char)text[at] & 0xc0) == 0x80) at--;
    return at;
}

static bool stands_alone(const moe_added_walk *walk, size_t start, size_t end) {
    if (start > 0 && moe_is_word(moe_utf8_code_point(walk->text + character_before(walk->text, start)))) return false;
    return end == walk->size || !moe_is_word(moe_utf8_code_point(walk->text + end));
}

static size_t skip_space_before(const moe_added_walk *walk, size_t start) {
    while (start > walk->done) {
        size_t before = character_before(walk->text, start);
        if (before < walk->done || !moe_is_white_space(moe_utf8_code_point(walk->text + before))) break;
        start = before;
    }
    return start;
}

static size_t skip_space_after(const moe_added_walk *walk, size_t end) {
    while (end < walk->size && moe_is_white_space(moe_utf8_code_point(walk->text + end)))
        end += moe_utf8_size((unsigned char)walk->text[end]);
    return end;
}

bool moe_added_tokens_next(const moe_added_tokens *set, moe_added_walk *walk) {
    for (size_t at = walk->done; at < walk->size;) {
        const moe_added_token *token = NULL;
        if (set->may_begin[(unsigned char)walk->text[at]]) token = longest_at(set, walk->text + at, walk->size - at);
        if (!token) {
            at++;
            continue;
        }
        size_t end = at + token->size;
        if (token->single_word && !stands_alone(walk, at, end)) {
            at = end; /* as in the reference: a match that is passed over still covers its text */
            continue;
        }
        walk->start = token->lstrip ? skip_space_before(walk, at) : at;
        walk->end = walk->done = token->rstrip ? skip_space_after(walk, end) : end;
        walk->id = token->id;
        return true;
    }
    return false;
}
