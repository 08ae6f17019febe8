/* backend.h's single operations over a kernel table, for the op table that compares backends. They allocate what they need and
 * abort when out of memory: nothing that serves requests calls them. */
#pragma once
#include "cpu/kernels.h"

void moe_cpu_single_embed(const moe_tensor *table, const int32_t *ids, int32_t rows, float *y);
void moe_cpu_single_rms_norm(const moe_cpu_kernels *kernels, const float *x, const moe_tensor *weight, float eps, int32_t rows,
                             int32_t width, float *y);
void moe_cpu_single_linear(const moe_cpu_kernels *kernels, const float *x, const moe_tensor *w, const moe_tensor *bias,
                           int32_t rows, float *y);
void moe_cpu_single_rotary(const moe_cpu_kernels *kernels, float *x, const int32_t *positions, float theta, int32_t rows,
                           int32_t heads, int32_t head_dim);
void moe_cpu_single_attention(const moe_cpu_kernels *kernels, const float *q, const float *k, const float *v, int32_t first,
                              int32_t rows, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t window, float *y);
void moe_cpu_single_gate_topk(const moe_cpu_kernels *kernels, const float *logits, int32_t rows, int32_t num_experts,
                              int32_t top_k, bool norm_topk, moe_route out);
void moe_cpu_single_combine(const moe_cpu_kernels *kernels, const moe_combine *c, int32_t rows, int32_t top_k, int32_t hidden,
                            float *y);
void moe_cpu_single_ffn(const moe_cpu_kernels *kernels, const float *x, const moe_ffn_weights *w, int32_t rows, int32_t block_lo,
                        int32_t block_hi, float *y);

extern const moe_ops moe_cpu_single_ref, moe_cpu_single_scalar, moe_cpu_single_avx2, moe_cpu_single_avx512;

/* Defines moe_cpu_single_NAME: the single operations over moe_cpu_kernels_NAME. */
#define MOE_CPU_SINGLE_OPS(name)                                                                                                \
    static void single_rms_norm(const float *x, const moe_tensor *weight, float eps, int32_t rows, int32_t width, float *y) {   \
        moe_cpu_single_rms_norm(&moe_cpu_kernels_##name, x, weight, eps, rows, width, y);                                       \
    }                                                                                                                           \
    static void single_linear(const float *x, const moe_tensor *w, const moe_tensor *bias, int32_t rows, float *y) {            \
        moe_cpu_single_linear(&moe_cpu_kernels_##name, x, w, bias, rows, y);                                                    \
    }                                                                                                                           \
    static void single_rotary(float *x, const int32_t *positions, float theta, int32_t rows, int32_t heads, int32_t head_dim) { \
        moe_cpu_single_rotary(&moe_cpu_kernels_##name, x, positions, theta, rows, heads, head_dim);                             \
    }                                                                                                                           \
    static void single_attention(const float *q, const float *k, const float *v, int32_t first, int32_t rows, int32_t heads,    \
                                 int32_t kv_heads, int32_t head_dim, int32_t window, float *y) {                                \
        moe_cpu_single_attention(&moe_cpu_kernels_##name, q, k, v, first, rows, heads, kv_heads, head_dim, window, y);          \
    }                                                                                                                           \
    static void single_gate_topk(const float *logits, int32_t rows, int32_t num_experts, int32_t top_k, moe_gate_kind kind,     \
                                 bool norm_topk, moe_route out) {                                                               \
        MOE_ASSERT(kind == MOE_GATE_SOFTMAX_TOPK);                                                                              \
        moe_cpu_single_gate_topk(&moe_cpu_kernels_##name, logits, rows, num_experts, top_k, norm_topk, out);                    \
    }                                                                                                                           \
    static void single_combine(const moe_combine *c, int32_t rows, int32_t top_k, int32_t hidden, float *y) {                   \
        moe_cpu_single_combine(&moe_cpu_kernels_##name, c, rows, top_k, hidden, y);                                             \
    }                                                                                                                           \
    static void single_ffn(const float *x, const moe_ffn_weights *w, int32_t rows, int32_t block_lo, int32_t block_hi,          \
                           float *y) {                                                                                          \
        moe_cpu_single_ffn(&moe_cpu_kernels_##name, x, w, rows, block_lo, block_hi, y);                                         \
    }                                                                                                                           \
    const moe_ops moe_cpu_single_##name = {                                                                                     \
        .embed = moe_cpu_single_embed,                                                                                          \
        .rms_norm = single_rms_norm,                                                                                            \
        .linear = single_linear,                                                                                                \
        .rotary = single_rotary,                                                                                                \
        .attention = single_attention,                                                                                          \
        .gate_topk = single_gate_topk,                                                                                          \
        .combine = single_combine,                                                                                              \
        .ffn = single_ffn,                                                                                                      \
    };
