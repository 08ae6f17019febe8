/* Expert FFN kernels of the GPU against double-precision mathematics written here: permutation, both architectures' kernels, every
 * token tile, empty and uneven groups, slices of the width, and that a row's bits do not depend on the batch it is in. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/random.h"
#include "common/tensor.h"
#include "tests/support/test.h"

#ifdef MOESAIC_HAS_CUDA
#include "cuda/expert_kernels.h"

#define CHECK(call) assert_int_equal((call), cudaSuccess)
#define MAX_EXPERTS 64
#define POISON 0xff /* float bytes of it are not a number */

/* One problem: weights, rows, routing, on the host and on the device. */
typedef struct problem {
    bool gated;
    int32_t experts, hidden, width, rows, top_k, assignments;
    uint16_t *gate_up[MAX_EXPERTS], *down[MAX_EXPERTS], *x;
    int32_t *ids;
    float *weights;
    moe_cuda_permute permute;
    moe_cuda_ffn ffn;
    void *allocations[2 * MAX_EXPERTS + 16];
    int num_allocations;
} problem;

static void *device_memory(problem *p, size_t bytes) {
    void *memory;
    CHECK(cudaMalloc(&memory, bytes));
    CHECK(cudaMemset(memory, POISON, bytes));
    return p->allocations[p->num_allocations++] = memory;
}

static void *to_device(problem *p, const void *host, size_t bytes) {
    void *memory = device_memory(p, bytes);
    CHECK(cudaMemcpy(memory, host, bytes, cudaMemcpyHostToDevice));
    return memory;
}

static uint16_t *random_bf16(moe_random *random, size_t count, float scale) {
    uint16_t *out = malloc(count * sizeof *out);
    assert_non_null(out);
    for (size_t i = 0; i < count; i++) out[i] = moe_f32_to_bf16(scale * (float)(2 * moe_random_unit(random) - 1));
    return out;
}

/* Routing: expert e is chosen with weight that falls with e, and every eighth never, so groups are uneven and some are empty. Ids
 * ascend within a row. */
static void random_routing(problem *p, moe_random *random) {
    for (int32_t r = 0; r < p->rows; r++) {
        int32_t *ids = p->ids + r * p->top_k;
        for (int32_t j = 0; j < p->top_k;) {
            int32_t e = (int32_t)(p->experts * moe_random_unit(random) * moe_random_unit(random)), k = 0;
            while (k < j && ids[k] != e) k++;
            if (k < j || e % 8 == 7) continue;
            for (k = j++; k > 0 && ids[k - 1] > e; k--) ids[k] = ids[k - 1];
            ids[k] = e;
        }
        for (int32_t j = 0; j < p->top_k; j++) p->weights[r * p->top_k + j] = (float)moe_random_unit(random);
    }
}

static void make_experts(problem *p, moe_random *random) {
    size_t one = (size_t)p->width * (size_t)p->hidden, up = p->gated ? 2 * one : one, e = (size_t)p->experts;
    const void *gate_up[MAX_EXPERTS], *down[MAX_EXPERTS], *maps[MAX_EXPERTS];
    for (size_t i = 0; i < e; i++) {
        _Alignas(64) moe_cuda_expert_maps host_maps = {0};
        p->gate_up[i] = random_bf16(random, up, 2 / sqrtf((float)p->hidden));
        p->down[i] = random_bf16(random, one, 2 / sqrtf((float)p->width));
        gate_up[i] = to_device(p, p->gate_up[i], up * 2);
        down[i] = to_device(p, p->down[i], one * 2);
        if (p->ffn.device.arch == 90)
            CHECK(moe_cuda_expert_maps_make(gate_up[i], down[i], p->hidden, p->width, p->gated, &host_maps));
        if (i == 0) maps[0] = device_memory(p, e * sizeof host_maps);
        maps[i] = (const moe_cuda_expert_maps *)maps[0] + i;
        CHECK(cudaMemcpy((void *)(uintptr_t)maps[i], &host_maps, sizeof host_maps, cudaMemcpyHostToDevice));
    }
    p->ffn.gate_up = to_device(p, gate_up, e * sizeof *gate_up);
    p->ffn.down = to_device(p, down, e * sizeof *down);
    p->ffn.maps = to_device(p, maps, e * sizeof *maps);
}

static problem make_problem(moe_cuda_expert_device device, bool gated, int32_t experts, int32_t hidden, int32_t width,
                            int32_t rows, int32_t top_k, uint64_t seed) {
    problem p = {gated, experts, hidden, width, rows, top_k, rows * top_k, .num_allocations = 0};
    moe_random random = {seed};
    size_t a = (size_t)p.assignments, e = (size_t)experts;
    p.ffn = (moe_cuda_ffn){.device = device,
                           .gated = gated,
                           .hidden = hidden,
                           .width = width,
                           .width_loaded = width,
                           .num_groups = experts,
                           .num_assignments = p.assignments};
    p.ids = calloc(a, sizeof *p.ids);
    p.weights = calloc(a, sizeof *p.weights);
    random_routing(&p, &random);
    p.x = random_bf16(&random, (size_t)rows * (size_t)hidden, 1);
    make_experts(&p, &random);
    p.permute = (moe_cuda_permute){.rows = rows, .top_k = top_k, .num_experts = experts};
    p.permute.ids = to_device(&p, p.ids, a * 4);
    p.permute.weights = to_device(&p, p.weights, a * 4);
    p.permute.expert_first = device_memory(&p, (e + 1) * 4);
    p.permute.sorted_rows = device_memory(&p, a * 4);
    p.permute.slot_of = device_memory(&p, a * 4);
    p.permute.sorted_weights = device_memory(&p, a * 4);
    p.permute.scratch = device_memory(&p, moe_cuda_permute_scratch_bytes(rows, top_k, experts));
    p.ffn.expert_first = p.permute.expert_first;
    p.ffn.sorted_rows = p.permute.sorted_rows;
    p.ffn.slot_of = p.permute.slot_of;
    p.ffn.x = to_device(&p, p.x, (size_t)rows * (size_t)hidden * 2);
    p.ffn.inner = device_memory(&p, a * (size_t)width * 2);
    p.ffn.y = device_memory(&p, a * (size_t)hidden * 4);
    return p;
}

static void free_problem(problem *p) {
    for (int i = 0; i < p->num_allocations; i++) CHECK(cudaFree(p->allocations[i]));
    for (int32_t e = 0; e < p->experts; e++) {
        free(p->gate_up[e]);
        free(p->down[e]);
    }
    free(p->x);
    free(p->ids);
    free(p->weights);
}

/* y of every slot in slot order; the caller frees it. */
static float *run(problem *p, int32_t tile) {
    size_t bytes = (size_t)p->assignments * (size_t)p->hidden * 4;
    float *y = malloc(bytes);
    p->ffn.tile_tokens = tile;
    CHECK(cudaMemset(p->ffn.y, POISON, bytes));
    CHECK(cudaMemset(p->ffn.inner, POISON, (size_t)p->assignments * (size_t)p->width * 2));
    CHECK(moe_cuda_permute_run(&p->permute, NULL));
    CHECK(moe_cuda_expert_ffn(&p->ffn, NULL));
    CHECK(cudaMemcpy(y, p->ffn.y, bytes, cudaMemcpyDeviceToHost));
    return y;
}

static double dot(const uint16_t *a, const uint16_t *b, int32_t n) {
    double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += (double)moe_bf16_to_f32(a[i]) * (double)moe_bf16_to_f32(b[i]);
    return sum;
}

/* The output of one slot over columns [first, first + width) of the intermediate width, in double precision but for the rounding
 * of the intermediate to bfloat16. */
static void truth(const problem *p, int32_t slot, int32_t first, int32_t width, double *y) {
    const uint16_t *gate_up = p->gate_up[p->ids[slot]], *down = p->down[p->ids[slot]];
    const uint16_t *x = p->x + (int64_t)(slot / p->top_k) * p->hidden;
    uint16_t *inner = malloc((size_t)width * sizeof *inner);
    for (int32_t i = 0; i < width; i++) {
        int32_t gate_row = (first + i) / 8 * 16 + (first + i) % 8, up_row = p->gated ? gate_row + 8 : first + i;
        double gate = p->gated ? dot(gate_up + (int64_t)gate_row * p->hidden, x, p->hidden) : 0;
        double up = dot(gate_up + (int64_t)up_row * p->hidden, x, p->hidden);
        inner[i] = moe_f32_to_bf16((float)(p->gated ? gate / (1 + exp(-gate)) * up : up < 0 ? 0 : up));
    }
    for (int32_t h = 0; h < p->hidden; h++) y[h] = dot(down + (int64_t)h * p->width + first, inner, width);
    free(inner);
}

/* Slots every `step` against the truth. */
static void compare(const problem *p, const float *y, int32_t first, int32_t width, int32_t step) {
    double *want = malloc((size_t)p->hidden * sizeof *want);
    for (int32_t slot = 0; slot < p->assignments; slot += step) {
        double error = 0, norm = 0;
        truth(p, slot, first, width, want);
        for (int32_t h = 0; h < p->hidden; h++) {
            double d = y[(int64_t)slot * p->hidden + h] - want[h];
            error += d * d;
            norm += want[h] * want[h];
        }
        /* not (error > bound), so that a number that is none fails */
        if (!(sqrt(error) <= 3e-3 * sqrt(norm))) fail_msg("slot %d: relative error %g", slot, sqrt(error / norm));
    }
    free(want);
}

/* ---- tests ---- */

static void check_permute(int32_t rows, int32_t top_k, int32_t experts) {
    int32_t a = rows * top_k, placed = 0;
    problem p = {.num_allocations = 0};
    moe_random random = {(uint64_t)(rows * 31 + experts)};
    int32_t *ids = calloc((size_t)a, 4), *first = calloc((size_t)experts + 1, 4), *row = calloc((size_t)a, 4), *slot = calloc((size_t)a, 4);
    float *weights = calloc((size_t)a, 4), *sorted = calloc((size_t)a, 4);
    int32_t *counted = calloc((size_t)experts, 4);
    for (int32_t e = 0; e < experts; e++) counted[e] = e;
    for (int32_t i = 0; i < a; i++) {
        ids[i] = (int32_t)moe_random_below(&random, (uint64_t)experts + 1) - (i % 5 == 0); /* some outside [0, experts) */
        weights[i] = (float)i;
    }
    moe_cuda_permute args = {rows, top_k, experts, to_device(&p, ids, (size_t)a * 4), to_device(&p, weights, (size_t)a * 4),
                             device_memory(&p, ((size_t)experts + 1) * 4), device_memory(&p, (size_t)a * 4),
                             device_memory(&p, (size_t)a * 4), device_memory(&p, (size_t)a * 4),
                             device_memory(&p, moe_cuda_permute_scratch_bytes(rows, top_k, experts)),
                             to_device(&p, counted, (size_t)experts * 4)};
    CHECK(moe_cuda_permute_run(&args, NULL));
    CHECK(cudaMemcpy(counted, args.expert_rows, (size_t)experts * 4, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(first, args.expert_first, ((size_t)experts + 1) * 4, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(row, args.sorted_rows, (size_t)a * 4, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(slot, args.slot_of, (size_t)a * 4, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(sorted, args.sorted_weights, (size_t)a * 4, cudaMemcpyDeviceToHost));
    for (int32_t e = 0; e < experts; e++) {
        assert_int_equal(first[e], placed);
        for (int32_t i = 0; i < a; i++) {
            if (ids[i] != e) continue;
            assert_int_equal(slot[placed], i);
            assert_int_equal(row[placed], i / top_k);
            assert_true(sorted[placed] == weights[i]);
            placed++;
        }
    }
    assert_int_equal(first[experts], placed);
    for (int32_t e = 0; e < experts; e++) assert_int_equal(counted[e], e + first[e + 1] - first[e]); /* added to the e before */
    for (int i = 0; i < p.num_allocations; i++) CHECK(cudaFree(p.allocations[i]));
    free(ids), free(first), free(row), free(slot), free(weights), free(sorted), free(counted);
}

static void test_permute(void **state) {
    (void)state;
    check_permute(1, 8, 128);
    check_permute(1, 1, 1);
    check_permute(128, 8, 512);
    check_permute(129, 8, 64);
    check_permute(1000, 16, 1024);
    check_permute(8192, 8, 128);
}

static void each_arch(void (*check)(moe_cuda_expert_device device)) {
    for (int force = 0; force < 2; force++) {
        moe_cuda_expert_device device;
        CHECK(moe_cuda_expert_device_open(force, &device));
        if (force || device.arch == 90) check(device);
    }
}

/* Every tile against the truth, and bit for bit against each other. */
static void check_tiles(moe_cuda_expert_device device, bool gated, int32_t experts, int32_t hidden, int32_t width, int32_t rows,
                        int32_t top_k) {
    problem p = make_problem(device, gated, experts, hidden, width, rows, top_k, 1);
    float *want = run(&p, 32);
    compare(&p, want, 0, width, p.assignments / 200 + 1);
    for (int32_t tile = 0; tile <= 256; tile = tile ? 2 * tile : 64) {
        float *y = run(&p, tile);
        if (memcmp(y, want, (size_t)p.assignments * (size_t)hidden * 4) != 0) fail_msg("sm_%d: tile %d has other bits", device.arch, tile);
        free(y);
    }
    free(want);
    free_problem(&p);
}

static void shapes(moe_cuda_expert_device device) {
    for (int gated = 0; gated <= 1; gated++) {
        check_tiles(device, gated, 8, 256, 192, 1, 2); /* without a gate, a width that is no multiple of a tile */
        check_tiles(device, gated, 8, 64, 64, 5, 1);
        check_tiles(device, gated, 4, 320, 128, 1500, 2); /* hidden is no multiple of a tile; groups of more than one tile */
        check_tiles(device, gated, 64, 512, 256, 300, 8);
        check_tiles(device, gated, 2, 128, 192, 9000, 1);  /* more than one band of token tiles */
        check_tiles(device, gated, 4, 1024, 448, 4000, 2); /* several of the widest tiles for each multiprocessor */
    }
    check_tiles(device, false, 16, 768, 3072, 200, 1); /* Switch-Base's experts */
}

static void test_shapes(void **state) {
    (void)state;
    each_arch(shapes);
}

/* A row alone has the bits that it has in a batch. */
static void alone(moe_cuda_expert_device device) {
    problem p = make_problem(device, true, 16, 512, 256, 200, 4, 2);
    float *all = run(&p, 0);
    p.permute.rows = 1;
    p.assignments = p.ffn.num_assignments = p.top_k;
    float *one = run(&p, 0);
    assert_memory_equal(one, all, (size_t)p.top_k * (size_t)p.hidden * 4);
    free(all);
    free(one);
    free_problem(&p);
}

static void test_alone(void **state) {
    (void)state;
    each_arch(alone);
}

static void check_slices(moe_cuda_expert_device device, bool gated) {
    problem p = make_problem(device, gated, 8, 256, 512, 100, 2, 3);
    for (int32_t first = 0; first < 512; first += 192) {
        p.ffn.width_first = first;
        p.ffn.width = first + 192 <= 512 ? 192 : 128;
        float *y = run(&p, 0);
        compare(&p, y, first, p.ffn.width, 7);
        free(y);
    }
    free_problem(&p);
}

static void slices(moe_cuda_expert_device device) {
    check_slices(device, true);
    check_slices(device, false);
}

/* Values that are no numbers stay so through the ReLU, which the maximum of a number and NaN would hide. */
static void not_a_number(moe_cuda_expert_device device) {
    problem p = make_problem(device, false, 4, 128, 128, 40, 1, 7);
    uint16_t nan = 0x7fc0;
    CHECK(cudaMemcpy((uint16_t *)(uintptr_t)p.ffn.x + 3 * p.hidden + 5, &nan, sizeof nan, cudaMemcpyHostToDevice));
    for (int32_t tile = 32; tile <= 256; tile *= 2) {
        float *y = run(&p, tile);
        for (int32_t row = 0; row < p.rows; row++)
            for (int32_t h = 0; h < p.hidden; h++) assert_int_equal(isnan(y[(int64_t)row * p.hidden + h]) != 0, row == 3);
        free(y);
    }
    free_problem(&p);
}

static void test_not_a_number(void **state) {
    (void)state;
    each_arch(not_a_number);
}

static void test_slices(void **state) {
    (void)state;
    each_arch(slices);
}

/* The weighted sum of slots, with and without counts, in both element types. */
static void partial(moe_cuda_expert_device device) {
    problem p = make_problem(device, true, 8, 256, 128, 50, 4, 4);
    float *y = run(&p, 0), *sums = malloc((size_t)p.rows * (size_t)p.hidden * 4);
    int32_t counts[50];
    for (int32_t r = 0; r < p.rows; r++) counts[r] = r % 5;
    moe_cuda_partial_sum args = {p.rows, p.top_k, p.hidden, p.ffn.y, p.permute.weights, to_device(&p, counts, sizeof counts),
                                 device_memory(&p, (size_t)p.rows * (size_t)p.hidden * 4), true};
    for (int pass = 0; pass < 3; pass++) {
        if (pass == 1) args.counts = NULL;
        args.out_f32 = pass < 2;
        CHECK(cudaMemset(args.out, POISON, (size_t)p.rows * (size_t)p.hidden * 4));
        CHECK(moe_cuda_partial_sum_run(&args, NULL));
        CHECK(cudaMemcpy(sums, args.out, (size_t)p.rows * (size_t)p.hidden * 4, cudaMemcpyDeviceToHost));
        for (int32_t r = 0; r < p.rows; r++)
            for (int32_t h = 0; h < p.hidden; h++) {
                float want = 0;
                for (int32_t j = 0; j < (pass == 0 ? counts[r] : p.top_k); j++)
                    want = fmaf(p.weights[r * p.top_k + j], y[((int64_t)r * p.top_k + j) * p.hidden + h], want);
                int64_t at = (int64_t)r * p.hidden + h;
                if (pass < 2)
                    assert_true(sums[at] == want);
                else
                    assert_int_equal(((const uint16_t *)(const void *)sums)[at], moe_f32_to_bf16(want));
            }
    }
    free(y);
    free(sums);
    free_problem(&p);
}

static void test_partial_sum(void **state) {
    (void)state;
    each_arch(partial);
}

/* Captured once, replayed with other routing of the same size. */
static void check_graph(moe_cuda_expert_device device, bool gated) {
    problem p = make_problem(device, gated, 16, 256, 128, 64, 4, 5);
    cudaStream_t stream;
    cudaGraph_t captured;
    cudaGraphExec_t executable;
    moe_random random = {6};
    size_t bytes = (size_t)p.assignments * (size_t)p.hidden * 4;
    float *y = malloc(bytes);
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    CHECK(moe_cuda_permute_run(&p.permute, stream));
    CHECK(moe_cuda_expert_ffn(&p.ffn, stream));
    CHECK(cudaStreamEndCapture(stream, &captured));
    CHECK(cudaGraphInstantiate(&executable, captured, 0));
    for (int i = 0; i < 3; i++) {
        random_routing(&p, &random);
        CHECK(cudaMemcpy((void *)(uintptr_t)p.permute.ids, p.ids, (size_t)p.assignments * 4, cudaMemcpyHostToDevice));
        CHECK(cudaMemset(p.ffn.y, POISON, bytes));
        CHECK(cudaDeviceSynchronize());
        CHECK(cudaGraphLaunch(executable, stream));
        CHECK(cudaStreamSynchronize(stream));
        CHECK(cudaMemcpy(y, p.ffn.y, bytes, cudaMemcpyDeviceToHost));
        compare(&p, y, 0, p.width, 5);
    }
    CHECK(cudaGraphExecDestroy(executable));
    CHECK(cudaGraphDestroy(captured));
    CHECK(cudaStreamDestroy(stream));
    free(y);
    free_problem(&p);
}

static void graph(moe_cuda_expert_device device) {
    check_graph(device, true);
    check_graph(device, false);
}

static void test_graph(void **state) {
    (void)state;
    each_arch(graph);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_permute),      cmocka_unit_test(test_shapes),      cmocka_unit_test(test_alone),
        cmocka_unit_test(test_slices),       cmocka_unit_test(test_partial_sum), cmocka_unit_test(test_graph),
        cmocka_unit_test(test_not_a_number),
    };
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("skipped: no GPU here\n");
        return 77;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
#else
int main(void) {
    printf("skipped: built without CUDA\n");
    return 77;
}
#endif
