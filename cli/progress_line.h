/* How far a command is that a person waits for: one line on standard error, where that is a terminal, rewritten until done =
 * total. */
#pragma once
#include <stdint.h>

void moe_progress_line(const char *what, const char *unit, int64_t done, int64_t total);
