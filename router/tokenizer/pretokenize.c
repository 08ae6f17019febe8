#include "router/tokenizer/pretokenize.h"

#include <string.h>

#include "common/alloc.h"
#include "router/tokenizer/byte_level.h"
#include "router/tokenizer/utf8.h"

void moe_pieces_free(moe_pieces *pieces) {
    moe_buf_free(&pieces->text);
    moe_free(pieces->items);
    *pieces = (moe_pieces){0};
}

static void add_piece(moe_pieces *pieces, size_t start, size_t end) {
    if (start == end || pieces->failed) return;
    if (pieces->count == pieces->capacity) {
        size_t capacity = pieces->capacity ? pieces->capacity * 2 : 64;
        moe_piece *items = moe_realloc(pieces->items, capacity, sizeof *items);
        if (!items) {
            pieces->failed = true;
            return;
        }
        pieces->items = items;
        pieces->capacity = capacity;
    }
    pieces->items[pieces->count++] = (moe_piece){.start = start, .size = end - start};
}

/* Cuts one piece; segments (matches and what lies between) come in order and join the one held back or push it out. */
typedef struct splitter {
    moe_pieces *out;
    moe_split_behavior behavior;
    bool holds, was_match;
    size_t start, end; /* the segment held back */
} splitter;

static void release(splitter *s) {
    if (s->holds) add_piece(s->out, s->start, s->end);
    s->holds = false;
}

static void take_segment(splitter *s, size_t start, size_t end, bool match) {
    bool joins = (s->behavior == MOE_SPLIT_CONTIGUOUS && match == s->was_match) ||
                 (s->behavior == MOE_SPLIT_MERGED_WITH_PREVIOUS && match && !s->was_match) ||
                 (s->behavior == MOE_SPLIT_MERGED_WITH_NEXT && !match && s->was_match);
    if (joins && s->holds) {
        s->end = end;
    } else {
        release(s);
        s->holds = !(s->behavior == MOE_SPLIT_REMOVED && match);
        s->start = start;
        s->end = end;
    }
    s->was_match = match;
}

static moe_status split_piece(const moe_pretokenizer_step *step, moe_regex_scratch *scratch, const char *text, moe_piece piece,
                              moe_pieces *out, moe_error *err) {
    splitter s = {.out = out, .behavior = step->behavior};
    moe_regex_walk walk = {.text = text + piece.start, .size = piece.size};
    size_t done = 0;
    for (;;) {
        bool found;
        moe_status status = moe_regex_next(step->pattern, scratch, &walk, &found, err);
        if (status != MOE_OK) return status;
        if (!found) break;
        if (done != walk.start) take_segment(&s, piece.start + done, piece.start + walk.start, step->invert);
        take_segment(&s, piece.start + walk.start, piece.start + walk.end, !step->invert);
        done = walk.end;
    }
    if (done != piece.size) take_segment(&s, piece.start + done, piece.start + piece.size, step->invert);
    release(&s);
    return MOE_OK;
}

static moe_status split(const moe_pretokenizer_step *step, moe_regex_scratch *scratch, const moe_pieces *in, moe_pieces *out,
                        moe_error *err) {
    moe_buf_append(&out->text, moe_buf_text(&in->text), in->text.size);
    for (size_t i = 0; i < in->count; i++) {
        moe_status status = split_piece(step, scratch, moe_buf_text(&in->text), in->items[i], out, err);
        if (status != MOE_OK) return status;
    }
    return MOE_OK;
}

static void append_byte_level(const char *text, size_t size, moe_buf *out) {
    for (size_t i = 0; i < size; i++) {
        char character[MOE_UTF8_MAX_BYTES];
        moe_buf_append(out, character, moe_utf8_write(moe_byte_level_char((unsigned char)text[i]), character));
    }
}

static void append_metaspace(const moe_pretokenizer_step *step, const char *text, size_t size, bool at_start, moe_buf *out) {
    size_t length = strlen(step->replacement);
    bool has_one = *text == ' ' || (size >= length && memcmp(text, step->replacement, length) == 0);
    bool wants_one = step->prepend == MOE_PREPEND_ALWAYS || (step->prepend == MOE_PREPEND_FIRST && at_start);
    if (wants_one && !has_one) moe_buf_append(out, step->replacement, length);
    for (size_t i = 0; i < size; i++) {
        if (text[i] == ' ')
            moe_buf_append(out, step->replacement, length);
        else
            moe_buf_append(out, text + i, 1);
    }
}

/* The steps that give every piece another text. */
static void rewrite(const moe_pretokenizer_step *step, const moe_pieces *in, bool at_start, moe_pieces *out) {
    for (size_t i = 0; i < in->count; i++) {
        const char *text = in->text.data + in->items[i].start;
        size_t size = in->items[i].size, start = out->text.size;
        if (step->kind == MOE_PRETOKENIZE_BYTES) {
            append_byte_level(text, size, &out->text);
        } else if (step->kind == MOE_PRETOKENIZE_METASPACE) {
            append_metaspace(step, text, size, at_start && i == 0, &out->text);
        } else {
            if (*text != ' ') moe_buf_append(&out->text, " ", 1);
            moe_buf_append(&out->text, text, size);
        }
        add_piece(out, start, out->text.size);
    }
}

static void clear(moe_pieces *pieces) {
    moe_buf_clear(&pieces->text);
    pieces->count = 0;
}

moe_status moe_pretokenize(const moe_pretokenizer *pretokenizer, moe_regex_scratch *scratch, const char *text, size_t size,
                           bool at_start, moe_pieces *out, moe_pieces *spare, moe_error *err) {
    clear(out);
    moe_buf_append(&out->text, text, size);
    add_piece(out, 0, size);
    for (int i = 0; i < pretokenizer->num_steps && !out->failed && !out->text.failed; i++) {
        const moe_pretokenizer_step *step = &pretokenizer->steps[i];
        clear(spare);
        moe_status status = MOE_OK;
        if (step->kind == MOE_PRETOKENIZE_SPLIT)
            status = split(step, scratch, out, spare, err);
        else
            rewrite(step, out, at_start, spare);
        if (status != MOE_OK) return status;
        moe_pieces swap = *out;
        *out = *spare;
        *spare = swap;
    }
    if (out->failed || out->text.failed)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory splitting %zu bytes of text", size);
    return MOE_OK;
}
