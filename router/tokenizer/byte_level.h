/* The alphabet of byte-level BPE (GPT-2's bytes_to_unicode): every byte as a printable character. Printable Latin-1 stands for
 * itself; the other 68 bytes, ascending, are U+0100 … U+0143. */
#pragma once
#include <stdint.h>

static inline uint32_t moe_byte_level_char(unsigned char byte) {
    if (byte <= 0x20) return 0x100u + byte;
    if (byte >= 0x7f && byte <= 0xa0) return 0x121u + (byte - 0x7fu);
    return byte == 0xad ? 0x143u : byte;
}

/* The byte that a character of the alphabet stands for, or -1. */
static inline int moe_byte_level_byte(uint32_t character) {
    if (character > 0x143) return -1;
    if (character == 0x143) return 0xad;
    if (character >= 0x121) return (int)(character - 0x121 + 0x7f);
    if (character >= 0x100) return (int)(character - 0x100);
    return moe_byte_level_char((unsigned char)character) == character ? (int)character : -1;
}
