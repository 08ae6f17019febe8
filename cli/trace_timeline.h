/* `moesaic trace --timeline`: one short generation with the experts in this process, drawn. */
#pragma once
#include "common/options.h"

/* Returns the command's exit status. */
int moe_trace_timeline(const moe_options *options);
