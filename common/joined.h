/* Two transports as one, for a thread that needs both: each endpoint is given to the first that can reach it, and one sleep covers
 * both. While only one of them is in use, the other costs nothing. */
#pragma once
#include "common/clock.h"
#include "common/transport.h"

/* Takes both over, also when it fails: closed with the joined one. `near` must offer `watch`, `far` must offer `rest`. */
moe_status moe_joined_open(moe_transport *near, moe_transport *far, const moe_clock *clock, moe_transport **out, moe_error *err);
