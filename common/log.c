#include "common/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MOE_LOG_LINE_BYTES 2048
#define CLEAR_LINE "\r\033[K" /* a progress line may be there, of this process or of another of the cluster */

static _Atomic int log_level = MOE_LOG_INFO;
static const char *_Atomic log_component = "moesaic";

void moe_log_init(moe_log_level level, const char *component) {
    log_level = (int)level;
    log_component = component;
}

moe_log_level moe_log_get_level(void) { return (moe_log_level)log_level; }

void moe_log(moe_log_level level, const char *format, ...) {
    static const char *const names[] = {"DEBUG", "INFO", "WARN", "ERROR"};
    if ((int)level < log_level || level >= MOE_LOG_OFF) return;
    struct timespec now;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    char line[MOE_LOG_LINE_BYTES];
    size_t used = isatty(STDERR_FILENO) ? (size_t)snprintf(line, sizeof line, CLEAR_LINE) : 0;
    used += strftime(line + used, sizeof line - used, "%Y-%m-%dT%H:%M:%S", &utc);
    used +=
        (size_t)snprintf(line + used, sizeof line - used, ".%03ldZ %s %s: ", now.tv_nsec / 1000000, names[level], log_component);
    va_list args;
    va_start(args, format);
    int wrote = vsnprintf(line + used, sizeof line - used - 1, format, args);
    va_end(args);
    used += wrote < 0 ? 0 : (size_t)wrote;
    if (used > sizeof line - 2) used = sizeof line - 2;
    line[used++] = '\n';
    if (write(STDERR_FILENO, line, used) < 0) return; /* nowhere left to say so */
}
