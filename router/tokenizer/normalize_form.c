#include "router/tokenizer/normalize_form.h"

#include <utf8proc.h>

#include "common/alloc.h"
#include "router/tokenizer/unicode.h"
#include "router/tokenizer/utf8.h"

/* The reference's tables (the crate unicode-normalization-alignments) are of Unicode 9. Characters that a later version gave a
 * decomposition, a composition or a combining class it leaves alone, as starters. tests/golden/tokenizer/compare.mjs asks it
 * about every character. */
static const struct {
    uint32_t from, to;
} newer[] = {
    {0x7fd, 0x7fd},     {0x898, 0x89f},     {0x8ca, 0x8d3},     {0x9fe, 0x9fe},     {0xc3c, 0xc3c},     {0xd3b, 0xd3c},
    {0xeba, 0xeba},     {0x1715, 0x1715},   {0x1abf, 0x1ace},   {0x1df6, 0x1dfa},   {0x32ff, 0x32ff},   {0xa7f2, 0xa7f4},
    {0xa82c, 0xa82c},   {0xab69, 0xab69},   {0x10781, 0x10785}, {0x10787, 0x107b0}, {0x107b2, 0x107ba}, {0x10d24, 0x10d27},
    {0x10eab, 0x10eac}, {0x10efd, 0x10eff}, {0x10f46, 0x10f50}, {0x10f82, 0x10f85}, {0x11070, 0x11070}, {0x1133b, 0x1133b},
    {0x1145e, 0x1145e}, {0x11839, 0x1183a}, {0x11930, 0x11930}, {0x11938, 0x11938}, {0x1193d, 0x1193e}, {0x11943, 0x11943},
    {0x119e0, 0x119e0}, {0x11a34, 0x11a34}, {0x11a47, 0x11a47}, {0x11a99, 0x11a99}, {0x11d42, 0x11d42}, {0x11d44, 0x11d45},
    {0x11d97, 0x11d97}, {0x11f41, 0x11f42}, {0x16ff0, 0x16ff1}, {0x1e030, 0x1e06d}, {0x1e08f, 0x1e08f}, {0x1e130, 0x1e136},
    {0x1e2ae, 0x1e2ae}, {0x1e2ec, 0x1e2ef}, {0x1e4ec, 0x1e4ef}, {0x1f16c, 0x1f16c}, {0x1fbf0, 0x1fbf9}};

static bool is_newer(uint32_t c) {
    size_t low = 0, high = sizeof newer / sizeof *newer;
    if (c < newer[0].from) return false;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (newer[middle].to < c)
            low = middle + 1;
        else
            high = middle;
    }
    return low < sizeof newer / sizeof *newer && newer[low].from <= c;
}

static moe_status check_combining_runs(const char *text, size_t size, moe_error *err) {
    int run = 0;
    for (size_t at = 0; at < size; at += moe_utf8_size((unsigned char)text[at])) {
        run = moe_combining_class(moe_utf8_code_point(text + at)) ? run + 1 : 0;
        if (run > MOE_MAX_COMBINING_RUN)
            return moe_fail(err, MOE_INVALID_ARGUMENT, "the text has more than %d combining marks in a row before byte %zu",
                            MOE_MAX_COMBINING_RUN, at);
    }
    return MOE_OK;
}

/* The Unicode normalization forms leave ASCII alone. */
static bool is_ascii(const char *text, size_t size) {
    for (size_t i = 0; i < size; i++)
        if ((unsigned char)text[i] >= 0x80) return false;
    return true;
}

/* Text without newer characters. */
static moe_status normalize_stretch(int form, const char *text, size_t size, moe_buf *out, moe_error *err) {
    if (is_ascii(text, size)) {
        moe_buf_append(out, text, size);
        return MOE_OK;
    }
    const utf8proc_uint8_t *bytes = (const utf8proc_uint8_t *)text;
    utf8proc_ssize_t length = utf8proc_decompose(bytes, (utf8proc_ssize_t)size, NULL, 0, (utf8proc_option_t)form);
    utf8proc_int32_t *points =
        length < 0 ? NULL : moe_calloc((size_t)length + 1, sizeof *points); /* + 1: reencode ends it by 0 */
    if (!points) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory normalizing %zu bytes of text", size);
    moe_status status = MOE_OK;
    length = utf8proc_decompose(bytes, (utf8proc_ssize_t)size, points, length, (utf8proc_option_t)form);
    if (length >= 0) length = utf8proc_reencode(points, length, (utf8proc_option_t)form);
    if (length >= 0)
        moe_buf_append(out, points, (size_t)length);
    else
        status = moe_fail(err, MOE_INTERNAL, "normalizing: %s", utf8proc_errmsg(length));
    moe_free(points);
    return status;
}

/* Nothing reorders or composes over a character that is left alone, so that the stretches between them stand by themselves. */
moe_status moe_normalize_form(int form, const char *text, size_t size, moe_buf *out, moe_error *err) {
    moe_status status = check_combining_runs(text, size, err);
    size_t begin = 0;
    for (size_t at = 0, next; at < size && status == MOE_OK; at = next) {
        next = at + moe_utf8_size((unsigned char)text[at]);
        if (!is_newer(moe_utf8_code_point(text + at))) continue;
        status = normalize_stretch(form, text + begin, at - begin, out, err);
        moe_buf_append(out, text + at, next - at);
        begin = next;
    }
    return status == MOE_OK ? normalize_stretch(form, text + begin, size - begin, out, err) : status;
}
