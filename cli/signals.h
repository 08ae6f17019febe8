/* Termination signals of a process: blocked in all its threads, taken by its main thread. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

/* Blocks SIGTERM, SIGINT, SIGHUP and ignores SIGPIPE; before any thread is started. */
void moe_signals_block(void);
/* Waits at most `timeout_ns` for one of them; true when one came. */
bool moe_signals_wait(int64_t timeout_ns);
