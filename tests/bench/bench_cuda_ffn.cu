/* The expert FFN on a GPU beside the device's measured bounds.
 *
 * usage: bench_cuda_ffn [-a sm80] [-s shape] [-r rows,rows,…] [-t] [-n repeats]
 *   -t  every token tile, not only the one that the thresholds choose, and the thresholds that tuning would write
 * Shapes: mixtral, olmoe, qwen3, switch (experts of Mixtral 8x7B, OLMoE 1B-7B, Qwen3 30B-A3B; of Switch-Base-128: two matrices, ReLU).
 *
 * Medians; the second-level cache is filled with other clean data before every run. Bytes: active experts' weights, x once, the
 * intermediate written and read, y written. `cublas`: both products alone, one cuBLASLt call an expert in one stream. */
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "cuda/expert_kernels.h"
#define _Noreturn /* C11's, in headers below */
extern "C" {
#include "common/tensor.h"
#include "cuda/tune.h"
}

#define CHECK(call)                                                                                     \
    do {                                                                                                \
        auto code_ = (call);                                                                            \
        if ((int)code_ != 0) {                                                                          \
            fprintf(stderr, "%s:%d: %s: error %d\n", __FILE__, __LINE__, #call, (int)code_);            \
            exit(1);                                                                                    \
        }                                                                                               \
    } while (0)

static const int64_t kFlushBytes = INT64_C(192) << 20;
static const int kMaxRows = 512, kMaxDecode = 256, kChain = 16;

struct shape {
    const char *name;
    int experts, hidden, width, top_k;
    bool gated;
    int matrices() const { return gated ? 3 : 2; }
};
static const shape kShapes[] = {
    {"mixtral", 8, 4096, 14336, 2, true}, {"olmoe", 64, 2048, 1024, 8, true}, {"qwen3", 128, 2048, 768, 8, true},
    {"switch", 128, 768, 3072, 1, false}};

static int repeats = 21;
static double copy_gbs, dense_tflops;

// ---- the device ----

__global__ void fill_kernel(__nv_bfloat16 *out, int64_t count, uint64_t seed, float scale) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += gridDim.x * (int64_t)blockDim.x) {
        uint64_t z = (seed << 40) + i + 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        out[i] = __float2bfloat16(scale * ((int)(z >> 40) * (2.0f / (1 << 24)) - 1.0f));
    }
}

__global__ void read_kernel(const uint4 *from, int64_t count, unsigned *sink) {
    unsigned sum = 0;
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += gridDim.x * (int64_t)blockDim.x) {
        uint4 v = from[i];
        sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == 0x12345678) *sink = sum;
}

static void *device_memory(size_t bytes) {
    void *p;
    CHECK(cudaMalloc(&p, bytes));
    return p;
}

static void fill(void *out, int64_t count, uint64_t seed, float scale) {
    fill_kernel<<<1024, 256>>>((__nv_bfloat16 *)out, count, seed, scale);
    CHECK(cudaGetLastError());
}

static uint8_t *flush_memory;
static void flush() {
    read_kernel<<<528, 256>>>((const uint4 *)flush_memory, kFlushBytes / 16, (unsigned *)flush_memory);
    CHECK(cudaGetLastError());
}

// Median microseconds of `run`, each after a flush.
template <typename F>
static double time_us(F run, int count = 0) {
    static cudaEvent_t begin, end;
    if (!begin) {
        CHECK(cudaEventCreate(&begin));
        CHECK(cudaEventCreate(&end));
    }
    std::vector<float> times;
    for (int i = -2; i < (count ? count : repeats); i++) {
        float ms;
        flush();
        CHECK(cudaEventRecord(begin));
        run();
        CHECK(cudaEventRecord(end));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i >= 0) times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] * 1000.0;
}

// ---- cuBLASLt ----

static cublasLtHandle_t lt;
static void *lt_workspace;
static const size_t kWorkspace = 64 << 20;

// d [n, m] = b [n, k] · a [m, k]^T, all row-major bf16.
struct matmul {
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algo;
    matmul(int m, int n, int k) {
        cublasOperation_t t = CUBLAS_OP_T;
        cublasLtMatmulPreference_t preference;
        cublasLtMatmulHeuristicResult_t result;
        int found;
        CHECK(cublasLtMatmulDescCreate(&op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        CHECK(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSA, &t, sizeof t));
        CHECK(cublasLtMatrixLayoutCreate(&a, CUDA_R_16BF, k, m, k));
        CHECK(cublasLtMatrixLayoutCreate(&b, CUDA_R_16BF, k, n, k));
        CHECK(cublasLtMatrixLayoutCreate(&d, CUDA_R_16BF, m, n, m));
        CHECK(cublasLtMatmulPreferenceCreate(&preference));
        CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspace,
                                                   sizeof kWorkspace));
        CHECK(cublasLtMatmulAlgoGetHeuristic(lt, op, a, b, d, d, preference, 1, &result, &found));
        algo = result.algo;
        cublasLtMatmulPreferenceDestroy(preference);
    }
    ~matmul() {
        cublasLtMatmulDescDestroy(op);
        cublasLtMatrixLayoutDestroy(a);
        cublasLtMatrixLayoutDestroy(b);
        cublasLtMatrixLayoutDestroy(d);
    }
    void run(const void *weights, const void *x, void *out) {
        float one = 1, zero = 0;
        CHECK(cublasLtMatmul(lt, op, &one, weights, a, x, b, &zero, out, d, out, d, &algo, lt_workspace, kWorkspace, 0));
    }
};

static void measure_bounds() {
    const int64_t bytes = INT64_C(2) << 30, n = 8192;
    void *from = device_memory(bytes), *to = device_memory(bytes);
    fill(from, bytes / 2, 1, 1);
    copy_gbs = 2 * bytes / 1e3 / time_us([&] { CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice)); });
    unsigned *sink = (unsigned *)to;
    double read_us = time_us([&] { read_kernel<<<1056, 512>>>((const uint4 *)from, bytes / 16, sink); });
    matmul product(n, n, n);
    fill(to, bytes / 2, 2, 1);
    uint8_t *a = (uint8_t *)from, *b = (uint8_t *)to;
    double us = time_us([&] { product.run(a, b, a + (INT64_C(1) << 30)); });
    dense_tflops = 2.0 * n * n * n / us / 1e6;
    printf("device copy %.0f GB/s (read + write), plain read kernel %.0f GB/s; dense bf16 8192^3 %.0f TFLOP/s\n", copy_gbs,
           bytes / 1e3 / read_us, dense_tflops);
    CHECK(cudaFree(from));
    CHECK(cudaFree(to));
}

// ---- one shape ----

struct rig {
    shape s;
    moe_cuda_expert_device device;
    std::vector<uint8_t *> gate_up, down;
    uint8_t *tables;
    int max_tokens, max_assignments;
    int32_t *ids, *expert_first, *sorted_rows, *slot_of, *scratch;
    void *x, *inner, *y;
    moe_cuda_ffn ffn;
    moe_cuda_permute permute;
};

static void open_rig(rig &r, const shape &s, moe_cuda_expert_device device) {
    size_t down_bytes = (size_t)s.width * s.hidden * 2, up_bytes = down_bytes * (s.gated ? 2 : 1), e = s.experts;
    r.s = s;
    r.device = device;
    std::vector<uint8_t> host(e * (sizeof(moe_cuda_expert_maps) + 3 * sizeof(void *)));
    r.tables = (uint8_t *)device_memory(host.size());
    const void **pointers = (const void **)(host.data() + e * sizeof(moe_cuda_expert_maps));
    for (size_t i = 0; i < e; i++) {
        alignas(64) moe_cuda_expert_maps maps;
        r.gate_up.push_back((uint8_t *)device_memory(up_bytes));
        r.down.push_back((uint8_t *)device_memory(down_bytes));
        fill(r.gate_up[i], up_bytes / 2, 10 + 2 * i, 2 / sqrtf((float)s.hidden));
        fill(r.down[i], down_bytes / 2, 11 + 2 * i, 2 / sqrtf((float)s.width));
        CHECK(moe_cuda_expert_maps_make(r.gate_up[i], r.down[i], s.hidden, s.width, s.gated, &maps));
        memcpy(host.data() + i * sizeof maps, &maps, sizeof maps);
        pointers[i] = r.gate_up[i];
        pointers[e + i] = r.down[i];
        pointers[2 * e + i] = r.tables + i * sizeof maps;
    }
    CHECK(cudaMemcpy(r.tables, host.data(), host.size(), cudaMemcpyHostToDevice));
    const void *const *on_device = (const void *const *)(r.tables + e * sizeof(moe_cuda_expert_maps));
    r.max_assignments = s.experts * kMaxRows;
    r.max_tokens = r.max_assignments / s.top_k;
    size_t a = r.max_assignments, routed = std::max(r.max_assignments, kChain * kMaxDecode * s.top_k);
    r.ids = (int32_t *)device_memory(routed * 4);
    r.expert_first = (int32_t *)device_memory((e + 1) * 4 * kChain);
    r.sorted_rows = (int32_t *)device_memory(routed * 4);
    r.slot_of = (int32_t *)device_memory(routed * 4);
    r.scratch = (int32_t *)device_memory(moe_cuda_permute_scratch_bytes(r.max_tokens, s.top_k, s.experts));
    r.x = device_memory((size_t)r.max_tokens * s.hidden * 2);
    r.inner = device_memory(a * s.width * 2);
    r.y = device_memory(a * s.hidden * 4);
    fill(r.x, (int64_t)r.max_tokens * s.hidden, 3, 1);
    r.permute = {0, s.top_k, s.experts, r.ids, nullptr, r.expert_first, r.sorted_rows, r.slot_of, nullptr, r.scratch};
    r.ffn = {device, s.gated, s.hidden, s.width, 0, s.width, s.experts, 0, 0, r.expert_first, r.sorted_rows, r.slot_of,
             (const moe_cuda_expert_maps *const *)(on_device + 2 * e), on_device, on_device + e, r.x, r.inner, (float *)r.y};
}

static void close_rig(rig &r) {
    for (size_t i = 0; i < r.gate_up.size(); i++) {
        CHECK(cudaFree(r.gate_up[i]));
        CHECK(cudaFree(r.down[i]));
    }
    for (void *p : {(void *)r.tables, (void *)r.ids, (void *)r.expert_first, (void *)r.sorted_rows, (void *)r.slot_of,
                    (void *)r.scratch, r.x, r.inner, r.y})
        CHECK(cudaFree(p));
}

// `rows` rows for every expert.
static void route_evenly(rig &r, int rows) {
    int tokens = rows * r.s.experts / r.s.top_k;
    std::vector<int32_t> ids(tokens * r.s.top_k);
    for (size_t i = 0; i < ids.size(); i++) ids[i] = (int32_t)(i * 5 % r.s.experts);
    CHECK(cudaMemcpy(r.ids, ids.data(), ids.size() * 4, cudaMemcpyHostToDevice));
    r.permute.rows = tokens;
    r.ffn.num_assignments = tokens * r.s.top_k;
    CHECK(moe_cuda_permute_run(&r.permute, 0));
}

// Random distinct experts for each of `tokens` rows; how many experts have rows.
static int route_randomly(rig &r, int tokens, unsigned seed, int32_t *ids_on_device) {
    std::vector<int32_t> ids;
    std::vector<char> active(r.s.experts);
    srand(seed);
    for (int t = 0; t < tokens; t++) {
        size_t begin = ids.size();
        while (ids.size() < begin + r.s.top_k) {
            int32_t e = rand() % r.s.experts;
            if (std::find(ids.begin() + begin, ids.end(), e) == ids.end()) ids.push_back(e), active[e] = 1;
        }
    }
    CHECK(cudaMemcpy(ids_on_device, ids.data(), ids.size() * 4, cudaMemcpyHostToDevice));
    return (int)std::count(active.begin(), active.end(), 1);
}

static double expert_bytes(const shape &s) { return 2.0 * s.matrices() * s.hidden * s.width; }

static double ffn_bytes(const shape &s, int active, double tokens) {
    double a = tokens * s.top_k;
    return active * expert_bytes(s) + 2.0 * tokens * s.hidden + 4.0 * a * s.width + 4.0 * a * s.hidden;
}

// One assignment's output against double precision; returns the relative error.
static double check_one(rig &r, int assignment, int rows) {
    const shape &s = r.s;
    int32_t slot, row;
    int expert = assignment / rows;
    CHECK(cudaMemcpy(&slot, r.slot_of + assignment, 4, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(&row, r.sorted_rows + assignment, 4, cudaMemcpyDeviceToHost));
    std::vector<uint16_t> up((s.gated ? 2 : 1) * (size_t)s.width * s.hidden), down((size_t)s.width * s.hidden), x(s.hidden);
    std::vector<float> y(s.hidden), inner(s.width);
    CHECK(cudaMemcpy(up.data(), r.gate_up[expert], up.size() * 2, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(down.data(), r.down[expert], down.size() * 2, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(x.data(), (uint16_t *)r.x + (int64_t)row * s.hidden, x.size() * 2, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(y.data(), (float *)r.y + (int64_t)slot * s.hidden, y.size() * 4, cudaMemcpyDeviceToHost));
    auto dot = [](const uint16_t *a, const auto *b, int n, auto value) {
        double sum = 0;
        for (int i = 0; i < n; i++) sum += (double)moe_bf16_to_f32(a[i]) * value(b[i]);
        return sum;
    };
    auto wide = [](uint16_t v) { return (double)moe_bf16_to_f32(v); };
    for (int i = 0; i < s.width; i++) {
        size_t gate_row = i / 8 * 16 + i % 8, up_row = s.gated ? gate_row + 8 : i;
        double g = s.gated ? dot(&up[gate_row * s.hidden], x.data(), s.hidden, wide) : 0;
        double u = dot(&up[up_row * s.hidden], x.data(), s.hidden, wide);
        inner[i] = moe_bf16_to_f32(moe_f32_to_bf16((float)(s.gated ? g / (1 + exp(-g)) * u : std::max(u, 0.0))));
    }
    double error = 0, norm = 0;
    for (int h = 0; h < s.hidden; h++) {
        double want = dot(&down[(size_t)h * s.width], inner.data(), s.width, [](float v) { return (double)v; });
        error += (want - y[h]) * (want - y[h]);
        norm += want * want;
    }
    return sqrt(error / norm);
}

// Every tile's result for `rows` rows an expert, bit for bit, against the widest tile's.
static void check_tiles(rig &r, int rows) {
    std::vector<float> want, got;
    route_evenly(r, rows);
    size_t count = (size_t)r.ffn.num_assignments * r.s.hidden;
    for (int tile = MOE_CUDA_TUNE_TILES - 1; tile >= 0; tile--) {
        r.ffn.tile_tokens = moe_cuda_tune_tokens(tile);
        CHECK(cudaMemset(r.y, 0xff, count * 4));
        CHECK(moe_cuda_expert_ffn(&r.ffn, 0));
        got.resize(count);
        CHECK(cudaMemcpy(got.data(), r.y, count * 4, cudaMemcpyDeviceToHost));
        if (want.empty()) {
            want = got;
            double error = std::max(check_one(r, 0, rows), check_one(r, r.ffn.num_assignments - 1, rows));
            printf("%s, %d rows an expert: relative error %.2e to double precision%s\n", r.s.name, rows, error,
                   error < 1e-2 ? "" : " WRONG");
        } else {
            size_t differ = 0;
            for (size_t i = 0; i < count; i++) differ += memcmp(&want[i], &got[i], 4) != 0;
            printf("  tile %3d: %zu of %zu differ from tile 256\n", r.ffn.tile_tokens, differ, count);
        }
    }
}

// Both products alone, one cuBLASLt call an expert.
static double cublas_us(rig &r, int rows) {
    matmul first((r.s.gated ? 2 : 1) * r.s.width, rows, r.s.hidden), second(r.s.hidden, rows, r.s.width);
    uint8_t *x = (uint8_t *)r.y;  // any data of the right size
    return time_us([&] {
        for (int e = 0; e < r.s.experts; e++) first.run(r.gate_up[e], r.x, x);
        for (int e = 0; e < r.s.experts; e++) second.run(r.down[e], r.inner, x);
    }, 5);
}

static void bench_rows(rig &r, const std::vector<int> &all_rows, bool all_tiles) {
    printf("%-8s %5s %5s %9s %8s %6s %9s %6s %9s\n", "shape", "rows", "tile", "us", "GB/s", "copy", "TFLOP/s", "dense", "cublas us");
    for (int rows : all_rows) {
        route_evenly(r, rows);
        double flop = 2.0 * r.s.matrices() * r.ffn.num_assignments * r.s.hidden * r.s.width;
        double bytes = ffn_bytes(r.s, r.s.experts, r.permute.rows), cublas = cublas_us(r, rows);
        int chosen = moe_cuda_tune_tile(NULL, r.s.hidden, r.s.width, r.ffn.num_assignments, r.s.experts);
        for (int tile = 0; tile < MOE_CUDA_TUNE_TILES; tile++) {
            r.ffn.tile_tokens = moe_cuda_tune_tokens(tile);
            if (!all_tiles && r.ffn.tile_tokens != chosen) continue;
            double us = time_us([&] { CHECK(moe_cuda_expert_ffn(&r.ffn, 0)); });
            printf("%-8s %5d %4d%c %9.1f %8.0f %5.1f%% %9.1f %5.1f%% %9.1f\n", r.s.name, rows, r.ffn.tile_tokens,
                   r.ffn.tile_tokens == chosen ? '*' : ' ', us, bytes / us / 1e3, bytes / us / 1e1 / copy_gbs, flop / us / 1e6,
                   flop / us / 1e4 / dense_tflops, cublas);
        }
    }
}

// Decode steps: a graph of kChain FFNs with random routing, each other experts than the last where few are active.
static void bench_decode(rig &r) {
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    for (int tokens : {1, 2, 4, 8, 16, 32, 64, kMaxDecode}) {
        double bytes = 0, us[2];
        for (int with_permute = 0; with_permute < 2; with_permute++) {
            cudaGraph_t graph;
            cudaGraphExec_t executable;
            bytes = 0;
            int a = tokens * r.s.top_k;
            std::vector<moe_cuda_permute> permutes;
            for (int i = 0; i < kChain; i++) {
                moe_cuda_permute p = r.permute;
                p.rows = tokens;
                p.ids += i * a;
                p.sorted_rows += i * a;
                p.slot_of += i * a;
                p.expert_first += i * (r.s.experts + 1);
                bytes += ffn_bytes(r.s, route_randomly(r, tokens, 100 + i, r.ids + i * a), tokens);
                CHECK(moe_cuda_permute_run(&p, 0));
                permutes.push_back(p);
            }
            CHECK(cudaDeviceSynchronize());
            CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
            for (const moe_cuda_permute &p : permutes) {
                moe_cuda_ffn f = r.ffn;
                f.num_assignments = a;
                f.tile_tokens = 0;
                f.expert_first = p.expert_first;
                f.sorted_rows = p.sorted_rows;
                f.slot_of = p.slot_of;
                if (with_permute) CHECK(moe_cuda_permute_run(&p, stream));
                CHECK(moe_cuda_expert_ffn(&f, stream));
            }
            CHECK(cudaStreamEndCapture(stream, &graph));
            CHECK(cudaGraphInstantiate(&executable, graph, 0));
            us[with_permute] = time_us([&] { CHECK(cudaGraphLaunch(executable, 0)); }) / kChain;
            CHECK(cudaGraphExecDestroy(executable));
            CHECK(cudaGraphDestroy(graph));
        }
        bytes /= kChain;
        printf("%-8s decode of %3d: %7.1f us (%7.1f with permute), %5.0f GB/s, %5.1f%% of copy\n", r.s.name, tokens, us[0], us[1],
               bytes / us[0] / 1e3, bytes / us[0] / 1e1 / copy_gbs);
    }
    CHECK(cudaStreamDestroy(stream));
}

static void bench_permute(rig &r) {
    for (int tokens : {1, 64, 512, 8192}) {
        if (tokens > r.max_tokens) continue;
        moe_cuda_permute p = r.permute;
        p.rows = tokens;
        route_randomly(r, tokens, 7, r.ids);
        printf("%-8s permute of %4d rows: %.1f us\n", r.s.name, tokens, time_us([&] { CHECK(moe_cuda_permute_run(&p, 0)); }));
    }
}

int main(int argc, char **argv) {
    const char *only = NULL, *rows_text = "1,2,4,8,16,32,64,128,256,512";
    bool sm80 = false, all_tiles = false;
    for (int option; (option = getopt(argc, argv, "a:s:r:n:t")) != -1;) {
        if (option == 'a') sm80 = strcmp(optarg, "sm80") == 0;
        else if (option == 's') only = optarg;
        else if (option == 'r') rows_text = optarg;
        else if (option == 'n') repeats = std::max(1, (int)strtol(optarg, NULL, 10));
        else if (option == 't') all_tiles = true;
        else return 2;
    }
    std::vector<int> rows;
    for (char *at = (char *)rows_text; *at; at += *at == ',')
        rows.push_back(std::min(kMaxRows, std::max(1, (int)strtol(at, &at, 10))));
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("skipped: no GPU here\n");
        return 77;
    }
    cudaDeviceProp properties;
    moe_cuda_expert_device device;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    CHECK(moe_cuda_expert_device_open(sm80, &device));
    CHECK(cublasLtCreate(&lt));
    lt_workspace = device_memory(kWorkspace);
    flush_memory = (uint8_t *)device_memory(kFlushBytes);
    fill(flush_memory, kFlushBytes / 2, 5, 1);
    printf("%s, kernels of sm_%d\n", properties.name, device.arch);
    measure_bounds();
    for (const shape &s : kShapes) {
        if (only && strcmp(only, s.name) != 0) continue;
        rig r;
        open_rig(r, s, device);
        check_tiles(r, 40);
        bench_rows(r, rows, all_tiles);
        bench_decode(r);
        bench_permute(r);
        close_rig(r);
        moe_cuda_tune_row row;
        if (all_tiles && moe_cuda_tune_measure(device, s.hidden, s.width, s.gated, s.experts, &row, NULL) == MOE_OK)
            printf("%-8s tuned: %d %d %d %d %d\n", s.name, row.hidden, row.width, row.limit[0], row.limit[1], row.limit[2]);
    }
    return 0;
}
