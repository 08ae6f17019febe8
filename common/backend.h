/* The compute backend: what runs the base layers and the experts. Implementations: cpu/ (cpu-ref, cpu), cuda/.
 *
 * Work is asynchronous: a submit returns at once and the job's `done` is called when it has ended, from any thread
 * (perhaps before submit returns), or, where the backend has `poll`, inside poll. Nothing here blocks but open, close, load and
 * free.
 *
 * Element types: a backend computes with activations, KV cache and payloads of its `dtype` (float32 or bfloat16), weights as
 * stored, sums in float32. Buffers that are `void *` hold elements of the backend's dtype unless said otherwise.
 *
 * A model with M MoE layers is cut into M + 1 *segments*, the stretches between two dispatches:
 *   segment 0        embed → (dense layers) → attention of MoE layer 0 → post-attention norm → gate
 *   segment s        combine of MoE layer s-1 → (dense layers) → attention of MoE layer s → norm → gate
 *   segment M        combine of MoE layer M-1 → (dense layers) → final norm → logits
 *
 * Numerics (docs/architecture.md, "Numeric profile"): every output element is one lane with a fixed order over K, whatever
 * the number of rows, so results are bit-identical under every batch, chunking, placement and retry. */
#pragma once
#include <stdatomic.h>

#include "common/model/model.h"

#define MOE_KV_BLOCK_TOKENS 16 /* positions in a KV block; block b of a sequence holds positions [16b, 16b + 16) */
#define MOE_FFN_BLOCKS 8       /* the down projection is a binary tree over 8 blocks of the intermediate width */
#define MOE_MAX_TOP_LOGITS 64  /* of a row, that a segment returns beside or instead of all logits */
#define MOE_MAX_SLOT_FILLS 64  /* pieces on their way into slots of one backend at once */

typedef struct moe_backend moe_backend;
typedef struct moe_base moe_base;     /* base-layer weights in the backend's own layout */
typedef struct moe_expert moe_expert; /* one expert's weights, or a slice of them, in the backend's own layout */
typedef struct moe_kv moe_kv;         /* a pool of KV blocks for all layers */
typedef struct moe_rows moe_rows;     /* the hidden state of one micro-batch between its segments */
typedef struct moe_local moe_local;   /* all experts of a model, as a forward step with no dispatch uses them */
typedef struct moe_slots moe_slots;   /* device memory for a fixed number of experts of one shape, which come and go */
typedef struct moe_host_experts moe_host_experts; /* handles of experts that are computed where their images lie */

/* One piece of submitted work. The submitter owns it and keeps it in place until done was called. */
typedef struct moe_job {
    void (*done)(struct moe_job *job); /* any thread; last touch of the job by the backend */
    void *owner;                       /* the submitter's */
    _Atomic uint64_t progress;         /* ticks while the job advances; for hang detection */
    moe_status status;                 /* valid once done was called */
    int64_t compute_ns;                /* time from start to end of the computation */
    int64_t copy_ns;                   /* of an expert batch, beside it: copies between host and device; 0 where there are none */
    int64_t combine_ns, logits_ns;     /* of a segment or local step: how much of it went to these; 0 where it is not known */
    int64_t expert_ns;                 /* of a local step, likewise: to routed experts */
    char message[256];                 /* when status is not OK */
} moe_job;

/* The blocks of one sequence of a micro-batch. Block table borrowed until the job is done. */
typedef struct moe_kv_view {
    const int32_t *blocks; /* block numbers in the pool, by position / MOE_KV_BLOCK_TOKENS */
    int32_t num_blocks;
} moe_kv_view;

/* Which routing a segment must produce. */
typedef enum moe_route_source {
    MOE_ROUTE_NONE,
    MOE_ROUTE_GATE,     /* this layer's own gate */
    MOE_ROUTE_PRE_GATE, /* this layer's pre-gate: routing of the next MoE layer */
    MOE_ROUTE_NEXT_GATE /* the next MoE layer's gate applied to this layer's vector: a prediction for hints */
} moe_route_source;

/* Top-k routing of rows: experts in ascending order of expert id, weights as the family defines them. */
typedef struct moe_route {
    int32_t *experts; /* [rows, top_k], host memory of the caller */
    float *weights;   /* [rows, top_k] */
} moe_route;

/* The expert outputs to combine at the start of a segment:
 *   moe(t) = fma over j = 0..counts[t]-1 of weights[t, j] · outputs[t, j, :], starting from 0, in that order.
 * exact: slot j is the token's j-th expert in ascending order. partial: slot j is a worker's weighted sum, weight 1. */
typedef struct moe_combine {
    const void *outputs;   /* [rows, top_k, H] of dtype, host; NULL: what layer_ffn_submit left with the rows, float32 */
    moe_dtype dtype;       /* moe_expert_output_dtype */
    const float *weights;  /* [rows, top_k] */
    const int32_t *counts; /* [rows], each ≤ top_k */
} moe_combine;

typedef struct moe_segment {
    int32_t index;    /* 0 … num_moe_layers */
    int32_t num_rows; /* 1 … the micro-batch's max_rows */
    moe_rows *rows;   /* hidden state, carried from segment to segment */
    moe_kv *kv;
    const int32_t *token_ids; /* [rows]; read by segment 0 */
    const int32_t *positions; /* [rows], absolute; rows of a sequence are consecutive and ascending */
    const int32_t *sequences; /* [rows], index into views. Positions, sequences, views: the same in all segments of a step */
    const moe_kv_view *views; /* [num_views] */
    int32_t num_views;
    moe_combine combine; /* read by segments 1 … M */

    /* outputs of segments 0 … M-1 */
    void *activations;          /* [rows, H]: the expert input (post-attention norm), host; NULL: it stays with the rows alone */
    bool want_gate;             /* fill `route` from this layer's gate */
    moe_route route;            /* */
    moe_route_source want_next; /* NONE, PRE_GATE or NEXT_GATE: fill `next`; ignored at the last MoE layer */
    moe_route next;
    /* The router logits that `route` and `next` come from, host [rows, num_experts]; NULL: not wanted. Filled where these are. */
    float *gate_logits, *next_logits;

    /* outputs of segment M */
    const int32_t *logit_rows; /* [num_logit_rows], ascending */
    int32_t num_logit_rows;
    float *logits;      /* [num_logit_rows, V], host; NULL: not wanted */
    int32_t num_top;    /* 0 … MOE_MAX_TOP_LOGITS: how many of the highest logits of each row are wanted, at most V */
    int32_t *top_ids;   /* [num_logit_rows, num_top], host: by descending logit, of equal ones the lower id first; -1 in all places of a
                           row with a value that is not finite */
    float *top_logits;  /* [num_logit_rows, num_top], host */
} moe_segment;

/* A whole forward step of a micro-batch whose experts are all in one moe_local: nothing of the routing leaves the backend. Of
 * `segment` the step reads what segments 0 and M read but `index` and `combine`, and fills the outputs of segment M alone. Same
 * numbers as the segments and ffn batches in exact mode. */
typedef struct moe_local_step {
    moe_segment segment;
    bool pre_gate; /* the pre-gate of MoE layer s routes layer s + 1; else every layer's own gate does */
    /* Outputs, may be NULL: experts that were chosen, for load figures. [num_moe_layers, num_experts], rows of this step, host. */
    int32_t *expert_rows;
} moe_local_step;

typedef enum moe_combine_mode { MOE_COMBINE_EXACT, MOE_COMBINE_PARTIAL } moe_combine_mode;

/* The element type of expert outputs: a row per (token, expert) is float32, a token's partial sum is of the backend's dtype. */
static inline moe_dtype moe_expert_output_dtype(moe_combine_mode mode, moe_dtype dtype) {
    return mode == MOE_COMBINE_EXACT ? MOE_F32 : dtype;
}

/* Consecutive assignments of one expert. */
typedef struct moe_ffn_group {
    moe_expert *expert;
    int32_t first, count;
} moe_ffn_group;

/* Expert FFN over a batch of assignments (one assignment = one token row at one expert):
 *   f(x) = down · (silu(gate · x) ⊙ (up · x)), or down · relu(up · x) of experts without a gate matrix (moe_ffn_gated),
 *          the down projection restricted to blocks [block_lo, block_hi).
 *   exact:   out[a, :] = f_expert(a)(x[row(a), :])
 *   partial: out[r, :] = Σ over the assignments a of row r, in order, fma(weight(a), f(x[r, :])) from 0 */
typedef struct moe_ffn_batch {
    const void *x; /* [num_rows, H], host, 64-byte aligned */
    int32_t num_rows;
    const moe_ffn_group *groups; /* cover [0, num_assignments) in order */
    int32_t num_groups;
    const int32_t *assignment_rows; /* [num_assignments] */
    const float *assignment_weights; /* [num_assignments]; read in partial mode */
    int32_t num_assignments;
    moe_combine_mode mode;
    int32_t block_lo, block_hi; /* 0, MOE_FFN_BLOCKS for whole experts; else an aligned power-of-two range */
    void *out;                  /* exact [num_assignments, H], partial [num_rows, H], host, of moe_expert_output_dtype */
} moe_ffn_batch;

/* Routed experts on a micro-batch where it is: between the segment of a MoE layer and the next one. What experts are given and what
 * comes out stays with the rows, so that only the routing crosses to the host. A layer may take several such jobs, each with the
 * experts that have come meanwhile; together they fill every slot, and no slot twice. Slot row · top_k + j is of the row's j-th expert. */
typedef struct moe_layer_ffn {
    moe_rows *rows;
    int32_t num_rows;              /* as in the segment */
    const int32_t *experts;        /* [num_rows, top_k]: whom the layer routes to, ascending in each row */
    moe_expert *const *handles;    /* [num_experts]: whole experts of this job; NULL: not of this one */
    const int32_t *given_slots;    /* [num_given]: slots whose outputs somebody else has computed, */
    const float *given;            /* [num_given, H]: which are these */
    int32_t num_given;
} moe_layer_ffn;

/* What one expert takes. Its image is the expert in the backend's own layout, in host memory. */
typedef struct moe_expert_size {
    int64_t image_bytes, slot_bytes;
} moe_expert_size;

/* Where one matrix of an expert is in an image that any backend may read: row by row, a row being one output, its elements one after
 * another. Rows lie in runs of `run`; row i is at offset + i / run · run_bytes + i % run · row_bytes. */
typedef struct moe_image_matrix {
    int64_t offset, run_bytes, row_bytes; /* from the image's start; from run to run; from row to row within one */
    int32_t rows, cols, run;
    moe_dtype dtype;
} moe_image_matrix;

typedef struct moe_image_layout {
    moe_image_matrix gate, up, down; /* of the slice; gate.rows 0: the network is not gated */
} moe_image_layout;

/* A piece of an expert on its way into a slot: bytes [offset, offset + bytes) of its image. A whole expert is there when all of its
 * pieces are, in any order. To cancel it is to submit no more pieces. */
typedef struct moe_slot_fill {
    moe_expert *slot;
    const void *image; /* as expert_pack left it */
    int64_t offset, bytes;
} moe_slot_fill;

/* Single operations on host memory, synchronous, f32: the op table that compares backends. y and x never alias. */
typedef struct moe_ops {
    void (*embed)(const moe_tensor *table, const int32_t *ids, int32_t rows, float *y /* [rows, H] */);
    /* y = x · weight / sqrt(mean(x²) + eps); x, y [rows, width] */
    void (*rms_norm)(const float *x, const moe_tensor *weight, float eps, int32_t rows, int32_t width, float *y);
    /* y = x @ W^T (+ bias); x [rows, W.cols], y [rows, W.rows] */
    void (*linear)(const float *x, const moe_tensor *w, const moe_tensor *bias, int32_t rows, float *y);
    /* in place, x [rows, heads, head_dim]: rotates pairs (i, i + d/2) by position · theta^(-2i/d) */
    void (*rotary)(float *x, const int32_t *positions, float theta, int32_t rows, int32_t heads, int32_t head_dim);
    /* causal attention of one sequence: q [rows, heads, d] at positions first … first+rows-1 over k, v [first+rows, kv, d] */
    void (*attention)(const float *q, const float *k, const float *v, int32_t first, int32_t rows, int32_t heads, int32_t kv_heads,
                      int32_t head_dim, int32_t window, float *y /* [rows, heads, d] */);
    /* top-k routing from router logits [rows, E]; ties go to the lower expert id */
    void (*gate_topk)(const float *logits, int32_t rows, int32_t num_experts, int32_t top_k, moe_gate_kind kind, bool norm_topk,
                      moe_route out);
    /* y [rows, H] += moe(t) as in moe_combine, top_k slots a row */
    void (*combine)(const moe_combine *c, int32_t rows, int32_t top_k, int32_t hidden, float *y);
    /* y [rows, H] = f(x) over blocks [block_lo, block_hi) */
    void (*ffn)(const float *x, const moe_ffn_weights *w, int32_t rows, int32_t block_lo, int32_t block_hi, float *y);
} moe_ops;

typedef struct moe_memory_info {
    int64_t total_bytes, free_bytes; /* of the device, or of host memory for CPU backends */
} moe_memory_info;

typedef struct moe_backend_ops {
    const char *name;           /* "cpu-ref", "cpu", "cuda" */
    const moe_ops *single;      /* the op table */
    void (*close)(moe_backend *backend);
    /* A short text that names the numeric profile ("cpu/avx512/float32"): equal text, equal bits. Borrowed. */
    const char *(*profile)(const moe_backend *backend);
    moe_status (*memory_info)(moe_backend *backend, moe_memory_info *out, moe_error *err);

    /* Memory for the host buffers of segments, batches and steps, 64-byte aligned, not cleared, that the backend reads and writes
     * fastest (pinned, where there is a device; any other host memory is right too). NULL when out of memory. Any thread. */
    void *(*host_alloc)(moe_backend *backend, size_t bytes);
    void (*host_free)(moe_backend *backend, void *memory); /* NULL is ignored */

    /* NULL where jobs end by themselves. Otherwise the submitter calls it, from any thread, until it has heard of its jobs: calls
     * `done` of those that ended, never waits; true while some are outstanding. */
    bool (*poll)(moe_backend *backend);

    /* Packs the base-layer weights. `progress` (may be NULL) is called with 0 … 1. The model stays open until base_free. */
    moe_status (*base_load)(moe_backend *b, const moe_model *model, void (*progress)(void *ctx, double fraction), void *ctx,
                            moe_base **out, moe_error *err);
    void (*base_free)(moe_backend *b, moe_base *base);
    moe_status (*kv_create)(moe_backend *b, moe_base *base, int32_t num_blocks, moe_kv **out, moe_error *err);
    void (*kv_free)(moe_backend *b, moe_kv *kv);
    int64_t (*kv_block_bytes)(const moe_backend *b, const moe_model_config *config); /* of all layers together */
    moe_status (*rows_create)(moe_backend *b, moe_base *base, int32_t max_rows, moe_rows **out, moe_error *err);
    void (*rows_free)(moe_backend *b, moe_rows *rows);
    /* `segment` and all it points to stay in place until done; layer_ffn_submit says in which order they run. Bad rows (non-finite
     * values) are results, not errors. */
    void (*segment_submit)(moe_backend *b, moe_base *base, const moe_segment *segment, moe_job *job);

    /* Packs one expert; [block_lo, block_hi) as in moe_ffn_batch (0, MOE_FFN_BLOCKS: whole). load and bytes may be called from
     * another thread than the submitter's while jobs run, and must not delay these: experts move under load. */
    moe_status (*expert_load)(moe_backend *b, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi, moe_expert **out,
                              moe_error *err);
    void (*expert_free)(moe_backend *b, moe_expert *expert);
    int64_t (*expert_bytes)(const moe_expert *expert);
    /* `batch` and all it points to stay in place until done. */
    void (*ffn_submit)(moe_backend *b, const moe_ffn_batch *batch, moe_job *job);
    /* `ffn` and all it points to but `rows` stay in place until done. Segments and these jobs of the same rows take effect in the order
     * of their submission: each may be submitted while those before it run, but a segment not before the last one is done. */
    void (*layer_ffn_submit)(moe_backend *b, moe_base *base, const moe_layer_ffn *ffn, moe_job *job);

    /* Slots, for shards larger than the device's memory. An expert is packed once into an image in host memory and copied into a
     * slot whenever it is wanted; then the slot is that expert, with the bits of expert_load's. All weights that share slots have
     * the same shape and types. */
    moe_expert_size (*expert_size)(const moe_backend *b, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi);
    /* Packs into image_bytes of memory from host_alloc. Any thread; computes and reads the checkpoint, touches no device. */
    void (*expert_pack)(const moe_backend *b, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi, void *image);
    /* `count` slots in one allocation, for experts shaped like `weights`. RESOURCE_EXHAUSTED. */
    moe_status (*slots_create)(moe_backend *b, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi, int32_t count,
                               moe_slots **out, moe_error *err);
    void (*slots_free)(moe_backend *b, moe_slots *slots); /* no job uses them any more */
    /* Slot `index` as batches and fills name it; expert_bytes works, expert_free does not take it. Borrowed from the slots. */
    moe_expert *(*slot)(const moe_slots *slots, int32_t index);
    /* Copies beside computation, in the order of submission. `fill` and the image stay in place until done; so does the slot, which
     * no batch uses before all of its pieces are there and done was called for each. copy_ns is the job's time. Neither allocates
     * nor waits. RESOURCE_EXHAUSTED: more than MOE_MAX_SLOT_FILLS at once. */
    void (*slot_fill_submit)(moe_backend *b, const moe_slot_fill *fill, moe_job *job);

    /* Where the matrices are in images that expert_pack makes of such experts, for another backend to compute from. NULL: none reads them
     * but this one. */
    void (*expert_layout)(const moe_backend *b, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi,
                          moe_image_layout *out);

    /* Experts that the host computes from their images, without a copy; all three NULL where a backend computes nothing on the host.
     * `count` handles for experts shaped like `weights`, in one allocation. Their images are of this backend's own expert_pack, or, with
     * `layout` (copied), another's. RESOURCE_EXHAUSTED; INVALID_ARGUMENT: a layout of another shape than the weights'. */
    moe_status (*host_experts_create)(moe_backend *b, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi,
                                      const moe_image_layout *layout, int32_t count, moe_host_experts **out, moe_error *err);
    void (*host_experts_free)(moe_backend *b, moe_host_experts *experts); /* no job uses them any more; NULL is ignored */
    /* Handle `index`, for ffn batches, from now on of the expert whose image lies at `image`. Its bits are those of expert_load's; from a
     * layout they differ in rounding, but like all others do not depend on the batch. The image stays until the batches that name it have
     * ended. Neither allocates nor reads the image. */
    moe_expert *(*host_expert)(const moe_host_experts *experts, int32_t index, const void *image);

    /* Forward steps with every expert in this backend; all three NULL where it has none. experts [num_moe_layers, num_experts]:
     * whole, borrowed until local_free. */
    moe_status (*local_create)(moe_backend *b, moe_base *base, moe_expert *const *experts, moe_local **out, moe_error *err);
    void (*local_free)(moe_backend *b, moe_local *local);
    /* `step` and all it points to stay in place until done. */
    void (*local_submit)(moe_backend *b, moe_base *base, moe_local *local, const moe_local_step *step, moe_job *job);
} moe_backend_ops;

struct moe_backend {
    const moe_backend_ops *ops;
    moe_dtype dtype; /* MOE_F32 or MOE_BF16 */
};

/* Block i of the 8 blocks of an intermediate width: [moe_ffn_block_start(I, i), moe_ffn_block_start(I, i + 1)). */
static inline int32_t moe_ffn_block_start(int32_t intermediate, int32_t block) {
    return (int32_t)((int64_t)intermediate * block / MOE_FFN_BLOCKS);
}

/* A slice [lo, hi) is legal when it is a node of the binary tree: a power-of-two length, aligned to that length. */
static inline bool moe_ffn_slice_legal(int32_t lo, int32_t hi) {
    int32_t n = hi - lo;
    return lo >= 0 && n > 0 && hi <= MOE_FFN_BLOCKS && (n & (n - 1)) == 0 && lo % n == 0;
}
