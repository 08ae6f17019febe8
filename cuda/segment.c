/* The base layers between two dispatches. Copies, the combination of expert outputs and logits are launched as they come; the
 * layers are one captured graph where the kernels have the model's shape. */
#include "cuda/layers.h"

#define ADVICE "lower --max-num-batched-tokens"

typedef struct stage {
    moe_cuda_pass pass;
    bool direct_outputs; /* the memory of the outputs to combine is pinned */
} stage;

static const moe_segment *segment_of(const stage *s) { return s->pass.segment; }
static bool has_logits(const stage *s) { return segment_of(s)->index == s->pass.config->num_moe_layers; }
static int32_t first_layer(const stage *s) {
    return segment_of(s)->index == 0 ? 0 : s->pass.config->moe_layers[segment_of(s)->index - 1] + 1;
}
static int32_t last_layer(const stage *s) {
    return has_logits(s) ? s->pass.config->num_layers - 1 : s->pass.config->moe_layers[segment_of(s)->index];
}
static bool has_next(const stage *s) {
    return segment_of(s)->want_next != MOE_ROUTE_NONE && segment_of(s)->index + 1 < s->pass.config->num_moe_layers;
}
static size_t route_bytes(const stage *s) { return (size_t)segment_of(s)->num_rows * (size_t)s->pass.config->top_k * 4; }
static size_t router_bytes(const stage *s) {
    return (size_t)segment_of(s)->num_rows * (size_t)s->pass.config->num_experts * sizeof(float);
}

/* ---- inputs ---- */

static void reserve(stage *s, moe_cuda_buffer *buffer, size_t bytes) {
    moe_cuda_pass *p = &s->pass;
    if (p->status == MOE_OK)
        p->status = moe_cuda_buffer_reserve(&p->cuda->device, buffer, bytes, "staging for a micro-batch", ADVICE, p->err);
}

/* All buffers of the segment grow before anything is enqueued that uses them. */
static void reserve_all(stage *s, moe_cuda_parcel *brought) {
    const moe_segment *g = segment_of(s);
    moe_rows *r = s->pass.rows;
    size_t rows = (size_t)g->num_rows,
           activations = rows * (size_t)s->pass.config->hidden * moe_dtype_bytes(s->pass.cuda->public.dtype);
    const void *direct = has_logits(s) ? (const void *)g->logits : g->activations;
    s->pass.direct = direct && moe_cuda_is_pinned(direct);
    if (g->index > 0) {
        brought->capacity = moe_cuda_parcel_bytes(route_bytes(s)) + moe_cuda_parcel_bytes(rows * sizeof(int32_t));
        s->direct_outputs = g->combine.outputs && moe_cuda_is_pinned(g->combine.outputs);
        if (g->combine.outputs && !s->direct_outputs)
            reserve(s, &r->outputs_in,
                    rows * (size_t)(s->pass.config->top_k * s->pass.config->hidden) * moe_dtype_bytes(g->combine.dtype));
    }
    if (has_logits(s)) brought->capacity += moe_cuda_parcel_bytes((size_t)g->num_logit_rows * sizeof(int32_t));
    reserve(s, &r->segment_in, brought->capacity);
    reserve(s, &r->segment_device, brought->capacity);
    reserve(s, &r->out,
            has_logits(s)
                ? moe_cuda_pass_logits_bytes(&s->pass)
                : 4 * moe_cuda_parcel_bytes(route_bytes(s)) + 2 * moe_cuda_parcel_bytes(router_bytes(s)) +
                      (!g->activations || s->pass.direct ? 0 : moe_cuda_parcel_bytes(activations)));
    brought->pinned = r->segment_in.memory;
    brought->device = r->segment_device.memory;
}

/* What this segment alone brings: how to combine, and the rows that get logits. */
static const int32_t *bring(stage *s, moe_cuda_parcel *parcel) {
    const moe_segment *g = segment_of(s);
    const int32_t *logit_rows = NULL;
    if (g->index > 0) {
        s->pass.pending.weights = moe_cuda_parcel_put(parcel, g->combine.weights, route_bytes(s));
        s->pass.pending.counts = moe_cuda_parcel_put(parcel, g->combine.counts, (size_t)g->num_rows * sizeof(int32_t));
    }
    for (int32_t i = 0; has_logits(s) && i < g->num_logit_rows; i++)
        MOE_ASSERT(g->logit_rows[i] >= 0 && g->logit_rows[i] < g->num_rows);
    if (has_logits(s) && g->num_logit_rows > 0)
        logit_rows = moe_cuda_parcel_put(parcel, g->logit_rows, (size_t)g->num_logit_rows * sizeof(int32_t));
    if (parcel->used > 0)
        moe_cuda_pass_did(&s->pass, moe_cuda_parcel_send(parcel, s->pass.queue.stream), "copying a segment's inputs to the GPU");
    return logit_rows;
}

/* The slots that are used of each row, from the caller's memory or through staging. */
static void bring_outputs(stage *s, int32_t slots) {
    const moe_combine *in = &segment_of(s)->combine;
    size_t slot_bytes = (size_t)s->pass.config->hidden * moe_dtype_bytes(in->dtype),
           pitch = (size_t)s->pass.config->top_k * slot_bytes;
    size_t used = (size_t)slots * slot_bytes, rows = (size_t)segment_of(s)->num_rows;
    cudaStream_t stream = s->pass.queue.stream;
    const void *from = in->outputs;
    if (slots == 0) return;
    if (!s->direct_outputs) {
        uint8_t *staging = s->pass.rows->outputs_in.memory;
        for (size_t row = 0; row < rows; row++) memcpy(staging + row * pitch, (const uint8_t *)from + row * pitch, used);
        from = staging;
    }
    moe_cuda_pass_did(&s->pass, moe_cuda_bring_rows(s->pass.rows->outputs, from, pitch, used, rows, stream), "copying expert outputs");
}

/* What the experts and the shared expert of the layer before gave is pending; `normed` still holds what they were given. */
static void combine(stage *s) {
    const moe_combine *in = &segment_of(s)->combine;
    moe_cuda_pass *p = &s->pass;
    int32_t slots = 0;
    for (int32_t row = 0; row < segment_of(s)->num_rows; row++) {
        MOE_ASSERT(in->counts[row] >= 0 && in->counts[row] <= p->config->top_k);
        slots = in->counts[row] > slots ? in->counts[row] : slots;
    }
    if (in->outputs) bring_outputs(s, slots); /* else they are there */
    moe_cuda_pass_mark(p, MOE_CUDA_BEGIN);
    p->pending.outputs = p->rows->outputs;
    p->pending.outputs_dtype = in->outputs ? in->dtype : MOE_F32;
    p->pending.top_k = p->config->top_k;
    moe_cuda_pass_shared(p, &p->base->layers[first_layer(s) - 1]);
}

/* ---- layers ---- */

static const moe_cuda_matrix *next_gate(const stage *s, const moe_cuda_layer *layer) {
    const moe_segment *g = segment_of(s);
    return g->want_next == MOE_ROUTE_PRE_GATE ? &layer->pre_gate
                                              : &s->pass.base->layers[s->pass.config->moe_layers[g->index + 1]].gate;
}

/* From the first layer's normed input to the expert input and its routing, or to the hidden state after the last layer. */
static moe_status record_layers(void *ctx, moe_error *err) {
    stage *s = ctx;
    moe_cuda_pass *p = &s->pass;
    p->err = err;
    for (int32_t i = first_layer(s); i <= last_layer(s); i++) {
        const moe_cuda_layer *layer = &p->base->layers[i];
        moe_cuda_pass_attention(p, i);
        moe_cuda_pass_norm(p, layer->post_norm);
        if (p->config->layer_is_moe[i]) {
            if (segment_of(s)->want_gate) moe_cuda_pass_route(p, &layer->gate, 0, NULL);
            if (has_next(s)) moe_cuda_pass_route(p, next_gate(s, layer), 1, NULL);
            continue;
        }
        moe_cuda_pass_network(p, &layer->dense);
        moe_cuda_pass_norm(p, i < last_layer(s) ? p->base->layers[i + 1].input_norm : NULL);
    }
    return p->status;
}

/* What was routed, from `first` on, `count` routes: each comes as two rows of the copy. */
static void give_routes(stage *s, int first, int count) {
    const moe_segment *g = segment_of(s);
    const moe_rows *r = s->pass.rows;
    const moe_route *to[2] = {&g->route, &g->next};
    size_t pitch = (size_t)((uint8_t *)r->routes[0].weights - (uint8_t *)r->routes[0].experts);
    size_t kept = moe_cuda_parcel_bytes(route_bytes(s));
    uint8_t *at = (uint8_t *)r->out.memory + s->pass.out_used;
    if (count == 0) return;
    moe_cuda_pass_did(&s->pass,
                      cudaMemcpy2DAsync(at, kept, r->routes[first].experts, pitch, route_bytes(s), 2 * (size_t)count,
                                        cudaMemcpyDeviceToHost, s->pass.queue.stream),
                      "copying routes from the GPU");
    s->pass.out_used += 2 * (size_t)count * kept;
    for (int i = first; i < first + count; i++, at += 2 * kept) {
        moe_cuda_job_deliver(s->pass.slot, to[i]->experts, at, route_bytes(s));
        moe_cuda_job_deliver(s->pass.slot, to[i]->weights, at + kept, route_bytes(s));
    }
}

static void give_to_experts(stage *s) {
    const moe_segment *g = segment_of(s);
    moe_cuda_pass *p = &s->pass;
    size_t bytes = (size_t)g->num_rows * (size_t)p->config->hidden * moe_dtype_bytes(p->cuda->public.dtype);
    moe_cuda_pass_mark(p, MOE_CUDA_END);
    give_routes(s, g->want_gate ? 0 : 1, (g->want_gate ? 1 : 0) + (has_next(s) ? 1 : 0));
    if (g->want_gate && g->gate_logits) moe_cuda_pass_give(p, g->gate_logits, p->rows->router[0], router_bytes(s), false);
    if (g->activations) moe_cuda_pass_give(p, g->activations, p->rows->normed, bytes, p->direct);
    if (has_next(s) && g->next_logits) moe_cuda_pass_give(p, g->next_logits, p->rows->router[1], router_bytes(s), false);
}

/* ---- the segment ---- */

static moe_status enqueue(void *ctx, moe_cuda_job *slot, moe_error *err) {
    stage *s = ctx;
    const moe_segment *g = segment_of(s);
    moe_cuda_pass *p = &s->pass;
    moe_cuda_parcel brought = {0};
    uint32_t flags = (g->want_gate ? 1u : 0) | (has_next(s) ? (uint32_t)g->want_next << 1 : 0);
    p->slot = slot;
    p->err = err;
    reserve_all(s, &brought);
    if (g->index == 0) moe_cuda_pass_begin_step(p);
    if (p->status != MOE_OK) return p->status;
    MOE_ASSERT(g->num_rows == p->rows->step.num_rows);
    const int32_t *logit_rows = bring(s, &brought);
    if (g->index == 0) {
        moe_cuda_pass_mark(p, MOE_CUDA_BEGIN);
        moe_cuda_pass_embed(p);
    } else {
        combine(s);
    }
    bool has_layers = first_layer(s) <= last_layer(s);
    moe_cuda_pass_norm(p, has_layers ? p->base->layers[first_layer(s)].input_norm : NULL);
    if (g->index > 0) moe_cuda_pass_mark(p, MOE_CUDA_COMBINED);
    if (has_layers) moe_cuda_pass_run(p, NULL, g->index, flags, record_layers, s);
    if (has_logits(s))
        moe_cuda_pass_logits(p, logit_rows);
    else
        give_to_experts(s);
    moe_cuda_pass_mark(p, MOE_CUDA_DONE);
    return p->status;
}

void moe_cuda_segment_submit(moe_cuda *cuda, const moe_base *base, const moe_segment *segment, moe_job *job) {
    stage s = {.pass = {.cuda = cuda, .base = base, .config = &base->model->config, .segment = segment, .rows = segment->rows}};
    MOE_ASSERT(segment->index >= 0 && segment->index <= s.pass.config->num_moe_layers && segment->num_top <= MOE_MAX_TOP_LOGITS);
    MOE_ASSERT(segment->num_rows > 0 && segment->num_rows <= segment->rows->max_rows);
    s.pass.queue = moe_cuda_rows_queue(cuda, segment->rows);
    moe_cuda_jobs_submit(&cuda->jobs, job, enqueue, &s);
}
