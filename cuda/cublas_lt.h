/* cuBLASLt, loaded when the first GPU is opened: the library is so large that a program which is linked to it takes a tenth of a
 * second and 200 MiB to start, also where it never uses a GPU. */
#pragma once
#include <cublasLt.h>

#include "common/status.h"

#define MOE_CUBLAS_LT_FUNCTIONS(X)          \
    X(cublasLtCreate)                       \
    X(cublasLtDestroy)                      \
    X(cublasLtMatmul)                       \
    X(cublasLtMatmulAlgoGetHeuristic)       \
    X(cublasLtMatmulDescCreate)             \
    X(cublasLtMatmulDescDestroy)            \
    X(cublasLtMatmulDescSetAttribute)       \
    X(cublasLtMatmulPreferenceCreate)       \
    X(cublasLtMatmulPreferenceDestroy)      \
    X(cublasLtMatmulPreferenceSetAttribute) \
    X(cublasLtMatrixLayoutCreate)           \
    X(cublasLtMatrixLayoutDestroy)

typedef struct moe_cublas_lt {
#define MOE_CUBLAS_LT_MEMBER(name) __typeof__(&name) name;
    MOE_CUBLAS_LT_FUNCTIONS(MOE_CUBLAS_LT_MEMBER)
#undef MOE_CUBLAS_LT_MEMBER
} moe_cublas_lt;

/* The library's functions; loaded once and kept until the process ends. It is looked for as the dynamic linker does, then in the
 * toolkit that this was built with. Any thread. UNAVAILABLE, with what the linker says. */
moe_status moe_cublas_lt_load(const moe_cublas_lt **out, moe_error *err);
