#include "tests/support/polled_backend.h"

#include <math.h>
#include <string.h>

static moe_polled_backend *polled_of(moe_backend *backend) { return (moe_polled_backend *)backend; }
static moe_backend *real_of(moe_backend *backend) { return polled_of(backend)->real; }

static const char *profile(const moe_backend *backend) {
    const moe_backend *real = ((const moe_polled_backend *)backend)->real;
    return real->ops->profile(real);
}

static void *host_alloc(moe_backend *b, size_t bytes) { return real_of(b)->ops->host_alloc(real_of(b), bytes); }
static void host_free(moe_backend *b, void *memory) { real_of(b)->ops->host_free(real_of(b), memory); }

static moe_status base_load(moe_backend *b, const moe_model *model, void (*progress)(void *, double), void *ctx, moe_base **out,
                            moe_error *err) {
    return real_of(b)->ops->base_load(real_of(b), model, progress, ctx, out, err);
}

static void base_free(moe_backend *b, moe_base *base) { real_of(b)->ops->base_free(real_of(b), base); }

static moe_status kv_create(moe_backend *b, moe_base *base, int32_t num_blocks, moe_kv **out, moe_error *err) {
    return real_of(b)->ops->kv_create(real_of(b), base, num_blocks, out, err);
}

static void kv_free(moe_backend *b, moe_kv *kv) { real_of(b)->ops->kv_free(real_of(b), kv); }

static moe_status rows_create(moe_backend *b, moe_base *base, int32_t max_rows, moe_rows **out, moe_error *err) {
    return real_of(b)->ops->rows_create(real_of(b), base, max_rows, out, err);
}

static void rows_free(moe_backend *b, moe_rows *rows) { real_of(b)->ops->rows_free(real_of(b), rows); }

static moe_status expert_load(moe_backend *b, const moe_ffn_weights *weights, int32_t lo, int32_t hi, moe_expert **out,
                              moe_error *err) {
    return real_of(b)->ops->expert_load(real_of(b), weights, lo, hi, out, err);
}

static void expert_free(moe_backend *b, moe_expert *expert) { real_of(b)->ops->expert_free(real_of(b), expert); }

static moe_status local_create(moe_backend *b, moe_base *base, moe_expert *const *experts, moe_local **out, moe_error *err) {
    return real_of(b)->ops->local_create(real_of(b), base, experts, out, err);
}

static void local_free(moe_backend *b, moe_local *local) { real_of(b)->ops->local_free(real_of(b), local); }

static void add(moe_backend *b, moe_polled_job job) {
    moe_polled_backend *p = polled_of(b);
    MOE_ASSERT(p->num_jobs < MOE_POLLED_MAX_JOBS);
    if (p->num_jobs == 0) p->polls_left = p->polls_a_job;
    p->jobs[p->num_jobs++] = job;
}

static void segment_submit(moe_backend *b, moe_base *base, const moe_segment *segment, moe_job *job) {
    add(b, (moe_polled_job){.job = job, .base = base, .segment = segment});
}

static void ffn_submit(moe_backend *b, const moe_ffn_batch *batch, moe_job *job) {
    add(b, (moe_polled_job){.job = job, .batch = batch});
}

static void layer_ffn_submit(moe_backend *b, moe_base *base, const moe_layer_ffn *ffn, moe_job *job) {
    polled_of(b)->num_layers++;
    add(b, (moe_polled_job){.job = job, .base = base, .layer = ffn});
}

static void local_submit(moe_backend *b, moe_base *base, moe_local *local, const moe_local_step *step, moe_job *job) {
    polled_of(b)->num_local++;
    add(b, (moe_polled_job){.job = job, .base = base, .local = local, .step = step});
}

static moe_expert_size expert_size(const moe_backend *b, const moe_ffn_weights *weights, int32_t lo, int32_t hi) {
    const moe_backend *real = ((const moe_polled_backend *)b)->real;
    return real->ops->expert_size(real, weights, lo, hi);
}

static void expert_pack(const moe_backend *b, const moe_ffn_weights *weights, int32_t lo, int32_t hi, void *image) {
    const moe_backend *real = ((const moe_polled_backend *)b)->real;
    real->ops->expert_pack(real, weights, lo, hi, image);
}

static moe_status slots_create(moe_backend *b, const moe_ffn_weights *weights, int32_t lo, int32_t hi, int32_t count, moe_slots **out,
                               moe_error *err) {
    return real_of(b)->ops->slots_create(real_of(b), weights, lo, hi, count, out, err);
}

static void slots_free(moe_backend *b, moe_slots *slots) { real_of(b)->ops->slots_free(real_of(b), slots); }

static void slot_fill_submit(moe_backend *b, const moe_slot_fill *fill, moe_job *job) {
    add(b, (moe_polled_job){.job = job, .fill = fill});
}

static moe_status host_experts_create(moe_backend *b, const moe_ffn_weights *weights, int32_t lo, int32_t hi,
                                      const moe_image_layout *layout, int32_t count, moe_host_experts **out, moe_error *err) {
    return real_of(b)->ops->host_experts_create(real_of(b), weights, lo, hi, layout, count, out, err);
}

static void host_experts_free(moe_backend *b, moe_host_experts *experts) { real_of(b)->ops->host_experts_free(real_of(b), experts); }

typedef struct inner_job {
    moe_job job;
    bool ended;
} inner_job;

static void inner_done(moe_job *job) { ((inner_job *)job)->ended = true; }

/* What a step gives for a row with a value that is not finite. */
static void spoil(const moe_segment *s) {
    for (int32_t j = 0; j < s->num_top; j++) s->top_ids[j] = -1;
    if (s->logits) s->logits[0] = NAN;
}

/* So that the result can be spoiled before its submitter sees it. */
static void run_local(moe_polled_backend *p, const moe_polled_job *j) {
    inner_job inner = {.job = {.done = inner_done}};
    p->real->ops->local_submit(p->real, j->base, j->local, j->step, &inner.job);
    MOE_ASSERT(inner.ended);
    if (p->spoil_local > 0 && j->step->segment.num_logit_rows > 0 && --p->spoil_local == 0) spoil(&j->step->segment);
    j->job->status = inner.job.status;
    j->job->compute_ns = inner.job.compute_ns;
    j->job->done(j->job);
}

/* The real backend has no threads: it computes and calls done before it returns. */
static void run(moe_polled_backend *p, const moe_polled_job *j) {
    moe_backend *real = p->real;
    if (j->segment)
        real->ops->segment_submit(real, j->base, j->segment, j->job);
    else if (j->batch)
        real->ops->ffn_submit(real, j->batch, j->job);
    else if (j->fill)
        real->ops->slot_fill_submit(real, j->fill, j->job);
    else if (j->layer)
        real->ops->layer_ffn_submit(real, j->base, j->layer, j->job);
    else
        run_local(p, j);
}

static bool poll(moe_backend *b) {
    moe_polled_backend *p = polled_of(b);
    p->num_polls++;
    if (p->num_jobs > 0 && --p->polls_left == 0) {
        moe_polled_job first = p->jobs[0];
        memmove(p->jobs, p->jobs + 1, (size_t)--p->num_jobs * sizeof *p->jobs);
        p->polls_left = p->polls_a_job;
        p->num_ended++;
        run(p, &first);
    }
    return p->num_jobs > 0;
}

void moe_polled_init(moe_polled_backend *p, moe_backend *real, int polls_a_job) {
    *p = (moe_polled_backend){.real = real, .ops = *real->ops, .polls_a_job = polls_a_job};
    p->ops.profile = profile;
    p->ops.host_alloc = host_alloc;
    p->ops.host_free = host_free;
    p->ops.poll = poll;
    p->ops.base_load = base_load;
    p->ops.base_free = base_free;
    p->ops.kv_create = kv_create;
    p->ops.kv_free = kv_free;
    p->ops.rows_create = rows_create;
    p->ops.rows_free = rows_free;
    p->ops.segment_submit = segment_submit;
    p->ops.expert_load = expert_load;
    p->ops.expert_free = expert_free;
    p->ops.ffn_submit = ffn_submit;
    p->ops.layer_ffn_submit = layer_ffn_submit;
    p->ops.expert_size = expert_size;
    p->ops.expert_pack = expert_pack;
    p->ops.slots_create = slots_create;
    p->ops.slots_free = slots_free;
    p->ops.slot_fill_submit = slot_fill_submit;
    p->ops.host_experts_create = host_experts_create;
    p->ops.host_experts_free = host_experts_free;
    p->ops.local_create = local_create;
    p->ops.local_free = local_free;
    p->ops.local_submit = local_submit;
    p->base.ops = &p->ops;
    p->base.dtype = real->dtype;
}
