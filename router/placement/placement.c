#include "router/placement/placement.h"

#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/json.h"
#include "common/model/config.h"
#include "common/store.h"

moe_placement *moe_placement_new(int32_t num_layers, int32_t num_experts, int32_t num_workers) {
    MOE_ASSERT(num_layers >= 0 && num_experts >= 0 && num_workers >= 0);
    moe_placement *p = moe_calloc(1, sizeof *p);
    if (!p) return NULL;
    p->references = 1;
    p->num_layers = num_layers;
    p->num_experts = num_experts;
    p->num_workers = num_workers;
    p->workers = moe_calloc((size_t)num_workers, sizeof *p->workers);
    p->entries = moe_calloc((size_t)num_layers * (size_t)num_experts, sizeof *p->entries);
    if (!p->workers || !p->entries) moe_placement_unref(&p);
    return p;
}

moe_placement *moe_placement_ref(moe_placement *placement) {
    if (placement) atomic_fetch_add_explicit(&placement->references, 1, memory_order_relaxed);
    return placement;
}

void moe_placement_unref(moe_placement **placement) {
    moe_placement *p = *placement;
    *placement = NULL;
    if (!p || atomic_fetch_sub_explicit(&p->references, 1, memory_order_acq_rel) != 1) return;
    moe_free(p->workers);
    moe_free(p->entries);
    moe_free(p);
}

moe_placement *moe_placement_copy(const moe_placement *p) {
    moe_placement *copy = moe_placement_new(p->num_layers, p->num_experts, p->num_workers);
    if (!copy) return NULL;
    copy->epoch = p->epoch;
    copy->fence = p->fence;
    copy->model_digest = p->model_digest;
    memcpy(copy->workers, p->workers, (size_t)p->num_workers * sizeof *p->workers);
    memcpy(copy->entries, p->entries, (size_t)p->num_layers * (size_t)p->num_experts * sizeof *p->entries);
    return copy;
}

static int by_value(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

moe_placement_cost moe_placement_unit_cost(const moe_placement *p) {
    int64_t per_expert[MOE_PLACEMENT_MAX_WORKERS], per_row[MOE_PLACEMENT_MAX_WORKERS];
    size_t count = 0;
    for (int32_t w = 0; w < p->num_workers; w++) {
        if (p->workers[w].cost.per_row == 0) continue;
        per_expert[count] = p->workers[w].cost.per_expert;
        per_row[count++] = p->workers[w].cost.per_row;
    }
    if (count == 0) return MOE_COST_DEFAULT;
    qsort(per_expert, count, sizeof *per_expert, by_value);
    qsort(per_row, count, sizeof *per_row, by_value);
    return (moe_placement_cost){per_expert[(count - 1) / 2], per_row[(count - 1) / 2]};
}

int32_t moe_placement_find_worker(const moe_placement *p, const char *id) {
    for (int32_t i = 0; i < p->num_workers; i++) {
        if (strcmp(p->workers[i].id, id) == 0) return i;
    }
    return -1;
}

bool moe_placement_has(const moe_placement_entry *entry, int32_t worker) {
    for (int32_t r = 0; r < entry->num_replicas; r++) {
        if (entry->replicas[r].worker == worker) return true;
    }
    return false;
}

/* ---- changes ---- */

int32_t moe_placement_add_worker(moe_placement *p, const moe_placement_worker *worker) {
    if (p->num_workers == MOE_PLACEMENT_MAX_WORKERS) return -1;
    moe_placement_worker *workers = moe_realloc(p->workers, (size_t)p->num_workers + 1, sizeof *workers);
    if (!workers) return -1;
    p->workers = workers;
    p->workers[p->num_workers] = *worker;
    return p->num_workers++;
}

void moe_placement_remove_worker(moe_placement *p, int32_t worker) {
    memmove(&p->workers[worker], &p->workers[worker + 1], (size_t)(--p->num_workers - worker) * sizeof *p->workers);
    for (int64_t i = 0; i < (int64_t)p->num_layers * p->num_experts; i++) {
        moe_placement_entry *e = &p->entries[i];
        for (int32_t r = 0; r < e->num_replicas; r++) {
            MOE_ASSERT(e->replicas[r].worker != worker);
            e->replicas[r].worker -= e->replicas[r].worker > worker;
        }
    }
}

moe_replica *moe_placement_replica(moe_placement_entry *e, int32_t worker) {
    for (int32_t r = 0; r < e->num_replicas; r++)
        if (e->replicas[r].worker == worker) return &e->replicas[r];
    return NULL;
}

void moe_placement_add_replica(moe_placement_entry *e, int32_t worker, moe_replica_state state) {
    MOE_ASSERT(e->num_replicas < MOE_PLACEMENT_MAX_REPLICAS && !moe_placement_has(e, worker));
    e->replicas[e->num_replicas++] = (moe_replica){.worker = (uint16_t)worker, .state = (uint8_t)state};
}

void moe_placement_remove_replica(moe_placement_entry *e, int32_t worker) {
    moe_replica *found = moe_placement_replica(e, worker);
    if (!found) return;
    size_t behind = (size_t)(&e->replicas[e->num_replicas--] - found) - 1;
    memmove(found, found + 1, behind * sizeof *found);
}

/* ---- JSON ---- */

static json_t *worker_json(const moe_placement_worker *w) {
    return json_pack("{s:s, s:o, s:s, s:s, s:[I, I]}", "id", w->id, "incarnation", moe_json_hex(w->incarnation), "endpoint",
                     w->endpoint, "public_key", w->public_key, "cost", (json_int_t)w->cost.per_expert,
                     (json_int_t)w->cost.per_row);
}

/* [digest, worker, state, worker, state, …] */
static json_t *entry_json(const moe_placement_entry *e) {
    json_t *array = json_array();
    int failed = json_array_append_new(array, moe_json_hex(e->digest));
    for (int32_t r = 0; r < e->num_replicas; r++) {
        failed |= json_array_append_new(array, json_integer(e->replicas[r].worker));
        failed |= json_array_append_new(array, json_integer(e->replicas[r].state));
    }
    if (!failed) return array;
    json_decref(array);
    return NULL;
}

static json_t *layers_json(const moe_placement *p) {
    json_t *layers = json_array();
    int failed = 0;
    for (int32_t l = 0; l < p->num_layers; l++) {
        json_t *experts = json_array();
        for (int32_t e = 0; e < p->num_experts; e++)
            failed |= json_array_append_new(experts, entry_json(moe_placement_at(p, l, e)));
        failed |= json_array_append_new(layers, experts);
    }
    if (!failed) return layers;
    json_decref(layers);
    return NULL;
}

static json_t *workers_json(const moe_placement *p) {
    json_t *workers = json_array();
    int failed = 0;
    for (int32_t w = 0; w < p->num_workers; w++) failed |= json_array_append_new(workers, worker_json(&p->workers[w]));
    if (!failed) return workers;
    json_decref(workers);
    return NULL;
}

moe_status moe_placement_to_json(const moe_placement *p, moe_buf *out, moe_error *err) {
    moe_buf_clear(out);
    json_t *root = json_pack("{s:I, s:I, s:o, s:i, s:i, s:o, s:o}", "epoch", (json_int_t)p->epoch, "fence", (json_int_t)p->fence,
                             "model_digest", moe_json_hex(p->model_digest), "num_layers", p->num_layers, "num_experts",
                             p->num_experts, "workers", workers_json(p), "layers", layers_json(p));
    if (moe_json_write(root, out)) return MOE_OK;
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a placement map's text");
}

static bool parse_integer(const json_t *json, int64_t lo, int64_t hi, int64_t *out) {
    if (!json_is_integer(json) || json_integer_value(json) < lo || json_integer_value(json) > hi) return false;
    *out = json_integer_value(json);
    return true;
}

/* [ns per expert, ns per row]; absent in maps of older versions. */
static bool parse_cost(const json_t *json, moe_placement_cost *out) {
    if (!json) return true;
    return json_array_size(json) == 2 && parse_integer(json_array_get(json, 0), 0, MOE_COST_MAX_NS, &out->per_expert) &&
           parse_integer(json_array_get(json, 1), 0, MOE_COST_MAX_NS, &out->per_row);
}

static moe_status parse_workers(const json_t *json, moe_placement *p, moe_error *err) {
    for (int32_t i = 0; i < p->num_workers; i++) {
        const json_t *j = json_array_get(json, (size_t)i);
        moe_placement_worker *w = &p->workers[i];
        if (!moe_json_get_text(j, "id", w->id, sizeof w->id) || !w->id[0] ||
            !moe_json_get_hex(j, "incarnation", &w->incarnation) ||
            !moe_json_get_text(j, "endpoint", w->endpoint, sizeof w->endpoint) || !w->endpoint[0] ||
            !moe_json_get_text(j, "public_key", w->public_key, sizeof w->public_key) ||
            !parse_cost(json_object_get(j, "cost"), &w->cost)) {
            return moe_fail(err, MOE_INVALID_ARGUMENT, "placement map: worker %d: bad or missing field", i);
        }
        if (moe_placement_find_worker(p, w->id) != i) {
            return moe_fail(err, MOE_INVALID_ARGUMENT, "placement map: worker id %s stands twice", w->id);
        }
    }
    return MOE_OK;
}

static bool parse_entry(const json_t *json, const moe_placement *p, moe_placement_entry *e) {
    size_t size = json_array_size(json);
    if (size % 2 != 1 || size / 2 > MOE_PLACEMENT_MAX_REPLICAS || !moe_json_read_hex(json_array_get(json, 0), &e->digest))
        return false;
    for (size_t r = 0; r < size / 2; r++) {
        int64_t worker, state;
        if (!parse_integer(json_array_get(json, 1 + 2 * r), 0, p->num_workers - 1, &worker) ||
            !parse_integer(json_array_get(json, 2 + 2 * r), MOE_REPLICA_LOADING, MOE_REPLICA_DRAINING, &state) ||
            moe_placement_has(e, (int32_t)worker)) {
            return false;
        }
        e->replicas[e->num_replicas++] = (moe_replica){.worker = (uint16_t)worker, .state = (uint8_t)state};
    }
    return true;
}

static moe_status parse_layers(const json_t *json, moe_placement *p, moe_error *err) {
    for (int32_t l = 0; l < p->num_layers; l++) {
        const json_t *experts = json_array_get(json, (size_t)l);
        if (json_array_size(experts) != (size_t)p->num_experts) {
            return moe_fail(err, MOE_INVALID_ARGUMENT, "placement map: layer %d does not have %d experts", l, p->num_experts);
        }
        for (int32_t e = 0; e < p->num_experts; e++) {
            if (!parse_entry(json_array_get(experts, (size_t)e), p, moe_placement_at(p, l, e))) {
                return moe_fail(err, MOE_INVALID_ARGUMENT, "placement map: layer %d expert %d: bad entry", l, e);
            }
        }
    }
    return MOE_OK;
}

static moe_status parse_root(const json_t *root, moe_placement **out, moe_error *err) {
    int64_t epoch, fence, num_layers, num_experts;
    uint64_t model_digest;
    const json_t *workers = json_object_get(root, "workers"), *layers = json_object_get(root, "layers");
    if (!moe_json_get_count(root, "epoch", MOE_MAX_EPOCH, &epoch) || !moe_json_get_count(root, "fence", MOE_MAX_EPOCH, &fence) ||
        !moe_json_get_hex(root, "model_digest", &model_digest) ||
        !moe_json_get_count(root, "num_layers", MOE_MAX_LAYERS, &num_layers) ||
        !moe_json_get_count(root, "num_experts", MOE_MAX_EXPERTS, &num_experts) || !json_is_array(workers) ||
        json_array_size(workers) > MOE_PLACEMENT_MAX_WORKERS || json_array_size(layers) != (size_t)num_layers) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "placement map: bad or missing field");
    }
    moe_placement *p = moe_placement_new((int32_t)num_layers, (int32_t)num_experts, (int32_t)json_array_size(workers));
    if (!p) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a placement map");
    p->epoch = (uint64_t)epoch;
    p->fence = (uint64_t)fence;
    p->model_digest = model_digest;
    moe_status status = parse_workers(workers, p, err);
    if (!status) status = parse_layers(layers, p, err);
    if (status) {
        moe_placement_unref(&p);
        return status;
    }
    *out = p;
    return MOE_OK;
}

moe_status moe_placement_from_json(const char *text, size_t size, moe_placement **out, moe_error *err) {
    if (size > (size_t)MOE_STORE_MAX_VALUE_BYTES) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "placement map: %zu bytes is above the limit of %lld", size,
                        (long long)MOE_STORE_MAX_VALUE_BYTES);
    }
    json_error_t where;
    json_t *root = json_loadb(text, size, JSON_REJECT_DUPLICATES, &where);
    if (!root) return moe_fail(err, MOE_INVALID_ARGUMENT, "placement map: %s at byte %d", where.text, where.position);
    moe_status status = parse_root(root, out, err);
    json_decref(root);
    return status;
}
