/* UTF-8 as the Unicode Standard reads it: each maximal ill-formed part (chapter 3, table 3-8) becomes one U+FFFD, as Rust's
 * from_utf8_lossy and the WHATWG decoder do. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "common/buf.h"

#define MOE_UTF8_MAX_BYTES 4
#define MOE_UTF8_REPLACEMENT "\xef\xbf\xbd"

/* Of p[0 … size), 1 ≤ size ≤ 4: the size of the character if exactly these bytes are one, 0 if they are the proper beginning of
 * one, -1 if they are neither. */
int moe_utf8_classify(const unsigned char *p, size_t size);

/* Appends text[0 … size) with ill-formed parts replaced. */
void moe_utf8_append_lossy(const char *text, size_t size, moe_buf *out);

/* The size in bytes of the character that starts at this byte of well-formed text. */
static inline size_t moe_utf8_size(unsigned char first) { return first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4; }

/* The code point at p in well-formed text. */
uint32_t moe_utf8_code_point(const char *p);

/* Writes a code point (a Unicode scalar value) and returns how many bytes it took. */
size_t moe_utf8_write(uint32_t code_point, char out[MOE_UTF8_MAX_BYTES]);
