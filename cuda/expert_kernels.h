/* Expert FFN kernels of the bfloat16 profile, on tensor cores. For C and CUDA C++.
 *
 * For every assignment a (one token row at one expert g):
 *   inner[a, :] = bf16(silu(gate_g · x[row(a)]) ⊙ (up_g · x[row(a)]))      sums in float32
 *                 or, of experts without a gate matrix, bf16(relu(up_g · x[row(a)]))
 *   y[a, :]     = down_g · inner[a, :]                                     float32
 *
 * Two launches, one for each product; the second starts fetching its weights while the first ends (programmatic dependent
 * launch). Weights are the M operand (features), tokens the N operand, so that gate and up rows interleaved in groups of 8 meet
 * in one thread. Which experts have rows, and how many, is read on the device from `expert_first`.
 *
 * All launchers are asynchronous on the stream, allocate nothing, never synchronise and can be captured into a graph. Every
 * pointer is device memory, 16-byte aligned, and is borrowed until the work has ended. */
#pragma once
#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MOE_CUDA_MAX_GROUPS 1024
#define MOE_CUDA_MAX_TOP_K 16
#define MOE_CUDA_SIZE_UNIT 64 /* H and the intermediate width must be multiples of it */

/* What the copy engine of sm_90 must know of an expert's matrices (two CUtensorMap). Lives in device memory, 64-byte aligned: one
 * for each loaded expert, for instance at the end of its slot. */
typedef struct moe_cuda_expert_maps {
    uint8_t gate_up[128], down[128];
} moe_cuda_expert_maps;

/* Fills *maps, in host memory, 64-byte aligned, for an expert whose weights lie at these device addresses (256-byte aligned):
 * gate_up bf16 [2·width, hidden], gate and up rows interleaved in groups of 8, or, not `gated`, up alone, [width, hidden]; down
 * bf16 [hidden, width]. The caller copies it to the device. cudaErrorNotSupported where the driver has no such maps. Any thread;
 * the device must be current. */
cudaError_t moe_cuda_expert_maps_make(const void *gate_up, const void *down, int32_t hidden, int32_t width, bool gated,
                                      moe_cuda_expert_maps *maps);

/* Which kernels a device runs: 90 (compute capability 9.0: TMA and wgmma) or 80 (mma.sync, cp.async; any later device too). */
typedef struct moe_cuda_expert_device {
    int32_t arch, num_sms;
} moe_cuda_expert_device;

/* Prepares the current device (kernel attributes). `force_sm80`: take the sm_80 kernels on every device. Once per device, at open. */
cudaError_t moe_cuda_expert_device_open(bool force_sm80, moe_cuda_expert_device *out);

/* Whether the kernels here can compute experts of this shape; where not, the caller's simple kernels must. `width` is that of the
 * slice that is computed, `width_first` where it begins. */
static inline bool moe_cuda_expert_supported(int32_t hidden, int32_t width, int32_t width_first) {
    return hidden > 0 && width > 0 && hidden % MOE_CUDA_SIZE_UNIT == 0 && width % MOE_CUDA_SIZE_UNIT == 0 && width_first % 8 == 0;
}

/* One expert FFN over assignments sorted by group. */
typedef struct moe_cuda_ffn {
    moe_cuda_expert_device device;
    bool gated;              /* of all experts: gate_up has gate and up rows; else up rows alone */
    int32_t hidden;          /* H */
    int32_t width;           /* columns of the intermediate width that are computed: I, or those of a slice */
    int32_t width_first;     /* where they begin in the loaded expert */
    int32_t width_loaded;    /* intermediate width of the loaded experts: row length of `down` */
    int32_t num_groups;      /* G ≤ MOE_CUDA_MAX_GROUPS; groups may be empty */
    int32_t num_assignments; /* upper bound of expert_first[G]; sizes of `inner` and `y` follow from it */
    int32_t tile_tokens;     /* tokens of a tile: 32, 64, 128, or 256 for the widest (moe_cuda_tune_tile); 0: built-in thresholds */

    const int32_t *expert_first;              /* [G + 1] */
    const int32_t *sorted_rows;               /* [A], row of x */
    const int32_t *slot_of;                   /* [A], row of y that takes an assignment's result; NULL: its sorted position */
    const moe_cuda_expert_maps *const *maps;  /* [G]; read by arch 90; may be NULL for empty groups */
    const void *const *gate_up, *const *down; /* [G]; read by arch 80; likewise */
    const void *x;                            /* bf16 [rows, H] */
    void *inner;                              /* bf16 [A, width], scratch */
    float *y;                                 /* [A, H]; or more rows, where slot_of says so */
    bool brought;                             /* the launch before this one wrote the tables of [G]: nothing is read ahead of its end */
} moe_cuda_ffn;

/* y as above. Results of a row depend neither on the other rows nor on tile_tokens: every element is summed over K in one order
 * by instructions whose result does not depend on their N (checked by test_cuda_ffn), so this is deterministic as it is. */
cudaError_t moe_cuda_expert_ffn(const moe_cuda_ffn *args, cudaStream_t stream);

/* Device top-k to sorted form, stable: within a group by ascending row, then slot. Assignments of experts outside [0, E) are left
 * out. `ids` [rows, top_k] and `weights` [rows, top_k] are indexed by slot = row · top_k + j. */
typedef struct moe_cuda_permute {
    int32_t rows, top_k, num_experts; /* top_k ≤ MOE_CUDA_MAX_TOP_K, E ≤ MOE_CUDA_MAX_GROUPS, rows · top_k ≤ 2^20 */
    const int32_t *ids;
    const float *weights;  /* NULL: sorted_weights is not wanted */
    int32_t *expert_first; /* [E + 1] */
    int32_t *sorted_rows;  /* [A] */
    int32_t *slot_of;      /* [A] */
    float *sorted_weights; /* [A], or NULL */
    int32_t *scratch;      /* moe_cuda_permute_scratch_bytes */
    int32_t *expert_rows;  /* [E], counts are added; or NULL */
} moe_cuda_permute;

size_t moe_cuda_permute_scratch_bytes(int32_t rows, int32_t top_k, int32_t num_experts);
cudaError_t moe_cuda_permute_run(const moe_cuda_permute *args, cudaStream_t stream);

/* The weighted sum of a row's expert outputs, y in slot order (row · top_k + j, ascending by expert):
 *   out[r, :] = Σ over j = 0 … counts[r]-1, in order, fma(weights[r, j], y[r, j, :]) from 0 */
typedef struct moe_cuda_partial_sum {
    int32_t rows, top_k, hidden; /* hidden % 4 == 0 */
    const float *y;              /* [rows, top_k, H] */
    const float *weights;        /* [rows, top_k] */
    const int32_t *counts;       /* [rows], or NULL: top_k everywhere */
    void *out;                   /* [rows, H], bf16, or float32 */
    bool out_f32;
} moe_cuda_partial_sum;

cudaError_t moe_cuda_partial_sum_run(const moe_cuda_partial_sum *args, cudaStream_t stream);

/* The launches of moe_cuda_expert_ffn for one architecture; tile_tokens is set. */
cudaError_t moe_cuda_expert_sm80_open(void);
cudaError_t moe_cuda_expert_sm90_open(void);
cudaError_t moe_cuda_expert_ffn_sm80(const moe_cuda_ffn *args, cudaStream_t stream);
cudaError_t moe_cuda_expert_ffn_sm90(const moe_cuda_ffn *args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
