#include "expert-worker/groups.h"

/* UNDECIDED and HOST need an image, DEVICE and ON_DEVICE a slot. */
enum { GROUP_UNDECIDED, GROUP_DEVICE, GROUP_HOST, GROUP_ON_DEVICE, GROUP_ON_HOST, GROUP_DONE };

static const uint8_t on_place[] = {[MOE_PASS_DEVICE] = GROUP_ON_DEVICE, [MOE_PASS_HOST] = GROUP_ON_HOST};

/* What device and host have to do for these groups before anything else of them. */
static moe_cold_queues queues(const moe_groups *g, const moe_cold_costs *costs) {
    moe_cold_queues q = {.link_ns = moe_residency_link_ns(g->residency),
                         .one_processor = moe_residency_shares_processor(g->residency)};
    for (int32_t i = 0; i < g->count; i++) {
        int state = g->states[i];
        if (state == GROUP_DEVICE || state == GROUP_ON_DEVICE) q.device_ns += moe_cold_compute_ns(&costs->device, 1, g->groups[i].count);
        if (state == GROUP_HOST || state == GROUP_ON_HOST) q.host_ns += moe_cold_compute_ns(&costs->host, 1, g->groups[i].count);
    }
    if (q.one_processor) q.device_ns += q.host_ns;
    return q;
}

/* In place of its image the group needs its slot. */
static void need_slot(const moe_groups *g, int32_t i) {
    moe_residency_need(g->residency, g->layer, g->experts[i]);
    moe_residency_unneed_image(g->residency, g->layer, g->experts[i]);
}

static void decide_for(moe_groups *g, int32_t i, bool host) {
    g->num_undecided -= g->states[i] == GROUP_UNDECIDED;
    g->states[i] = host ? GROUP_HOST : GROUP_DEVICE;
    if (host) {
        moe_residency_forgo(g->residency, g->layer, g->experts[i]); /* the link has the next layers' to copy */
        return;
    }
    need_slot(g, i);
    g->wants_copies = true;
}

void moe_groups_decide(moe_groups *g) {
    moe_residency *r = g->residency;
    int32_t count = 0;
    if (g->num_undecided == 0) return;
    bool fixed = moe_residency_cold(r) == MOE_COLD_HOST;
    for (int32_t i = 0; i < g->count && count < g->num_undecided; i++) {
        if (g->states[i] != GROUP_UNDECIDED || !moe_residency_has_image(r, g->layer, g->experts[i])) continue;
        g->cold[count++] = (moe_cold_group){.left_bytes = moe_residency_left_bytes(r, g->layer, g->experts[i]),
                                            .rows = g->groups[i].count,
                                            .rank = moe_residency_rank(r, g->layer, g->experts[i]),
                                            .index = i,
                                            .host = fixed};
    }
    if (count == 0) return;
    moe_cold_costs *costs = moe_residency_costs(r);
    if (!fixed) moe_cold_split(costs, queues(g, costs), g->cold, count);
    bool host = false;
    for (int32_t i = 0; i < count; i++) {
        host = host || g->cold[i].host;
        decide_for(g, g->cold[i].index, g->cold[i].host);
    }
    if (!host && !moe_residency_shares_processor(r)) moe_cold_host_unused(costs);
}

void moe_groups_begin(moe_groups *g) {
    moe_residency *r = g->residency;
    g->num_left = g->count;
    g->num_undecided = 0;
    for (int32_t i = 0; i < g->count; i++) {
        bool open = g->cold && r && !moe_residency_has(r, g->layer, g->experts[i]);
        g->states[i] = open ? GROUP_UNDECIDED : GROUP_DEVICE;
        g->num_undecided += open;
        if (r) (open ? moe_residency_need_image : moe_residency_need)(r, g->layer, g->experts[i]);
    }
}

static moe_expert *take_for_device(moe_groups *g, int32_t i) {
    moe_residency *r = g->residency;
    if (g->states[i] > GROUP_HOST) return NULL;
    if (!r) return g->groups[i].expert;
    moe_expert *expert = moe_residency_acquire(r, g->layer, g->experts[i]);
    if (expert && g->states[i] != GROUP_DEVICE) decide_for(g, i, false);
    return expert;
}

static moe_expert *take_for_host(const moe_groups *g, int32_t i) {
    if (g->states[i] != GROUP_HOST) return NULL;
    return moe_residency_acquire_image(g->residency, g->layer, g->experts[i], g->groups[i].count);
}

moe_expert *moe_groups_take(moe_groups *g, int32_t i, moe_pass_place place) {
    moe_expert *expert = place == MOE_PASS_HOST ? take_for_host(g, i) : take_for_device(g, i);
    if (!expert) return NULL;
    g->states[i] = on_place[place];
    g->num_left--;
    return expert;
}

int32_t moe_groups_host_rows(const moe_groups *g) {
    int32_t rows = 0;
    for (int32_t i = 0; i < g->count; i++)
        if (g->states[i] == GROUP_UNDECIDED || g->states[i] == GROUP_HOST || g->states[i] == GROUP_ON_HOST) rows += g->groups[i].count;
    return rows;
}

void moe_groups_copy_all(moe_groups *g) {
    for (int32_t i = 0; i < g->count; i++)
        if (g->states[i] == GROUP_UNDECIDED || g->states[i] == GROUP_HOST) decide_for(g, i, false);
    g->cold = NULL;
}

int32_t moe_groups_ready(const moe_groups *g) {
    int32_t ready = 0;
    if (!g->residency) return g->num_left;
    for (int32_t i = 0; i < g->count && ready < g->num_left; i++)
        ready += g->states[i] <= GROUP_HOST && moe_residency_has(g->residency, g->layer, g->experts[i]);
    return ready;
}

bool moe_groups_taken(const moe_groups *g, int32_t i, moe_pass_place place) { return g->states[i] == on_place[place]; }

void moe_groups_let_go(moe_groups *g, int32_t i) {
    moe_residency *r = g->residency;
    int32_t expert = g->experts[i], state = g->states[i];
    g->states[i] = GROUP_DONE;
    if (!r || state == GROUP_DONE) return;
    if (state == GROUP_ON_DEVICE) moe_residency_release(r, g->layer, expert);
    if (state == GROUP_ON_HOST) moe_residency_release_image(r, g->layer, expert);
    if (state == GROUP_DEVICE || state == GROUP_ON_DEVICE)
        moe_residency_unneed(r, g->layer, expert);
    else
        moe_residency_unneed_image(r, g->layer, expert);
}
