/* Shows how far a long piece of work is: on a terminal (standard error) a line that is rewritten, elsewhere a log line every few
 * seconds; at the end one log line. One thread at a time. */
#pragma once
#include <stdbool.h>

#include "common/clock.h"

#define MOE_PROGRESS_LOG_NS (2 * MOE_NS_PER_S)        /* between log lines */
#define MOE_PROGRESS_REWRITE_NS (100 * MOE_NS_PER_MS) /* between rewritten lines */

typedef struct moe_progress {
    const moe_clock *clock;  /* borrowed */
    const char *what, *unit; /* "loading", "experts"; borrowed */
    bool running, terminal;
    int64_t began_ns, shown_ns;
    int64_t done, total; /* items */
    int64_t bytes;       /* done so far */
} moe_progress;

void moe_progress_begin(moe_progress *progress, const char *what, const char *unit, const moe_clock *clock);

/* `done` of `total` items, which together had `bytes` bytes. Both may change as the work becomes known. */
void moe_progress_update(moe_progress *progress, int64_t done, int64_t total, int64_t bytes);

/* Clears the terminal's line and logs what was done, in what time. Nothing unless it runs. */
void moe_progress_end(moe_progress *progress);
