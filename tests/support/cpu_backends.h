/* Every CPU implementation that this machine can run, one after another. */
#pragma once
#include "cpu/cpu.h"

#define MOE_TEST_CPU_BACKENDS 4 /* cpu-ref, then cpu: scalar, avx2, avx512 */

/* Opens the index-th with that dtype; NULL where this machine lacks its instructions. Closed by ops->close. */
moe_backend *moe_test_cpu_open_dtype(int index, int32_t threads, moe_dtype dtype);

static inline moe_backend *moe_test_cpu_open(int index, int32_t threads) {
    return moe_test_cpu_open_dtype(index, threads, MOE_F32);
}
