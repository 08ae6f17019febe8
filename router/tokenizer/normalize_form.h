/* NFC, NFD, NFKC and NFKD as the reference computes them. */
#pragma once
#include <stddef.h>

#include "common/buf.h"
#include "common/status.h"

/* Canonical ordering takes quadratic time in the length of a run of combining marks; real text has a handful. */
#define MOE_MAX_COMBINING_RUN 4096

/* Appends the normalized form of well-formed text; `form`: utf8proc's options. INVALID_ARGUMENT: more than MOE_MAX_COMBINING_RUN
 * marks in a row. */
moe_status moe_normalize_form(int form, const char *text, size_t size, moe_buf *out, moe_error *err);
