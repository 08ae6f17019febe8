#include "tests/support/cuda_backends.h"

#include <stdio.h>

#ifdef MOESAIC_HAS_CUDA
#include "cuda/cuda.h"

moe_backend *moe_test_cuda_open(moe_dtype dtype, bool deterministic) {
    moe_cuda_config config = {.dtype = dtype, .deterministic = deterministic};
    moe_backend *backend;
    moe_error err;
    moe_status status = moe_cuda_open(&config, &backend, &err);
    if (status == MOE_OK) return backend;
    printf("not tested: %s\n", err.message);
    MOE_ASSERT(status == MOE_UNAVAILABLE);
    return NULL;
}
#else
moe_backend *moe_test_cuda_open(moe_dtype dtype, bool deterministic) {
    printf("not tested: this build has no CUDA backend (%s%s)\n", moe_dtype_name(dtype), deterministic ? ", deterministic" : "");
    return NULL;
}
#endif
