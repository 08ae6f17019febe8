#include "expert-worker/batch.h"

#include <string.h>

#include "common/alloc.h"

moe_status moe_batch_init(moe_batch *b, moe_backend *backend, int32_t num_experts, moe_error *err) {
    *b = (moe_batch){.backend = backend, .first_of = moe_calloc((size_t)num_experts + 1, sizeof *b->first_of)};
    TAILQ_INIT(&b->works);
    return b->first_of ? MOE_OK : moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a batch of %d experts", num_experts);
}

static void trim(moe_batch *b, size_t kept_bytes) {
    for (int i = 0; i < MOE_BATCH_PARTS; i++) {
        if (b->parts[i].bytes <= kept_bytes) continue;
        b->backend->ops->host_free(b->backend, b->parts[i].memory);
        b->parts[i] = (moe_batch_memory){.bytes = 0};
    }
}

void moe_batch_trim(moe_batch *b) { trim(b, MOE_BATCH_KEPT_BYTES); }

void moe_batch_free(moe_batch *b) {
    trim(b, 0);
    moe_free(b->first_of);
    *b = (moe_batch){.num_works = 0};
}

bool moe_batch_fits(const moe_batch *b, const moe_work *w, int32_t most) {
    const moe_work *first = TAILQ_FIRST(&b->works);
    if (!first) return true;
    return w->layer == first->layer && w->mode == first->mode && w->block_lo == first->block_lo &&
           w->block_hi == first->block_hi && (int64_t)b->assignments + w->assignments <= most;
}

static void count(moe_batch *b, const moe_work *w, int32_t sign) {
    b->num_works += sign;
    b->rows += sign * w->rows;
    b->assignments += sign * w->assignments;
    b->assembled = false;
}

void moe_batch_add(moe_batch *b, moe_work *w) {
    TAILQ_INSERT_TAIL(&b->works, w, link);
    count(b, w, 1);
}

void moe_batch_remove(moe_batch *b, moe_work *w) {
    TAILQ_REMOVE(&b->works, w, link);
    count(b, w, -1);
}

bool moe_batch_reserve(moe_batch *b, int part, int32_t num, size_t size) {
    moe_batch_memory *m = &b->parts[part];
    size_t bytes = (size_t)num * size; /* both are bounded by what one message can carry */
    if (bytes <= m->bytes) return true;
    b->backend->ops->host_free(b->backend, m->memory); /* first, so that never both are there */
    m->memory = b->backend->ops->host_alloc(b->backend, bytes);
    m->bytes = m->memory ? bytes : 0;
    return m->memory != NULL;
}

static bool reserve_all(moe_batch *b, const moe_shard *shard) {
    const moe_work *first = TAILQ_FIRST(&b->works);
    int32_t hidden = shard->model->config.hidden, num_experts = shard->model->config.num_experts;
    int32_t out_rows = first->mode == MOE_COMBINE_EXACT ? b->assignments : b->rows;
    bool merged = b->num_works > 1;
    return moe_batch_reserve(b, MOE_BATCH_OUT, out_rows, moe_row_bytes(moe_work_out_dtype(first, shard), hidden)) &&
           moe_batch_reserve(b, MOE_BATCH_GROUPS, num_experts, sizeof(moe_ffn_group)) &&
           moe_batch_reserve(b, MOE_BATCH_EXPERTS, num_experts, sizeof(int32_t)) &&
           moe_batch_reserve(b, MOE_BATCH_ROWS, b->assignments, sizeof(int32_t)) &&
           moe_batch_reserve(b, MOE_BATCH_WEIGHTS, b->assignments, sizeof(float)) &&
           moe_batch_reserve(b, MOE_BATCH_POSITIONS, b->assignments, sizeof(int32_t)) &&
           (!merged || moe_batch_reserve(b, MOE_BATCH_X, b->rows, moe_row_bytes(shard->backend->dtype, hidden)));
}

/* first_of[e] = assignments of experts below e. */
static void count_by_expert(moe_batch *b, int32_t num_experts) {
    const moe_work *w;
    memset(b->first_of, 0, ((size_t)num_experts + 1) * sizeof *b->first_of);
    TAILQ_FOREACH(w, &b->works, link) {
        for (int32_t a = 0; a < w->assignments; a++) b->first_of[w->expert_of[a] + 1]++;
    }
    for (int32_t e = 0; e < num_experts; e++) b->first_of[e + 1] += b->first_of[e];
}

static int32_t make_groups(moe_batch *b, const moe_shard *shard, int32_t layer) {
    moe_ffn_group *groups = b->parts[MOE_BATCH_GROUPS].memory;
    int32_t *experts = b->parts[MOE_BATCH_EXPERTS].memory, num_groups = 0;
    for (int32_t e = 0; e < shard->model->config.num_experts; e++) {
        int32_t first = b->first_of[e], end = b->first_of[e + 1];
        if (first == end) continue;
        experts[num_groups] = e;
        groups[num_groups++] =
            (moe_ffn_group){.expert = moe_shard_at(shard, layer, e)->handle, .first = first, .count = end - first};
    }
    return num_groups;
}

/* Places each assignment behind those of its expert that were placed before; first_of is used up. */
static void place_assignments(moe_batch *b) {
    int32_t *row_of = b->parts[MOE_BATCH_ROWS].memory, *position_of = b->parts[MOE_BATCH_POSITIONS].memory, row = 0, at = 0;
    float *weight_of = b->parts[MOE_BATCH_WEIGHTS].memory;
    const moe_work *w;
    TAILQ_FOREACH(w, &b->works, link) {
        for (int32_t a = 0; a < w->assignments; a++) {
            int32_t position = b->first_of[w->expert_of[a]]++;
            row_of[position] = row + w->row_of[a];
            weight_of[position] = w->weight_of ? w->weight_of[a] : 1;
            position_of[at++] = position;
        }
        row += w->rows;
    }
}

static const void *gather_rows(moe_batch *b, size_t row_bytes) {
    const moe_work *w = TAILQ_FIRST(&b->works);
    if (b->num_works == 1) return w->x;
    uint8_t *to = b->parts[MOE_BATCH_X].memory;
    TAILQ_FOREACH(w, &b->works, link) {
        memcpy(to, w->x, (size_t)w->rows * row_bytes);
        to += (size_t)w->rows * row_bytes;
    }
    return b->parts[MOE_BATCH_X].memory;
}

moe_status moe_batch_assemble(moe_batch *b, const moe_shard *shard, moe_error *err) {
    const moe_work *first = TAILQ_FIRST(&b->works);
    int32_t hidden = shard->model->config.hidden, num_experts = shard->model->config.num_experts;
    if (!reserve_all(b, shard))
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a batch of %d rows", b->assignments);
    count_by_expert(b, num_experts);
    int32_t num_groups = make_groups(b, shard, first->layer);
    place_assignments(b);
    b->ffn = (moe_ffn_batch){
        .x = gather_rows(b, moe_row_bytes(shard->backend->dtype, hidden)),
        .num_rows = b->rows,
        .groups = b->parts[MOE_BATCH_GROUPS].memory,
        .num_groups = num_groups,
        .assignment_rows = b->parts[MOE_BATCH_ROWS].memory,
        .assignment_weights = b->parts[MOE_BATCH_WEIGHTS].memory,
        .num_assignments = b->assignments,
        .mode = first->mode,
        .block_lo = first->block_lo,
        .block_hi = first->block_hi,
        .out = b->parts[MOE_BATCH_OUT].memory,
    };
    b->assembled = true;
    return MOE_OK;
}

/* Partial sums lie by row, so a call's rows follow each other; so do the assignments of a call of its own. */
static void deliver_in_place(moe_batch *b, size_t row_bytes) {
    const uint8_t *out = b->parts[MOE_BATCH_OUT].memory;
    moe_work *w;
    TAILQ_FOREACH(w, &b->works, link) {
        w->out = out;
        out += (size_t)moe_work_out_rows(w) * row_bytes;
    }
}

moe_status moe_batch_deliver(moe_batch *b, const moe_shard *shard, moe_error *err) {
    moe_work *w = TAILQ_FIRST(&b->works);
    size_t row_bytes = moe_row_bytes(moe_work_out_dtype(w, shard), shard->model->config.hidden);
    const int32_t *position_of = b->parts[MOE_BATCH_POSITIONS].memory;
    const uint8_t *out = b->parts[MOE_BATCH_OUT].memory;
    if (b->num_works == 1 || b->ffn.mode == MOE_COMBINE_PARTIAL) {
        deliver_in_place(b, row_bytes);
        return MOE_OK;
    }
    if (!moe_batch_reserve(b, MOE_BATCH_ANSWERS, b->assignments, row_bytes))
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the answers of a batch of %d rows", b->assignments);
    uint8_t *to = b->parts[MOE_BATCH_ANSWERS].memory;
    TAILQ_FOREACH(w, &b->works, link) {
        w->out = to;
        for (int32_t a = 0; a < w->assignments; a++, to += row_bytes)
            memcpy(to, out + (size_t)*position_of++ * row_bytes, row_bytes);
    }
    return MOE_OK;
}
