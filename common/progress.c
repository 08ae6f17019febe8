#include "common/progress.h"

#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

#include "common/log.h"

#define LINE_BYTES 160
#define CLEAR_LINE "\r\033[K"

static double seconds_since(const moe_progress *p) { return (double)(moe_now_ns(p->clock) - p->began_ns) / MOE_NS_PER_S; }

/* Megabytes a second; 0 where no time has passed. */
static double rate(const moe_progress *p) {
    double seconds = seconds_since(p);
    return seconds > 0 ? (double)p->bytes / 1e6 / seconds : 0;
}

static void rewrite(const moe_progress *p) {
    char line[LINE_BYTES];
    int size = snprintf(line, sizeof line, CLEAR_LINE "%s: %" PRId64 " of %" PRId64 " %s, %.0f MB/s", p->what, p->done, p->total,
                        p->unit, rate(p));
    if (size > 0 && write(STDERR_FILENO, line, (size_t)size < sizeof line ? (size_t)size : sizeof line - 1) < 0) return;
}

void moe_progress_begin(moe_progress *p, const char *what, const char *unit, const moe_clock *clock) {
    int64_t now = moe_now_ns(clock);
    bool terminal = moe_log_get_level() <= MOE_LOG_INFO && isatty(STDERR_FILENO);
    *p = (moe_progress){.clock = clock, .what = what, .unit = unit, .running = true, .terminal = terminal};
    p->began_ns = p->shown_ns = now;
}

void moe_progress_update(moe_progress *p, int64_t done, int64_t total, int64_t bytes) {
    int64_t now = moe_now_ns(p->clock);
    p->done = done;
    p->total = total;
    p->bytes = bytes;
    if (!p->running || now - p->shown_ns < (p->terminal ? MOE_PROGRESS_REWRITE_NS : MOE_PROGRESS_LOG_NS)) return;
    p->shown_ns = now;
    if (p->terminal)
        rewrite(p);
    else
        moe_info("%s: %" PRId64 " of %" PRId64 " %s, %.0f MB/s", p->what, done, total, p->unit, rate(p));
}

void moe_progress_end(moe_progress *p) {
    if (!p->running) return;
    p->running = false;
    if (p->terminal && write(STDERR_FILENO, CLEAR_LINE, sizeof CLEAR_LINE - 1) < 0) return;
    moe_info("%s: %" PRId64 " %s, %.1f MB in %.2f s (%.0f MB/s)", p->what, p->done, p->unit, (double)p->bytes / 1e6,
             seconds_since(p), rate(p));
}
