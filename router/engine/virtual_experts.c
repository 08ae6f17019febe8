/* Virtual experts (--expert-budget): the engine's side of virtual_sets.h. Layers are routed among their sets, what gates would have
 * chosen is counted, and sets follow, one swap at a time:
 *   propose → Prefetch the newcomer to all its holders, again until each answers that it is on the device → swap → retire the other.
 * So no step waits for a newcomer; and one that has gone from the device again by the time it is used is an ordinary miss. */
#include <math.h>
#include <string.h>

#include "common/alloc.h"
#include "common/elements.h"
#include "common/log.h"
#include "common/metrics.h"
#include "proto/forward.h"
#include "router/engine/internal.h"
#include "router/engine/virtual_sets.h"

#define SWAP_STEPS (UINT64_C(1) << 63)   /* numbers of swaps, which Prefetch tells apart from forward steps by this bit */
#define MAX_ASKS 4096                    /* for a newcomer that does not come: another may */
#define PROPOSE_LAYERS 32                /* routed between two looks for a swap, where none was found */
#define ASK_TIMEOUT_NS (5 * MOE_NS_PER_S)
#define WEIGHT_UNITS 1e6                 /* metrics count whole numbers */

struct virtual_experts {
    moe_engine *engine;
    moe_virtual_sets *sets;
    int32_t *home; /* [num_moe_layers, num_experts] */
    uint64_t epoch, fence; /* of the map that homes are of; epoch 0: none yet */
    bool swapping;
    moe_virtual_swap swap; /* while swapping */
    uint64_t number;       /* of the swap */
    int32_t asks;          /* for its newcomer */
    int32_t waiting;       /* answers that are to come */
    bool everywhere;       /* so far each holder has said that it has the newcomer */
    int32_t idle_layers;
    _Atomic int32_t *sizes; /* [num_moe_layers], for other threads */
};

moe_status virtual_experts_new(moe_engine *e, virtual_experts **out, moe_error *err) {
    size_t layers = (size_t)e->model->num_moe_layers, all = layers * (size_t)e->model->num_experts;
    *out = NULL;
    if (!moe_expert_budget_given(e->config.expert_budget)) return MOE_OK;
    moe_status status = moe_expert_budget_check(e->config.expert_budget, e->model, err);
    if (status != MOE_OK) return status;
    virtual_experts *v = *out = moe_calloc(1, sizeof *v);
    if (!v) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    v->engine = e;
    v->home = moe_calloc(all, sizeof *v->home);
    v->sizes = moe_calloc(layers, sizeof *v->sizes);
    if (!v->home || !v->sizes)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for --expert-budget");
    return moe_virtual_sets_new(e->model, e->config.expert_budget, &v->sets, err);
}

void virtual_experts_free(virtual_experts **pointer) {
    virtual_experts *v = *pointer;
    *pointer = NULL;
    if (!v) return;
    moe_virtual_sets_free(&v->sets);
    moe_free(v->home);
    moe_free((void *)v->sizes);
    moe_free(v);
}

static void show_sizes(virtual_experts *v) {
    int64_t all = 0;
    for (int32_t layer = 0; layer < v->engine->model->num_moe_layers; layer++) {
        int32_t size = moe_virtual_sets_size(v->sets, layer);
        atomic_store(&v->sizes[layer], size);
        all += size;
    }
    moe_metric_set(MOE_METRIC_VIRTUAL_EXPERTS, all);
}

int32_t moe_engine_virtual_size(const moe_engine *e, int32_t layer) {
    return e->virtual ? atomic_load(&e->virtual->sizes[layer]) : 0;
}

/* ---- what workers are told ---- */

/* Whether it was sent: the worker is up. */
static bool tell(virtual_experts *v, int32_t placed, moe_prefetch_call call, moe_rpc_on_reply on_reply) {
    moe_engine *e = v->engine;
    moe_error err;
    if (!workers_up(e, e->map, placed)) return false;
    const engine_worker *w = &e->workers[e->map->worker[placed]];
    call.incarnation = w->incarnation;
    call.step = v->number;
    return moe_prefetch_start(e->channels[w->transport].rpc, w->peer, &call, engine_now(e) + ASK_TIMEOUT_NS, on_reply, v, &err) ==
           MOE_OK;
}

static bool holds(const moe_placement_entry *entry, int32_t placed) {
    for (int r = 0; r < entry->num_replicas; r++)
        if (entry->replicas[r].worker == placed && entry->replicas[r].state != MOE_REPLICA_LOADING) return true;
    return false;
}

/* Of the experts of a layer that the worker holds, it is to have the set's on the device, not the others. */
static void tell_set(virtual_experts *v, int32_t placed, int32_t layer) {
    const moe_placement *map = v->engine->map->placement;
    uint32_t members[MOE_MAX_EXPERTS], others[MOE_MAX_EXPERTS];
    moe_prefetch_call call = {.layer = layer, .experts = members, .retired = others};
    for (int32_t x = 0; x < map->num_experts; x++) {
        if (!holds(moe_placement_at(map, layer, x), placed)) continue;
        if (moe_virtual_sets_has(v->sets, layer, x))
            members[call.num_experts++] = (uint32_t)x;
        else
            others[call.num_retired++] = (uint32_t)x;
    }
    v->number = (v->number + 1) | SWAP_STEPS;
    if (call.num_experts + call.num_retired > 0) tell(v, placed, call, NULL);
}

/* An expert is at home at its first replica's worker. */
static void follow_map(virtual_experts *v, const moe_placement *map) {
    if (map->epoch == v->epoch && map->fence == v->fence) return;
    int64_t all = (int64_t)map->num_layers * map->num_experts;
    for (int64_t i = 0; i < all; i++) v->home[i] = map->entries[i].num_replicas ? map->entries[i].replicas[0].worker : 0;
    moe_virtual_sets_place(v->sets, v->home, map->num_workers);
    v->epoch = map->epoch;
    v->fence = map->fence;
    v->swapping = false; /* its newcomer may have other holders now */
    for (int32_t w = 0; w < map->num_workers; w++)
        for (int32_t layer = 0; layer < map->num_layers; layer++) tell_set(v, w, layer);
    show_sizes(v);
}

/* ---- swaps ---- */

static void on_resident(void *ctx, const moe_rpc_reply *reply);

/* Every worker that may be sent rows of the newcomer. */
static void ask(virtual_experts *v) {
    const uint32_t expert = (uint32_t)v->swap.comes.expert;
    const moe_prefetch_call call = {.layer = v->swap.comes.layer, .num_experts = 1, .experts = &expert};
    const moe_placement_entry *entry =
        moe_placement_at(v->engine->map->placement, v->swap.comes.layer, v->swap.comes.expert);
    v->everywhere = true;
    for (int32_t w = 0; w < v->engine->map->placement->num_workers; w++)
        if (holds(entry, w)) v->waiting += tell(v, w, call, on_resident);
    moe_metric_add(MOE_METRIC_PREFETCHES, v->waiting);
    v->swapping = v->waiting > 0 && ++v->asks <= MAX_ASKS;
}

static void look_for_swap(virtual_experts *v) {
    v->idle_layers = 0;
    if (v->swapping || v->waiting > 0 || !moe_virtual_sets_propose(v->sets, &v->swap)) return;
    v->swapping = true;
    v->number = (v->number + 1) | SWAP_STEPS;
    v->asks = 0;
    ask(v);
}

static void finish_swap(virtual_experts *v) {
    const uint32_t expert = (uint32_t)v->swap.leaves.expert;
    const moe_prefetch_call call = {.layer = v->swap.leaves.layer, .num_retired = 1, .retired = &expert};
    moe_virtual_sets_swap(v->sets, &v->swap);
    for (int32_t w = 0; w < v->engine->map->placement->num_workers; w++) tell(v, w, call, NULL);
    v->swapping = false;
    moe_metric_add(MOE_METRIC_VIRTUAL_SWAPS, 1);
    show_sizes(v);
    moe_debug("virtual experts: expert %d of MoE layer %d comes, %d of %d leaves, after %d asks", v->swap.comes.expert,
              v->swap.comes.layer, v->swap.leaves.expert, v->swap.leaves.layer, v->asks);
}

/* A holder's answer to ask(). Who cannot answer has no say; the newcomer's next call finds it or misses it. */
static void on_resident(void *ctx, const moe_rpc_reply *reply) {
    virtual_experts *v = ctx;
    const Moesaic__V1__PrefetchResponse *body = (const Moesaic__V1__PrefetchResponse *)reply->body;
    v->waiting--;
    v->everywhere = v->everywhere && reply->status == MOE_OK && body && body->n_resident == 1;
    if (v->waiting > 0 || !v->swapping) return; /* others are to answer, or the swap was given up */
    if (v->everywhere) {
        finish_swap(v);
        look_for_swap(v);
    } else if (reply->status != MOE_OK) {
        v->swapping = false;
    }
}

/* ---- routing ---- */

/* How much of what gates chose the sets held. */
static void count_held(const virtual_experts *v, int32_t layer, const moe_route *route, int32_t rows) {
    int32_t slots = rows * v->engine->model->top_k;
    int64_t held = 0;
    double weight = 0, held_weight = 0;
    for (int32_t i = 0; i < slots; i++) {
        if (!isfinite(route->weights[i])) continue;
        weight += (double)route->weights[i];
        if (!moe_virtual_sets_has(v->sets, layer, route->experts[i])) continue;
        held_weight += (double)route->weights[i];
        held++;
    }
    moe_metric_add(MOE_METRIC_GATE_CHOICES, slots);
    moe_metric_add(MOE_METRIC_GATE_CHOICES_HELD, held);
    moe_metric_add(MOE_METRIC_GATE_WEIGHT, llround(WEIGHT_UNITS * weight));
    moe_metric_add(MOE_METRIC_GATE_WEIGHT_HELD, llround(WEIGHT_UNITS * held_weight));
}

/* `decides`: the route is what the layer will use, not a prediction. */
static void restrict_route(virtual_experts *v, const micro_batch *b, int32_t layer, const float *logits, moe_route route, bool decides) {
    if (decides) {
        moe_virtual_sets_chosen(v->sets, layer, &route, b->num_rows);
        count_held(v, layer, &route, b->num_rows);
    }
    moe_virtual_sets_route(v->sets, layer, logits, b->num_rows, route);
}

void virtual_experts_settle(micro_batch *b) {
    moe_engine *e = b->engine;
    virtual_experts *v = e->virtual;
    follow_map(v, e->map->placement);
    int32_t layer = b->segment.index;
    if (b->segment.want_gate) restrict_route(v, b, layer, b->segment.gate_logits, b->segment.route, true);
    if (b->segment.want_next != MOE_ROUTE_NONE)
        restrict_route(v, b, layer + 1, b->segment.next_logits, b->segment.next, e->config.gating == MOE_GATING_PRE_GATE);
    if (v->swapping && v->waiting == 0)
        ask(v);
    else if (++v->idle_layers >= PROPOSE_LAYERS)
        look_for_swap(v);
}

/* The norm of one row of each expert tells enough. */
void virtual_experts_answered(const expert_call *call, const void *rows) {
    const moe_engine *e = call->batch->engine;
    for (int32_t i = 0; i < call->num_assignments; i++) {
        if (i > 0 && call->assignments[i].expert == call->assignments[i - 1].expert) continue;
        float value;
        double squares = 0;
        const uint8_t *row = (const uint8_t *)rows + (size_t)i * moe_row_bytes(MOE_F32, e->model->hidden);
        for (int32_t h = 0; h < e->model->hidden; h++) {
            memcpy(&value, row + (size_t)h * sizeof value, sizeof value);
            squares += (double)value * (double)value;
        }
        moe_virtual_sets_returned(e->virtual->sets, call->batch->segment.index, call->assignments[i].expert, sqrt(squares));
    }
}
