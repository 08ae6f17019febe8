#include <stdio.h>
#include <string.h>

#include "common/random.h"
#include "router/tokenizer/bpe.h"
#include "router/tokenizer/json_read.h"

static bool split_spelling(const json_t *merge, const char **left, size_t *left_size, const char **right, size_t *right_size) {
    if (json_is_array(merge)) {
        const json_t *a = json_array_get(merge, 0), *b = json_array_get(merge, 1);
        if (json_array_size(merge) != 2 || !json_is_string(a) || !json_is_string(b)) return false;
        *left = json_string_value(a), *left_size = json_string_length(a);
        *right = json_string_value(b), *right_size = json_string_length(b);
        return true;
    }
    if (!json_is_string(merge)) return false;
    const char *text = json_string_value(merge);
    const char *space = strchr(text, ' ');
    if (!space || strchr(space + 1, ' ')) return false;
    *left = text, *left_size = (size_t)(space - text);
    *right = space + 1, *right_size = strlen(space + 1);
    return true;
}

/* The id of left's spelling followed by right's, or -1. `joined` is working memory. */
static int32_t find_joined(const moe_vocab *vocab, const char *left, size_t left_size, const char *right, size_t right_size,
                           moe_buf *joined) {
    moe_buf_clear(joined);
    moe_buf_append(joined, left, left_size);
    moe_buf_append(joined, right, right_size);
    return joined->failed ? -1 : moe_vocab_find(vocab, moe_buf_text(joined), joined->size);
}

static moe_status load_merge(moe_bpe *bpe, const json_t *merge, int32_t rank, const moe_vocab *vocab, moe_buf *joined,
                             moe_error *err) {
    const char *left, *right;
    size_t left_size, right_size;
    if (!split_spelling(merge, &left, &left_size, &right, &right_size))
        return moe_fail(err, MOE_INVALID_ARGUMENT, "merge %d is neither \"a b\" nor [\"a\", \"b\"]", rank);
    int32_t left_id = moe_vocab_find(vocab, left, left_size);
    int32_t right_id = moe_vocab_find(vocab, right, right_size);
    int32_t merged = find_joined(vocab, left, left_size, right, right_size, joined);
    if (joined->failed) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory reading the merges");
    if (left_id < 0 || right_id < 0 || merged < 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "merge %d ('%s' + '%s') has a part or a result that is no token", rank, left,
                        right);
    moe_bpe_put(bpe, (moe_merge){.pair = moe_bpe_pair(left_id, right_id), .rank = rank, .merged = merged});
    return MOE_OK;
}

static moe_status load_merges(moe_bpe *bpe, const json_t *merges, const moe_vocab *vocab, moe_error *err) {
    size_t count = json_array_size(merges);
    if (!json_is_array(merges) || count > MOE_BPE_MAX_MERGES)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "'merges' is not an array of at most %d merges", MOE_BPE_MAX_MERGES);
    uint32_t num_slots = 16;
    while (num_slots < 2 * count) num_slots *= 2;
    bpe->slots = moe_calloc(num_slots, sizeof *bpe->slots);
    if (!bpe->slots) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for %zu merges", count);
    bpe->num_slots = num_slots;
    for (uint32_t i = 0; i < num_slots; i++) bpe->slots[i].rank = -1;
    moe_buf joined = {0};
    moe_status status = MOE_OK;
    for (size_t i = 0; i < count && status == MOE_OK; i++)
        status = load_merge(bpe, json_array_get(merges, i), (int32_t)i, vocab, &joined, err);
    moe_buf_free(&joined);
    return status;
}

/* Options whose other values change the ids and are not built. */
static moe_status refuse_options(const json_t *model, moe_error *err) {
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    for (size_t i = 0; i < sizeof affixes / sizeof *affixes; i++) {
        const char *affix;
        moe_status status = moe_json_text(model, affixes[i], &affix, err);
        if (status != MOE_OK) return status;
        if (affix && *affix) return moe_fail(err, MOE_UNIMPLEMENTED, "'%s' is '%s': not supported", affixes[i], affix);
    }
    const json_t *dropout = json_object_get(model, "dropout");
    if (dropout && !json_is_null(dropout) && json_number_value(dropout) != 0.0)
        return moe_fail(err, MOE_UNIMPLEMENTED, "'dropout' is set: encoding would be random, which is not supported");
    return MOE_OK;
}

static moe_status load_unknown(moe_bpe *bpe, const json_t *model, const moe_vocab *vocab, moe_error *err) {
    const char *unk = NULL;
    moe_status status = moe_json_text(model, "unk_token", &unk, err);
    bpe->unk_id = unk ? moe_vocab_find(vocab, unk, strlen(unk)) : -1;
    if (status == MOE_OK && unk && bpe->unk_id < 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "'unk_token' '%s' is no token", unk);
    for (int byte = 0; byte < 256; byte++) {
        char name[8];
        int size = snprintf(name, sizeof name, "<0x%02X>", (unsigned)byte);
        bpe->byte_ids[byte] = moe_vocab_find(vocab, name, (size_t)size);
    }
    return status;
}

moe_status moe_bpe_load(const json_t *model, const moe_vocab *vocab, moe_bpe *out, moe_error *err) {
    moe_status status = refuse_options(model, err);
    if (status == MOE_OK) status = moe_json_bool(model, "fuse_unk", false, &out->fuse_unk, err);
    if (status == MOE_OK) status = moe_json_bool(model, "byte_fallback", false, &out->byte_fallback, err);
    if (status == MOE_OK) status = moe_json_bool(model, "ignore_merges", false, &out->ignore_merges, err);
    if (status == MOE_OK) status = load_unknown(out, model, vocab, err);
    if (status == MOE_OK) status = load_merges(out, json_object_get(model, "merges"), vocab, err);
    if (status != MOE_OK) moe_bpe_free(out);
    return status;
}

void moe_bpe_free(moe_bpe *bpe) {
    moe_free(bpe->slots);
    *bpe = (moe_bpe){.unk_id = -1};
}
