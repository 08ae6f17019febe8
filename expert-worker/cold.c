#include "expert-worker/cold.h"

#define OBSERVED_PART (1.0 / 16)
#define MOST_OBSERVED 3.0     /* times what was expected */
#define MOST_OBSERVED_NS 50e3 /* beyond that, of a fixed cost, which may be expected to be 0 */
#define LEAST_GAIN 0.04       /* of the time until everything would be computed from slots */
#define UNUSED_PART (1.0 / 4096)

static double later(double a, double b) { return a > b ? a : b; }

static double copy_ns(const moe_cold_costs *c, const moe_cold_group *g) { return c->copy_byte_ns * (double)g->left_bytes; }
static double host_ns(const moe_cold_costs *c, const moe_cold_group *g) { return moe_cold_compute_ns(&c->host, 1, g->rows); }

/* Whether copying suits a, beside the host's time for it, more than b. */
static bool before(const moe_cold_costs *c, const moe_cold_group *a, const moe_cold_group *b) {
    double of_a = host_ns(c, a) * copy_ns(c, b), of_b = host_ns(c, b) * copy_ns(c, a);
    return of_a > of_b || (of_a >= of_b && a->rank > b->rank);
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

/* Sets `host` of all groups, at most `most` of them true. Returns when the batch ends. */
static double divide(const moe_cold_costs *c, moe_cold_queues q, moe_cold_group *groups, int32_t count, int32_t most) {
    double fixed_ns = c->host_job_ns + c->host_rows_ns, end_ns = 0;
    for (int32_t first = 0, last = count - 1; first <= last;) {
        double link_ns = q.one_processor ? later(q.link_ns, q.device_ns) : q.link_ns;
        double copied_ns = link_ns + copy_ns(c, &groups[first]);
        double device_end_ns = later(q.device_ns, copied_ns) + moe_cold_compute_ns(&c->device, 1, groups[first].rows);
        double host_end_ns = (q.one_processor ? q.device_ns : q.host_ns) + host_ns(c, &groups[last]);
        if (count - 1 - last < most && host_end_ns + fixed_ns < device_end_ns) {
            groups[last--].host = true;
            if (q.one_processor) q.device_ns = host_end_ns;
            q.host_ns = host_end_ns;
            end_ns = host_end_ns + fixed_ns;
        } else {
            groups[first++].host = false;
            q.link_ns = copied_ns;
            q.device_ns = device_end_ns;
        }
    }
    return later(q.device_ns, end_ns);
}

void moe_cold_split(const moe_cold_costs *c, moe_cold_queues q, moe_cold_group *groups, int32_t count) {
    sort(c, groups, count);
    double divided_ns = divide(c, q, groups, count, count), copied_ns = later(q.host_ns, divide(c, q, groups, count, 0));
    if (divided_ns < (1 - LEAST_GAIN) * copied_ns) divide(c, q, groups, count, count);
}

/* What to multiply an expected time with after a measured one. */
static double change(double expected, double measured) {
    double times = measured / expected;
    return 1 + OBSERVED_PART * ((times < MOST_OBSERVED ? times : MOST_OBSERVED) - 1);
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

void moe_cold_observe_fixed(double *cost_ns, int64_t ns) {
    double most = MOST_OBSERVED * *cost_ns + MOST_OBSERVED_NS, measured = ns > 0 ? (double)ns : 0;
    *cost_ns += OBSERVED_PART * ((measured < most ? measured : most) - *cost_ns);
}

void moe_cold_host_unused(moe_cold_costs *c) {
    c->host_job_ns *= 1 - UNUSED_PART;
    c->host_rows_ns *= 1 - UNUSED_PART;
    c->host.expert_ns *= 1 - UNUSED_PART;
    c->host.row_ns *= 1 - UNUSED_PART;
}
