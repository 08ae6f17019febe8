/* The `cpu` backend's kernels in plain C. */
#include "cpu/lanes_scalar.h"
/* over those lanes: */
#include "cpu/kernels_lanes.h"

const moe_cpu_kernels moe_cpu_kernels_scalar = LANES_KERNELS;
MOE_CPU_SINGLE_OPS(scalar)
