// Expert FFN on Hopper: one persistent kernel a product, three warpgroups. One fetches, two multiply (wgmma, half of a tile's weight
// rows each) and write. Stages of 64 columns of K go round in shared memory, so the next tile's weights are on their way while a tile
// ends.
//
// Weights come by the copy engine (TMA). Token rows are gathered by cp.async, or, where the rows of a wide tile are consecutive, come
// by the copy engine too. Few rows: time is the weights' bytes, and narrow token tiles leave room for many stages. Many rows: time is
// arithmetic, and large tiles feed the tensor cores.
#include <cuda.h>

#include "cuda/expert_tiles.cuh"
#include "cuda/sm90.cuh"

namespace {

using namespace moe_expert;
using namespace moe_sm90;

constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kBoxFeatures = 128;  // weight rows of one copy

// A kernel for tiles of FEATURES weight rows by TOKENS tokens. BULK: token rows are consecutive and come by the copy engine. Each
// multiplying warpgroup has HALVES times 64 of the weight rows; two halves take turns at every 8 rows, so that a warp has 32 rows in
// succession, of GATE_UP gate rows in one half and up rows in the other.
template <int FEATURES_, int TOKENS_, int STAGES_, product_kind KIND>
struct config {
    enum { FEATURES = FEATURES_, TOKENS = TOKENS_, STAGES = STAGES_, UP_ALONE = KIND == UP, SECOND = KIND == DOWN };
    enum { BULK = SECOND && TOKENS >= 128, HALVES = FEATURES / (64 * kConsumers) };
    enum { fetch_registers = 56, multiply_registers = 224 };                           // 128 · 56 + 256 · 224 ≤ 65536
    enum { weight_bytes = FEATURES * kTileK * 2, token_bytes = TOKENS * kTileK * 2 };  // of a stage
    enum { tokens_at = STAGES * weight_bytes, barriers_at = tokens_at + STAGES * token_bytes };
    enum { list_at = barriers_at + 2 * STAGES * 8 };
    enum { bytes = list_at + 1024 };  // room to align the stages to 1024; and the list of tiles
};

// The pipeline as either side sees it: barriers `full` and `empty` of each stage, and where the thread is.
template <class C>
struct pipeline {
    uint32_t base;
    int stage = 0, parity = 0;
    __device__ __forceinline__ uint32_t full(int s) const { return base + C::barriers_at + 8 * s; }
    __device__ __forceinline__ uint32_t empty(int s) const { return base + C::barriers_at + 8 * (C::STAGES + s); }
    __device__ __forceinline__ uint32_t weights(int s) const { return base + s * C::weight_bytes; }
    __device__ __forceinline__ uint32_t tokens(int s) const { return base + C::tokens_at + s * C::token_bytes; }
    __device__ __forceinline__ void advance() {
        if (++stage == C::STAGES) stage = 0, parity ^= 1;
    }
};

struct work {
    const product &p;
    const void *tokens_map;  // of p.b
    const tile_list &list;
    uint32_t base;  // of the stages
    int feature_tiles, num_tiles, steps;

    template <class C>
    __device__ __forceinline__ tile find(int index) const {
        return find_tile<C::FEATURES, C::TOKENS>(list, p.num_groups, feature_tiles, index);
    }
    template <class C>
    __device__ __forceinline__ const uint8_t *map(const tile &t) const {
        return C::SECOND ? list.maps[t.group]->down : list.maps[t.group]->gate_up;
    }
};

template <class C>
__device__ __forceinline__ void fetch_weights(const work &w, const pipeline<C> &pipe, const void *map, const tile &t, int stage, int kb) {
    barrier_arrive_expect(pipe.full(stage), C::weight_bytes + (C::BULK ? (int)C::token_bytes : 0));
#pragma unroll
    for (int i = 0; i < C::FEATURES / kBoxFeatures; i++)
        copy_box(pipe.weights(stage) + i * kBoxFeatures * 128, map, w.p.k_first + kb * kTileK,
                 w.p.feature_first + t.feature + i * kBoxFeatures, pipe.full(stage));
}

// The fetching warpgroup. Where rows are gathered, thread t copies the 16 bytes t % 8 of rows t / 8 + 16·i of each stage's token tile
// to where the 128-byte swizzle wants them.
template <class C>
__device__ __forceinline__ void fetch(const work &w) {
    constexpr int ROWS = C::TOKENS / 16;
    const int thread = threadIdx.x - 128 * kConsumers, row = thread / 8, chunk = thread % 8;
    const bool leader = thread == 0;
    const uint32_t place = row * 128 + ((chunk ^ (row & 7)) << 4);
    const uint8_t *b = reinterpret_cast<const uint8_t *>(w.p.b);
    pipeline<C> pipe = {w.base};
    int step = 0, ahead = 0;  // steps so far; of them, weights requested before the previous grid ended

    if (C::SECOND) {
        if (leader && (int)blockIdx.x < w.num_tiles) {
            tile t = w.find<C>(blockIdx.x);
            fence_map(w.map<C>(t));
            for (; ahead < min((int)C::STAGES, w.steps); ahead++) fetch_weights(w, pipe, w.map<C>(t), t, ahead, ahead);
        }
        wait_for_previous_grid();
    }
    if (C::BULK && !leader) return;
    for (int index = blockIdx.x; index < w.num_tiles; index += gridDim.x) {
        tile t = w.find<C>(index);
        const void *map = w.map<C>(t);
        int mine = C::BULK ? 0 : (t.count - row + 15) / 16;  // rows of the tile that this thread copies
        uint32_t offset[ROWS];                               // in units of 16 bytes
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int from = t.first + row + 16 * i;
            if (i < mine && !C::SECOND) from = w.p.rows[from];
            offset[i] = (uint32_t)from * (uint32_t)(w.p.k / 8) + chunk;
        }
        if (leader && step >= ahead) fence_map(map);
        for (int kb = 0; kb < w.steps; kb++, step++) {
            barrier_wait(pipe.empty(pipe.stage), pipe.parity ^ 1);
            if (leader && step >= ahead) fetch_weights(w, pipe, map, t, pipe.stage, kb);
            if (C::BULK) {
                copy_box(pipe.tokens(pipe.stage), w.tokens_map, kb * kTileK, t.first, pipe.full(pipe.stage));
            } else {
                uint32_t to = pipe.tokens(pipe.stage) + place;
#pragma unroll
                for (int i = 0; i < ROWS; i++)
                    if (i < mine) copy_16(to + i * 2048, b + ((uint64_t)(offset[i] + kb * 8) << 4));
                barrier_arrive_copied(pipe.full(pipe.stage));
            }
            pipe.advance();
        }
    }
}

// Multiplies the stages of one tile whose tokens are at most N into d, and leaves the pipeline at the next tile's first.
template <int N, class C>
__device__ __forceinline__ void multiply(pipeline<C> &pipe, float (&d)[C::HALVES][C::TOKENS / 2], int warpgroup, int steps) {
    int previous = 0;
    bool elected = threadIdx.x % 32 == 0;
    for (int kb = 0; kb < steps; kb++) {
        barrier_wait(pipe.full(pipe.stage), pipe.parity);
        if (!C::BULK) fence_async_shared();
        uint64_t a = descriptor(pipe.weights(pipe.stage) + warpgroup * (C::weight_bytes / kConsumers), 1024 * C::HALVES);
        uint64_t b = descriptor(pipe.tokens(pipe.stage), 1024);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < kTileK / 16; k++)
#pragma unroll
            for (int h = 0; h < C::HALVES; h++) wgmma<N>(d[h], a + h * (1024 / 16) + 2 * k, b + 2 * k, kb + k > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (kb > 0 && elected) barrier_arrive(pipe.empty(previous));
        previous = pipe.stage;
        pipe.advance();
    }
    wgmma_wait<0>();
    if (elected) barrier_arrive(pipe.empty(previous));
}

// Writes tokens 8j … 8j + 7 of a tile, for the warp's weight rows from `feature` on. slot: of token lane + 32·(j / 4).
template <class C>
__device__ __forceinline__ void store(const product &p, const tile &t, int feature, float (&d)[C::HALVES][C::TOKENS / 2], int j, int slot) {
    const int lane = threadIdx.x % 32, first = t.first + 8 * j, count = t.count - 8 * j;
    if (!C::SECOND && feature >= p.features) return;
    if (C::UP_ALONE) {
#pragma unroll
        for (int i = 0; i < 2 * C::HALVES; i++)
            store_relu(d[i % C::HALVES] + 4 * j + i / C::HALVES * 2, p, first, count, feature + 8 * i);
    } else if (!C::SECOND && C::HALVES == 1) {
        store_silu(d[0] + 4 * j, d[0] + 4 * j + 2, p, first, count, feature / 2);
    } else if (!C::SECOND) {
        store_silu(d[0] + 4 * j, d[C::HALVES - 1] + 4 * j, p, first, count, feature / 2);
        store_silu(d[0] + 4 * j + 2, d[C::HALVES - 1] + 4 * j + 2, p, first, count, feature / 2 + 8);
    } else {
        int from = 8 * j % 32 + 2 * (lane % 4);
        int slots[2] = {__shfl_sync(0xffffffffu, slot, from), __shfl_sync(0xffffffffu, slot, from + 1)};
        if (C::HALVES == 1) {
            store_rows(d[0] + 4 * j, p, feature + lane / 4, slots[0], slots[1]);
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float v[] = {d[0][4 * j + i], d[C::HALVES - 1][4 * j + i], d[0][4 * j + 2 + i], d[C::HALVES - 1][4 * j + 2 + i]};
                store_row_line(v, p, feature, slots[i]);
            }
        }
    }
}

template <class C>
__device__ __forceinline__ void consume(const work &w) {
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
    const int warp_row = warpgroup * (C::FEATURES / kConsumers) + threadIdx.x / 32 % 4 * 16 * C::HALVES;  // of the tile's weight rows
    pipeline<C> pipe = {w.base};
    float d[C::HALVES][C::TOKENS / 2];
    for (int index = blockIdx.x; index < w.num_tiles; index += gridDim.x) {
        tile t = w.find<C>(index);
        int slot[C::SECOND ? C::TOKENS / 32 : 1];  // of token lane + 32·i
        if (C::SECOND) {
#pragma unroll
            for (int i = 0; i < C::TOKENS / 32; i++) {
                int token = lane + 32 * i;
                slot[i] = token >= t.count ? -1 : w.p.slot_of ? w.p.slot_of[t.first + token] : t.first + token;
            }
        }
        if (C::TOKENS > 64 && t.count <= 64)
            multiply<64>(pipe, d, warpgroup, w.steps);
        else
            multiply<C::TOKENS>(pipe, d, warpgroup, w.steps);
#pragma unroll
        for (int j = 0; j < C::TOKENS / 8; j++)
            if (8 * j < t.count) store<C>(w.p, t, t.feature + warp_row, d, j, slot[C::SECOND ? j / 4 : 0]);
    }
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1) expert_kernel(const __grid_constant__ product p, const __grid_constant__ CUtensorMap map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ uint8_t shared[];
    uint32_t base = (shared_address(shared) + 1023) & ~1023u;
    const tile_list list(shared + (base - shared_address(shared)) + C::list_at, p.num_groups);
    pipeline<C> pipe = {base};
    if (threadIdx.x == 32) {
        for (int s = 0; s < C::STAGES; s++) {
            barrier_init(pipe.full(s), 1 + (C::BULK ? 0 : 128));  // the leader with the copy engine's bytes, and every gatherer
            barrier_init(pipe.empty(s), 4 * kConsumers);
        }
        fence_barrier_init();
        fence_async_shared();
    }
    for (int g = threadIdx.x; g < p.num_groups; g += kThreads) list.maps[g] = p.maps[g];
    if (!C::SECOND) wait_for_previous_grid();
    if (threadIdx.x < 32) list_tiles<C::TOKENS>(p, list);
    __syncthreads();
    allow_next_grid();
    int feature_tiles = (p.features + C::FEATURES - 1) / C::FEATURES;
    work w = {p, &map, list, base, feature_tiles, list.tiles[p.num_groups] * feature_tiles, p.k / kTileK};
    if (threadIdx.x >= 128 * kConsumers) {
        registers_fewer<C::fetch_registers>();
        fetch<C>(w);
    } else {
        registers_more<C::multiply_registers>();
        consume<C>(w);
    }
#endif
}

using kernel = void (*)(product, CUtensorMap);

struct variant {
    int tile, features, tokens, bytes;
    bool bulk;  // the second product's kernel reads its tokens by a map
    kernel gate_up, up, down;
};

template <int FEATURES, int TOKENS, int STAGES>
constexpr variant make_variant(int tile) {
    using gate_up = config<FEATURES, TOKENS, STAGES, GATE_UP>;
    using up = config<FEATURES, TOKENS, STAGES, UP>;
    using down = config<FEATURES, TOKENS, STAGES, DOWN>;
    return {tile, FEATURES, TOKENS, gate_up::bytes, down::BULK, expert_kernel<gate_up>, expert_kernel<up>, expert_kernel<down>};
}

// As many stages as shared memory holds. The widest tile is 256 weight rows by 128 tokens rather than 128 by 256: gathering costs more
// than copying weights does.
const variant kVariants[] = {make_variant<128, 32, 10>(32), make_variant<128, 64, 8>(64), make_variant<128, 128, 6>(128),
                             make_variant<256, 128, 4>(256)};

// cuTensorMapEncodeTiled, or NULL where the driver has none.
decltype(&cuTensorMapEncodeTiled) find_encoder() {
    cudaDriverEntryPointQueryResult found;
    void *entry = nullptr;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found) != cudaSuccess) return nullptr;
    return found == cudaDriverEntryPointSuccess ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry) : nullptr;
}

// A map of a row-major bf16 matrix in boxes of kTileK columns.
cudaError_t make_map(const void *matrix, int64_t rows, int64_t columns, int box_rows, void *map) {
    static const auto encode = find_encoder();
    if (!encode) return cudaErrorNotSupported;
    cuuint64_t sizes[] = {(cuuint64_t)columns, (cuuint64_t)rows}, strides[] = {(cuuint64_t)columns * 2};
    cuuint32_t box[] = {kTileK, (cuuint32_t)box_rows}, steps[] = {1, 1};
    CUresult result = encode(static_cast<CUtensorMap *>(map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void *>(matrix), sizes,
                             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// early: the kernel may start, and read the table of maps, before the one before it has ended.
cudaError_t launch(const variant &v, kernel k, const product &p, const CUtensorMap &map, const moe_cuda_ffn &f, bool early,
                   cudaStream_t stream) {
    int64_t token_tiles = f.num_assignments / v.tokens + (f.num_assignments < f.num_groups ? f.num_assignments : f.num_groups);
    int64_t tiles = token_tiles * ((p.features + v.features - 1) / v.features);
    cudaLaunchAttribute dependent = {};
    dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependent.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(tiles < f.device.num_sms ? tiles : f.device.num_sms));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = (size_t)(v.bytes + list_bytes(p.num_groups));
    config.stream = stream;
    config.attrs = &dependent;
    config.numAttrs = early ? 1 : 0;
    return cudaLaunchKernelEx(&config, k, p, map);
}

}  // namespace

cudaError_t moe_cuda_expert_sm90_open(void) {
    for (const variant &v : kVariants) {
        for (kernel k : {v.gate_up, v.up, v.down}) {
            int bytes = v.bytes + list_bytes(MOE_CUDA_MAX_GROUPS);
            cudaError_t error = cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
            if (error != cudaSuccess) return error;
        }
    }
    return cudaSuccess;
}

cudaError_t moe_cuda_expert_ffn_sm90(const moe_cuda_ffn *args, cudaStream_t stream) {
    for (const variant &v : kVariants) {
        if (v.tile != args->tile_tokens) continue;
        alignas(64) CUtensorMap map = {};
        cudaError_t error = !v.bulk ? cudaSuccess : make_map(args->inner, args->num_assignments, args->width, v.tokens, &map);
        kernel first = args->gated ? v.gate_up : v.up;
        if (error == cudaSuccess) error = launch(v, first, first_product(*args), map, *args, !args->brought, stream);
        if (error == cudaSuccess) error = launch(v, v.down, second_product(*args), map, *args, true, stream);
        return error;
    }
    return cudaErrorInvalidValue;
}

cudaError_t moe_cuda_expert_maps_make(const void *gate_up, const void *down, int32_t hidden, int32_t width, bool gated,
                                      moe_cuda_expert_maps *maps) {
    cudaError_t error = make_map(gate_up, (gated ? 2 : 1) * (int64_t)width, hidden, kBoxFeatures, maps->gate_up);
    return error != cudaSuccess ? error : make_map(down, hidden, width, kBoxFeatures, maps->down);
}
