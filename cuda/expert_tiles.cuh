// What the expert kernels of all architectures share: the list of tiles, found on the device, and the ends of the two products.
#pragma once
#include <cuda_bf16.h>
#include <stdint.h>

#include "cuda/expert_kernels.h"

namespace moe_expert {

constexpr int kTileK = 64;      // columns of a pipeline stage: 128 bytes
constexpr int kTokenBand = 16;  // token tiles that run side by side over the same weights

// Which product a kernel computes, and what its end does with it: the first one with gate and up rows (SwiGLU), or with up rows alone
// (ReLU), or the second.
enum product_kind { GATE_UP, UP, DOWN };

// One product of all experts: for each group g, d[feature, token] = Σ_k a_g[feature, k] · b[token, k].
struct product {
    const int32_t *expert_first;  // [G + 1]
    const int32_t *rows;          // of b for each sorted position; NULL: the position itself
    const int32_t *slot_of;       // row of the output for each sorted position; NULL: the position itself
    const moe_cuda_expert_maps *const *maps;
    const void *const *weights;   // [G], a_g [features + .., a_stride]
    const __nv_bfloat16 *b;
    void *out;                    // GATE_UP: bf16 [A, features / 2]; UP: bf16 [A, features]; DOWN: f32 [.., features]
    int num_groups, features, k;  // k: multiple of kTileK
    int feature_first, k_first;   // where the slice begins in a_g
    int a_stride;
};

// In shared memory: what finding a tile needs. list_bytes(G), 8-byte aligned.
struct tile_list {
    const moe_cuda_expert_maps **maps;  // [G]
    int *tiles, *first;                 // [G + 1], prefix sums of the groups' token tiles and rows

    __device__ __forceinline__ tile_list(void *memory, int num_groups)
        : maps(static_cast<const moe_cuda_expert_maps **>(memory)),
          tiles(reinterpret_cast<int *>(maps + num_groups)),
          first(tiles + num_groups + 1) {}
};

inline int list_bytes(int num_groups) { return num_groups * 16 + 8; }

struct tile {
    int group, feature, token;  // feature and token: first of the tile; token within the group
    int first, count;           // sorted position of the tile's first token, tokens of the tile
};

// By one warp. Readers synchronise with it.
template <int TOKENS>
__device__ __forceinline__ void list_tiles(const product &p, const tile_list &list) {
    int lane = threadIdx.x & 31, each = (p.num_groups + 31) / 32, sum = 0;
    int lo = min(lane * each, p.num_groups), hi = min(lo + each, p.num_groups);
    int begin = p.expert_first[lo];
    for (int g = lo; g < hi; g++) {
        int end = p.expert_first[g + 1];
        list.first[g] = begin;
        list.tiles[g] = sum;
        sum += (end - begin + TOKENS - 1) / TOKENS;
        begin = end;
    }
    int before = sum;
    for (int d = 1; d < 32; d *= 2) {
        int other = __shfl_up_sync(0xffffffffu, before, d);
        if (lane >= d) before += other;
    }
    before -= sum;
    for (int g = lo; g < hi; g++) list.tiles[g] += before;
    if (lane == 31) {
        list.tiles[p.num_groups] = before + sum;
        list.first[p.num_groups] = begin;
    }
}

// Tile `index` of num_tiles: experts in order; within one, bands of token tiles; within a band, features, then tokens, so that
// blocks that run at a time share weights and tokens in the second-level cache.
template <int FEATURES, int TOKENS>
__device__ __forceinline__ tile find_tile(const tile_list &list, int num_groups, int feature_tiles, int index) {
    int unit = index / feature_tiles, lo = 0, hi = num_groups;  // the group whose tiles[g] ≤ unit < tiles[g + 1]
    while (hi - lo > 1) {
        int middle = (lo + hi) / 2;
        if (list.tiles[middle] <= unit)
            lo = middle;
        else
            hi = middle;
    }
    int local = index - list.tiles[lo] * feature_tiles, token_tiles = list.tiles[lo + 1] - list.tiles[lo];
    int band = local / (feature_tiles * kTokenBand), in_band = local - band * feature_tiles * kTokenBand;
    int width = min(kTokenBand, token_tiles - band * kTokenBand), feature = in_band / width;
    tile t;
    t.group = lo;
    t.feature = feature * FEATURES;
    t.token = (band * kTokenBand + in_band - feature * width) * TOKENS;
    t.first = list.first[lo] + t.token;
    t.count = min(TOKENS, list.first[lo + 1] - t.first);
    return t;
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

__device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays

// Writes 8 units × 8 tokens of which a thread holds unit lane / 4, tokens 2·(lane % 4) + 0, 1, into rows of `units` units. They turn
// round in registers, so that 4 lanes write 16 bytes of one token.
__device__ __forceinline__ void store_units(float value0, float value1, void *inner, int units, int first, int count, int unit) {
    int lane = threadIdx.x & 31;
    __nv_bfloat162 pair = __floats2bfloat162_rn(value0, value1);
    uint32_t turned, held;
    memcpy(&held, &pair, sizeof held);
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(held));
    if (lane / 4 < count) {
        __nv_bfloat16 *out = static_cast<__nv_bfloat16 *>(inner) + (int64_t)(first + lane / 4) * units + unit;
        *reinterpret_cast<uint32_t *>(out + 2 * (lane % 4)) = turned;
    }
}

// Ends of the first product, for 8 units × 8 tokens as store_units has them.
__device__ __forceinline__ void store_silu(const float *gate, const float *up, const product &p, int first, int count, int unit) {
    store_units(silu(gate[0]) * up[0], silu(gate[1]) * up[1], p.out, p.features / 2, first, count, unit);
}
__device__ __forceinline__ void store_relu(const float *up, const product &p, int first, int count, int unit) {
    store_units(relu(up[0]), relu(up[1]), p.out, p.features, first, count, unit);
}

// End of the second product: `feature` is the thread's upper row, slot0 and slot1 the output rows of its two tokens, -1: none. 8 lanes
// write 32 bytes, a sector.
__device__ __forceinline__ void store_rows(const float *d, const product &p, int feature, int slot0, int slot1) {
    float *out = static_cast<float *>(p.out) + feature;
    if (feature < p.features) {
        if (slot0 >= 0) out[(int64_t)slot0 * p.features] = d[0];
        if (slot1 >= 0) out[(int64_t)slot1 * p.features] = d[1];
    }
    if (feature + 8 < p.features) {
        if (slot0 >= 0) out[(int64_t)slot0 * p.features + 8] = d[2];
        if (slot1 >= 0) out[(int64_t)slot1 * p.features + 8] = d[3];
    }
}

// The same for a warp that holds 32 features × 4 tokens: v[i] of a thread is feature 8·i + lane / 4 of token lane % 4 of them. Four
// lanes exchange, so that 8 lanes write 128 bytes of one token. `feature` is the first of the 32.
__device__ __forceinline__ void store_row_line(float (&v)[4], const product &p, int feature, int slot) {
    int lane = threadIdx.x & 31, row = lane / 4;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        float got = __shfl_xor_sync(0xffffffffu, row & 1 ? v[i] : v[i + 1], 4);
        (row & 1 ? v[i] : v[i + 1]) = got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float got = __shfl_xor_sync(0xffffffffu, row & 2 ? v[i] : v[i + 2], 8);
        (row & 2 ? v[i] : v[i + 2]) = got;
    }
    if (slot >= 0 && feature < p.features) {
        float *out = static_cast<float *>(p.out) + (int64_t)slot * p.features + feature + row % 4 * 8 + row / 4 * 4;
        *reinterpret_cast<float4 *>(out) = make_float4(v[0], v[1], v[2], v[3]);
    }
}

// The two products of an FFN.
inline product first_product(const moe_cuda_ffn &f) {
    product p = {f.expert_first, f.sorted_rows, nullptr, f.maps, f.gate_up, static_cast<const __nv_bfloat16 *>(f.x), f.inner};
    p.num_groups = f.num_groups;
    p.features = (f.gated ? 2 : 1) * f.width;
    p.k = f.hidden;
    p.feature_first = (f.gated ? 2 : 1) * f.width_first;
    p.a_stride = f.hidden;
    return p;
}

inline product second_product(const moe_cuda_ffn &f) {
    product p = {f.expert_first, nullptr, f.slot_of, f.maps, f.down, static_cast<const __nv_bfloat16 *>(f.inner), f.y};
    p.num_groups = f.num_groups;
    p.features = f.hidden;
    p.k = f.width;
    p.k_first = f.width_first;
    p.a_stride = f.width_loaded;
    return p;
}

}  // namespace moe_expert
