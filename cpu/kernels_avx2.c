/* The `cpu` backend's kernels for avx2. */
#if defined(__x86_64__)
#include "cpu/lanes_avx2.h"
/* over those lanes: */
#include "cpu/kernels_lanes.h"

const moe_cpu_kernels moe_cpu_kernels_avx2 = LANES_KERNELS;
MOE_CPU_SINGLE_OPS(avx2)
#endif
