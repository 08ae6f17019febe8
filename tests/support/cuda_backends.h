/* The CUDA backend in tests. Where there is no GPU, or no CUDA in this build, the test prints why and skips; it never passes. */
#pragma once
#include "common/backend.h"

/* Opens device 0; NULL, with the reason printed, where that cannot be. Any other failure aborts. Closed by ops->close. */
moe_backend *moe_test_cuda_open(moe_dtype dtype, bool deterministic);
