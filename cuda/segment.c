/* The base layers between two dispatches, as launches on the micro-batch's stream. */
#include <math.h>

#include "cuda/rows.h"

#define ADVICE "lower --max-num-batched-tokens"

typedef struct stage {
    moe_cuda *cuda;
    const moe_base *base;
    const moe_model_config *config;
    const moe_segment *segment;
    moe_rows *rows;
    moe_dtype dtype;
    cudaStream_t stream;
    moe_cuda_job *slot;
    bool direct, direct_outputs; /* the activations' or logits' memory is pinned; that of the outputs to combine */
    const int32_t *logit_rows;   /* device */
    size_t out_used;             /* of rows->out */
    moe_status status;
    moe_error *err;
} stage;

static void did(stage *s, cudaError_t code, const char *what) {
    if (s->status == MOE_OK) s->status = moe_cuda_check(code, what, s->err);
}

static void mark(stage *s, moe_cuda_mark mark) { did(s, moe_cuda_job_mark(s->slot, mark, s->stream), "recording an event"); }

/* ---- inputs ---- */

static int32_t last_layer(const stage *s) {
    const moe_model_config *c = s->config;
    return s->segment->index == c->num_moe_layers ? c->num_layers - 1 : c->moe_layers[s->segment->index];
}

static bool has_logits(const stage *s) { return s->segment->index == s->config->num_moe_layers; }

static bool has_next(const stage *s) {
    return s->segment->want_next != MOE_ROUTE_NONE && s->segment->index + 1 < s->config->num_moe_layers;
}

static size_t route_bytes(const stage *s) { return (size_t)s->segment->num_rows * (size_t)s->config->top_k * 4; }

/* The rows of a sequence stand together, ascending: whether `row` is its last. */
static bool ends_sequence(const moe_segment *g, int32_t row) {
    return row + 1 == g->num_rows || g->sequences[row + 1] != g->sequences[row];
}

/* KV blocks that the sequences' rows read or write. */
static size_t count_blocks(const stage *s) {
    const moe_segment *g = s->segment;
    size_t blocks = 0;
    for (int32_t row = 0; row < g->num_rows; row++) {
        MOE_ASSERT(g->sequences[row] >= 0 && g->sequences[row] < g->num_views && g->positions[row] >= 0);
        MOE_ASSERT(g->positions[row] / MOE_KV_BLOCK_TOKENS < g->views[g->sequences[row]].num_blocks);
        MOE_ASSERT(g->token_ids[row] >= 0 && g->token_ids[row] < s->config->vocab);
        if (ends_sequence(g, row)) blocks += (size_t)(g->positions[row] / MOE_KV_BLOCK_TOKENS + 1);
    }
    return blocks;
}

static void reserve(stage *s, moe_cuda_buffer *buffer, size_t bytes) {
    if (s->status == MOE_OK)
        s->status = moe_cuda_buffer_reserve(&s->cuda->device, buffer, bytes, "staging for a micro-batch", ADVICE, s->err);
}

static size_t out_bytes(const stage *s) {
    const moe_segment *g = s->segment;
    size_t rows = (size_t)g->num_rows, logit_rows = (size_t)g->num_logit_rows;
    size_t activations = rows * (size_t)s->config->hidden * moe_dtype_bytes(s->dtype);
    if (!has_logits(s)) return 4 * moe_cuda_parcel_bytes(route_bytes(s)) + (s->direct ? 0 : moe_cuda_parcel_bytes(activations));
    size_t logits = g->logits && !s->direct ? logit_rows * (size_t)s->config->vocab * sizeof(float) : 0;
    return 2 * moe_cuda_parcel_bytes(logit_rows * (size_t)g->num_top * 4) + moe_cuda_parcel_bytes(logits);
}

/* All buffers of the segment grow before anything is enqueued that uses them. */
static void reserve_all(stage *s, moe_cuda_parcel *step, moe_cuda_parcel *brought) {
    const moe_segment *g = s->segment;
    moe_rows *r = s->rows;
    size_t rows = (size_t)g->num_rows, combined = 0;
    const void *direct = has_logits(s) ? (const void *)g->logits : g->activations;
    s->direct = direct && moe_cuda_is_pinned(direct);
    if (g->index == 0) {
        step->capacity = 3 * moe_cuda_parcel_bytes(rows * sizeof(int32_t)) + moe_cuda_parcel_bytes(2 * sizeof(int32_t)) +
                         moe_cuda_parcel_bytes((size_t)g->num_views * sizeof(int32_t)) +
                         moe_cuda_parcel_bytes(count_blocks(s) * sizeof(int32_t));
    } else {
        combined = moe_cuda_parcel_bytes(rows * (size_t)s->config->top_k * sizeof(float)) + moe_cuda_parcel_bytes(rows * 4);
        s->direct_outputs = moe_cuda_is_pinned(g->combine.outputs);
        if (!s->direct_outputs)
            reserve(s, &r->outputs_in, rows * (size_t)(s->config->top_k * s->config->hidden) * moe_dtype_bytes(g->combine.dtype));
    }
    brought->capacity = combined + moe_cuda_parcel_bytes(has_logits(s) ? (size_t)g->num_logit_rows * sizeof(int32_t) : 0);
    reserve(s, &r->step_in, step->capacity);
    reserve(s, &r->step_device, step->capacity);
    reserve(s, &r->segment_in, brought->capacity);
    reserve(s, &r->segment_device, brought->capacity);
    reserve(s, &r->out, out_bytes(s));
    step->pinned = r->step_in.memory;
    step->device = r->step_device.memory;
    brought->pinned = r->segment_in.memory;
    brought->device = r->segment_device.memory;
}

static void fill_tables(const moe_segment *g, int32_t num_blocks, int32_t *first, int32_t *tables) {
    int32_t used = 0;
    for (int32_t row = 0; row < g->num_rows; row++) {
        const moe_kv_view *view = &g->views[g->sequences[row]];
        if (!ends_sequence(g, row)) continue;
        first[g->sequences[row]] = used;
        for (int32_t b = 0; b <= g->positions[row] / MOE_KV_BLOCK_TOKENS; b++) {
            MOE_ASSERT(view->blocks[b] >= 0 && view->blocks[b] < num_blocks);
            tables[used++] = view->blocks[b];
        }
    }
}

/* What the whole step needs to know of its rows, and the hidden state to begin with. */
static void begin_step(stage *s, moe_cuda_parcel *parcel) {
    const moe_segment *g = s->segment;
    const int32_t whole[2] = {0, g->num_rows};
    moe_simple_places *places = &s->rows->places;
    size_t rows_bytes = (size_t)g->num_rows * sizeof(int32_t);
    void *first, *tables;
    const int32_t *ids = moe_cuda_parcel_put(parcel, g->token_ids, rows_bytes);
    places->positions = moe_cuda_parcel_put(parcel, g->positions, rows_bytes);
    places->sequences = moe_cuda_parcel_put(parcel, g->sequences, rows_bytes);
    s->rows->whole = moe_cuda_parcel_put(parcel, whole, sizeof whole);
    places->table_first = moe_cuda_parcel_take(parcel, (size_t)g->num_views * sizeof(int32_t), &first);
    places->tables = moe_cuda_parcel_take(parcel, parcel->capacity - parcel->used, &tables);
    fill_tables(g, g->kv->num_blocks, first, tables);
    did(s, moe_cuda_parcel_send(parcel, s->stream), "copying a step's inputs to the GPU");
    mark(s, MOE_CUDA_BEGIN);
    did(s, moe_simple_embed(&s->base->embed, ids, g->num_rows, s->rows->hidden, s->stream), "embedding");
    did(s,
        moe_simple_rotary_angles(places->positions, s->base->inverse_frequency, g->num_rows, s->config->head_dim / 2,
                                 s->rows->cosine, s->rows->sine, s->stream),
        "rotary angles");
}

/* The slots that are used of each row, from the caller's memory or through staging. */
static void bring_outputs(stage *s, int32_t slots) {
    const moe_combine *in = &s->segment->combine;
    size_t slot_bytes = (size_t)s->config->hidden * moe_dtype_bytes(in->dtype), pitch = (size_t)s->config->top_k * slot_bytes;
    size_t used = (size_t)slots * slot_bytes, rows = (size_t)s->segment->num_rows;
    const void *from = in->outputs;
    if (slots == 0) return;
    if (!s->direct_outputs) {
        uint8_t *staging = s->rows->outputs_in.memory;
        for (size_t row = 0; row < rows; row++) memcpy(staging + row * pitch, (const uint8_t *)from + row * pitch, used);
        from = staging;
    }
    if (used == pitch)
        did(s, cudaMemcpyAsync(s->rows->outputs, from, rows * pitch, cudaMemcpyHostToDevice, s->stream),
            "copying expert outputs");
    else
        did(s, cudaMemcpy2DAsync(s->rows->outputs, pitch, from, pitch, used, rows, cudaMemcpyHostToDevice, s->stream),
            "copying expert outputs");
}

/* ---- layers ---- */

static void norm(stage *s, const float *weight, const int32_t *row_index, int32_t count) {
    moe_simple_norm_args args = {.x = s->rows->hidden, .weight = weight, .row_index = row_index, .y = s->rows->normed};
    args.y_dtype = s->dtype;
    args.x_stride = args.y_stride = args.width = s->config->hidden;
    args.count = count;
    args.group = 1;
    args.eps = s->config->rms_eps;
    did(s, moe_simple_rms_norm(&args, s->stream), "RMSNorm");
}

static void linear(stage *s, const moe_cuda_matrix *w, const float *bias, const void *x, float *y, int32_t rows,
                   bool accumulate) {
    moe_simple_linear_args args = {.w = *w, .bias = bias, .x = x, .x_dtype = s->dtype, .y = y};
    args.rows = rows;
    args.accumulate = accumulate;
    did(s, moe_simple_linear(&args, s->stream), "linear");
}

/* In place on the `heads` heads of each row from `x` on. */
static void qk_norm(stage *s, float *x, const float *weight, int32_t heads) {
    const moe_model_config *c = s->config;
    int32_t norms = c->qk_norm == MOE_QK_NORM_HEAD ? heads : 1;
    if (!weight) return;
    moe_simple_norm_args args = {.x = x, .weight = weight, .y = x, .y_dtype = MOE_F32};
    args.x_stride = args.y_stride = (int64_t)(c->num_heads + 2 * c->num_kv_heads) * c->head_dim;
    args.count = s->segment->num_rows * norms;
    args.width = heads * c->head_dim / norms;
    args.group = norms;
    args.eps = c->rms_eps;
    did(s, moe_simple_rms_norm(&args, s->stream), "RMSNorm of queries and keys");
}

static void attention(stage *s, const moe_cuda_layer *layer, int32_t index) {
    const moe_model_config *c = s->config;
    moe_rows *r = s->rows;
    int32_t rows = s->segment->num_rows;
    moe_cuda_kv_layer kv = moe_cuda_kv_layer_of(s->segment->kv, index);
    norm(s, layer->input_norm, NULL, rows);
    linear(s, &layer->qkv, layer->qkv_bias, r->normed, r->qkv, rows, false);
    qk_norm(s, r->qkv, layer->q_norm, c->num_heads);
    qk_norm(s, r->qkv + (int64_t)c->num_heads * c->head_dim, layer->k_norm, c->num_kv_heads);
    moe_simple_project_args project = {.qkv = r->qkv, .cosine = r->cosine, .sine = r->sine, .kv = kv, .places = r->places};
    project.q = r->q;
    project.rows = rows;
    project.heads = c->num_heads;
    project.clip = c->clip_qkv;
    did(s, moe_simple_project(&project, s->stream), "rotary and KV store");
    moe_simple_attention_args attend = {.q = r->q, .y = r->attention, .kv = kv, .places = r->places, .rows = rows};
    attend.heads = c->num_heads;
    attend.window = c->sliding_window;
    attend.scale = 1.0f / sqrtf((float)c->head_dim);
    did(s, moe_simple_attention(&attend, s->stream), "attention");
    linear(s, &layer->o, layer->o_bias, r->attention, r->hidden, rows, true);
}

/* delta = FFN(normed) */
static void feed_forward(stage *s, const moe_cuda_base_network *n) {
    const void *const *tables = n->tables;
    moe_cuda_groups group = {.device = &s->cuda->expert_device,
                             .tune = &s->cuda->tune,
                             .shape = &n->network.shape,
                             .dtype = s->dtype,
                             .block_hi = MOE_FFN_BLOCKS,
                             .num_groups = 1,
                             .num_assignments = s->segment->num_rows,
                             .expert_first = s->rows->whole,
                             .sorted_rows = s->rows->identity,
                             .gate_up = tables,
                             .down = tables + 1,
                             .maps = tables + 2,
                             .x = s->rows->normed,
                             .inner = s->rows->inner,
                             .y = s->rows->delta};
    did(s, moe_cuda_groups_run(&group, s->stream), "dense FFN");
}

/* hidden += what the experts and the shared expert of the layer before gave; `normed` still holds what they were given. */
static void combine(stage *s, const moe_cuda_layer *layer, moe_simple_combine_args args) {
    const moe_combine *in = &s->segment->combine;
    size_t rows = (size_t)s->segment->num_rows;
    int32_t slots = 0;
    for (size_t row = 0; row < rows; row++) {
        MOE_ASSERT(in->counts[row] >= 0 && in->counts[row] <= s->config->top_k);
        slots = in->counts[row] > slots ? in->counts[row] : slots;
    }
    args.outputs = s->rows->outputs;
    args.dtype = in->dtype;
    args.hidden = s->rows->hidden;
    args.rows = s->segment->num_rows;
    args.top_k = s->config->top_k;
    args.width = s->config->hidden;
    bring_outputs(s, slots);
    mark(s, MOE_CUDA_BEGIN);
    if (layer->shared.tables) {
        feed_forward(s, &layer->shared);
        args.shared = s->rows->delta;
    }
    if (layer->shared_gate.data) {
        linear(s, &layer->shared_gate, NULL, s->rows->normed, s->rows->shared_logits, args.rows, false);
        args.shared_logits = s->rows->shared_logits;
    }
    did(s, moe_simple_combine(&args, s->stream), "combine");
    mark(s, MOE_CUDA_COMBINED);
}

static void dense(stage *s, const moe_cuda_base_network *network) {
    moe_simple_combine_args add = {.dtype = MOE_F32, .shared = s->rows->delta, .hidden = s->rows->hidden};
    add.rows = s->segment->num_rows;
    add.width = s->config->hidden;
    feed_forward(s, network);
    did(s, moe_simple_combine(&add, s->stream), "residual");
}

/* ---- outputs ---- */

/* A result on its way to the caller: straight where his memory is pinned, else through staging. Small arrays always take the
 * staging. */
static void give(stage *s, void *to, const void *from, size_t bytes, bool direct) {
    void *at = to;
    if (!direct) {
        at = (uint8_t *)s->rows->out.memory + s->out_used;
        s->out_used += moe_cuda_parcel_bytes(bytes);
        moe_cuda_job_deliver(s->slot, to, at, bytes);
    }
    did(s, cudaMemcpyAsync(at, from, bytes, cudaMemcpyDeviceToHost, s->stream), "copying a segment's results from the GPU");
}

static void route(stage *s, const moe_cuda_matrix *gate, void *at) {
    const moe_model_config *c = s->config;
    int32_t rows = s->segment->num_rows;
    MOE_ASSERT(gate->data);
    linear(s, gate, NULL, s->rows->normed, s->rows->router, rows, false);
    did(s,
        moe_simple_gate_topk(s->rows->router, rows, c->num_experts, c->top_k, c->norm_topk, at,
                             (float *)at + (int64_t)rows * c->top_k, s->stream),
        "gate");
}

static void give_route(stage *s, const void *at, const moe_route *to) {
    give(s, to->experts, at, route_bytes(s), false);
    give(s, to->weights, (const uint8_t *)at + route_bytes(s), route_bytes(s), false);
}

static void give_to_experts(stage *s, const moe_cuda_layer *layer) {
    const moe_segment *g = s->segment;
    const moe_model_config *c = s->config;
    size_t bytes = (size_t)g->num_rows * (size_t)c->hidden * moe_dtype_bytes(s->dtype);
    if (g->want_gate) route(s, &layer->gate, s->rows->routes[0]);
    if (has_next(s))
        route(s, g->want_next == MOE_ROUTE_PRE_GATE ? &layer->pre_gate : &s->base->layers[c->moe_layers[g->index + 1]].gate,
              s->rows->routes[1]);
    mark(s, MOE_CUDA_END);
    if (g->want_gate) give_route(s, s->rows->routes[0], &g->route);
    give(s, g->activations, s->rows->normed, bytes, s->direct);
    if (has_next(s)) give_route(s, s->rows->routes[1], &g->next);
}

/* Rows of logits a few at a time, so that their memory does not grow with the micro-batch. */
static void logits(stage *s) {
    const moe_segment *g = s->segment;
    size_t vocab = (size_t)s->config->vocab, count = (size_t)g->num_logit_rows, top = (size_t)g->num_top;
    uint8_t *to = s->direct ? (uint8_t *)g->logits : (uint8_t *)s->rows->out.memory;
    mark(s, MOE_CUDA_LAYERS);
    for (int32_t first = 0, rows; first < g->num_logit_rows; first += rows) {
        rows = g->num_logit_rows - first < s->rows->logits_rows ? g->num_logit_rows - first : s->rows->logits_rows;
        size_t at = (size_t)first * vocab * sizeof(float), bytes = (size_t)rows * vocab * sizeof(float);
        norm(s, s->base->final_norm, s->logit_rows + first, rows);
        linear(s, &s->base->lm_head, NULL, s->rows->normed, s->rows->logits, rows, false);
        if (top)
            did(s,
                moe_simple_logits_top(s->rows->logits, rows, s->config->vocab, g->num_top, s->rows->top_ids + (size_t)first * top,
                                      s->rows->top_logits + (size_t)first * top, s->stream),
                "top logits");
        if (g->logits)
            did(s, cudaMemcpyAsync(to + at, s->rows->logits, bytes, cudaMemcpyDeviceToHost, s->stream),
                "copying logits from the GPU");
    }
    mark(s, MOE_CUDA_END);
    if (g->logits && !s->direct) {
        moe_cuda_job_deliver(s->slot, g->logits, to, count * vocab * sizeof(float));
        s->out_used += moe_cuda_parcel_bytes(count * vocab * sizeof(float));
    }
    if (top && count) give(s, g->top_ids, s->rows->top_ids, count * top * sizeof(int32_t), false);
    if (top && count) give(s, g->top_logits, s->rows->top_logits, count * top * sizeof(float), false);
}

/* ---- the segment ---- */

/* What this segment alone brings: how to combine, and the rows that get logits. */
static moe_simple_combine_args bring_segment(stage *s, moe_cuda_parcel *parcel) {
    const moe_segment *g = s->segment;
    moe_simple_combine_args args = {0};
    if (g->index > 0) {
        args.weights = moe_cuda_parcel_put(parcel, g->combine.weights, route_bytes(s));
        args.counts = moe_cuda_parcel_put(parcel, g->combine.counts, (size_t)g->num_rows * sizeof(int32_t));
    }
    for (int32_t i = 0; has_logits(s) && i < g->num_logit_rows; i++)
        MOE_ASSERT(g->logit_rows[i] >= 0 && g->logit_rows[i] < g->num_rows);
    if (has_logits(s) && g->num_logit_rows > 0)
        s->logit_rows = moe_cuda_parcel_put(parcel, g->logit_rows, (size_t)g->num_logit_rows * sizeof(int32_t));
    if (parcel->used > 0) did(s, moe_cuda_parcel_send(parcel, s->stream), "copying a segment's inputs to the GPU");
    return args;
}

static void run(stage *s) {
    const moe_model_config *c = s->config;
    int32_t index = s->segment->index, previous = index == 0 ? -1 : c->moe_layers[index - 1];
    moe_cuda_parcel step = {0}, brought = {0};
    reserve_all(s, &step, &brought);
    if (s->status != MOE_OK) return;
    moe_simple_combine_args combining = bring_segment(s, &brought);
    if (index == 0)
        begin_step(s, &step);
    else
        combine(s, &s->base->layers[previous], combining);
    for (int32_t i = previous + 1; i <= last_layer(s) && s->status == MOE_OK; i++) {
        const moe_cuda_layer *layer = &s->base->layers[i];
        attention(s, layer, i);
        norm(s, layer->post_norm, NULL, s->segment->num_rows);
        if (c->layer_is_moe[i])
            give_to_experts(s, layer);
        else
            dense(s, &layer->dense);
    }
    if (has_logits(s)) logits(s);
    mark(s, MOE_CUDA_DONE);
}

void moe_cuda_segment_submit(moe_cuda *cuda, const moe_base *base, const moe_segment *segment, moe_job *job) {
    moe_error err = {0};
    stage s = {
        .cuda = cuda, .base = base, .config = &base->model->config, .segment = segment, .rows = segment->rows, .err = &err};
    MOE_ASSERT(segment->index >= 0 && segment->index <= s.config->num_moe_layers && segment->num_top <= MOE_MAX_TOP_LOGITS);
    MOE_ASSERT(segment->num_rows > 0 && segment->num_rows <= segment->rows->max_rows);
    s.dtype = cuda->public.dtype;
    s.stream = segment->rows->stream;
    pthread_mutex_lock(&cuda->jobs.lock);
    moe_status status = moe_cuda_job_begin(&cuda->jobs, job, &s.slot, &err);
    if (status == MOE_OK) {
        run(&s);
        status = s.status;
        if (status == MOE_OK)
            moe_cuda_job_submit(&cuda->jobs, s.slot);
        else
            moe_cuda_job_abandon(&cuda->jobs, s.slot, &err);
    }
    pthread_mutex_unlock(&cuda->jobs.lock);
    if (status != MOE_OK) moe_cuda_job_refuse(job, &err);
}
