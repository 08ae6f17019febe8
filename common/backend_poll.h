/* Waiting for jobs of a polled backend. */
#pragma once
#include "common/backend.h"
#include "common/clock.h"

#define MOE_POLL_SPIN_NS (20 * MOE_NS_PER_US) /* then messages have their turn */

/* For whoever has jobs outstanding: polls until *ended, which its jobs' `done` count up, changes, until there are no jobs, or for
 * MOE_POLL_SPIN_NS. True: the caller comes back without sleeping while it has jobs. False, at once: the backend is not polled,
 * jobs end by themselves. */
bool moe_backend_poll(moe_backend *backend, const _Atomic uint64_t *ended);
