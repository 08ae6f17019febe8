/* Kernels of the base layers in the bfloat16 profile, except matrix products of many rows (cuda/linear.h).
 *
 * Every launcher is asynchronous on the queue's stream, allocates nothing, and can be captured into a graph. It returns
 * cudaErrorInvalidValue for a shape that it is not built for, else what the launch returned. Sums are float32.
 *
 * A captured launch runs with a number of rows that only the device knows: buffers have room for the rows of the launch
 * (`max_rows`), and rows from *num_rows on are padding, which kernels of a row's own work pass over. */
#pragma once
#include <cuda_runtime_api.h>

#include "common/tensor.h" /* the interface of C++ too: backend.h is C alone */

#ifdef __cplusplus
extern "C" {
#endif

#define MOE_CUDA_PAGE_TOKENS 16      /* positions of a KV block (MOE_KV_BLOCK_TOKENS) */
#define MOE_CUDA_GATE_TOP_K 32       /* experts of a row (MOE_MAX_TOP_K) */
#define MOE_CUDA_MAX_PIECES 64       /* that a decoding row's keys are cut into, at most */
#define MOE_CUDA_PIECE_TOKENS 256    /* shortest piece; longer ones are this times a power of two */
#define MOE_CUDA_MERGE 8             /* pieces that are added at a time */
#define MOE_CUDA_MAX_GROUP 16        /* query heads of a key head that the attention kernels take */
#define MOE_CUDA_PREFILL_QUERIES 128 /* (row, head) pairs in a tile of prompt attention */
#define MOE_CUDA_FEW_ROWS 64         /* rows of one pass of the few-row product */

/* Where kernels are launched. overlap: a kernel's start may overlap the end of the one before it in the stream (programmatic
 * dependent launch, sm_90 on); every kernel here waits for its predecessor before it touches what that wrote. */
typedef struct moe_cuda_queue {
    cudaStream_t stream;
    bool overlap;
    bool hopper; /* code for sm_90a alone runs here */
    int32_t num_sms;
} moe_cuda_queue;

/* The rows of a micro-batch, in device memory. */
typedef struct moe_cuda_row_inputs {
    const int32_t *num_rows;  /* [1] */
    const int32_t *token_ids; /* [rows] */
    const int32_t *positions; /* [rows] */
    const int32_t *table_at;  /* [rows]: where the block table of the row's sequence begins in `tables` */
    const int32_t *tables;    /* block numbers by position / MOE_CUDA_PAGE_TOKENS */
} moe_cuda_row_inputs;

/* One layer of the KV pool: [block][kv head][16 positions][head_dim], bf16. */
typedef struct moe_cuda_kv_view {
    void *keys, *values;
} moe_cuda_kv_view;

typedef struct moe_cuda_attention_shape {
    int32_t num_heads, num_kv_heads, head_dim;
    int32_t window; /* 0: none */
} moe_cuda_attention_shape;

/* ---- project.cu ---- */

/* hidden[r, :] = table[token_ids[r], :]; cosine, sine [rows, head_dim / 2] of position · inverse_frequency, in float32. */
typedef struct moe_cuda_embed {
    moe_cuda_row_inputs rows;
    const void *table; /* [V, H] of table_dtype */
    moe_dtype table_dtype;
    const float *inverse_frequency; /* [head_dim / 2] */
    float *hidden, *cosine, *sine;
    int32_t max_rows, width, half_dim;
} moe_cuda_embed;
cudaError_t moe_cuda_embed_rows(const moe_cuda_queue *q, const moe_cuda_embed *a);

/* In place on qkv [rows, (heads + 2 kv) · d] bf16: bias, norms of q and k, clamp, rotation; keys and values go to the pool. */
typedef struct moe_cuda_project {
    moe_cuda_row_inputs rows;
    moe_cuda_attention_shape shape;
    moe_cuda_kv_view kv;
    void *qkv;
    const float *bias;            /* [(heads + 2 kv) · d] or NULL */
    const float *q_norm, *k_norm; /* NULL, or [d], or full_norm: [heads · d] and [kv · d] */
    bool full_norm;               /* one norm over the whole q and k vectors, instead of one over each head */
    float eps, clip;              /* clip 0: none */
    const float *cosine, *sine;
    int32_t max_rows;
} moe_cuda_project;
cudaError_t moe_cuda_project_rows(const moe_cuda_queue *q, const moe_cuda_project *a);

/* ---- attention_decode.cu, attention_prefill.cu ---- */

/* Keys [lo, hi) of a decoding row; its pieces are consecutive. */
typedef struct moe_cuda_piece {
    int32_t row, lo, hi;
    int32_t table_at;      /* as moe_cuda_row_inputs */
    int32_t settled;       /* keys and values below this position were stored by earlier steps */
    int32_t place, pieces; /* it is the place-th of so many */
    int32_t unused;        /* 32 bytes */
} moe_cuda_piece;

/* Rows of one sequence that stand together at consecutive positions, at most moe_cuda_prefill_rows. 16-byte aligned. */
typedef struct moe_cuda_tile {
    int32_t first_row, rows;
    int32_t first_position;
    int32_t table_at; /* as moe_cuda_row_inputs */
} moe_cuda_tile;

/* y[r, h, :] = softmax(q[r, h] · K^T / sqrt(d)) V over the keys at positions ≤ the row's (and in its window). Pieces and tiles
 * and their number are in device memory, written before anything else of the step; a launch has room for max_pieces or max_tiles.
 */
typedef struct moe_cuda_attention {
    moe_cuda_row_inputs rows;
    moe_cuda_attention_shape shape;
    moe_cuda_kv_view kv;
    const void *q; /* bf16, row r at q + r · q_stride */
    void *y;       /* bf16 [rows, heads · d] */
    int64_t q_stride;
    const moe_cuda_piece *pieces; /* decode; 16-byte aligned */
    const int32_t *num_pieces;
    int32_t max_pieces;
    float *partial;             /* decode: [max_pieces, heads, d + 4] */
    int32_t *arrivals;          /* decode: [rows, kv heads, 1 + MOE_CUDA_MAX_PIECES / MOE_CUDA_MERGE], zero before and after */
    const moe_cuda_tile *tiles; /* prefill; best with the most keys first */
    const int32_t *num_tiles;
    int32_t max_tiles;
} moe_cuda_attention;

bool moe_cuda_attention_supported(const moe_cuda_attention_shape *shape);
cudaError_t moe_cuda_attention_decode(const moe_cuda_queue *q, const moe_cuda_attention *a);
cudaError_t moe_cuda_attention_prefill(const moe_cuda_queue *q, const moe_cuda_attention *a);
/* What the latter takes where the queue is Hopper's: head_dim 128. */
cudaError_t moe_cuda_attention_prefill_sm90(const moe_cuda_queue *q, const moe_cuda_attention *a);

/* Rows of a tile of prompt attention. */
static inline int32_t moe_cuda_prefill_rows(const moe_cuda_attention_shape *shape) {
    return MOE_CUDA_PREFILL_QUERIES / (shape->num_heads / shape->num_kv_heads);
}

/* ---- combine.cu ---- */

/* hidden[r] += moe(r) (+ shared), as moe_combine; then normed[i] = RMSNorm(hidden[row_of ? row_of[i] : i]) in bf16. */
typedef struct moe_cuda_combine_norm {
    const int32_t *num_rows; /* [1], of normed's rows; NULL: max_rows */
    int32_t max_rows, width;
    float *hidden;       /* [rows, H] */
    const void *outputs; /* [rows, top_k, H] of outputs_dtype; NULL: no experts to add */
    moe_dtype outputs_dtype;
    const float *weights;  /* [rows, top_k]; NULL: 1 */
    const int32_t *counts; /* [rows]; NULL: top_k each */
    int32_t top_k;
    const float *shared;       /* [rows, H] or NULL */
    const float *shared_logit; /* [rows]: scale = sigmoid; NULL: 1 */
    const float *bias;         /* [H], added too (an output projection's), or NULL */
    const float *norm;         /* [H]; NULL: no norm is wanted */
    float eps;
    const int32_t *row_of; /* [rows] or NULL; with it nothing is added */
    void *normed;          /* bf16 [rows, H] */
    uint64_t *began;       /* the device's clock when the kernel's work begins, in ns; NULL: not wanted */
} moe_cuda_combine_norm;
cudaError_t moe_cuda_combine_norm_rows(const moe_cuda_queue *q, const moe_cuda_combine_norm *a);

/* ---- gate_topk.cu ---- */

/* Softmax over all experts, the top_k highest in ascending expert order (of equal ones the lower id is chosen). */
typedef struct moe_cuda_gate {
    const int32_t *num_rows;
    int32_t max_rows, num_experts, top_k; /* top_k ≤ MOE_CUDA_GATE_TOP_K, experts ≤ 1024 */
    bool norm_topk;
    const float *logits; /* [rows, E] */
    int32_t *experts;    /* [rows, top_k]; -1 of padding */
    float *weights;      /* [rows, top_k] */
} moe_cuda_gate;
cudaError_t moe_cuda_gate_topk(const moe_cuda_queue *q, const moe_cuda_gate *a);

/* The same, and the assignments sorted by expert (as moe_cuda_permute has them), in one launch for few assignments. */
#define MOE_CUDA_FEW_ASSIGNMENTS 128
typedef struct moe_cuda_route_few {
    moe_cuda_gate gate;
    int32_t *expert_first;          /* [E + 1] */
    int32_t *sorted_rows, *slot_of; /* [rows · top_k] */
    int32_t *expert_rows;           /* [E], counts are added; or NULL */
} moe_cuda_route_few;
bool moe_cuda_route_few_takes(const moe_cuda_gate *gate);
cudaError_t moe_cuda_route_few_rows(const moe_cuda_queue *q, const moe_cuda_route_few *a);

/* ---- logits_top.cu ---- */

/* The num_top highest of each row, highest first, of equal ones the lower id first; ids -1 where a row has a value that is not
 * finite. scratch: moe_cuda_logits_top_scratch bytes, 16-byte aligned. */
typedef struct moe_cuda_logits_top {
    const float *logits; /* [rows, V] */
    int32_t rows, vocab, num_top;
    int32_t *ids;  /* [rows, num_top] */
    float *values; /* [rows, num_top] */
    void *scratch;
} moe_cuda_logits_top;
size_t moe_cuda_logits_top_scratch(int32_t rows, int32_t vocab, int32_t num_top);
cudaError_t moe_cuda_logits_top_rows(const moe_cuda_queue *q, const moe_cuda_logits_top *a);

/* ---- linear_few.cu ---- */

typedef enum moe_cuda_out {
    MOE_CUDA_OUT_BF16, /* y = x W^T */
    MOE_CUDA_OUT_F32,
    MOE_CUDA_OUT_F32_ADD /* y += x W^T */
} moe_cuda_out;

/* y [rows, n] = x [rows, k] · W [n, k]^T, x and W bf16, 16-byte aligned, k % 64 == 0. The order over k depends on k alone. */
typedef struct moe_cuda_product {
    const void *w, *x;
    void *y;
    moe_cuda_out out;
    int32_t rows, n, k;
} moe_cuda_product;
cudaError_t moe_cuda_linear_few(const moe_cuda_queue *q, const moe_cuda_product *a);

#ifdef __cplusplus
}
#endif
