#include "common/timeline.h"

#include "common/alloc.h"

struct moe_timeline {
    const moe_clock *clock;
    moe_timeline_event *events; /* [capacity] */
    int32_t capacity;
    int64_t added;
};

moe_status moe_timeline_new(const moe_clock *clock, int32_t capacity, moe_timeline **out, moe_error *err) {
    MOE_ASSERT(capacity > 0);
    moe_timeline *t = *out = moe_calloc(1, sizeof *t);
    if (!t) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    *t = (moe_timeline){.clock = clock, .capacity = capacity, .events = moe_calloc((size_t)capacity, sizeof *t->events)};
    if (t->events) return MOE_OK;
    moe_timeline_free(out);
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a timeline of %d events", capacity);
}

void moe_timeline_free(moe_timeline **timeline) {
    if (*timeline) moe_free((*timeline)->events);
    moe_free(*timeline);
    *timeline = NULL;
}

int64_t moe_timeline_now(const moe_timeline *t) { return t ? moe_now_ns(t->clock) : 0; }

void moe_timeline_span(moe_timeline *t, moe_timeline_kind kind, int32_t layer, int32_t count, int64_t begin_ns, int64_t end_ns) {
    if (t) t->events[t->added++ % t->capacity] = (moe_timeline_event){begin_ns, end_ns, kind, layer, count};
}

void moe_timeline_add(moe_timeline *t, moe_timeline_kind kind, int32_t layer, int32_t count, int64_t begin_ns) {
    if (t) moe_timeline_span(t, kind, layer, count, begin_ns, moe_now_ns(t->clock));
}

int32_t moe_timeline_count(const moe_timeline *t) { return t->added < t->capacity ? (int32_t)t->added : t->capacity; }

const moe_timeline_event *moe_timeline_at(const moe_timeline *t, int32_t index) {
    MOE_ASSERT(index >= 0 && index < moe_timeline_count(t));
    int64_t first = moe_timeline_whole(t) ? 0 : t->added;
    return &t->events[(first + index) % t->capacity];
}

bool moe_timeline_whole(const moe_timeline *t) { return t->added <= t->capacity; }
