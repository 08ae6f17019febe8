/* What Unicode 15, 15.1 and 16 added to the properties that patterns name. Debian 12's PCRE2 knows Unicode 14; the reference
 * (Hugging Face's tokenizers, whose Oniguruma has Unicode 16) decides. With a newer PCRE2 the additions repeat what it knows.
 *
 * U+1171E alone moved between old categories, Mn to Mc, in Unicode 16: here it is in both. */
#pragma once
#include <stddef.h>

typedef struct moe_unicode_addition {
    const char *name;   /* general category, binary property or script, as Unicode spells it: "Lu", "Alphabetic", "Han" */
    const char *alias;  /* a script's short name ("Hani"); else the name */
    const char *ranges; /* in PCRE2's notation, for the inside of a class */
} moe_unicode_addition;

extern const moe_unicode_addition moe_unicode_additions[];
extern const size_t moe_num_unicode_additions;
