/* One log line a call, to standard error: "2026-01-31T12:00:00.123Z INFO router: text". Any thread. */
#pragma once

typedef enum moe_log_level { MOE_LOG_DEBUG, MOE_LOG_INFO, MOE_LOG_WARN, MOE_LOG_ERROR, MOE_LOG_OFF } moe_log_level;

/* `component` is kept by reference (a literal or memory that outlives the process's last line). */
void moe_log_init(moe_log_level level, const char *component);
moe_log_level moe_log_get_level(void);

void moe_log(moe_log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));
#define moe_debug(...) moe_log(MOE_LOG_DEBUG, __VA_ARGS__)
#define moe_info(...) moe_log(MOE_LOG_INFO, __VA_ARGS__)
#define moe_warn(...) moe_log(MOE_LOG_WARN, __VA_ARGS__)
#define moe_error_log(...) moe_log(MOE_LOG_ERROR, __VA_ARGS__)
