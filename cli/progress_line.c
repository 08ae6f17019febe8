#include "cli/progress_line.h"

#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

void moe_progress_line(const char *what, const char *unit, int64_t done, int64_t total) {
    if (!isatty(STDERR_FILENO)) return;
    fprintf(stderr, "\r%s: %" PRId64 " of %" PRId64 " %s", what, done, total, unit);
    if (done == total) fputc('\n', stderr);
}
