/* Which cores a process may run on. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

#define MOE_CORES_TEXT_BYTES 256

int32_t moe_cores_count(void); /* that this process may run on; at least 1 */

/* Lets this process, with the threads that it starts from now on, run on the listed cores alone: "0-3,8". INVALID_ARGUMENT: not
 * such a list, or none of these cores may be used. */
moe_status moe_cores_restrict(const char *list, moe_error *err);

/* The list of the index-th of `count` shares of the cores that this process may run on. False, and "", where there are fewer
 * cores than shares, or the list does not fit. */
bool moe_cores_share(int32_t index, int32_t count, char list[MOE_CORES_TEXT_BYTES]);
