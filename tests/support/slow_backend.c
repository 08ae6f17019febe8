#include "tests/support/slow_backend.h"

#include <stdio.h>
#include <string.h>

static moe_slow_backend *slow_of(moe_backend *b) { return (moe_slow_backend *)b; }
static const moe_backend *real_of(const moe_backend *b) { return ((const moe_slow_backend *)b)->real; }

static const char *profile(const moe_backend *b) { return real_of(b)->ops->profile(real_of(b)); }

static moe_status expert_load(moe_backend *b, const moe_ffn_weights *weights, int32_t lo, int32_t hi, moe_expert **out, moe_error *err) {
    return real_of(b)->ops->expert_load(slow_of(b)->real, weights, lo, hi, out, err);
}
static void expert_free(moe_backend *b, moe_expert *expert) { real_of(b)->ops->expert_free(slow_of(b)->real, expert); }

static void run(moe_slow_backend *s, const moe_ffn_batch *batch, moe_base *base, const moe_layer_ffn *layer, moe_job *job) {
    if (batch)
        s->real->ops->ffn_submit(s->real, batch, job);
    else
        s->real->ops->layer_ffn_submit(s->real, base, layer, job);
}

static void run_or_keep(moe_slow_backend *s, const moe_ffn_batch *batch, moe_base *base, const moe_layer_ffn *layer, moe_job *job) {
    if (!s->slow_batches) {
        run(s, batch, base, layer, job);
        return;
    }
    MOE_ASSERT(s->num_batches < MOE_SLOW_MAX_BATCHES);
    s->batches[s->num_batches] = batch;
    s->layers[s->num_batches] = layer;
    s->bases[s->num_batches] = base;
    s->batch_jobs[s->num_batches++] = job;
}

static void ffn_submit(moe_backend *b, const moe_ffn_batch *batch, moe_job *job) { run_or_keep(slow_of(b), batch, NULL, NULL, job); }

static void layer_ffn_submit(moe_backend *b, moe_base *base, const moe_layer_ffn *layer, moe_job *job) {
    slow_of(b)->layers_submitted++;
    run_or_keep(slow_of(b), NULL, base, layer, job);
}

void moe_slow_end_batch(moe_slow_backend *s) {
    MOE_ASSERT(s->num_batches > 0);
    const moe_ffn_batch *batch = s->batches[0];
    const moe_layer_ffn *layer = s->layers[0];
    moe_base *base = s->bases[0];
    moe_job *job = s->batch_jobs[0];
    s->num_batches--;
    memmove(s->batches, s->batches + 1, (size_t)s->num_batches * sizeof *s->batches);
    memmove(s->layers, s->layers + 1, (size_t)s->num_batches * sizeof *s->layers);
    memmove(s->bases, s->bases + 1, (size_t)s->num_batches * sizeof *s->bases);
    memmove(s->batch_jobs, s->batch_jobs + 1, (size_t)s->num_batches * sizeof *s->batch_jobs);
    if (s->fail_next_batch) {
        s->fail_next_batch = false;
        job->status = MOE_INTERNAL;
        snprintf(job->message, sizeof job->message, "the computation failed");
        job->done(job);
        return;
    }
    run(s, batch, base, layer, job);
}

void moe_slow_hurry(moe_slow_backend *s) {
    s->at_once = true;
    s->slow_batches = false;
    while (s->num_fills) moe_slow_end(s);
    while (s->num_batches) moe_slow_end_batch(s);
}

static moe_expert_size expert_size(const moe_backend *b, const moe_ffn_weights *weights, int32_t lo, int32_t hi) {
    return real_of(b)->ops->expert_size(real_of(b), weights, lo, hi);
}
static void expert_pack(const moe_backend *b, const moe_ffn_weights *weights, int32_t lo, int32_t hi, void *image) {
    ((moe_slow_backend *)(uintptr_t)b)->packed++;
    real_of(b)->ops->expert_pack(real_of(b), weights, lo, hi, image);
}
static moe_status slots_create(moe_backend *b, const moe_ffn_weights *weights, int32_t lo, int32_t hi, int32_t count, moe_slots **out,
                               moe_error *err) {
    return real_of(b)->ops->slots_create(slow_of(b)->real, weights, lo, hi, count, out, err);
}
static void slots_free(moe_backend *b, moe_slots *slots) { real_of(b)->ops->slots_free(slow_of(b)->real, slots); }

static moe_status host_experts_create(moe_backend *b, const moe_ffn_weights *weights, int32_t lo, int32_t hi,
                                      const moe_image_layout *layout, int32_t count, moe_host_experts **out, moe_error *err) {
    return real_of(b)->ops->host_experts_create(slow_of(b)->real, weights, lo, hi, layout, count, out, err);
}
static void host_experts_free(moe_backend *b, moe_host_experts *experts) { real_of(b)->ops->host_experts_free(slow_of(b)->real, experts); }

static void slot_fill_submit(moe_backend *b, const moe_slot_fill *fill, moe_job *job) {
    moe_slow_backend *s = slow_of(b);
    MOE_ASSERT(s->num_fills < MOE_SLOW_MAX_FILLS);
    s->fills[s->num_fills] = fill;
    s->jobs[s->num_fills++] = job;
    if (s->at_once) moe_slow_end(s);
}

void moe_slow_end(moe_slow_backend *s) {
    MOE_ASSERT(s->num_fills > 0);
    const moe_slot_fill *fill = s->fills[0];
    moe_job *job = s->jobs[0];
    s->num_fills--;
    memmove(s->fills, s->fills + 1, (size_t)s->num_fills * sizeof *s->fills);
    memmove(s->jobs, s->jobs + 1, (size_t)s->num_fills * sizeof *s->jobs);
    s->fills_ended++;
    if (!s->fail_next) {
        s->real->ops->slot_fill_submit(s->real, fill, job);
        return;
    }
    s->fail_next = false;
    job->status = MOE_INTERNAL;
    snprintf(job->message, sizeof job->message, "the link is gone");
    job->done(job);
}

void moe_slow_init(moe_slow_backend *s, moe_backend *real) {
    *s = (moe_slow_backend){.real = real, .ops = *real->ops};
    s->ops.profile = profile;
    s->ops.expert_load = expert_load;
    s->ops.expert_free = expert_free;
    s->ops.ffn_submit = ffn_submit;
    s->ops.layer_ffn_submit = layer_ffn_submit;
    s->ops.expert_size = expert_size;
    s->ops.expert_pack = expert_pack;
    s->ops.slots_create = slots_create;
    s->ops.slots_free = slots_free;
    s->ops.host_experts_create = host_experts_create;
    s->ops.host_experts_free = host_experts_free;
    s->ops.slot_fill_submit = slot_fill_submit;
    s->base.ops = &s->ops;
    s->base.dtype = real->dtype;
}
