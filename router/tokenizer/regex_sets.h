/* The sets of characters that Oniguruma's \s, \w, \d and \p{…} name, spelled for PCRE2 with the characters assigned since its
 * version of Unicode. */
#pragma once
#include <stdbool.h>
#include <stddef.h>

#include "common/buf.h"

/* Each appends what stands between the brackets of a class: "\p{Nd}\x{10d40}-\x{10d49}…". */
void moe_regex_white_space(moe_buf *out);
void moe_regex_word(moe_buf *out);
void moe_regex_digit(moe_buf *out);

/* \p{name}: a general category, a binary property or a script. *complement: what was appended is the set of all other characters.
 */
void moe_regex_property(const char *name, size_t size, moe_buf *out, bool *complement);
