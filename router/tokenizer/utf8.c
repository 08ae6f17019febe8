#include "router/tokenizer/utf8.h"

/* Range of the second byte after `first` (table 3-7); every later byte is 80 … BF. */
static void second_byte_range(unsigned char first, unsigned char *low, unsigned char *high) {
    *low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
    *high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
}

int moe_utf8_classify(const unsigned char *p, size_t size) {
    if (p[0] < 0x80) return size == 1 ? 1 : -1;
    if (p[0] < 0xc2 || p[0] > 0xf4) return -1;
    size_t need = moe_utf8_size(p[0]);
    if (size > need) return -1;
    if (size > 1) {
        unsigned char low, high;
        second_byte_range(p[0], &low, &high);
        if (p[1] < low || p[1] > high) return -1;
    }
    for (size_t i = 2; i < size; i++)
        if ((p[i] & 0xc0) != 0x80) return -1;
    return size == need ? (int)need : 0;
}

void moe_utf8_append_lossy(const char *text, size_t size, moe_buf *out) {
    const unsigned char *p = (const unsigned char *)text;
    size_t clean = 0; /* text[clean … at) is well-formed and not yet appended */
    for (size_t at = 0; at < size;) {
        size_t length = 1;
        int kind = moe_utf8_classify(p + at, length);
        while (kind == 0 && at + length < size) kind = moe_utf8_classify(p + at, ++length);
        if (kind > 0) {
            at += length;
            continue;
        }
        moe_buf_append(out, text + clean, at - clean);
        moe_buf_append_text(out, MOE_UTF8_REPLACEMENT);
        /* The byte that proved the part ill-formed may begin a character of its own. */
        at += kind < 0 && length > 1 ? length - 1 : length;
        clean = at;
    }
    moe_buf_append(out, text + clean, size - clean);
}

uint32_t moe_utf8_code_point(const char *text) {
    const unsigned char *p = (const unsigned char *)text;
    if (p[0] < 0x80) return p[0];
    if (p[0] < 0xe0) return (p[0] & 0x1fu) << 6 | (p[1] & 0x3fu);
    if (p[0] < 0xf0) return (p[0] & 0x0fu) << 12 | (p[1] & 0x3fu) << 6 | (p[2] & 0x3fu);
    return (p[0] & 0x07u) << 18 | (p[1] & 0x3fu) << 12 | (p[2] & 0x3fu) << 6 | (p[3] & 0x3fu);
}

size_t moe_utf8_write(uint32_t c, char out[MOE_UTF8_MAX_BYTES]) {
    if (c < 0x80) return out[0] = (char)c, 1;
    size_t size = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    static const unsigned char lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (size_t i = size - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3f));
    out[0] = (char)(lead[size] | c);
    return size;
}
