#include "cuda/step.h"

#include <stdlib.h>

#define HEADER_INTS 8 /* num_rows, num_pieces, num_tiles, 0; 0, num_rows (`whole`), 0, 0 */

_Static_assert(MOE_CUDA_PAGE_TOKENS == MOE_KV_BLOCK_TOKENS && MOE_CUDA_GATE_TOP_K == MOE_MAX_TOP_K,
               "base_kernels.h repeats backend.h");

/* Rows [first, end) of one sequence at consecutive positions. */
typedef struct span {
    int32_t first, end;
} span;

static span next_span(const moe_segment *g, int32_t first) {
    span s = {first, first + 1};
    while (s.end < g->num_rows && g->sequences[s.end] == g->sequences[first] &&
           g->positions[s.end] == g->positions[s.end - 1] + 1)
        s.end++;
    return s;
}

static bool by_tiles(const moe_cuda_step_shape *shape, span s) {
    return shape->tiles_only || s.end - s.first > MOE_CUDA_DECODE_ROWS;
}

static int32_t lowest_key(const moe_cuda_step_shape *shape, int32_t position) {
    int32_t window = shape->attention.window;
    return window > 0 && position + 1 > window ? position + 1 - window : 0;
}

static int32_t pieces_of(const moe_cuda_step_shape *shape, int32_t position, int32_t tokens) {
    return position / tokens - lowest_key(shape, position) / tokens + 1;
}

/* Buckets of rows, so that few graphs serve all decoding steps. */
static int32_t bucket(int32_t rows) {
    int32_t unit = rows <= 64 ? 8 : 32, power = 1;
    while (power < rows) power *= 2;
    return rows <= 8 ? power : (rows + unit - 1) / unit * unit;
}

int32_t moe_cuda_step_room(int32_t max_rows) { return max_rows <= MOE_CUDA_GRAPH_ROWS ? bucket(max_rows) : max_rows; }

static int32_t four(int32_t ints) { return (ints + 3) / 4 * 4; }

/* Pieces of `tokens` of all decoding rows; *most is that of one row. */
static int64_t count_pieces(const moe_segment *g, const moe_cuda_step_shape *shape, int32_t tokens, int32_t *most) {
    int64_t count = 0;
    *most = 0;
    for (span s = next_span(g, 0);; s = next_span(g, s.end)) {
        for (int32_t row = s.first; row < s.end && !by_tiles(shape, s); row++) {
            int32_t pieces = pieces_of(shape, g->positions[row], tokens);
            count += pieces;
            *most = pieces > *most ? pieces : *most;
        }
        if (s.end == g->num_rows) return count;
    }
}

/* As short as a few waves of blocks allow. */
static void cut(const moe_segment *g, const moe_cuda_step_shape *shape, moe_cuda_step *step) {
    int32_t most, tokens = MOE_CUDA_PIECE_TOKENS;
    int64_t count = count_pieces(g, shape, tokens, &most);
    while (most > 1 && (most > MOE_CUDA_MAX_PIECES || count * shape->attention.num_kv_heads > 8 * shape->num_sms)) {
        tokens *= 2;
        count = count_pieces(g, shape, tokens, &most);
    }
    step->num_pieces = (int32_t)count;
    step->piece_tokens = tokens;
}

void moe_cuda_step_plan(const moe_segment *g, int32_t vocab, const moe_cuda_step_shape *shape, moe_cuda_step *out, size_t *ints) {
    int32_t tile = moe_cuda_attention_supported(&shape->attention) ? moe_cuda_prefill_rows(&shape->attention) : 1;
    size_t blocks = 0;
    *out = (moe_cuda_step){.num_rows = g->num_rows, .launch_rows = g->num_rows};
    for (int32_t row = 0; row < g->num_rows; row++) {
        MOE_ASSERT(g->sequences[row] >= 0 && g->sequences[row] < g->num_views && g->positions[row] >= 0);
        MOE_ASSERT(g->positions[row] / MOE_KV_BLOCK_TOKENS < g->views[g->sequences[row]].num_blocks);
        MOE_ASSERT(g->token_ids[row] >= 0 && g->token_ids[row] < vocab);
    }
    for (span s = next_span(g, 0);; s = next_span(g, s.end)) {
        blocks += (size_t)(g->positions[s.end - 1] / MOE_KV_BLOCK_TOKENS + 1);
        if (by_tiles(shape, s)) out->num_tiles += (s.end - s.first + tile - 1) / tile;
        if (s.end == g->num_rows) break;
    }
    cut(g, shape, out);
    if (shape->padded && g->num_rows <= MOE_CUDA_GRAPH_ROWS) out->launch_rows = bucket(g->num_rows);
    *ints = HEADER_INTS + (3 + 4) * (size_t)four(out->launch_rows) + 8 * (size_t)out->num_pieces + blocks;
}

static void fill_pieces(const moe_segment *g, const moe_cuda_step_shape *shape, const moe_cuda_step *step, span s,
                        int32_t table_at, moe_cuda_piece **to) {
    for (int32_t row = s.first; row < s.end; row++) {
        int32_t position = g->positions[row], tokens = step->piece_tokens, lowest = lowest_key(shape, position);
        int32_t count = pieces_of(shape, position, tokens);
        for (int32_t i = 0; i < count; i++) {
            int32_t lo = (lowest / tokens + i) * tokens, hi = lo + tokens;
            *(*to)++ = (moe_cuda_piece){.row = row,
                                        .lo = lo > lowest ? lo : lowest,
                                        .hi = hi < position + 1 ? hi : position + 1,
                                        .table_at = table_at,
                                        .settled = g->positions[s.first],
                                        .place = i,
                                        .pieces = count};
        }
    }
}

static int by_keys(const void *a, const void *b) {
    const moe_cuda_tile *x = a, *y = b;
    return x->first_position != y->first_position ? y->first_position - x->first_position : y->first_row - x->first_row;
}

void moe_cuda_step_fill(const moe_segment *g, const moe_cuda_step_shape *shape, const int32_t *identity, int32_t *host,
                        const int32_t *device, moe_cuda_step *step) {
    int32_t stride = four(step->launch_rows), at = HEADER_INTS, tables_at = at + 7 * stride + 8 * step->num_pieces;
    int32_t *table_at = host + at + 2 * stride;
    const int32_t header[HEADER_INTS] = {g->num_rows, step->num_pieces, step->num_tiles, 0, 0, g->num_rows, 0, 0};
    moe_cuda_tile *tile = (moe_cuda_tile *)(void *)(host + at + 3 * stride), *first_tile = tile;
    moe_cuda_piece *piece = (moe_cuda_piece *)(void *)(host + at + 7 * stride);
    int32_t tile_rows = step->num_tiles > 0 ? moe_cuda_prefill_rows(&shape->attention) : 1;
    memcpy(host, header, sizeof header);
    memcpy(host + at, g->token_ids, (size_t)g->num_rows * sizeof(int32_t));
    memcpy(host + at + stride, g->positions, (size_t)g->num_rows * sizeof(int32_t));
    for (span s = next_span(g, 0);; s = next_span(g, s.end)) {
        const moe_kv_view *view = &g->views[g->sequences[s.first]];
        int32_t blocks = g->positions[s.end - 1] / MOE_KV_BLOCK_TOKENS + 1;
        for (int32_t b = 0; b < blocks; b++) {
            MOE_ASSERT(view->blocks[b] >= 0);
            host[tables_at + b] = view->blocks[b];
        }
        for (int32_t row = s.first; row < s.end; row++) table_at[row] = tables_at;
        if (!by_tiles(shape, s)) fill_pieces(g, shape, step, s, tables_at, &piece);
        for (int32_t row = s.first; row < s.end && by_tiles(shape, s); row += tile_rows)
            *tile++ = (moe_cuda_tile){.first_row = row,
                                      .rows = s.end - row < tile_rows ? s.end - row : tile_rows,
                                      .first_position = g->positions[row],
                                      .table_at = tables_at};
        tables_at += blocks;
        if (s.end == g->num_rows) break;
    }
    /* those with the most keys begin first */
    qsort(first_tile, (size_t)(tile - first_tile), sizeof *tile, by_keys);
    step->rows = (moe_cuda_row_inputs){.num_rows = device,
                                       .token_ids = device + at,
                                       .positions = device + at + stride,
                                       .table_at = device + at + 2 * stride,
                                       .tables = device};
    step->places = (moe_simple_places){
        .positions = step->rows.positions, .sequences = identity, .table_first = step->rows.table_at, .tables = device};
    step->num_pieces_at = device + 1;
    step->num_tiles_at = device + 2;
    step->whole = device + 4;
    step->tiles = (const moe_cuda_tile *)(const void *)(device + at + 3 * stride);
    step->pieces = (const moe_cuda_piece *)(const void *)(device + at + 7 * stride);
}
