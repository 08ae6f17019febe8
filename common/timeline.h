/* What a process did when, on one clock: segments, passes of experts, waits, copies. A bounded ring of events for `moesaic trace
 * --timeline`. Nothing is allocated when an event is recorded, and where there is no timeline (NULL) nothing is recorded. One thread:
 * the one that steps the engine and its worker. */
#pragma once
#include "common/clock.h"
#include "common/status.h"

typedef enum moe_timeline_kind {
    MOE_TIMELINE_SEGMENT, /* of `count` rows of the router, up to the dispatch of `layer`; or to the logits */
    MOE_TIMELINE_PASS,    /* of `count` experts of a batch of `layer` */
    MOE_TIMELINE_HOST,    /* likewise, computed by the host in place of the device */
    MOE_TIMELINE_STALL,   /* a batch of `layer` waits for experts */
    MOE_TIMELINE_AHEAD,   /* expert `count` of `layer` comes into a slot because a hint announced it */
    MOE_TIMELINE_DEMAND,  /* because a call wants it, or (rarely) because slots are empty */
    MOE_TIMELINE_GIVEN_UP /* it was to come, and is not wanted any more */
} moe_timeline_kind;

typedef struct moe_timeline_event {
    int64_t begin_ns, end_ns;
    moe_timeline_kind kind;
    int32_t layer, count; /* layer: of MoE layers; count: as the kind says */
} moe_timeline_event;

typedef struct moe_timeline moe_timeline;

/* Room for the newest `capacity` events. clock is borrowed. RESOURCE_EXHAUSTED. */
moe_status moe_timeline_new(const moe_clock *clock, int32_t capacity, moe_timeline **out, moe_error *err);
void moe_timeline_free(moe_timeline **timeline); /* NULLs; idempotent */

int64_t moe_timeline_now(const moe_timeline *timeline); /* 0 for NULL */
void moe_timeline_span(moe_timeline *timeline, moe_timeline_kind kind, int32_t layer, int32_t count, int64_t begin_ns, int64_t end_ns);
/* What began at begin_ns has ended now. */
void moe_timeline_add(moe_timeline *timeline, moe_timeline_kind kind, int32_t layer, int32_t count, int64_t begin_ns);

int32_t moe_timeline_count(const moe_timeline *timeline);
/* Event `index` of those that there are, in the order in which they ended. Borrowed until the next is added. */
const moe_timeline_event *moe_timeline_at(const moe_timeline *timeline, int32_t index);
bool moe_timeline_whole(const moe_timeline *timeline); /* no event was overwritten */
