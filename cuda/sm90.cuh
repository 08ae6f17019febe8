// PTX of Hopper's asynchronous units (sm_90a): memory barriers, the copy engine, warpgroup matrix products, dependent launch.
// Names and semantics are those of the PTX ISA, chapters "mbarrier", "cp.async.bulk.tensor", "wgmma", "griddepcontrol".
#pragma once
#include <stdint.h>

namespace moe_sm90 {

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---- barriers in shared memory, by address ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase wait for `bytes` of the copy engine as well.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity has completed.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Orders ordinary and cp.async writes to shared memory that this thread has seen before what the asynchronous units read.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- turns ----

// Two warpgroups that do something in turn, `warpgroup` 0 or 1: each waits for its turn at a hardware barrier of its own, at which the
// other arrives when it gives the turn away. As many turns are taken as given.
__device__ __forceinline__ void take_turn(int warpgroup) { asm volatile("bar.sync %0, 256;" ::"r"(1 + warpgroup) : "memory"); }
__device__ __forceinline__ void give_turn(int warpgroup) { asm volatile("bar.arrive %0, 256;" ::"r"(2 - warpgroup) : "memory"); }

// ---- copies ----

// A tensor map that host or device wrote to device memory, before its use.
__device__ __forceinline__ void fence_map(const void *map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(map) : "memory");
}

// One box of a 2-D map at (column, row) to shared memory; its bytes count towards the barrier.
__device__ __forceinline__ void copy_box(uint32_t shared, const void *map, int column, int row, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                     shared),
                 "l"(map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

// 16 bytes, by the thread's own asynchronous copy.
__device__ __forceinline__ void copy_16(uint32_t shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
// Arrives when this thread's copy_16 so far have landed.
__device__ __forceinline__ void barrier_arrive_copied(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// ---- dependent launch ----

__device__ __forceinline__ void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void allow_next_grid() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- registers of a warpgroup ----

template <int N>
__device__ __forceinline__ void registers_more() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void registers_fewer() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- matrix products of a warpgroup ----

// Descriptor of a matrix in shared memory whose rows are 128 bytes of K, 8 of them to a swizzle atom of 1024 bytes (128-byte
// swizzle): start address, leading offset 1 (unused), stride in bytes between atoms, in units of 16 bytes; layout 1. The next 16
// columns of K are 32 bytes, 2 units, further.
__device__ __forceinline__ uint64_t descriptor(uint32_t shared, int stride) {
    return (uint64_t)((shared & 0x3ffff) >> 4) | (uint64_t)1 << 16 | (uint64_t)(stride >> 4) << 32 | (uint64_t)1 << 62;
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// d [64, N] (+)= a [64, 16] · b [N, 16]^T, bfloat16 to float32. d[4j + 0, 1] of a thread: row 16·warp + lane / 4, columns
// 8j + 2·(lane % 4) + 0, 1; d[4j + 2, 3]: the row 8 below.
template <int N>
__device__ void wgmma(float *d, uint64_t a, uint64_t b, int accumulate);

#define MOE_ACC_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MOE_ACC_8(i) MOE_ACC_4(i), MOE_ACC_4(i + 4)
#define MOE_ACC_16(i) MOE_ACC_8(i), MOE_ACC_8(i + 8)
#define MOE_ACC_32(i) MOE_ACC_16(i), MOE_ACC_16(i + 16)
#define MOE_REGS_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define MOE_REGS_32 MOE_REGS_16 \
    ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MOE_REGS_64 MOE_REGS_32 \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
    ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define MOE_REGS_96 MOE_REGS_64 \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
    ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define MOE_WGMMA(N, REGS, A, B, ACCUMULATE, ...)                                                                       \
    template <>                                                                                                           \
    __device__ __forceinline__ void wgmma<N>(float *d, uint64_t a, uint64_t b, int accumulate) {                        \
        asm volatile(                                                                                                     \
            "{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\n"                                                       \
            "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGS "}, " A ", " B ", p, 1, 1, 0, 0;\n}\n"       \
            : __VA_ARGS__                                                                                                 \
            : "l"(a), "l"(b), "r"(accumulate));                                                                           \
    }

MOE_WGMMA(32, MOE_REGS_16, "%16", "%17", "%18", MOE_ACC_16(0))
MOE_WGMMA(64, MOE_REGS_32, "%32", "%33", "%34", MOE_ACC_32(0))
MOE_WGMMA(128, MOE_REGS_64, "%64", "%65", "%66", MOE_ACC_32(0), MOE_ACC_32(32))
MOE_WGMMA(192, MOE_REGS_96, "%96", "%97", "%98", MOE_ACC_32(0), MOE_ACC_32(32), MOE_ACC_32(64))

#undef MOE_WGMMA

}  // namespace moe_sm90
