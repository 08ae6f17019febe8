#include "tests/support/cpu_backends.h"

#include <stdio.h>

moe_backend *moe_test_cpu_open_dtype(int index, int32_t threads, moe_dtype dtype) {
    static const char *const isas[] = {NULL, "scalar", "avx2", "avx512"};
    moe_cpu_config config = {.threads = threads, .dtype = dtype, .isa = isas[index]};
    moe_backend *backend;
    moe_error err;
    moe_status status = index == 0 ? moe_cpu_ref_open(&config, &backend, &err) : moe_cpu_open(&config, &backend, &err);
    if (status == MOE_OK) return backend;
    MOE_ASSERT(status == MOE_FAILED_PRECONDITION);
    printf("not tested: %s\n", err.message);
    return NULL;
}
