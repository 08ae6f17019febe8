#include "cuda/rows.h"

#include "common/alloc.h"

#define ADVICE "lower --max-num-batched-tokens"

static size_t widest(const moe_model_config *c) {
    int32_t width = c->dense_intermediate > c->shared_intermediate ? c->dense_intermediate : c->shared_intermediate;
    return ((size_t)width + 7) / 8 * 8;
}

static int32_t most_top(const moe_model_config *c) { return c->vocab < MOE_MAX_TOP_LOGITS ? c->vocab : MOE_MAX_TOP_LOGITS; }

static size_t arrivals_bytes(const moe_rows *r, const moe_model_config *c) {
    return (size_t)r->room * (size_t)c->num_kv_heads * (1 + MOE_CUDA_MAX_PIECES / MOE_CUDA_MERGE) * sizeof(int32_t);
}

/* Whether the kernels of base_kernels.h have the shape of every matrix of the base layers. */
static bool is_fast(moe_dtype dtype, const moe_model_config *c) {
    const moe_cuda_attention_shape attention = {c->num_heads, c->num_kv_heads, c->head_dim, c->sliding_window};
    return dtype == MOE_BF16 && c->hidden % 64 == 0 && c->hidden <= 16384 && moe_cuda_attention_supported(&attention);
}

static void lay_out(moe_rows *r, const moe_model_config *c, size_t element, moe_cuda_arena *arena) {
    size_t rows = (size_t)r->room, hidden = (size_t)c->hidden, head_dim = (size_t)c->head_dim;
    size_t q_width = (size_t)c->num_heads * head_dim, kv_width = (size_t)c->num_kv_heads * head_dim;
    size_t routed = rows * (size_t)c->top_k;
    r->hidden = moe_cuda_arena_take(arena, rows * hidden * sizeof(float));
    r->normed = moe_cuda_arena_take(arena, rows * hidden * element);
    r->qkv = moe_cuda_arena_take(arena, rows * (q_width + 2 * kv_width) * sizeof(float));
    r->q = moe_cuda_arena_take(arena, rows * q_width * element);
    r->attention = moe_cuda_arena_take(arena, rows * q_width * element);
    r->inner = moe_cuda_arena_take(arena, rows * widest(c) * element);
    r->delta = moe_cuda_arena_take(arena, rows * hidden * sizeof(float));
    r->shared_logits = moe_cuda_arena_take(arena, rows * sizeof(float));
    r->cosine = moe_cuda_arena_take(arena, rows * head_dim / 2 * sizeof(float));
    r->sine = moe_cuda_arena_take(arena, rows * head_dim / 2 * sizeof(float));
    r->identity = moe_cuda_arena_take(arena, rows * sizeof(int32_t));
    r->all_slots = moe_cuda_arena_take(arena, rows * sizeof(int32_t));
    r->outputs = moe_cuda_arena_take(arena, routed * hidden * sizeof(float));
    for (int i = 0; i < 2; i++) r->router[i] = moe_cuda_arena_take(arena, rows * (size_t)c->num_experts * sizeof(float));
    for (int i = 0; i < 2; i++) { /* one behind another: all that is wanted comes to the host in one copy */
        r->routes[i].experts = moe_cuda_arena_take(arena, routed * sizeof(int32_t));
        r->routes[i].weights = moe_cuda_arena_take(arena, routed * sizeof(float));
    }
    r->top_scratch = moe_cuda_arena_take(arena, moe_cuda_logits_top_scratch(r->logits_rows, c->vocab, most_top(c)));
    r->arrivals = moe_cuda_arena_take(arena, arrivals_bytes(r, c));
    r->logits = moe_cuda_arena_take(arena, (size_t)r->logits_rows * (size_t)c->vocab * sizeof(float));
    r->top_ids = moe_cuda_arena_take(arena, rows * MOE_MAX_TOP_LOGITS * sizeof(int32_t));
    r->top_logits = moe_cuda_arena_take(arena, rows * MOE_MAX_TOP_LOGITS * sizeof(float));
}

static moe_status fill_constants(const moe_rows *rows, const moe_model_config *c, moe_error *err) {
    size_t count = (size_t)rows->room;
    int32_t *numbers = moe_calloc(2 * count, sizeof *numbers);
    if (!numbers) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a micro-batch");
    for (int32_t i = 0; i < rows->room; i++) {
        numbers[i] = i;
        numbers[count + (size_t)i] = c->top_k;
    }
    cudaError_t code = cudaMemcpy(rows->identity, numbers, count * sizeof *numbers, cudaMemcpyHostToDevice);
    if (code == cudaSuccess) code = cudaMemcpy(rows->all_slots, numbers + count, count * sizeof *numbers, cudaMemcpyHostToDevice);
    if (code == cudaSuccess) code = cudaMemset(rows->arrivals, 0, arrivals_bytes(rows, c));
    if (code == cudaSuccess) code = cudaStreamSynchronize(0); /* the micro-batch's stream does not wait for it */
    moe_free(numbers);
    return moe_cuda_check(code, "preparing a micro-batch", err);
}

moe_status moe_cuda_rows_create(moe_cuda *cuda, const moe_base *base, int32_t max_rows, moe_rows **out, moe_error *err) {
    const moe_model_config *c = &base->model->config;
    size_t row_bytes = (size_t)c->vocab * sizeof(float), element = moe_dtype_bytes(cuda->public.dtype);
    moe_rows *rows = moe_calloc(1, sizeof *rows);
    moe_cuda_arena arena = {0};
    *out = NULL;
    if (!rows) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a micro-batch");
    size_t at_once = MOE_CUDA_LOGITS_BYTES / row_bytes ? MOE_CUDA_LOGITS_BYTES / row_bytes : 1;
    rows->max_rows = max_rows;
    rows->room = moe_cuda_step_room(max_rows);
    rows->fast = is_fast(cuda->public.dtype, c);
    rows->logits_rows = at_once < (size_t)max_rows ? (int32_t)at_once : max_rows;
    rows->step_in.pinned = rows->segment_in.pinned = rows->outputs_in.pinned = rows->out.pinned = true;
    lay_out(rows, c, element, &arena);
    moe_status status =
        moe_cuda_device_alloc(&cuda->device, arena.used, "the working memory of a micro-batch", ADVICE, &rows->memory, err);
    if (status == MOE_OK) {
        arena = (moe_cuda_arena){.memory = rows->memory};
        lay_out(rows, c, element, &arena);
        status = fill_constants(rows, c, err);
    }
    if (status == MOE_OK)
        status = moe_cuda_check(cudaStreamCreateWithFlags(&rows->stream, cudaStreamNonBlocking), "creating a stream", err);
    if (status == MOE_OK && rows->fast) status = moe_cuda_linear_open(&cuda->device, cuda->deterministic, &rows->linear, err);
    if (status == MOE_OK)
        *out = rows;
    else
        moe_cuda_rows_free(rows);
    return status;
}

void moe_cuda_rows_free(moe_rows *rows) {
    if (!rows) return;
    moe_cuda_buffer *buffers[] = {&rows->step_in,    &rows->step_device, &rows->segment_in, &rows->segment_device,
                                  &rows->outputs_in, &rows->out,         &rows->partial,    &rows->experts};
    moe_cuda_graphs_free(&rows->graphs);
    moe_cuda_linear_close(rows->linear);
    if (rows->stream) cudaStreamDestroy(rows->stream);
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) moe_cuda_buffer_free(buffers[i]);
    moe_cuda_device_free(rows->memory);
    moe_free(rows);
}
