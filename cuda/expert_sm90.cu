// Expert FFN on Hopper: one persistent kernel a product, three warpgroups. One fetches (weights by the copy engine, the experts'
// token rows gathered by cp.async), two multiply (wgmma, 64 of a tile's 128 weight rows each) and write. Stages of 64 columns of K
// go round in shared memory, so the next tile's weights are on their way while a tile ends.
//
// The same kernel serves few rows, where time is the weights' bytes and narrow token tiles leave room for many stages, and many rows,
// where time is arithmetic and 256 tokens a tile feed the tensor cores.
#include <cuda.h>

#include "cuda/expert_tiles.cuh"
#include "cuda/sm90.cuh"

namespace {

using namespace moe_expert;
using namespace moe_sm90;

constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kWeightBytes = kTileFeatures * kTileK * 2;       // of a stage

template <int TOKENS, int STAGES>
struct layout {
    enum { fetch_registers = 56, multiply_registers = 224 };  // 128 · 56 + 256 · 224 ≤ 65536
    static constexpr int token_bytes = TOKENS * kTileK * 2;
    static constexpr int tokens_at = STAGES * kWeightBytes, barriers_at = tokens_at + STAGES * token_bytes;
    static constexpr int list_at = barriers_at + 2 * STAGES * 8;
    static constexpr int bytes = list_at + (int)sizeof(tile_list) + 1024;  // and room to align the stages to 1024
};

// The pipeline as either side sees it: barriers `full` and `empty` of each stage, and where the thread is.
template <int TOKENS, int STAGES>
struct pipeline {
    uint32_t base;
    int stage = 0, parity = 0;
    using at = layout<TOKENS, STAGES>;
    __device__ __forceinline__ uint32_t full(int s) const { return base + at::barriers_at + 8 * s; }
    __device__ __forceinline__ uint32_t empty(int s) const { return base + at::barriers_at + 8 * (STAGES + s); }
    __device__ __forceinline__ uint32_t weights(int s) const { return base + s * kWeightBytes; }
    __device__ __forceinline__ uint32_t tokens(int s) const { return base + at::tokens_at + s * at::token_bytes; }
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// The fetching warpgroup. Thread t copies the 16 bytes t % 8 of rows t / 8 + 16·i of each stage's token tile to where the 128-byte
// swizzle wants them. A stage is announced LAG stages later, when its copies have landed.
template <int TOKENS, int STAGES, bool SECOND>
__device__ __forceinline__ void fetch(const product &p, const tile_list &list, uint32_t base, int feature_tiles, int num_tiles) {
    constexpr int ROWS = TOKENS / 16, LAG = STAGES / 2;
    const int thread = threadIdx.x - 128 * kConsumers, row = thread / 8, chunk = thread % 8, steps = p.k / kTileK;
    const bool leader = thread == 0;
    const uint32_t place = row * 128 + ((chunk ^ (row & 7)) << 4);
    const uint8_t *b = reinterpret_cast<const uint8_t *>(p.b);
    pipeline<TOKENS, STAGES> pipe = {base};
    int step = 0, ahead = 0;  // steps so far; of them, weights requested before the previous grid ended

    if (SECOND) {
        if (leader && (int)blockIdx.x < num_tiles) {
            tile t = find_tile<TOKENS>(list, p.num_groups, feature_tiles, blockIdx.x);
            const uint8_t *map = p.maps[t.group]->down;
            fence_map(map);
            for (; ahead < min(STAGES, steps); ahead++) {
                barrier_arrive_expect(pipe.full(ahead), kWeightBytes);
                copy_box(pipe.weights(ahead), map, p.k_first + ahead * kTileK, t.feature, pipe.full(ahead));
            }
        }
        wait_for_previous_grid();
    }
    for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
        tile t = find_tile<TOKENS>(list, p.num_groups, feature_tiles, index);
        const uint8_t *map = SECOND ? p.maps[t.group]->down : p.maps[t.group]->gate_up;
        int mine = (t.count - row + 15) / 16;  // rows of the tile that this thread copies
        uint32_t offset[ROWS];                 // in units of 16 bytes
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int from = t.first + row + 16 * i;
            if (i < mine && !SECOND) from = p.rows[from];
            offset[i] = (uint32_t)from * (uint32_t)(p.k / 8) + chunk;
        }
        if (leader && step >= ahead) fence_map(map);
        for (int kb = 0; kb < steps; kb++, step++) {
            barrier_wait(pipe.empty(pipe.stage), pipe.parity ^ 1);
            if (leader && step >= ahead) {
                barrier_arrive_expect(pipe.full(pipe.stage), kWeightBytes);
                copy_box(pipe.weights(pipe.stage), map, p.k_first + kb * kTileK, p.feature_first + t.feature, pipe.full(pipe.stage));
            }
            uint32_t to = pipe.tokens(pipe.stage) + place;
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                if (i < mine) copy_16(to + i * 2048, b + ((uint64_t)(offset[i] + kb * 8) << 4));
            copy_commit();
            if (step >= LAG) {
                copy_wait<LAG>();
                fence_async_shared();
                __syncwarp();
                if (thread % 32 == 0) barrier_arrive(pipe.full(pipe.stage >= LAG ? pipe.stage - LAG : pipe.stage + STAGES - LAG));
            }
            pipe.advance();
        }
    }
    copy_wait<0>();
    fence_async_shared();
    __syncwarp();
    if (thread % 32 == 0)
        for (int left = min(LAG, step); left > 0; left--)
            barrier_arrive(pipe.full(pipe.stage >= left ? pipe.stage - left : pipe.stage + STAGES - left));
}

// Multiplies the stages of one tile whose tokens are at most N into d, and leaves the pipeline at the next tile's first.
template <int N, int TOKENS, int STAGES>
__device__ __forceinline__ void multiply(pipeline<TOKENS, STAGES> &pipe, float *d, int warpgroup, int steps) {
    int previous = 0;
    bool elected = threadIdx.x % 32 == 0;
    for (int kb = 0; kb < steps; kb++) {
        barrier_wait(pipe.full(pipe.stage), pipe.parity);
        uint64_t a = descriptor(pipe.weights(pipe.stage) + warpgroup * (kWeightBytes / kConsumers));
        uint64_t b = descriptor(pipe.tokens(pipe.stage));
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < kTileK / 16; k++) wgmma<N>(d, a + 2 * k, b + 2 * k, kb + k > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (kb > 0 && elected) barrier_arrive(pipe.empty(previous));
        previous = pipe.stage;
        pipe.advance();
    }
    wgmma_wait<0>();
    if (elected) barrier_arrive(pipe.empty(previous));
}

template <int TOKENS, int STAGES, bool SECOND>
__device__ __forceinline__ void consume(const product &p, const tile_list &list, uint32_t base, int feature_tiles, int num_tiles) {
    const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32, steps = p.k / kTileK;
    const int warp_row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16;  // of the tile's weight rows
    pipeline<TOKENS, STAGES> pipe = {base};
    float d[TOKENS / 2];
    for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
        tile t = find_tile<TOKENS>(list, p.num_groups, feature_tiles, index);
        int slot[SECOND ? TOKENS / 32 : 1];  // of token lane + 32·i
        if (SECOND) {
#pragma unroll
            for (int i = 0; i < TOKENS / 32; i++) {
                int token = lane + 32 * i;
                slot[i] = token >= t.count ? -1 : p.slot_of ? p.slot_of[t.first + token] : t.first + token;
            }
        }
        if (TOKENS > 64 && t.count <= 64)
            multiply<64>(pipe, d, warpgroup, steps);
        else if (TOKENS > 128 && t.count <= 128)
            multiply<128>(pipe, d, warpgroup, steps);
        else if (TOKENS > 192 && t.count <= 192)
            multiply<192>(pipe, d, warpgroup, steps);
        else
            multiply<TOKENS>(pipe, d, warpgroup, steps);
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
            if (8 * j >= t.count) continue;
            if (SECOND) {
                int from = 8 * j % 32 + 2 * (lane % 4);
                int slot0 = __shfl_sync(0xffffffffu, slot[j / 4], from), slot1 = __shfl_sync(0xffffffffu, slot[j / 4], from + 1);
                store_rows(d + 4 * j, p, t.feature + warp_row + lane / 4, slot0, slot1);
            } else {
                store_inner(d + 4 * j, p, t.first + 8 * j, t.count - 8 * j, (t.feature + warp_row) / 2);
            }
        }
    }
}

template <int TOKENS, int STAGES, bool SECOND>
__global__ void __launch_bounds__(kThreads, 1) expert_kernel(const __grid_constant__ product p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ uint8_t shared[];
    using at = layout<TOKENS, STAGES>;
    uint32_t base = (shared_address(shared) + 1023) & ~1023u;
    tile_list &list = *reinterpret_cast<tile_list *>(shared + (base - shared_address(shared)) + at::list_at);
    pipeline<TOKENS, STAGES> pipe = {base};
    if (threadIdx.x == 32) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(pipe.full(s), 4 + 1);  // the fetching warps, and the copy engine's bytes
            barrier_init(pipe.empty(s), 4 * kConsumers);
        }
        fence_barrier_init();
        fence_async_shared();
    }
    if (!SECOND) wait_for_previous_grid();
    if (threadIdx.x < 32) list_tiles<TOKENS>(p, list);
    __syncthreads();
    allow_next_grid();
    int feature_tiles = (p.features + kTileFeatures - 1) / kTileFeatures;
    int num_tiles = list.tiles[p.num_groups] * feature_tiles;
    if (threadIdx.x >= 128 * kConsumers) {
        registers_fewer<at::fetch_registers>();
        fetch<TOKENS, STAGES, SECOND>(p, list, base, feature_tiles, num_tiles);
    } else {
        registers_more<at::multiply_registers>();
        consume<TOKENS, STAGES, SECOND>(p, list, base, feature_tiles, num_tiles);
    }
#endif
}

using kernel = void (*)(product);

struct variant {
    int tokens, bytes;
    kernel first, second;
};

template <int TOKENS, int STAGES>
constexpr variant make_variant() {
    return {TOKENS, layout<TOKENS, STAGES>::bytes, expert_kernel<TOKENS, STAGES, false>, expert_kernel<TOKENS, STAGES, true>};
}

// As many stages as shared memory holds.
const variant kVariants[] = {make_variant<32, 10>(), make_variant<64, 8>(), make_variant<128, 6>(), make_variant<256, 4>()};

cudaError_t launch(kernel k, const product &p, int bytes, int blocks, cudaStream_t stream) {
    cudaLaunchAttribute dependent = {};
    dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependent.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = (size_t)bytes;
    config.stream = stream;
    config.attrs = &dependent;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, k, p);
}

int blocks_for(const product &p, const moe_cuda_ffn &f, int tokens) {
    int64_t token_tiles = f.num_assignments / tokens + (f.num_assignments < f.num_groups ? f.num_assignments : f.num_groups);
    int64_t tiles = token_tiles * ((p.features + kTileFeatures - 1) / kTileFeatures);
    return (int)(tiles < f.device.num_sms ? tiles : f.device.num_sms);
}

}  // namespace

cudaError_t moe_cuda_expert_sm90_open(void) {
    for (const variant &v : kVariants) {
        for (kernel k : {v.first, v.second}) {
            cudaError_t error = cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, v.bytes);
            if (error != cudaSuccess) return error;
        }
    }
    return cudaSuccess;
}

cudaError_t moe_cuda_expert_ffn_sm90(const moe_cuda_ffn *args, cudaStream_t stream) {
    for (const variant &v : kVariants) {
        if (v.tokens != args->tile_tokens) continue;
        product first = first_product(*args), second = second_product(*args);
        cudaError_t error = launch(v.first, first, v.bytes, blocks_for(first, *args, v.tokens), stream);
        return error != cudaSuccess ? error : launch(v.second, second, v.bytes, blocks_for(second, *args, v.tokens), stream);
    }
    return cudaErrorInvalidValue;
}

static cudaError_t make_map(const void *matrix, int32_t rows, int32_t columns, void *map) {
    cudaDriverEntryPointQueryResult found;
    void *encode = nullptr;
    cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess) return error;
    if (found != cudaDriverEntryPointSuccess || !encode) return cudaErrorNotSupported;
    cuuint64_t sizes[] = {(cuuint64_t)columns, (cuuint64_t)rows}, strides[] = {(cuuint64_t)columns * 2};
    cuuint32_t box[] = {kTileK, kTileFeatures}, steps[] = {1, 1};
    CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
        static_cast<CUtensorMap *>(map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void *>(matrix), sizes, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t moe_cuda_expert_maps_make(const void *gate_up, const void *down, int32_t hidden, int32_t width,
                                      moe_cuda_expert_maps *maps) {
    cudaError_t error = make_map(gate_up, 2 * width, hidden, maps->gate_up);
    return error != cudaSuccess ? error : make_map(down, hidden, width, maps->down);
}
