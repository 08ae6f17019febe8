#include "cuda/groups.h"

static int32_t slice_start(const moe_cuda_network_shape *s, int32_t block) {
    return moe_ffn_block_start(s->intermediate, block) - moe_ffn_block_start(s->intermediate, s->block_lo);
}

static cudaError_t run_simple(const moe_cuda_groups *g, cudaStream_t stream) {
    const moe_cuda_network_shape *s = g->shape;
    moe_simple_ffn_args args = {.x = g->x,
                                .dtype = g->dtype,
                                .weight_dtype = s->dtype,
                                .hidden = s->hidden,
                                .width = s->width,
                                .padded = s->padded,
                                .intermediate = s->intermediate,
                                .slice_lo = s->block_lo,
                                .gated = s->gated,
                                .block_lo = g->block_lo,
                                .block_hi = g->block_hi,
                                .num_groups = g->num_groups,
                                .num_assignments = g->num_assignments,
                                .expert_first = g->expert_first,
                                .sorted_rows = g->sorted_rows,
                                .slot_of = g->slot_of,
                                .gate_up = g->gate_up,
                                .down = g->down,
                                .inner = g->inner,
                                .y = g->y};
    cudaError_t code = moe_simple_ffn_gate_up(&args, stream);
    return code == cudaSuccess ? moe_simple_ffn_down(&args, stream) : code;
}

cudaError_t moe_cuda_groups_run(const moe_cuda_groups *g, cudaStream_t stream) {
    const moe_cuda_network_shape *s = g->shape;
    int32_t first = slice_start(s, g->block_lo), width = slice_start(s, g->block_hi) - first;
    if (g->dtype != MOE_BF16 || !moe_cuda_expert_supported(s->hidden, s->width, 0) ||
        !moe_cuda_expert_supported(s->hidden, width, first))
        return run_simple(g, stream);
    moe_cuda_ffn args = {.device = *g->device,
                         .gated = s->gated,
                         .hidden = s->hidden,
                         .width = width,
                         .width_first = first,
                         .width_loaded = s->width,
                         .num_groups = g->num_groups,
                         .num_assignments = g->num_assignments,
                         .expert_first = g->expert_first,
                         .sorted_rows = g->sorted_rows,
                         .slot_of = g->slot_of,
                         .maps = (const moe_cuda_expert_maps *const *)g->maps,
                         .gate_up = g->gate_up,
                         .down = g->down,
                         .x = g->x,
                         .inner = g->inner,
                         .y = g->y,
                         .brought = g->brought};
    args.tile_tokens = moe_cuda_tune_tile(g->tune, s->hidden, width, g->num_assignments, g->num_groups);
    return moe_cuda_expert_ffn(&args, stream);
}
