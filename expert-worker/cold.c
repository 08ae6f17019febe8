#include "expert-worker/cold.h"

#define OBSERVED_PART (1.0 / 16)
#define MOST_CHANGE 1.5 /* of one observation */

static double later(double a, double b) { return a > b ? a : b; }

static double copy_ns(const moe_cold_costs *c, const moe_cold_group *g) { return c->copy_byte_ns * (double)g->left_bytes; }
static double host_ns(const moe_cold_costs *c, const moe_cold_group *g) { return moe_cold_compute_ns(&c->host, 1, g->rows); }

/* Whether copying suits a, beside the host's time for it, more than b. */
static bool before(const moe_cold_costs *c, const moe_cold_group *a, const moe_cold_group *b) {
    return host_ns(c, a) * copy_ns(c, b) > host_ns(c, b) * copy_ns(c, a);
}

/* By insertion: no memory is allocated, equal ones keep their order, and there are few. */
static void sort(const moe_cold_costs *c, moe_cold_group *groups, int32_t count) {
    for (int32_t i = 1; i < count; i++) {
        moe_cold_group moved = groups[i];
        int32_t at = i;
        for (; at > 0 && before(c, &moved, &groups[at - 1]); at--) groups[at] = groups[at - 1];
        groups[at] = moved;
    }
}

void moe_cold_split(const moe_cold_costs *c, moe_cold_queues q, moe_cold_group *groups, int32_t count) {
    sort(c, groups, count);
    for (int32_t first = 0, last = count - 1; first <= last;) {
        double link_ns = q.one_processor ? later(q.link_ns, q.device_ns) : q.link_ns;
        double copied_ns = link_ns + copy_ns(c, &groups[first]);
        double device_end_ns = later(q.device_ns, copied_ns) + moe_cold_compute_ns(&c->device, 1, groups[first].rows);
        double host_end_ns = (q.one_processor ? q.device_ns : q.host_ns) + host_ns(c, &groups[last]);
        if (host_end_ns < device_end_ns) {
            groups[last--].host = true;
            if (q.one_processor) q.device_ns = host_end_ns;
            q.host_ns = host_end_ns;
        } else {
            groups[first++].host = false;
            q.link_ns = copied_ns;
            q.device_ns = device_end_ns;
        }
    }
}

/* What to multiply an expected time with after a measured one. */
static double change(double expected, double measured) {
    double factor = 1 + OBSERVED_PART * (measured / expected - 1);
    return factor < MOST_CHANGE ? factor : MOST_CHANGE;
}

void moe_cold_observe_compute(moe_cold_compute *cost, int32_t experts, int32_t rows, int64_t ns) {
    double expected = moe_cold_compute_ns(cost, experts, rows);
    if (ns <= 0 || experts <= 0) return;
    if (expected <= 0) {
        cost->expert_ns = (double)ns / experts;
        return;
    }
    double factor = change(expected, (double)ns);
    cost->expert_ns *= factor;
    cost->row_ns *= factor;
}

void moe_cold_observe_copy(double *byte_ns, int64_t bytes, int64_t ns) {
    if (ns <= 0 || bytes <= 0) return;
    *byte_ns = *byte_ns > 0 ? *byte_ns * change(*byte_ns * (double)bytes, (double)ns) : (double)ns / (double)bytes;
}
