#include "cuda/tune.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "common/alloc.h"

#define LINE_BYTES 256
#define MEASURE_MAX_ROWS 512 /* of an expert */
#define MEASURE_RUNS 5

/* Where no file speaks: measured on an H100 with the shapes of Mixtral 8x7B, OLMoE and Qwen3 30B. */
static const int32_t default_limits[MOE_CUDA_TUNE_TILES - 1] = {16, 48, 112};

int32_t moe_cuda_tune_tile(const moe_cuda_tune *tune, int32_t hidden, int32_t width, int32_t num_assignments, int32_t num_groups) {
    const int32_t *limit = default_limits;
    for (int32_t i = 0; tune && i < tune->count; i++)
        if (tune->rows[i].hidden == hidden && tune->rows[i].width == width) limit = tune->rows[i].limit;
    int32_t groups = num_groups < num_assignments ? num_groups : num_assignments, tile = 0;
    int32_t mean = groups > 0 ? (num_assignments + groups - 1) / groups : 0;
    while (tile < MOE_CUDA_TUNE_TILES - 1 && mean > limit[tile]) tile++;
    return moe_cuda_tune_tokens(tile);
}

moe_status moe_cuda_tune_add(moe_cuda_tune *tune, const moe_cuda_tune_row *row, moe_error *err) {
    int32_t at = 0;
    while (at < tune->count && (tune->rows[at].hidden != row->hidden || tune->rows[at].width != row->width)) at++;
    if (at == MOE_CUDA_TUNE_SHAPES)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "more than %d shapes of experts in one table", MOE_CUDA_TUNE_SHAPES);
    tune->rows[at] = *row;
    if (at == tune->count) tune->count++;
    return MOE_OK;
}

static bool parse_row(const char *line, moe_cuda_tune_row *row) {
    int end = 0;
    int got = sscanf(line, "%9" SCNd32 " %9" SCNd32 " %9" SCNd32 " %9" SCNd32 " %9" SCNd32 " %n", &row->hidden, &row->width,
                     &row->limit[0], &row->limit[1], &row->limit[2], &end);
    return got == 5 && line[end] == '\0' && row->hidden > 0 && row->width > 0 && row->limit[0] >= 0 &&
           row->limit[1] >= row->limit[0] && row->limit[2] >= row->limit[1];
}

static moe_status read_lines(FILE *file, const char *path, moe_cuda_tune *tune, moe_error *err) {
    char line[LINE_BYTES];
    for (int number = 1; fgets(line, sizeof line, file); number++) {
        moe_cuda_tune_row row;
        line[strcspn(line, "#\n")] = '\0';
        if (line[strspn(line, " \t")] == '\0') continue;
        if (!parse_row(line, &row))
            return moe_fail(err, MOE_INVALID_ARGUMENT, "%s:%d: expected hidden, width and three ascending limits", path, number);
        moe_status status = moe_cuda_tune_add(tune, &row, err);
        if (status != MOE_OK) return status;
    }
    if (ferror(file)) return moe_fail(err, MOE_UNAVAILABLE, "cannot read %s: %s", path, strerror(errno));
    return MOE_OK;
}

moe_status moe_cuda_tune_read(const char *path, moe_cuda_tune *tune, moe_error *err) {
    FILE *file = fopen(path, "re");
    *tune = (moe_cuda_tune){0};
    if (!file) {
        moe_status code = errno == ENOENT ? MOE_NOT_FOUND : MOE_UNAVAILABLE;
        return moe_fail(err, code, "cannot read %s: %s", path, strerror(errno));
    }
    moe_status status = read_lines(file, path, tune, err);
    fclose(file);
    if (status != MOE_OK) tune->count = 0;
    return status;
}

moe_status moe_cuda_tune_write(const char *path, const moe_cuda_tune *tune, moe_error *err) {
    char temporary[4096];
    if ((size_t)snprintf(temporary, sizeof temporary, "%s.new", path) >= sizeof temporary)
        return moe_fail(err, MOE_UNAVAILABLE, "cannot write %s: the path is too long", path);
    FILE *file = fopen(temporary, "we");
    if (!file) return moe_fail(err, MOE_UNAVAILABLE, "cannot write %s: %s", temporary, strerror(errno));
    fprintf(file, "# hidden width, then the largest mean rows of an expert for token tiles of 32, 64 and 128\n");
    for (int32_t i = 0; i < tune->count; i++) {
        const moe_cuda_tune_row *row = &tune->rows[i];
        fprintf(file, "%" PRId32 " %" PRId32 " %" PRId32 " %" PRId32 " %" PRId32 "\n", row->hidden, row->width, row->limit[0],
                row->limit[1], row->limit[2]);
    }
    bool written = !ferror(file);
    if (fclose(file) != 0 || !written || rename(temporary, path) != 0) {
        int reason = errno;
        remove(temporary);
        return moe_fail(err, MOE_UNAVAILABLE, "cannot write %s: %s", path, strerror(reason));
    }
    return MOE_OK;
}

/* ---- measuring ---- */

/* Device memory of one measurement. */
typedef struct rig {
    moe_cuda_ffn ffn;
    void *memory[4]; /* weights, activations, tables, maps and pointers */
    int32_t experts;
    cudaEvent_t begin, end;
} rig;

static void rig_free(rig *r) {
    for (size_t i = 0; i < sizeof r->memory / sizeof *r->memory; i++) cudaFree(r->memory[i]);
    if (r->begin) cudaEventDestroy(r->begin);
    if (r->end) cudaEventDestroy(r->end);
}

/* Host tables of pointers and maps for the experts, copied to the device. */
static cudaError_t rig_tables(rig *r, uint8_t *weights, size_t expert_bytes, size_t down_at) {
    size_t maps_bytes = (size_t)r->experts * sizeof(moe_cuda_expert_maps), pointers = (size_t)r->experts;
    size_t bytes = maps_bytes + 3 * pointers * sizeof(void *);
    uint8_t *host = moe_alloc_aligned(1, bytes), *device = r->memory[3];
    if (!host) return cudaErrorMemoryAllocation;
    moe_cuda_expert_maps *maps = (moe_cuda_expert_maps *)(void *)host;
    const void **table = (const void **)(void *)(host + maps_bytes);
    cudaError_t error = cudaSuccess;
    for (int32_t e = 0; e < r->experts && error == cudaSuccess; e++) {
        const uint8_t *at = weights + (size_t)e * expert_bytes;
        table[e] = at;
        table[pointers + (size_t)e] = at + down_at;
        table[2 * pointers + (size_t)e] = device + (size_t)e * sizeof *maps;
        if (r->ffn.device.arch >= 90)
            error = moe_cuda_expert_maps_make(at, at + down_at, r->ffn.hidden, r->ffn.width, r->ffn.gated, &maps[e]);
    }
    if (error == cudaSuccess) error = cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice);
    const void *const *on_device = (const void *const *)(const void *)(device + maps_bytes);
    r->ffn.gate_up = on_device;
    r->ffn.down = on_device + pointers;
    r->ffn.maps = (const moe_cuda_expert_maps *const *)(const void *)(on_device + 2 * pointers);
    moe_free(host);
    return error;
}

static cudaError_t rig_make(rig *r, int32_t num_experts) {
    moe_cuda_ffn *f = &r->ffn;
    size_t hidden = (size_t)f->hidden, width = (size_t)f->width, first_bytes = (f->gated ? 4 : 2) * width * hidden;
    size_t down_at = (first_bytes + 255) / 256 * 256, expert_bytes = down_at + (2 * width * hidden + 255) / 256 * 256, free_bytes,
           total_bytes;
    cudaError_t error = cudaMemGetInfo(&free_bytes, &total_bytes);
    if (error != cudaSuccess) return error;
    size_t each = expert_bytes + MEASURE_MAX_ROWS * (2 * hidden + 2 * width + 4 * hidden), fit = free_bytes / 10 * 9 / each;
    r->experts = fit < (size_t)num_experts ? (int32_t)fit : num_experts;
    if (r->experts < 1) return cudaErrorMemoryAllocation;
    size_t experts = (size_t)r->experts, rows = experts * MEASURE_MAX_ROWS;
    size_t tables = experts * (sizeof(moe_cuda_expert_maps) + 3 * sizeof(void *));
    if ((error = cudaMalloc(&r->memory[0], experts * expert_bytes)) != cudaSuccess) return error;
    if ((error = cudaMalloc(&r->memory[1], rows * (6 * hidden + 2 * width))) != cudaSuccess) return error;
    if ((error = cudaMalloc(&r->memory[2], (rows + experts + 1) * sizeof(int32_t))) != cudaSuccess) return error;
    if ((error = cudaMalloc(&r->memory[3], tables)) != cudaSuccess) return error;
    /* Small numbers that are not zero: time and power depend on the operands' bits, if little. */
    if ((error = cudaMemset(r->memory[0], 0x3c, experts * expert_bytes)) != cudaSuccess) return error;
    if ((error = cudaMemset(r->memory[1], 0x3c, rows * (6 * hidden + 2 * width))) != cudaSuccess) return error;
    uint8_t *activations = r->memory[1];
    f->x = activations;
    f->y = (float *)(void *)(activations + 2 * rows * hidden);
    f->inner = activations + 6 * rows * hidden;
    f->sorted_rows = r->memory[2];
    f->expert_first = f->sorted_rows + rows;
    if ((error = cudaEventCreate(&r->begin)) != cudaSuccess || (error = cudaEventCreate(&r->end)) != cudaSuccess) return error;
    return rig_tables(r, r->memory[0], expert_bytes, down_at);
}

/* `rows` rows for every expert, all different. */
static cudaError_t rig_route(rig *r, int32_t rows) {
    size_t count = (size_t)r->experts * (size_t)rows, at = (size_t)r->experts * MEASURE_MAX_ROWS;
    int32_t *host = moe_calloc(count + (size_t)r->experts + 1, sizeof *host), *device = r->memory[2];
    if (!host) return cudaErrorMemoryAllocation;
    for (size_t i = 0; i < count; i++) host[i] = (int32_t)i;
    for (int32_t e = 0; e <= r->experts; e++) host[count + (size_t)e] = e * rows;
    cudaError_t error = cudaMemcpy(device, host, count * sizeof *host, cudaMemcpyHostToDevice);
    if (error == cudaSuccess)
        error = cudaMemcpy(device + at, host + count, ((size_t)r->experts + 1) * sizeof *host, cudaMemcpyHostToDevice);
    moe_free(host);
    r->ffn.num_groups = r->experts;
    r->ffn.num_assignments = (int32_t)count;
    return error;
}

/* The fastest of MEASURE_RUNS runs. */
static cudaError_t rig_time(rig *r, float *best_ms) {
    *best_ms = 1e30f;
    for (int i = 0; i <= MEASURE_RUNS; i++) {
        float ms;
        cudaError_t error = cudaEventRecord(r->begin, NULL);
        if (error == cudaSuccess) error = moe_cuda_expert_ffn(&r->ffn, NULL);
        if (error == cudaSuccess) error = cudaEventRecord(r->end, NULL);
        if (error == cudaSuccess) error = cudaEventSynchronize(r->end);
        if (error == cudaSuccess) error = cudaEventElapsedTime(&ms, r->begin, r->end);
        if (error != cudaSuccess) return error;
        if (i > 0 && ms < *best_ms) *best_ms = ms;
    }
    return cudaSuccess;
}

/* A wider tile is taken from the first number of rows on at which it is more than this much faster. */
#define MEASURE_MARGIN 0.99f

static cudaError_t rig_limits(rig *r, int32_t limit[MOE_CUDA_TUNE_TILES - 1]) {
    for (int32_t i = 0; i < MOE_CUDA_TUNE_TILES - 1; i++) limit[i] = MEASURE_MAX_ROWS;
    for (int32_t rows = MEASURE_MAX_ROWS, above = MOE_CUDA_TUNE_TILES - 1; rows >= 1; rows = rows > 32 ? rows - 32 : rows / 2) {
        float best_ms = 1e30f;
        int32_t best = 0;
        cudaError_t error = rig_route(r, rows);
        for (int32_t tile = 0; tile <= above && error == cudaSuccess; tile++) {
            float ms;
            r->ffn.tile_tokens = moe_cuda_tune_tokens(tile);
            error = rig_time(r, &ms);
            if (error == cudaSuccess && ms < best_ms * MEASURE_MARGIN) best_ms = ms, best = tile;
        }
        if (error != cudaSuccess) return error;
        for (int32_t i = best; i < above; i++) limit[i] = rows;
        above = best;
    }
    for (int32_t i = 0; i < MOE_CUDA_TUNE_TILES - 1; i++)
        if (limit[i] == MEASURE_MAX_ROWS) limit[i] = 1 << 20; /* no wider tile was ever better */
    return cudaSuccess;
}

moe_status moe_cuda_tune_measure(moe_cuda_expert_device device, int32_t hidden, int32_t width, bool gated, int32_t num_experts,
                                 moe_cuda_tune_row *row, moe_error *err) {
    rig r = {.ffn = {.device = device, .gated = gated, .hidden = hidden, .width = width, .width_loaded = width}};
    if (!moe_cuda_expert_supported(hidden, width, 0) || num_experts < 1 || num_experts > MOE_CUDA_MAX_GROUPS)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "no expert kernels to tune for %d experts of %d x %d", num_experts, hidden, width);
    *row = (moe_cuda_tune_row){.hidden = hidden, .width = width};
    cudaError_t error = rig_make(&r, num_experts);
    if (error == cudaSuccess) error = rig_limits(&r, row->limit);
    rig_free(&r);
    if (error == cudaSuccess) return MOE_OK;
    cudaGetLastError();
    return moe_fail(err, error == cudaErrorMemoryAllocation ? MOE_RESOURCE_EXHAUSTED : MOE_INTERNAL,
                    "tuning expert kernels for %d x %d: %s", hidden, width, cudaGetErrorString(error));
}
