#include "cpu/segment.h"

#include <string.h>

#include "common/alloc.h"
#include "common/clock.h"
#include "common/elements.h"
#include "common/model/gate.h"
#include "cpu/top_logits.h"

#define TASK_OUTPUTS 128  /* of a linear task: its weights stay in the second-level cache while the task's rows pass */
#define TASK_ROWS 64      /* of a linear task */
#define TASK_SMALL_ROWS 4 /* of a task of element-wise work */
#define ATTENTION_ROWS 8  /* of one sequence in an attention task */

/* From PART_ROWS rows a thread, and up to PART_LAYER_BYTES of base weights a layer, each thread takes rows of its own through a
 * whole segment: every thread reads all weights, from the caches where they are that few, but no thread waits for another or
 * reads what another wrote. */
#define PART_ROWS 8
#define PART_LAYER_BYTES (INT64_C(1) << 20)
#define MAX_PARTS 64

typedef struct stage {
    const moe_cpu_kernels *kernels;
    moe_dtype dtype; /* of what is handed out */
    const moe_cpu_run *run;
    const moe_base *base;
    const moe_model_config *config;
    const moe_segment *segment;
    moe_rows *rows;
    const moe_cpu_layer *layer; /* the layer being computed */
    moe_cpu_kv_layer kv;        /* its keys and values */
    int32_t num_spans;
    int64_t scratch_positions, scratch_floats; /* of attention, per thread */
    void (*row_fn)(const struct stage *stage, int32_t row);
    moe_route route;      /* where route_row writes */
    float *router_logits; /* NULL: not wanted */
    int64_t combine_ns;
} stage;

/* ---- parallel loops ---- */

typedef struct linear_loop {
    const moe_cpu_kernels *kernels;
    moe_cpu_linear whole;
    int32_t output_tasks;
} linear_loop;

static void linear_task(void *ctx, int32_t index, int32_t thread) {
    const linear_loop *loop = ctx;
    moe_cpu_linear task = loop->whole;
    int32_t row = index / loop->output_tasks * TASK_ROWS;
    (void)thread;
    task.n_lo = index % loop->output_tasks * TASK_OUTPUTS;
    if (task.n_hi - task.n_lo > TASK_OUTPUTS) task.n_hi = task.n_lo + TASK_OUTPUTS;
    task.x += row * task.x_stride;
    task.y += row * task.y_stride;
    task.rows = task.rows - row < TASK_ROWS ? task.rows - row : TASK_ROWS;
    loop->kernels->linear(&task);
}

void moe_cpu_linear_run(const moe_cpu_kernels *kernels, const moe_cpu_run *run, const moe_cpu_matrix *w, const float *bias,
                        const float *x, int32_t rows, float *y) {
    const int32_t k_bounds[2] = {0, w->k};
    linear_loop loop = {.kernels = kernels, .output_tasks = (w->n + TASK_OUTPUTS - 1) / TASK_OUTPUTS};
    loop.whole = (moe_cpu_linear){.w = w,
                                  .bias = bias,
                                  .x = x,
                                  .y = y,
                                  .x_stride = w->k,
                                  .y_stride = w->n,
                                  .rows = rows,
                                  .n_hi = w->n,
                                  .k_bounds = k_bounds,
                                  .num_blocks = 1};
    int32_t row_tasks = (rows + TASK_ROWS - 1) / TASK_ROWS;
    moe_cpu_parallel_for(run->pool, loop.output_tasks * row_tasks, linear_task, &loop, run->progress);
}

static void linear(const stage *s, const moe_cpu_matrix *w, const float *bias, const float *x, float *y) {
    moe_cpu_linear_run(s->kernels, s->run, w, bias, x, s->segment->num_rows, y);
}

static void rows_task(void *ctx, int32_t index, int32_t thread) {
    const stage *s = ctx;
    (void)thread;
    for (int32_t row = index * TASK_SMALL_ROWS; row < (index + 1) * TASK_SMALL_ROWS && row < s->segment->num_rows; row++)
        s->row_fn(s, row);
}

static void for_each_row(stage *s, void (*row_fn)(const stage *s, int32_t row)) {
    s->row_fn = row_fn;
    moe_cpu_parallel_for(s->run->pool, (s->segment->num_rows + TASK_SMALL_ROWS - 1) / TASK_SMALL_ROWS, rows_task, s,
                         s->run->progress);
}

/* ---- rows ---- */

static float *row_of(float *buffer, int32_t row, int64_t width) { return buffer + row * width; }

static void embed_row(const stage *s, int32_t row) {
    int64_t hidden = s->config->hidden, half = s->config->head_dim / 2, id = s->segment->token_ids[row];
    MOE_ASSERT(id >= 0 && id < s->config->vocab);
    moe_tensor_read_f32(&s->base->model->embed, id * hidden, hidden, row_of(s->rows->hidden, row, hidden));
    moe_cpu_rotary_angles(s->base->inverse_frequency, s->config->head_dim, s->segment->positions[row],
                          row_of(s->rows->cosine, row, half), row_of(s->rows->sine, row, half));
}

static void norm_row(const stage *s, int32_t row, const float *weight) {
    int32_t hidden = s->config->hidden;
    s->kernels->rms_norm(row_of(s->rows->hidden, row, hidden), weight, s->config->rms_eps, hidden,
                         row_of(s->rows->normed, row, hidden));
}

static void input_norm_row(const stage *s, int32_t row) { norm_row(s, row, s->layer->input_norm); }
static void post_norm_row(const stage *s, int32_t row) { norm_row(s, row, s->layer->post_norm); }

/* Gates, shared and routed experts are all given the same values: those that fit the backend's dtype. */
static void expert_input_row(const stage *s, int32_t row) {
    size_t hidden = (size_t)s->config->hidden;
    float *normed = row_of(s->rows->normed, row, s->config->hidden);
    post_norm_row(s, row);
    moe_elements_round(normed, s->dtype, hidden);
    if (s->segment->activations)
        moe_elements_narrow(normed, s->dtype, hidden, moe_row_at(s->segment->activations, s->dtype, s->config->hidden, row));
}

static void add_delta_row(const stage *s, int32_t row) {
    int32_t hidden = s->config->hidden;
    s->kernels->accumulate(1.0f, row_of(s->rows->delta, row, hidden), hidden, row_of(s->rows->hidden, row, hidden));
}

static void qk_norm(const stage *s, float *x, const float *weight, int32_t heads) {
    int32_t norms = s->config->qk_norm == MOE_QK_NORM_HEAD ? heads : 1, width = heads * s->config->head_dim / norms;
    for (int32_t i = 0; i < norms; i++)
        s->kernels->rms_norm(x + (int64_t)i * width, weight, s->config->rms_eps, width, x + (int64_t)i * width);
}

/* Norms, clamp and rotation of a row's q, k, v, and its keys and values into the KV pool. */
static void project_row(const stage *s, int32_t row) {
    const moe_model_config *c = s->config;
    int32_t q_width = c->num_heads * c->head_dim, kv_width = c->num_kv_heads * c->head_dim, width = q_width + 2 * kv_width;
    float *q = row_of(s->rows->qkv, row, width), *k = q + q_width, *v = k + kv_width;
    const float *cosine = row_of(s->rows->cosine, row, c->head_dim / 2), *sine = row_of(s->rows->sine, row, c->head_dim / 2);
    if (s->layer->q_norm) qk_norm(s, q, s->layer->q_norm, c->num_heads);
    if (s->layer->k_norm) qk_norm(s, k, s->layer->k_norm, c->num_kv_heads);
    if (c->clip_qkv > 0) s->kernels->clamp(q, c->clip_qkv, width);
    s->kernels->rotate(q, cosine, sine, c->num_heads, c->head_dim);
    s->kernels->rotate(k, cosine, sine, c->num_kv_heads, c->head_dim);
    const moe_kv_view *view = &s->segment->views[s->segment->sequences[row]];
    moe_cpu_kv_store(&s->kv, view->blocks, s->segment->positions[row], k, v);
}

static void route_row(const stage *s, int32_t row) {
    const moe_model_config *c = s->config;
    const float *logits = row_of(s->rows->router, row, c->num_experts);
    size_t bytes = (size_t)c->num_experts * sizeof *logits;
    if (s->router_logits) memcpy(row_of(s->router_logits, row, c->num_experts), logits, bytes);
    moe_gate_topk(s->kernels->softmax, logits, c->num_experts, c->top_k, c->norm_topk, s->route.experts + (int64_t)row * c->top_k,
                  s->route.weights + (int64_t)row * c->top_k);
}

static void combine_row(const stage *s, int32_t row) {
    const moe_combine *in = &s->segment->combine;
    int64_t hidden = s->config->hidden, slot = (int64_t)row * s->config->top_k;
    MOE_ASSERT(in->counts[row] >= 0 && in->counts[row] <= s->config->top_k);
    const uint8_t *outputs = (const uint8_t *)in->outputs + slot * (int64_t)moe_row_bytes(in->dtype, s->config->hidden);
    moe_cpu_combine args = {.outputs = outputs, .dtype = in->dtype, .weights = in->weights + slot, .count = in->counts[row]};
    args.hidden = s->config->hidden;
    args.y = row_of(s->rows->hidden, row, hidden);
    if (moe_cpu_ffn_present(&s->layer->shared)) args.shared = row_of(s->rows->delta, row, hidden);
    args.shared_scale = s->layer->shared_gate.data ? s->kernels->sigmoid(s->rows->router[row]) : 1.0f;
    s->kernels->combine(&args);
}

/* ---- attention ---- */

/* Cuts the rows into spans of one sequence. */
static void cut_spans(stage *s) {
    const moe_segment *segment = s->segment;
    moe_rows *rows = s->rows;
    for (int32_t row = 0; row < segment->num_rows; row++) {
        int32_t sequence = segment->sequences[row];
        moe_cpu_row_span *span = s->num_spans ? &rows->spans[s->num_spans - 1] : NULL;
        bool same = span && segment->sequences[span->first] == sequence && span->count < ATTENTION_ROWS;
        if (same)
            span->count++;
        else
            rows->spans[s->num_spans++] = (moe_cpu_row_span){.first = row, .count = 1};
    }
}

/* Makes room for every thread's attention scores up to the last position. */
static moe_status reserve_scores(stage *s, moe_error *err) {
    const moe_segment *segment = s->segment;
    moe_rows *rows = s->rows;
    int32_t last_position = 0;
    for (int32_t row = 0; row < segment->num_rows; row++) {
        int32_t position = segment->positions[row], sequence = segment->sequences[row];
        MOE_ASSERT(sequence >= 0 && sequence < segment->num_views && position >= 0);
        MOE_ASSERT(position / MOE_KV_BLOCK_TOKENS < segment->views[sequence].num_blocks);
        if (position > last_position) last_position = position;
    }
    s->scratch_positions = (int64_t)(last_position / MOE_KV_BLOCK_TOKENS + 1) * MOE_KV_BLOCK_TOKENS;
    s->scratch_floats = MOE_CPU_ATTENTION_QUERIES * (s->scratch_positions + segment->kv->shape.padded_dim);
    size_t floats = (size_t)s->scratch_floats * (size_t)moe_cpu_pool_threads(s->run->pool);
    if (floats <= rows->attention_floats) return MOE_OK;
    moe_free(rows->attention_scratch);
    rows->attention_scratch = moe_alloc_aligned(floats, sizeof(float));
    rows->attention_floats = rows->attention_scratch ? floats : 0;
    if (rows->attention_scratch) return MOE_OK;
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for attention scores of %lld positions",
                    (long long)s->scratch_positions);
}

static void attention_task(void *ctx, int32_t index, int32_t thread) {
    const stage *s = ctx;
    const moe_model_config *c = s->config;
    const moe_cpu_row_span span = s->rows->spans[index / c->num_kv_heads];
    int64_t q_stride = (int64_t)(c->num_heads + 2 * c->num_kv_heads) * c->head_dim,
            y_stride = (int64_t)c->num_heads * c->head_dim;
    moe_cpu_attention args = {
        .kv = &s->kv,
        .blocks = s->segment->views[s->segment->sequences[span.first]].blocks,
        .positions = s->segment->positions + span.first,
        .q = s->rows->qkv + span.first * q_stride,
        .y = s->rows->attention + span.first * y_stride,
        .q_stride = q_stride,
        .y_stride = y_stride,
        .rows = span.count,
        .kv_head = index % c->num_kv_heads,
        .heads_per_kv = c->num_heads / c->num_kv_heads,
        .window = c->sliding_window,
        .scale = 1.0f / __builtin_sqrtf((float)c->head_dim),
        .scratch = s->rows->attention_scratch + thread * s->scratch_floats,
        .scratch_positions = s->scratch_positions,
    };
    s->kernels->attend(&args);
}

static void attention(stage *s) {
    for_each_row(s, input_norm_row);
    linear(s, &s->layer->qkv, s->layer->qkv_bias, s->rows->normed, s->rows->qkv);
    for_each_row(s, project_row);
    moe_cpu_parallel_for(s->run->pool, s->num_spans * s->config->num_kv_heads, attention_task, s, s->run->progress);
    linear(s, &s->layer->o, s->layer->o_bias, s->rows->attention, s->rows->delta);
    for_each_row(s, add_delta_row);
}

/* ---- the stages of a segment ---- */

/* delta = FFN(normed) */
static void feed_forward(const stage *s, const moe_cpu_ffn *ffn) {
    moe_cpu_ffn_part part = {.ffn = ffn,
                             .x = s->rows->normed,
                             .inner = s->rows->inner,
                             .up = s->rows->up,
                             .y = s->rows->delta,
                             .rows = s->segment->num_rows,
                             .block_hi = MOE_FFN_BLOCKS};
    moe_cpu_ffn_run(s->kernels, s->run, &part, 1);
}

/* `normed` still holds what the experts of that layer were given. */
static void combine(stage *s, int32_t layer) {
    s->layer = &s->base->layers[layer];
    if (moe_cpu_ffn_present(&s->layer->shared)) feed_forward(s, &s->layer->shared);
    if (s->layer->shared_gate.data) linear(s, &s->layer->shared_gate, NULL, s->rows->normed, s->rows->router);
    for_each_row(s, combine_row);
}

static void route(stage *s, const moe_cpu_matrix *gate, moe_route out, float *logits) {
    linear(s, gate, NULL, s->rows->normed, s->rows->router);
    s->route = out;
    s->router_logits = logits;
    for_each_row(s, route_row);
}

static void route_to_experts(stage *s) {
    const moe_segment *segment = s->segment;
    const moe_model_config *c = s->config;
    if (segment->want_gate) route(s, &s->layer->gate, segment->route, segment->gate_logits);
    if (segment->index + 1 == c->num_moe_layers) return;
    if (segment->want_next == MOE_ROUTE_PRE_GATE) {
        MOE_ASSERT(s->layer->pre_gate.data);
        route(s, &s->layer->pre_gate, segment->next, segment->next_logits);
    } else if (segment->want_next == MOE_ROUTE_NEXT_GATE) {
        route(s, &s->base->layers[c->moe_layers[segment->index + 1]].gate, segment->next, segment->next_logits);
    }
}

typedef struct top_loop {
    const moe_segment *segment;
    const float *logits; /* [num_logit_rows, vocab] */
    int32_t vocab;
} top_loop;

static void top_task(void *ctx, int32_t row, int32_t thread) {
    const top_loop *loop = ctx;
    const moe_segment *segment = loop->segment;
    int64_t at = (int64_t)row * segment->num_top;
    (void)thread;
    moe_cpu_top_logits(loop->logits + (int64_t)row * loop->vocab, loop->vocab, segment->num_top, segment->top_ids + at,
                       segment->top_logits + at);
}

/* Where logits go: to the caller, or to memory of our own where only the highest are wanted. NULL: out of memory. */
static float *logits_memory(const stage *s) {
    moe_rows *rows = s->rows;
    if (s->segment->logits) return s->segment->logits;
    size_t floats = (size_t)s->segment->num_logit_rows * (size_t)s->config->vocab;
    if (floats > rows->logits_floats) {
        moe_free(rows->logits);
        rows->logits = moe_alloc_aligned(floats, sizeof(float));
        rows->logits_floats = rows->logits ? floats : 0;
    }
    return rows->logits;
}

static moe_status logits(const stage *s, moe_error *err) {
    const moe_segment *segment = s->segment;
    int64_t hidden = s->config->hidden;
    if (segment->num_logit_rows == 0) return MOE_OK;
    float *out = logits_memory(s);
    if (!out) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for %d rows of logits", segment->num_logit_rows);
    MOE_ASSERT(segment->num_top >= 0 && segment->num_top <= MOE_MAX_TOP_LOGITS && segment->num_top <= s->config->vocab);
    for (int32_t i = 0; i < segment->num_logit_rows; i++) {
        MOE_ASSERT(segment->logit_rows[i] >= 0 && segment->logit_rows[i] < segment->num_rows);
        s->kernels->rms_norm(row_of(s->rows->hidden, segment->logit_rows[i], hidden), s->base->final_norm, s->config->rms_eps,
                             s->config->hidden, row_of(s->rows->normed, i, hidden));
    }
    moe_cpu_linear_run(s->kernels, s->run, &s->base->lm_head, NULL, s->rows->normed, segment->num_logit_rows, out);
    top_loop loop = {segment, out, s->config->vocab};
    if (segment->num_top > 0) moe_cpu_parallel_for(s->run->pool, segment->num_logit_rows, top_task, &loop, s->run->progress);
    return MOE_OK;
}

static void run_layer(stage *s, int32_t layer) {
    s->layer = &s->base->layers[layer];
    s->kv = moe_cpu_kv_layer_of(s->segment->kv, layer);
    attention(s);
    if (s->config->layer_is_moe[layer]) {
        for_each_row(s, expert_input_row);
        route_to_experts(s);
    } else {
        for_each_row(s, post_norm_row);
        feed_forward(s, &s->layer->dense);
        for_each_row(s, add_delta_row);
    }
}

/* The layers that a segment computes wholly or in part: it combines the first and ends before the experts of the last. */
typedef struct layer_range {
    int32_t first, last; /* first: -1 in segment 0 */
} layer_range;

static layer_range layers_of(const moe_model_config *c, const moe_segment *segment) {
    return (layer_range){segment->index == 0 ? -1 : c->moe_layers[segment->index - 1],
                         segment->index == c->num_moe_layers ? c->num_layers - 1 : c->moe_layers[segment->index]};
}

static void run_layers(stage *s) {
    layer_range layers = layers_of(s->config, s->segment);
    int64_t start_ns = moe_now_ns(moe_clock_real());
    cut_spans(s);
    if (layers.first < 0) {
        for_each_row(s, embed_row);
    } else {
        combine(s, layers.first);
        s->combine_ns = moe_now_ns(moe_clock_real()) - start_ns;
    }
    for (int32_t layer = layers.first + 1; layer <= layers.last; layer++) run_layer(s, layer);
}

/* ---- parts: rows of whole sequences, each computed by one thread ---- */

typedef struct part_loop {
    const stage *whole;
    int32_t starts[MAX_PARTS + 1];
    int64_t combine_ns; /* of the first part */
} part_loop;

static int64_t matrix_size(const moe_cpu_matrix *m) { return (int64_t)m->n * m->k; }

static int64_t layer_size(const moe_cpu_layer *layer) {
    return matrix_size(&layer->qkv) + matrix_size(&layer->o) + moe_cpu_ffn_row_multiply_adds(&layer->dense) +
           moe_cpu_ffn_row_multiply_adds(&layer->shared);
}

static bool layers_are_small(const stage *s) {
    layer_range layers = layers_of(s->config, s->segment);
    for (int32_t i = layers.first < 0 ? 0 : layers.first; i <= layers.last; i++) {
        const moe_cpu_layer *layer = &s->base->layers[i];
        if (layer_size(layer) * (int64_t)moe_dtype_bytes(layer->qkv.dtype) > PART_LAYER_BYTES) return false;
    }
    return true;
}

/* Parts of about equal rows, a sequence in one of them; 0 where it is better to share every loop's work. */
static int32_t cut_parts(const stage *s, int32_t *starts) {
    const moe_segment *segment = s->segment;
    int32_t rows = segment->num_rows, parts = moe_cpu_pool_threads(s->run->pool), most = rows / parts + rows / parts / 2 + 1;
    if (parts < 2 || parts > MAX_PARTS || rows < parts * PART_ROWS || !layers_are_small(s)) return 0;
    starts[0] = 0;
    for (int32_t p = 1, row = 0; p <= parts; p++) {
        while (row < rows && (row < (int64_t)rows * p / parts || segment->sequences[row] == segment->sequences[row - 1])) row++;
        starts[p] = row;
        if (starts[p] == starts[p - 1] || starts[p] - starts[p - 1] > most) return 0;
    }
    return parts;
}

static void part_task(void *ctx, int32_t index, int32_t thread) {
    part_loop *loop = ctx;
    int32_t first = loop->starts[index], top_k = loop->whole->config->top_k, hidden = loop->whole->config->hidden;
    moe_cpu_run run = {.progress = loop->whole->run->progress, .job = loop->whole->run->job};
    moe_rows rows = moe_cpu_rows_from(loop->whole->rows, loop->whole->config, first);
    rows.attention_scratch += thread * loop->whole->scratch_floats;
    moe_segment segment = *loop->whole->segment;
    size_t slots = (size_t)first * (size_t)top_k, slot_bytes = moe_row_bytes(segment.combine.dtype, hidden);
    segment.num_rows = loop->starts[index + 1] - first;
    segment.token_ids += first;
    segment.positions += first;
    segment.sequences += first;
    if (segment.activations) segment.activations = moe_row_at(segment.activations, loop->whole->dtype, hidden, first);
    if (segment.index > 0) {
        segment.combine.outputs = (const uint8_t *)segment.combine.outputs + slots * slot_bytes;
        segment.combine.weights += slots;
        segment.combine.counts += first;
    }
    moe_route *const routes[] = {&segment.route, &segment.next};
    for (int i = 0; i < 2; i++) {
        if (routes[i]->experts) routes[i]->experts += slots;
        if (routes[i]->weights) routes[i]->weights += slots;
    }
    int64_t router = (int64_t)first * loop->whole->config->num_experts;
    if (segment.gate_logits) segment.gate_logits += router;
    if (segment.next_logits) segment.next_logits += router;
    stage part = *loop->whole;
    part.run = &run;
    part.segment = &segment;
    part.rows = &rows;
    run_layers(&part);
    if (index == 0) loop->combine_ns = part.combine_ns;
}

moe_status moe_cpu_segment_run(const moe_cpu_kernels *kernels, moe_dtype dtype, const moe_cpu_run *run, const moe_base *base,
                               const moe_segment *segment, moe_error *err) {
    const moe_model_config *c = &base->model->config;
    stage s = {
        .kernels = kernels, .dtype = dtype, .run = run, .base = base, .config = c, .segment = segment, .rows = segment->rows};
    MOE_ASSERT(segment->index >= 0 && segment->index <= c->num_moe_layers);
    MOE_ASSERT(segment->num_rows > 0 && segment->num_rows <= segment->rows->max_rows);
    moe_segment from_rows = *segment;
    if (segment->index > 0 && !segment->combine.outputs) {
        from_rows.combine.outputs = segment->rows->outputs;
        from_rows.combine.dtype = MOE_F32;
        s.segment = &from_rows;
        if (!segment->rows->outputs) return moe_fail(err, MOE_FAILED_PRECONDITION, "no job has left expert outputs with these rows");
    }
    moe_status status = reserve_scores(&s, err);
    if (status != MOE_OK) return status;
    part_loop loop = {.whole = &s};
    int32_t parts = cut_parts(&s, loop.starts);
    if (parts)
        moe_cpu_parallel_for(run->pool, parts, part_task, &loop, run->progress);
    else
        run_layers(&s);
    run->job->combine_ns += parts ? loop.combine_ns : s.combine_ns;
    int64_t start_ns = moe_now_ns(moe_clock_real());
    if (segment->index == c->num_moe_layers) status = logits(&s, err);
    run->job->logits_ns += moe_now_ns(moe_clock_real()) - start_ns;
    return status;
}

int64_t moe_cpu_segment_multiply_adds(const moe_base *base, const moe_segment *segment) {
    const moe_model_config *c = &base->model->config;
    layer_range layers = layers_of(c, segment);
    int32_t first = layers.first < 0 ? 0 : layers.first, last = layers.last;
    int64_t weights = 0, positions = 0;
    for (int32_t i = first; i <= last; i++) weights += layer_size(&base->layers[i]);
    for (int32_t r = 0; r < segment->num_rows; r++) positions += segment->positions[r] + 1;
    int64_t attention = positions * (last - first + 1) * c->num_heads * c->head_dim * 2;
    int64_t logits = segment->index == c->num_moe_layers ? segment->num_logit_rows * matrix_size(&base->lm_head) : 0;
    return segment->num_rows * weights + attention + logits;
}
