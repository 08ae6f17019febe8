#include "cli/trace_replay.h"

#include <math.h>
#include <string.h>

#include "common/alloc.h"
#include "expert-worker/eviction.h"
#include "expert-worker/residency.h"

#define EMPTY (-1)

typedef struct stream { /* one request under way */
    int32_t text, token;
} stream;

typedef struct replay {
    const moe_trace *trace;
    const moe_replay_config *config;
    moe_eviction *eviction;
    moe_replay_result *out;
    int32_t *expert_in; /* [slots]: number of the expert (layer · experts + expert), or EMPTY */
    int32_t *slot_of;   /* [layers · experts], or EMPTY */
    bool *fresh;        /* [layers · experts]: copied and not used since */
    bool *wanted;       /* [experts] of the layer under way: not computed yet */
    int32_t *list;      /* [experts] scratch */
    stream *streams;    /* [requests] */
    int32_t num_streams, next_text, used_slots;
    int32_t layer;         /* under way */
    int64_t step, batches; /* batches: time, as in the worker */
} replay;

int32_t moe_replay_slots(const moe_trace *t, double part) {
    int32_t all = t->num_layers * t->num_experts, slots = (int32_t)lround(part * all),
            least = t->top_k + MOE_RESIDENCY_SPARE_SLOTS;
    if (slots < least) slots = least;
    return slots < all ? slots : all;
}

static int32_t number(const replay *r, int32_t layer, int32_t expert) { return layer * r->trace->num_experts + expert; }

/* What this layer still needs stays. */
static bool may_go(void *ctx, int32_t slot) {
    const replay *r = ctx;
    int32_t held = r->expert_in[slot];
    bool needed = held >= number(r, r->layer, 0) && held < number(r, r->layer + 1, 0) && r->wanted[held - number(r, r->layer, 0)];
    return !needed;
}

/* A slot for an expert; -1: none may be had. */
static int32_t make_room(replay *r, bool foretold_alone) {
    if (r->used_slots < r->out->slots) return r->used_slots++;
    int32_t slot = moe_eviction_victim(r->eviction, r->expert_in, r->out->slots, may_go, r);
    if (slot < 0 || (foretold_alone && moe_eviction_announced(r->eviction, r->expert_in[slot]))) return -1;
    r->out->wasted_copies += r->fresh[r->expert_in[slot]];
    r->slot_of[r->expert_in[slot]] = EMPTY;
    return slot;
}

static bool copy_in(replay *r, int32_t held, bool foretold_alone) {
    int32_t slot = make_room(r, foretold_alone);
    if (slot < 0) return false;
    r->expert_in[slot] = held;
    r->slot_of[held] = slot;
    r->fresh[held] = true;
    r->out->copies++;
    moe_eviction_loaded(r->eviction, held, r->batches);
    return true;
}

/* The distinct experts of `plane` that the step's tokens want at `layer`, ascending, in r->list. */
static int32_t collect(replay *r, moe_trace_plane plane, int32_t layer, bool *seen) {
    const moe_trace *t = r->trace;
    int32_t count = 0;
    memset(seen, 0, (size_t)t->num_experts * sizeof *seen);
    for (int32_t i = 0; i < r->num_streams; i++) {
        const uint16_t *experts = moe_trace_at(t, r->streams[i].text, plane, r->streams[i].token, layer);
        for (int32_t j = 0; j < t->top_k; j++) seen[experts[j]] = true;
    }
    for (int32_t x = 0; x < t->num_experts; x++)
        if (seen[x]) r->list[count++] = x;
    return count;
}

static void use(replay *r, int32_t expert) {
    int32_t held = number(r, r->layer, expert);
    moe_eviction_used(r->eviction, held, r->batches);
    r->fresh[held] = false;
    r->wanted[expert] = false;
}

/* Those that are there are computed first: a layer may want more experts than there are slots. */
static void run_layer(replay *r, moe_trace_plane plane, int32_t layer) {
    r->layer = layer;
    int32_t count = collect(r, plane, layer, r->wanted), misses = 0;
    moe_eviction_ran(r->eviction, (uint64_t)r->step, number(r, layer, 0), r->trace->num_experts, r->batches);
    r->out->uses += count;
    for (int32_t i = 0; i < count; i++) {
        if (r->slot_of[number(r, layer, r->list[i])] == EMPTY) {
            r->list[misses++] = r->list[i];
            continue;
        }
        r->out->hits++;
        use(r, r->list[i]);
    }
    for (int32_t i = 0; i < misses; i++) {
        MOE_ASSERT(copy_in(r, number(r, layer, r->list[i]), false));
        use(r, r->list[i]);
    }
    r->batches++;
}

/* While `layer` computes: its own experts stay. */
static void foretell(replay *r, moe_trace_plane decides, moe_trace_plane foretells, int32_t layer, bool *seen) {
    collect(r, decides, layer, r->wanted);
    int32_t count = collect(r, foretells, layer + 1, seen);
    for (int32_t i = 0; i < count; i++)
        moe_eviction_hinted(r->eviction, number(r, layer + 1, r->list[i]), (uint64_t)r->step,
                            r->batches + MOE_EVICTION_HINT_BATCHES);
    for (int32_t i = 0; i < count; i++) {
        int32_t held = number(r, layer + 1, r->list[i]);
        if (r->slot_of[held] == EMPTY && !copy_in(r, held, true)) return;
    }
}

static bool next_text(replay *r, stream *s) {
    while (r->next_text < r->trace->num_texts && r->trace->texts[r->next_text].num_tokens == 0) r->next_text++;
    if (r->next_text == r->trace->num_texts) return false;
    *s = (stream){.text = r->next_text++};
    return true;
}

/* Ends that were reached make room for new texts. */
static void advance(replay *r) {
    int32_t kept = 0;
    for (int32_t i = 0; i < r->num_streams; i++) {
        stream s = r->streams[i];
        if (++s.token < r->trace->texts[s.text].num_tokens || next_text(r, &s)) r->streams[kept++] = s;
    }
    r->num_streams = kept;
}

static void run(replay *r, bool *seen) {
    moe_gating gating = r->config->gating;
    moe_trace_plane decides = gating == MOE_GATING_PRE_GATE ? MOE_TRACE_PRE_GATE : MOE_TRACE_GATE,
                    foretells = gating == MOE_GATING_PRE_GATE ? MOE_TRACE_PRE_GATE : MOE_TRACE_HINT;
    while (r->num_streams < r->config->requests && next_text(r, &r->streams[r->num_streams])) r->num_streams++;
    for (; r->num_streams > 0; r->step++) {
        r->out->tokens += r->num_streams;
        for (int32_t layer = 0; layer < r->trace->num_layers; layer++) {
            run_layer(r, decides, layer);
            if (gating != MOE_GATING_GATE && layer + 1 < r->trace->num_layers) foretell(r, decides, foretells, layer, seen);
        }
        advance(r);
    }
}

moe_status moe_replay(const moe_trace *t, const moe_replay_config *c, moe_replay_result *out, moe_error *err) {
    MOE_ASSERT(c->requests > 0);
    if (c->gating == MOE_GATING_PRE_GATE && t->num_planes <= MOE_TRACE_PRE_GATE)
        return moe_fail(err, MOE_FAILED_PRECONDITION, "the trace was recorded without pre-gates");
    int32_t all = t->num_layers * t->num_experts;
    replay r = {.trace = t, .config = c, .out = out};
    *out = (moe_replay_result){.slots = moe_replay_slots(t, c->part)};
    moe_eviction_config eviction = {
        .policy = c->policy, .num_experts = all, .num_layers = t->num_layers, .half_life = MOE_EVICTION_HALF_LIFE_BATCHES};
    moe_status status = moe_eviction_new(&eviction, &r.eviction, err);
    if (status != MOE_OK) return status;
    bool *seen = moe_calloc((size_t)t->num_experts, sizeof *seen);
    r.expert_in = moe_calloc((size_t)out->slots, sizeof *r.expert_in);
    r.slot_of = moe_calloc((size_t)all, sizeof *r.slot_of);
    r.fresh = moe_calloc((size_t)all, sizeof *r.fresh);
    r.wanted = moe_calloc((size_t)t->num_experts, sizeof *r.wanted);
    r.list = moe_calloc((size_t)t->num_experts, sizeof *r.list);
    r.streams = moe_calloc((size_t)c->requests, sizeof *r.streams);
    for (int32_t i = 0; r.slot_of && i < all; i++) r.slot_of[i] = EMPTY;
    if (seen && r.expert_in && r.slot_of && r.fresh && r.wanted && r.list && r.streams)
        run(&r, seen);
    else
        status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a replay");
    void *const owned[] = {seen, r.expert_in, r.slot_of, r.fresh, r.wanted, r.list, r.streams};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) moe_free(owned[i]);
    moe_eviction_free(&r.eviction);
    return status;
}
