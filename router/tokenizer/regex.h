/* Regular expressions of tokenizer.json (Oniguruma's, Ruby syntax) over PCRE2 with UTF and Unicode properties, compiled by its
 * JIT where there is one.
 *
 * A pattern is translated first, because PCRE2 takes some of Oniguruma's notation to mean something else without complaint, and
 * knows an older Unicode: sets get the characters assigned since (unicode_additions.h), classes with && or with classes inside
 * become groups. What has no faithful translation (\h, \v, inline options other than i, anchors, …) is refused by name.
 */
#pragma once
#include <stdbool.h>
#include <stddef.h>

#include "common/buf.h"
#include "common/status.h"

/* Immutable after compile: any thread, each with a scratch of its own. */
typedef struct moe_regex moe_regex;
typedef struct moe_regex_scratch moe_regex_scratch; /* usable with every regex */

/* `literal`: the pattern is plain text. INVALID_ARGUMENT: PCRE2 finds it malformed; UNIMPLEMENTED: a construct refused. */
moe_status moe_regex_compile(const char *pattern, size_t size, bool literal, moe_regex **out, moe_error *err);
void moe_regex_free(moe_regex **regex); /* NULLs; idempotent */

moe_regex_scratch *moe_regex_scratch_new(void); /* NULL: out of memory */
void moe_regex_scratch_free(moe_regex_scratch **scratch);

/* Walks the matches of well-formed UTF-8 from left to right; set text and size, zero the rest. An empty match right behind the
 * match before it is passed over (as Oniguruma's find_iter does). */
typedef struct moe_regex_walk {
    const char *text;
    size_t size;
    size_t next; /* where the search goes on */
    bool any;    /* a match was found before; it ended at `next` */
    size_t last_end;
    size_t start, end; /* the match found: text[start … end) */
} moe_regex_walk;

/* *found false: no further match. RESOURCE_EXHAUSTED: the text drives the pattern over its match limit. */
moe_status moe_regex_next(const moe_regex *regex, moe_regex_scratch *scratch, moe_regex_walk *walk, bool *found, moe_error *err);

/* Appends text with every match replaced by `with`. Errors as moe_regex_next; out of memory shows in out->failed. */
moe_status moe_regex_replace(const moe_regex *regex, moe_regex_scratch *scratch, const char *text, size_t size, const char *with,
                             moe_buf *out, moe_error *err);

/* Oniguruma's notation to PCRE2's, appended to `out`; UNIMPLEMENTED naming the construct that has no translation. */
moe_status moe_regex_translate(const char *pattern, size_t size, moe_buf *out, moe_error *err);
