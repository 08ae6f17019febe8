// Expert FFN for compute capability 8.0 and later: one persistent kernel a product, cp.async stages, mma.sync. Eight warps multiply
// and fetch alike; the fetching side runs ahead of the multiplying side across tiles.
#include "cuda/expert_tiles.cuh"

namespace {

using namespace moe_expert;

constexpr int kThreads = 256;
constexpr int kTileFeatures = 128;  // weight rows of a tile
constexpr int kWeightBytes = kTileFeatures * kTileK * 2;  // of a stage

// WARPS_N warps side by side over a tile's tokens, the rest over its features.
template <int TOKENS, int STAGES, int WARPS_N>
struct shape {
    static constexpr int warps_m = 8 / WARPS_N;
    static constexpr int blocks_m = kTileFeatures / warps_m / 16, blocks_n = TOKENS / WARPS_N / 8;  // of 16 and 8, for a warp
    static constexpr int stage_bytes = kWeightBytes + TOKENS * kTileK * 2;
    static constexpr int bytes = STAGES * stage_bytes;  // and the list of tiles
};

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void copy_16(uint32_t shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void load_blocks(uint32_t *r, uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// d [16, 8] += a [16, 16] · b [8, 16]^T
__device__ __forceinline__ void multiply_block(float *d, const uint32_t *a, const uint32_t *b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rows of 128 bytes; the 16-byte chunks of a row are permuted by the row's last 3 bits, so that ldmatrix meets no bank twice.
__device__ __forceinline__ uint32_t at(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// The fetching side: one stage a call, through all tiles of this block.
template <int TOKENS, bool SECOND>
struct fetcher {
    int index, kb = 0;
    const uint8_t *weights = nullptr;
    uint32_t offset[TOKENS / 32];  // of this thread's token rows, in units of 16 bytes
    int mine = 0, features_left = 0;

    __device__ __forceinline__ void step(const product &p, const tile_list &list, int feature_tiles, int num_tiles, uint32_t stage) {
        const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
        if (index >= num_tiles) return;
        if (kb == 0) {
            tile t = find_tile<kTileFeatures, TOKENS>(list, p.num_groups, feature_tiles, index);
            const uint8_t *a = static_cast<const uint8_t *>(p.weights[t.group]);
            weights = a + 2 * ((int64_t)(p.feature_first + t.feature + row) * p.a_stride + p.k_first) + 16 * chunk;
            features_left = p.features - t.feature - row;
            mine = (t.count - row + 31) / 32;
#pragma unroll
            for (int i = 0; i < TOKENS / 32; i++) {
                int from = t.first + row + 32 * i;
                if (i < mine && !SECOND) from = p.rows[from];
                offset[i] = (uint32_t)from * (uint32_t)(p.k / 8) + chunk;
            }
        }
#pragma unroll
        for (int i = 0; i < kTileFeatures / 32; i++)
            if (32 * i < features_left)
                copy_16(stage + at(row + 32 * i, chunk), weights + (int64_t)64 * i * p.a_stride + kb * kTileK * 2);
#pragma unroll
        for (int i = 0; i < TOKENS / 32; i++)
            if (i < mine)
                copy_16(stage + kWeightBytes + at(row + 32 * i, chunk),
                        reinterpret_cast<const uint8_t *>(p.b) + ((uint64_t)(offset[i] + kb * 8) << 4));
        if (++kb == p.k / kTileK) kb = 0, index += gridDim.x;
    }
};

template <int TOKENS, int STAGES, int WARPS_N, product_kind KIND>
__global__ void __launch_bounds__(kThreads) expert_kernel(const __grid_constant__ product p) {
    constexpr bool SECOND = KIND == DOWN;
    using s = shape<TOKENS, STAGES, WARPS_N>;
    extern __shared__ __align__(128) uint8_t shared[];
    const tile_list list(shared + STAGES * s::stage_bytes, p.num_groups);
    if (threadIdx.x < 32) list_tiles<TOKENS>(p, list);
    __syncthreads();
    const int feature_tiles = (p.features + kTileFeatures - 1) / kTileFeatures, steps = p.k / kTileK;
    const int num_tiles = list.tiles[p.num_groups] * feature_tiles;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / WARPS_N * s::blocks_m * 16, warp_token = warp % WARPS_N * s::blocks_n * 8;
    const uint32_t base = shared_address(shared);
    fetcher<TOKENS, SECOND> next = {(int)blockIdx.x};
    int stage = 0;
    for (int i = 0; i < STAGES - 1; i++) {
        next.step(p, list, feature_tiles, num_tiles, base + i * s::stage_bytes);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
        float d[s::blocks_m][s::blocks_n][4] = {};
        for (int kb = 0; kb < steps; kb++) {
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
            __syncthreads();  // this stage has landed for all; the one before it is free
            next.step(p, list, feature_tiles, num_tiles, base + (stage == 0 ? STAGES - 1 : stage - 1) * s::stage_bytes);
            asm volatile("cp.async.commit_group;" ::: "memory");
            uint32_t a_at = base + stage * s::stage_bytes, b_at = a_at + kWeightBytes;
#pragma unroll
            for (int k = 0; k < kTileK / 16; k++) {
                uint32_t a[s::blocks_m][4], b[s::blocks_n / 2][4];
#pragma unroll
                for (int m = 0; m < s::blocks_m; m++)
                    load_blocks(a[m], a_at + at(warp_row + 16 * m + lane % 16, 2 * k + lane / 16));
#pragma unroll
                for (int n = 0; n < s::blocks_n / 2; n++)
                    load_blocks(b[n], b_at + at(warp_token + 16 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
                for (int m = 0; m < s::blocks_m; m++)
#pragma unroll
                    for (int n = 0; n < s::blocks_n; n++) multiply_block(d[m][n], a[m], b[n / 2] + n % 2 * 2);
            }
            if (++stage == STAGES) stage = 0;
        }
        tile t = find_tile<kTileFeatures, TOKENS>(list, p.num_groups, feature_tiles, index);
#pragma unroll
        for (int n = 0; n < s::blocks_n; n++) {
            int token = warp_token + 8 * n, own = token + 2 * (lane % 4), slot[2];
            if (token >= t.count) continue;
            for (int i = 0; i < 2 && SECOND; i++)
                slot[i] = own + i >= t.count ? -1 : p.slot_of ? p.slot_of[t.first + own + i] : t.first + own + i;
#pragma unroll
            for (int m = 0; m < s::blocks_m; m++) {
                int row = t.feature + warp_row + 16 * m;
                if (SECOND) {
                    store_rows(d[m][n], p, row + lane / 4, slot[0], slot[1]);
                } else if (KIND == GATE_UP) {
                    store_silu(d[m][n], d[m][n] + 2, p, t.first + token, t.count - token, row / 2);
                } else if (row < p.features) {  // of all 16 rows or none
                    store_relu(d[m][n], p, t.first + token, t.count - token, row);
                    store_relu(d[m][n] + 2, p, t.first + token, t.count - token, row + 8);
                }
            }
        }
    }
}

using kernel = void (*)(product);

struct variant {
    int tokens, bytes, blocks_per_sm;
    kernel gate_up, up, down;
};

template <int TOKENS, int STAGES, int WARPS_N, int BLOCKS>
constexpr variant make_variant() {
    return {TOKENS, shape<TOKENS, STAGES, WARPS_N>::bytes, BLOCKS, expert_kernel<TOKENS, STAGES, WARPS_N, GATE_UP>,
            expert_kernel<TOKENS, STAGES, WARPS_N, UP>, expert_kernel<TOKENS, STAGES, WARPS_N, DOWN>};
}

// Shared memory of an A100's multiprocessor is 164 KiB.
const variant kVariants[] = {make_variant<32, 3, 1, 2>(), make_variant<64, 5, 1, 1>(), make_variant<128, 4, 2, 1>()};

cudaError_t launch(const variant &v, kernel k, const product &p, const moe_cuda_ffn &f, cudaStream_t stream) {
    int64_t token_tiles = f.num_assignments / v.tokens + (f.num_assignments < f.num_groups ? f.num_assignments : f.num_groups);
    int64_t tiles = token_tiles * ((p.features + kTileFeatures - 1) / kTileFeatures), most = f.device.num_sms * v.blocks_per_sm;
    k<<<(unsigned)(tiles < most ? tiles : most), kThreads, (size_t)(v.bytes + list_bytes(p.num_groups)), stream>>>(p);
    return cudaGetLastError();
}

}  // namespace

cudaError_t moe_cuda_expert_sm80_open(void) {
    for (const variant &v : kVariants) {
        for (kernel k : {v.gate_up, v.up, v.down}) {
            cudaError_t error = cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     v.bytes + list_bytes(MOE_CUDA_MAX_GROUPS));
            if (error != cudaSuccess) return error;
        }
    }
    return cudaSuccess;
}

cudaError_t moe_cuda_expert_ffn_sm80(const moe_cuda_ffn *args, cudaStream_t stream) {
    int tokens = args->tile_tokens < 128 ? args->tile_tokens : 128;
    for (const variant &v : kVariants) {
        if (v.tokens != tokens) continue;
        cudaError_t error = launch(v, args->gated ? v.gate_up : v.up, first_product(*args), *args, stream);
        return error != cudaSuccess ? error : launch(v, v.down, second_product(*args), *args, stream);
    }
    return cudaErrorInvalidValue;
}
