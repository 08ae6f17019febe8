/* The layouts of a new cluster: which workers get which experts at epoch 1. */
#include <jansson.h>
#include <string.h>

#include "common/alloc.h"
#include "common/random.h"
#include "router/placement/placement.h"

static void add_replica(moe_placement_entry *entry, int32_t worker) {
    entry->replicas[entry->num_replicas++] = (moe_replica){.worker = (uint16_t)worker, .state = MOE_REPLICA_READY};
}

/* Replicas are dealt round the workers in one go. Any run of consecutive cards differs by at most one between workers, so every
 * layer is balanced as well as the whole, and R ≤ W consecutive cards lie on distinct workers. */
static void layout_balanced(moe_placement *p, int32_t replicas) {
    int64_t next = 0;
    for (int32_t l = 0; l < p->num_layers; l++) {
        for (int32_t e = 0; e < p->num_experts; e++) {
            for (int32_t r = 0; r < replicas; r++) add_replica(moe_placement_at(p, l, e), (int32_t)(next++ % p->num_workers));
        }
    }
}

static void shuffle(int32_t *items, int32_t count, moe_random *random) {
    for (int32_t i = count - 1; i > 0; i--) {
        int32_t j = (int32_t)moe_random_below(random, (uint64_t)i + 1);
        int32_t held = items[i];
        items[i] = items[j];
        items[j] = held;
    }
}

/* Puts the workers that `entry` already has at the end of a fresh deck: the others are at least as many as it still needs. */
static void move_held_back(int32_t *deck, int32_t count, const moe_placement_entry *entry) {
    int32_t kept = 0, held[MOE_PLACEMENT_MAX_REPLICAS], num_held = 0;
    for (int32_t i = 0; i < count; i++) {
        if (moe_placement_has(entry, deck[i])) {
            held[num_held++] = deck[i];
        } else {
            deck[kept++] = deck[i];
        }
    }
    memcpy(deck + kept, held, (size_t)num_held * sizeof *held);
}

/* Whole decks of workers are dealt to the experts in random order, so that totals stay within one of each other. */
static moe_status layout_random(moe_placement *p, uint64_t seed, int32_t replicas, moe_error *err) {
    moe_random random = {.state = seed};
    int32_t total = p->num_layers * p->num_experts, top = p->num_workers;
    int32_t *order = moe_calloc((size_t)total, sizeof *order), *deck = moe_calloc((size_t)p->num_workers, sizeof *deck);
    for (int32_t i = 0; order && i < total; i++) order[i] = i;
    for (int32_t i = 0; deck && i < p->num_workers; i++) deck[i] = i;
    bool ok = order && deck;
    if (ok) shuffle(order, total, &random);
    for (int32_t i = 0; ok && i < total; i++) {
        moe_placement_entry *entry = &p->entries[order[i]];
        for (int32_t r = 0; r < replicas; r++) {
            if (top == p->num_workers) {
                shuffle(deck, p->num_workers, &random);
                move_held_back(deck, p->num_workers, entry);
                top = 0;
            }
            add_replica(entry, deck[top++]);
        }
    }
    moe_free(order);
    moe_free(deck);
    return ok ? MOE_OK : moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the layout");
}

static moe_status expert_from_file(moe_placement *p, const json_t *ids, int32_t layer, int32_t expert, int32_t replicas,
                                   moe_error *err) {
    moe_placement_entry *entry = moe_placement_at(p, layer, expert);
    size_t count = json_array_size(ids);
    if (count < (size_t)replicas || count > MOE_PLACEMENT_MAX_REPLICAS) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "layer %d expert %d: a list of %d to %d worker ids is needed", layer, expert,
                        replicas, MOE_PLACEMENT_MAX_REPLICAS);
    }
    for (size_t r = 0; r < count; r++) {
        const char *id = json_string_value(json_array_get(ids, r));
        int32_t worker = id ? moe_placement_find_worker(p, id) : -1;
        if (worker < 0) {
            return moe_fail(err, MOE_INVALID_ARGUMENT, "layer %d expert %d: \"%s\" is no registered worker", layer, expert,
                            id ? id : "");
        }
        if (moe_placement_has(entry, worker)) {
            return moe_fail(err, MOE_INVALID_ARGUMENT, "layer %d expert %d: worker \"%s\" stands twice", layer, expert, id);
        }
        add_replica(entry, worker);
    }
    return MOE_OK;
}

static moe_status layers_from_file(moe_placement *p, const json_t *layers, int32_t replicas, moe_error *err) {
    if (json_array_size(layers) != (size_t)p->num_layers) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "\"layers\" must be an array of %d MoE layers", p->num_layers);
    }
    for (int32_t l = 0; l < p->num_layers; l++) {
        const json_t *experts = json_array_get(layers, (size_t)l);
        if (json_array_size(experts) != (size_t)p->num_experts) {
            return moe_fail(err, MOE_INVALID_ARGUMENT, "layer %d: an array of %d experts is needed", l, p->num_experts);
        }
        for (int32_t e = 0; e < p->num_experts; e++) {
            moe_status status = expert_from_file(p, json_array_get(experts, (size_t)e), l, e, replicas, err);
            if (status) return status;
        }
    }
    return MOE_OK;
}

static moe_status layout_file(moe_placement *p, const char *file, int32_t replicas, moe_error *err) {
    json_error_t where;
    json_t *root = json_load_file(file, JSON_REJECT_DUPLICATES, &where);
    if (!root) return moe_fail(err, MOE_INVALID_ARGUMENT, "placement file %s: line %d: %s", file, where.line, where.text);
    moe_status status = layers_from_file(p, json_object_get(root, "layers"), replicas, err);
    json_decref(root);
    return status ? moe_fail_prefix(err, status, "placement file %s", file) : MOE_OK;
}

moe_status moe_placement_layout(moe_placement *p, moe_placement_kind kind, uint64_t seed, const char *file, int32_t replicas,
                                moe_error *err) {
    if (replicas < 1 || replicas > MOE_PLACEMENT_MAX_REPLICAS) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%d replicas: 1 to %d are possible", replicas, MOE_PLACEMENT_MAX_REPLICAS);
    }
    if (replicas > p->num_workers) {
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "%d replicas of every expert need %d workers, there are %d; add workers or lower --replicas", replicas,
                        replicas, p->num_workers);
    }
    for (int64_t i = 0; i < (int64_t)p->num_layers * p->num_experts; i++) p->entries[i].num_replicas = 0;
    switch (kind) {
        case MOE_PLACEMENT_BALANCED:
            layout_balanced(p, replicas);
            return MOE_OK;
        case MOE_PLACEMENT_RANDOM:
            return layout_random(p, seed, replicas, err);
        case MOE_PLACEMENT_FILE:
            return layout_file(p, file, replicas, err);
    }
    return moe_fail(err, MOE_INVALID_ARGUMENT, "unknown placement kind %d", (int)kind);
}
