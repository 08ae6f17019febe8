/* A store in this process's memory: `--workers 0`, tests, simulation. Leases expire on the given clock. */
#pragma once
#include "common/clock.h"
#include "common/store.h"

typedef struct moe_memory_hub moe_memory_hub; /* the data; shared by several stores, as several clients share a Redis */

moe_status moe_memory_hub_new(const moe_clock *clock, moe_memory_hub **out, moe_error *err); /* thread-safe */
void moe_memory_hub_free(moe_memory_hub **hub);
moe_status moe_memory_open(moe_memory_hub *hub, moe_store **out, moe_error *err);
/* Fault injection: while down, every call answers UNAVAILABLE; wipe loses all data. */
void moe_memory_hub_set_down(moe_memory_hub *hub, bool down);
void moe_memory_hub_wipe(moe_memory_hub *hub);
