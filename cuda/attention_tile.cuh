/* A tile of prompt attention, as the kernels for sm_80 and sm_90 take it. */
#pragma once
#include "cuda/base_device.cuh"

typedef struct tile {
    int32_t first_row, rows, kv_head, group, table_at;
    int32_t first_position, last_position; /* of its rows */
} tile;

static __device__ __forceinline__ tile read_tile(const moe_cuda_attention &a, int item, int kv_head) {
    const int4 from = *(const int4 *)&a.tiles[item];
    tile t;
    t.first_row = from.x;
    t.rows = from.y;
    t.kv_head = kv_head;
    t.group = a.shape.num_heads / a.shape.num_kv_heads;
    t.table_at = from.w;
    t.first_position = from.z;
    t.last_position = t.first_position + t.rows - 1;
    return t;
}
