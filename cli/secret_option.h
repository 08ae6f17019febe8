/* Secrets that are given as an option or, better, in a file, so that they stand in no process list and no container's settings. */
#pragma once
#include "common/options.h"

#define MOE_SECRET_BYTES 1024 /* with the NUL */

/* *out: the value of option `name`, else the first line of the file that option "NAME-file" names (then in `text`), else NULL.
 * INVALID_ARGUMENT: both are given, or the line is empty or too long; NOT_FOUND: the file cannot be read. */
moe_status moe_secret_option(const moe_options *options, const char *name, char text[MOE_SECRET_BYTES], const char **out,
                             moe_error *err);
