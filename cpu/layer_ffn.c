#include "cpu/layer_ffn.h"

#include <string.h>

/* Of one job. Its assignments are the slots whose expert has a handle; slots are (row, j-th expert) pairs. */
typedef struct layer_memory {
    float *out;            /* [assignments, H]: by expert */
    int32_t *slots, *rows; /* [assignments], by expert */
    int32_t *first_of;     /* [num_experts + 1] */
    moe_ffn_group *groups; /* [num_experts] */
} layer_memory;

static size_t lay_out(const moe_model_config *c, int32_t num_assignments, void *block, layer_memory *m) {
    size_t at = 0, assignments = (size_t)num_assignments, experts = (size_t)c->num_experts;
    m->out = moe_cpu_scratch_part(block, &at, assignments, (size_t)c->hidden * sizeof(float));
    m->slots = moe_cpu_scratch_part(block, &at, assignments, sizeof(int32_t));
    m->rows = moe_cpu_scratch_part(block, &at, assignments, sizeof(int32_t));
    m->first_of = moe_cpu_scratch_part(block, &at, experts + 1, sizeof(int32_t));
    m->groups = moe_cpu_scratch_part(block, &at, experts, sizeof *m->groups);
    return at;
}

static int32_t count_assignments(const moe_model_config *c, const moe_layer_ffn *ffn) {
    int32_t count = 0;
    for (int32_t s = 0; s < ffn->num_rows * c->top_k; s++) {
        MOE_ASSERT(ffn->experts[s] >= 0 && ffn->experts[s] < c->num_experts);
        count += ffn->handles[ffn->experts[s]] != NULL;
    }
    return count;
}

/* The job's assignments by expert, within one by row, as a dispatch orders them. */
static moe_ffn_batch make_batch(const moe_model_config *c, const moe_layer_ffn *ffn, int32_t num_assignments, const layer_memory *m) {
    int32_t num_slots = ffn->num_rows * c->top_k;
    moe_ffn_batch batch = {.x = ffn->rows->normed,
                           .num_rows = ffn->num_rows,
                           .groups = m->groups,
                           .assignment_rows = m->rows,
                           .num_assignments = num_assignments,
                           .mode = MOE_COMBINE_EXACT,
                           .block_hi = MOE_FFN_BLOCKS,
                           .out = m->out};
    memset(m->first_of, 0, ((size_t)c->num_experts + 1) * sizeof *m->first_of);
    for (int32_t s = 0; s < num_slots; s++) m->first_of[ffn->experts[s] + 1] += ffn->handles[ffn->experts[s]] != NULL;
    for (int32_t e = 0; e < c->num_experts; e++) {
        int32_t first = m->first_of[e], count = m->first_of[e + 1];
        m->first_of[e + 1] += first;
        if (count > 0) m->groups[batch.num_groups++] = (moe_ffn_group){.expert = ffn->handles[e], .first = first, .count = count};
    }
    for (int32_t s = 0; s < num_slots; s++) { /* first_of is used up */
        if (!ffn->handles[ffn->experts[s]]) continue;
        int32_t at = m->first_of[ffn->experts[s]]++;
        m->slots[at] = s;
        m->rows[at] = s / c->top_k;
    }
    return batch;
}

/* Rows [count, H] to the slots that they are of. */
static void put(const moe_model_config *c, const moe_layer_ffn *ffn, const int32_t *slots, const float *from, int32_t count) {
    for (int32_t i = 0; i < count; i++) {
        MOE_ASSERT(slots[i] >= 0 && slots[i] < ffn->num_rows * c->top_k);
        memcpy(ffn->rows->outputs + (int64_t)slots[i] * c->hidden, from + (int64_t)i * c->hidden, (size_t)c->hidden * sizeof *from);
    }
}

/* The rows hold their vectors in float32, rounded to the backend's dtype where it is another: so the batch is one of float32. */
static moe_status run_experts(const moe_cpu_kernels *kernels, moe_cpu_scratch_list *list, const moe_cpu_run *run,
                              const moe_model_config *c, const moe_layer_ffn *ffn, moe_error *err) {
    int32_t count = count_assignments(c, ffn);
    layer_memory m;
    if (count == 0) return MOE_OK;
    moe_cpu_scratch *scratch = moe_cpu_scratch_take(list, lay_out(c, count, NULL, &m));
    if (!scratch) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a layer's %d expert rows", count);
    lay_out(c, count, scratch->data, &m);
    moe_ffn_batch batch = make_batch(c, ffn, count, &m);
    moe_status status = moe_cpu_ffn_batch(kernels, MOE_F32, list, run, &batch, err);
    if (status == MOE_OK) put(c, ffn, m.slots, m.out, count);
    moe_cpu_scratch_give_back(list, scratch);
    return status;
}

moe_status moe_cpu_layer_ffn(const moe_cpu_kernels *kernels, moe_cpu_scratch_list *scratch, const moe_cpu_run *run,
                             const moe_model_config *config, const moe_layer_ffn *ffn, moe_error *err) {
    MOE_ASSERT(ffn->num_rows > 0 && ffn->num_rows <= ffn->rows->max_rows);
    moe_status status = moe_cpu_rows_reserve_outputs(ffn->rows, config, err);
    if (status != MOE_OK) return status;
    put(config, ffn, ffn->given_slots, ffn->given, ffn->num_given);
    return run_experts(kernels, scratch, run, config, ffn, err);
}

int64_t moe_cpu_layer_ffn_multiply_adds(const moe_model_config *config, const moe_layer_ffn *ffn) {
    for (int32_t e = 0; e < config->num_experts; e++)
        if (ffn->handles[e]) return count_assignments(config, ffn) * moe_cpu_ffn_row_multiply_adds(&ffn->handles[e]->ffn);
    return 0;
}
