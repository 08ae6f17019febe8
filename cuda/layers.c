#include "cuda/layers.h"

#include <math.h>

#include "cuda/groups.h"

#define ADVICE "lower --max-num-batched-tokens"

void moe_cuda_pass_did(moe_cuda_pass *p, cudaError_t code, const char *what) {
    if (p->status == MOE_OK) p->status = moe_cuda_check(code, what, p->err);
}

void moe_cuda_pass_mark(moe_cuda_pass *p, moe_cuda_mark mark) {
    moe_cuda_pass_did(p, moe_cuda_job_mark(p->slot, mark, p->queue.stream), "recording an event");
}

/* ---- inputs of a step ---- */

static bool reserve(moe_cuda_pass *p, moe_cuda_buffer *buffer, size_t bytes) {
    const void *before = buffer->memory;
    if (p->status == MOE_OK)
        p->status = moe_cuda_buffer_reserve(&p->cuda->device, buffer, bytes, "staging for a micro-batch", ADVICE, p->err);
    return before != buffer->memory;
}

void moe_cuda_pass_reserve_out(moe_cuda_pass *p, size_t bytes) { reserve(p, &p->rows->out, bytes); }

void moe_cuda_pass_begin_step(moe_cuda_pass *p) {
    moe_rows *r = p->rows;
    const moe_model_config *c = p->config;
    moe_cuda_attention_shape attention = {c->num_heads, c->num_kv_heads, c->head_dim, c->sliding_window};
    moe_cuda_step_shape shape = {.attention = attention, .padded = r->fast, .num_sms = p->cuda->device.num_sms};
    size_t ints;
    shape.tiles_only = p->cuda->deterministic && r->fast;
    moe_cuda_step_plan(p->segment, c->vocab, &shape, &r->step, &ints);
    size_t partial = (size_t)r->step.num_pieces * (size_t)c->num_heads * (size_t)(c->head_dim + 4) * sizeof(float);
    reserve(p, &r->step_in, ints * sizeof(int32_t));
    bool moved = reserve(p, &r->step_device, ints * sizeof(int32_t));
    if (r->fast) moved |= reserve(p, &r->partial, partial);
    if (moved) moe_cuda_graphs_clear(&r->graphs);
    if (p->status != MOE_OK) return;
    moe_cuda_step_fill(p->segment, &shape, r->identity, r->step_in.memory, r->step_device.memory, &r->step);
    moe_cuda_pass_did(p, moe_cuda_bring(r->step_device.memory, r->step_in.memory, ints * sizeof(int32_t), p->queue.stream),
                      "copying a step's inputs to the GPU");
}

void moe_cuda_pass_run(moe_cuda_pass *p, const void *local, int32_t segment, uint32_t flags,
                       moe_status (*record)(void *ctx, moe_error *err), void *ctx) {
    const moe_cuda_step *step = &p->rows->step;
    moe_cuda_graph_key key = {.keys = p->segment->kv->keys, .local = local, .segment = segment, .rows = step->launch_rows};
    if (p->status != MOE_OK) return;
    key.kv_blocks = p->segment->kv->num_blocks;
    key.flags = flags << 2 | (step->num_pieces > 0 ? 1u : 0) | (step->num_tiles > 0 ? 2u : 0);
    if (p->rows->fast && step->num_rows <= MOE_CUDA_GRAPH_ROWS)
        p->status = moe_cuda_graphs_run(&p->rows->graphs, &key, p->queue.stream, record, ctx, p->err);
    else
        p->status = record(ctx, p->err);
}

/* ---- ops ---- */

void moe_cuda_pass_embed(moe_cuda_pass *p) {
    const moe_rows *r = p->rows;
    int32_t half = p->config->head_dim / 2;
    if (r->fast) {
        moe_cuda_embed args = {.rows = r->step.rows, .table = p->base->embed.data, .table_dtype = p->base->embed.dtype};
        args.inverse_frequency = p->base->inverse_frequency;
        args.hidden = r->hidden;
        args.cosine = r->cosine;
        args.sine = r->sine;
        args.max_rows = r->step.launch_rows;
        args.width = p->config->hidden;
        args.half_dim = half;
        moe_cuda_queue first = p->queue;
        first.overlap = false; /* the inputs' copy is no kernel that this one could wait for */
        moe_cuda_pass_did(p, moe_cuda_embed_rows(&first, &args), "embedding");
        return;
    }
    moe_cuda_pass_did(p, moe_simple_embed(&p->base->embed, r->step.rows.token_ids, r->step.num_rows, r->hidden, p->queue.stream),
                      "embedding");
    moe_cuda_pass_did(p,
                      moe_simple_rotary_angles(r->step.rows.positions, p->base->inverse_frequency, r->step.num_rows, half,
                                               r->cosine, r->sine, p->queue.stream),
                      "rotary angles");
}

static void simple_norm(moe_cuda_pass *p, const float *weight, const int32_t *row_index, int32_t count) {
    moe_simple_norm_args args = {.x = p->rows->hidden, .weight = weight, .row_index = row_index, .y = p->rows->normed};
    args.y_dtype = p->cuda->public.dtype;
    args.x_stride = args.y_stride = args.width = p->config->hidden;
    args.count = count;
    args.group = 1;
    args.eps = p->config->rms_eps;
    moe_cuda_pass_did(p, moe_simple_rms_norm(&args, p->queue.stream), "RMSNorm");
}

static void simple_add(moe_cuda_pass *p) {
    const moe_cuda_combine_norm *a = &p->pending;
    moe_simple_combine_args args = {.outputs = a->outputs, .dtype = a->outputs_dtype, .weights = a->weights, .counts = a->counts};
    if (!a->outputs && !a->shared) return;
    args.shared = a->shared;
    args.shared_logits = a->shared_logit;
    args.hidden = p->rows->hidden;
    args.rows = p->rows->step.num_rows;
    args.top_k = a->top_k;
    args.width = p->config->hidden;
    moe_cuda_pass_did(p, moe_simple_combine(&args, p->queue.stream), "combine");
}

void moe_cuda_pass_norm(moe_cuda_pass *p, const float *weight) {
    moe_cuda_combine_norm args = p->pending;
    bool adds = args.outputs || args.shared || args.bias;
    if (p->rows->fast && (adds || weight)) {
        args.num_rows = p->rows->step.rows.num_rows;
        args.max_rows = p->rows->step.launch_rows;
        args.width = p->config->hidden;
        args.hidden = p->rows->hidden;
        args.norm = weight;
        args.eps = p->config->rms_eps;
        args.normed = p->rows->normed;
        moe_cuda_pass_did(p, moe_cuda_combine_norm_rows(&p->queue, &args), "combine and RMSNorm");
    } else if (!p->rows->fast) {
        simple_add(p);
        if (weight) simple_norm(p, weight, NULL, p->rows->step.num_rows);
    }
    p->pending = (moe_cuda_combine_norm){0};
}

static void simple_linear(moe_cuda_pass *p, const moe_cuda_matrix *w, const float *bias, const void *x, float *y, int32_t rows,
                          bool accumulate) {
    moe_simple_linear_args args = {.w = *w, .bias = bias, .x = x, .x_dtype = p->cuda->public.dtype, .y = y};
    args.rows = rows;
    args.accumulate = accumulate;
    moe_cuda_pass_did(p, moe_simple_linear(&args, p->queue.stream), "linear");
}

static void fast_linear(moe_cuda_pass *p, const moe_cuda_matrix *w, const void *x, void *y, moe_cuda_out out, int32_t rows) {
    moe_cuda_product product = {.w = w->data, .x = x, .y = y, .out = out, .rows = rows, .n = w->n, .k = w->k};
    moe_cuda_pass_did(p, moe_cuda_linear_run(p->rows->linear, &p->queue, &product), "linear");
}

/* y [rows, w.n] f32 = normed · w^T */
static void linear_of_normed(moe_cuda_pass *p, const moe_cuda_matrix *w, float *y, int32_t rows) {
    if (p->rows->fast)
        fast_linear(p, w, p->rows->normed, y, MOE_CUDA_OUT_F32, rows);
    else
        simple_linear(p, w, NULL, p->rows->normed, y, rows, false);
}

/* In place on the `heads` heads of each row from `x` on. */
static void simple_qk_norm(moe_cuda_pass *p, float *x, const float *weight, int32_t heads) {
    const moe_model_config *c = p->config;
    int32_t norms = c->qk_norm == MOE_QK_NORM_HEAD ? heads : 1;
    if (!weight) return;
    moe_simple_norm_args args = {.x = x, .weight = weight, .y = x, .y_dtype = MOE_F32};
    args.x_stride = args.y_stride = (int64_t)(c->num_heads + 2 * c->num_kv_heads) * c->head_dim;
    args.count = p->rows->step.num_rows * norms;
    args.width = heads * c->head_dim / norms;
    args.group = norms;
    args.eps = c->rms_eps;
    moe_cuda_pass_did(p, moe_simple_rms_norm(&args, p->queue.stream), "RMSNorm of queries and keys");
}

static void simple_attention(moe_cuda_pass *p, const moe_cuda_layer *layer, moe_cuda_kv_layer kv) {
    const moe_model_config *c = p->config;
    moe_rows *r = p->rows;
    int32_t rows = r->step.num_rows;
    simple_linear(p, &layer->qkv, layer->qkv_bias, r->normed, r->qkv, rows, false);
    simple_qk_norm(p, r->qkv, layer->q_norm, c->num_heads);
    simple_qk_norm(p, r->qkv + (int64_t)c->num_heads * c->head_dim, layer->k_norm, c->num_kv_heads);
    moe_simple_project_args project = {.qkv = r->qkv, .cosine = r->cosine, .sine = r->sine, .kv = kv, .places = r->step.places};
    project.q = r->q;
    project.rows = rows;
    project.heads = c->num_heads;
    project.clip = c->clip_qkv;
    moe_cuda_pass_did(p, moe_simple_project(&project, p->queue.stream), "rotary and KV store");
    moe_simple_attention_args attend = {.q = r->q, .y = r->attention, .kv = kv, .places = r->step.places, .rows = rows};
    attend.heads = c->num_heads;
    attend.window = c->sliding_window;
    attend.scale = 1.0f / sqrtf((float)c->head_dim);
    moe_cuda_pass_did(p, moe_simple_attention(&attend, p->queue.stream), "attention");
    simple_linear(p, &layer->o, layer->o_bias, r->attention, r->hidden, rows, true);
}

static void fast_attention(moe_cuda_pass *p, const moe_cuda_layer *layer, moe_cuda_kv_layer kv) {
    const moe_model_config *c = p->config;
    const moe_cuda_step *step = &p->rows->step;
    moe_rows *r = p->rows;
    moe_cuda_attention_shape shape = {c->num_heads, c->num_kv_heads, c->head_dim, c->sliding_window};
    moe_cuda_project project = {.rows = step->rows, .shape = shape, .kv = {kv.keys, kv.values}, .qkv = r->qkv, .eps = c->rms_eps};
    moe_cuda_attention attend = {.rows = step->rows, .shape = shape, .kv = {kv.keys, kv.values}, .q = r->qkv, .y = r->attention};
    fast_linear(p, &layer->qkv, r->normed, r->qkv, MOE_CUDA_OUT_BF16, step->launch_rows);
    project.bias = layer->qkv_bias;
    project.q_norm = layer->q_norm;
    project.k_norm = layer->k_norm;
    project.full_norm = c->qk_norm == MOE_QK_NORM_FULL;
    project.clip = c->clip_qkv;
    project.cosine = r->cosine;
    project.sine = r->sine;
    project.max_rows = step->launch_rows;
    moe_cuda_pass_did(p, moe_cuda_project_rows(&p->queue, &project), "rotary and KV store");
    attend.q_stride = (int64_t)(c->num_heads + 2 * c->num_kv_heads) * c->head_dim;
    attend.pieces = step->pieces;
    attend.num_pieces = step->num_pieces_at;
    attend.partial = r->partial.memory;
    attend.arrivals = r->arrivals;
    attend.tiles = step->tiles;
    attend.num_tiles = step->num_tiles_at;
    /* a graph serves steps with other numbers of pieces and tiles: blocks take what there is */
    bool captured = step->num_rows <= MOE_CUDA_GRAPH_ROWS;
    attend.max_pieces = captured ? INT32_MAX : step->num_pieces;
    attend.max_tiles = captured ? step->launch_rows : step->num_tiles;
    if (step->num_pieces > 0) moe_cuda_pass_did(p, moe_cuda_attention_decode(&p->queue, &attend), "attention");
    if (step->num_tiles > 0) moe_cuda_pass_did(p, moe_cuda_attention_prefill(&p->queue, &attend), "attention");
    fast_linear(p, &layer->o, r->attention, r->hidden, MOE_CUDA_OUT_F32_ADD, step->launch_rows);
    p->pending.bias = layer->o_bias;
}

void moe_cuda_pass_attention(moe_cuda_pass *p, int32_t index) {
    moe_cuda_kv_layer kv = moe_cuda_kv_layer_of(p->segment->kv, index);
    if (p->rows->fast)
        fast_attention(p, &p->base->layers[index], kv);
    else
        simple_attention(p, &p->base->layers[index], kv);
}

void moe_cuda_pass_network(moe_cuda_pass *p, const moe_cuda_base_network *n) {
    const void *const *tables = n->tables;
    moe_cuda_groups group = {.device = &p->cuda->expert_device,
                             .tune = &p->cuda->tune,
                             .shape = &n->network.shape,
                             .dtype = p->cuda->public.dtype,
                             .block_hi = MOE_FFN_BLOCKS,
                             .num_groups = 1,
                             .num_assignments = p->rows->step.launch_rows,
                             .expert_first = p->rows->step.whole,
                             .sorted_rows = p->rows->identity,
                             .gate_up = tables,
                             .down = tables + 1,
                             .maps = tables + 2,
                             .x = p->rows->normed,
                             .inner = p->rows->inner,
                             .y = p->rows->delta};
    moe_cuda_pass_did(p, moe_cuda_groups_run(&group, p->queue.stream), "dense FFN");
    p->pending.shared = p->rows->delta;
}

void moe_cuda_pass_shared(moe_cuda_pass *p, const moe_cuda_layer *layer) {
    if (layer->shared.tables) moe_cuda_pass_network(p, &layer->shared);
    if (!layer->shared_gate.data) return;
    linear_of_normed(p, &layer->shared_gate, p->rows->shared_logits, p->rows->step.launch_rows);
    p->pending.shared_logit = p->rows->shared_logits;
}

bool moe_cuda_pass_route(moe_cuda_pass *p, const moe_cuda_matrix *gate, int which, const moe_cuda_route_few *sorted) {
    const moe_model_config *c = p->config;
    const moe_rows *r = p->rows;
    MOE_ASSERT(gate->data);
    linear_of_normed(p, gate, r->router[which], r->step.launch_rows);
    moe_cuda_gate args = {.num_rows = r->step.rows.num_rows, .max_rows = r->step.launch_rows, .num_experts = c->num_experts};
    args.top_k = c->top_k;
    args.norm_topk = c->norm_topk;
    args.logits = r->router[which];
    args.experts = r->routes[which].experts;
    args.weights = r->routes[which].weights;
    if (sorted && moe_cuda_route_few_takes(&args)) {
        moe_cuda_route_few both = *sorted;
        both.gate = args;
        moe_cuda_pass_did(p, moe_cuda_route_few_rows(&p->queue, &both), "gate");
        return true;
    }
    moe_cuda_pass_did(p, moe_cuda_gate_topk(&p->queue, &args), "gate");
    return false;
}

/* ---- results ---- */

static void copy_out(moe_cuda_pass *p, void *to, const void *from, size_t bytes) {
    moe_cuda_pass_did(p, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, p->queue.stream), "copying results from the GPU");
}

const void *moe_cuda_pass_keep(moe_cuda_pass *p, const void *from, size_t bytes) {
    void *at = (uint8_t *)p->rows->out.memory + p->out_used;
    p->out_used += moe_cuda_parcel_bytes(bytes);
    copy_out(p, at, from, bytes);
    return at;
}

void moe_cuda_pass_give(moe_cuda_pass *p, void *to, const void *from, size_t bytes, bool direct) {
    if (bytes == 0) return;
    if (direct)
        copy_out(p, to, from, bytes);
    else
        moe_cuda_job_deliver(p->slot, to, moe_cuda_pass_keep(p, from, bytes), bytes);
}

size_t moe_cuda_pass_logits_bytes(const moe_cuda_pass *p) {
    const moe_segment *g = p->segment;
    size_t rows = (size_t)g->num_logit_rows,
           logits = g->logits && !p->direct ? rows * (size_t)p->config->vocab * sizeof(float) : 0;
    return 2 * moe_cuda_parcel_bytes(rows * (size_t)g->num_top * 4) + moe_cuda_parcel_bytes(logits);
}

static void final_norm(moe_cuda_pass *p, const int32_t *rows, int32_t count) {
    moe_cuda_combine_norm args = {.max_rows = count, .width = p->config->hidden, .hidden = p->rows->hidden, .row_of = rows};
    if (!p->rows->fast) {
        simple_norm(p, p->base->final_norm, rows, count);
        return;
    }
    args.norm = p->base->final_norm;
    args.eps = p->config->rms_eps;
    args.normed = p->rows->normed;
    moe_cuda_pass_did(p, moe_cuda_combine_norm_rows(&p->queue, &args), "RMSNorm");
}

static void top_logits(moe_cuda_pass *p, int32_t rows, int32_t first) {
    const moe_rows *r = p->rows;
    int32_t num_top = p->segment->num_top;
    moe_cuda_logits_top args = {.logits = r->logits, .rows = rows, .vocab = p->config->vocab, .num_top = num_top};
    args.ids = r->top_ids + (size_t)first * (size_t)num_top;
    args.values = r->top_logits + (size_t)first * (size_t)num_top;
    args.scratch = r->top_scratch;
    moe_cuda_pass_did(p, moe_cuda_logits_top_rows(&p->queue, &args), "top logits");
}

/* Rows of logits a few at a time, so that their memory does not grow with the micro-batch. */
void moe_cuda_pass_logits(moe_cuda_pass *p, const int32_t *logit_rows) {
    const moe_segment *g = p->segment;
    moe_rows *r = p->rows;
    size_t vocab = (size_t)p->config->vocab, count = (size_t)g->num_logit_rows, top = (size_t)g->num_top;
    uint8_t *to = p->direct ? (uint8_t *)g->logits : (uint8_t *)r->out.memory + p->out_used;
    moe_cuda_pass_mark(p, MOE_CUDA_LAYERS);
    for (int32_t first = 0, rows; first < g->num_logit_rows; first += rows) {
        rows = g->num_logit_rows - first < r->logits_rows ? g->num_logit_rows - first : r->logits_rows;
        size_t at = (size_t)first * vocab * sizeof(float), bytes = (size_t)rows * vocab * sizeof(float);
        final_norm(p, logit_rows + first, rows);
        linear_of_normed(p, &p->base->lm_head, r->logits, rows);
        if (top) top_logits(p, rows, first);
        if (g->logits)
            moe_cuda_pass_did(p, cudaMemcpyAsync(to + at, r->logits, bytes, cudaMemcpyDeviceToHost, p->queue.stream),
                              "copying logits from the GPU");
    }
    moe_cuda_pass_mark(p, MOE_CUDA_END);
    if (g->logits && !p->direct && count) {
        moe_cuda_job_deliver(p->slot, g->logits, to, count * vocab * sizeof(float));
        p->out_used += moe_cuda_parcel_bytes(count * vocab * sizeof(float));
    }
    moe_cuda_pass_give(p, g->top_ids, r->top_ids, count * top * sizeof(int32_t), false);
    moe_cuda_pass_give(p, g->top_logits, r->top_logits, count * top * sizeof(float), false);
}
