#include "cuda/linear.h"

#include "common/alloc.h"
#include "cuda/cublas_lt.h"

#define WORKSPACE_BYTES ((size_t)32 << 20) /* what NVIDIA advises for Hopper */
#define MAX_PLANS 512                      /* remembered; the oldest makes room */
/* Up to here the few-row kernel is the faster one (docs/performance.md); more for a narrow output. */
#define FEW_ROWS 8
#define FEW_ROWS_NARROW 32
#define NARROW 1024

/* How cuBLASLt multiplies one shape. */
typedef struct plan {
    int32_t rows, n, k;
    moe_cuda_out out;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t w, x, y;
    cublasLtMatmulAlgo_t algo;
    bool used;
} plan;

struct moe_cuda_linear {
    bool deterministic;
    const moe_cublas_lt *lt;
    cublasLtHandle_t handle;
    void *workspace;
    plan plans[MAX_PLANS];
    int32_t next; /* the place that the next new plan takes */
};

moe_status moe_cuda_linear_open(const moe_cuda_device *device, bool deterministic, moe_cuda_linear **out, moe_error *err) {
    moe_cuda_linear *l = moe_calloc(1, sizeof *l);
    moe_status status = MOE_OK;
    *out = NULL;
    if (!l) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for matrix products");
    l->deterministic = deterministic;
    status = moe_cublas_lt_load(&l->lt, err);
    if (status == MOE_OK && l->lt->cublasLtCreate(&l->handle) != CUBLAS_STATUS_SUCCESS)
        status = moe_fail(err, MOE_INTERNAL, "cuBLASLt cannot be started on GPU %d", device->index);
    if (status == MOE_OK)
        status = moe_cuda_device_alloc(device, WORKSPACE_BYTES, "the workspace of matrix products", "lower --kv-cache-memory",
                                       &l->workspace, err);
    if (status == MOE_OK)
        *out = l;
    else
        moe_cuda_linear_close(l);
    return status;
}

static void forget(const moe_cublas_lt *lt, plan *p) {
    if (p->y) lt->cublasLtMatrixLayoutDestroy(p->y);
    if (p->x) lt->cublasLtMatrixLayoutDestroy(p->x);
    if (p->w) lt->cublasLtMatrixLayoutDestroy(p->w);
    if (p->product) lt->cublasLtMatmulDescDestroy(p->product);
    *p = (plan){0};
}

void moe_cuda_linear_close(moe_cuda_linear *l) {
    if (!l) return;
    for (int32_t i = 0; i < MAX_PLANS; i++) forget(l->lt, &l->plans[i]);
    moe_cuda_device_free(l->workspace);
    if (l->handle) l->lt->cublasLtDestroy(l->handle);
    moe_free(l);
}

/* cuBLAS counts by columns: y^T [n, rows] = (W^T)^T [n, k] · x^T [k, rows]. */
static bool describe(const moe_cublas_lt *lt, plan *p) {
    const cublasOperation_t transposed = CUBLAS_OP_T;
    cudaDataType_t y = p->out == MOE_CUDA_OUT_BF16 ? CUDA_R_16BF : CUDA_R_32F;
    return lt->cublasLtMatmulDescCreate(&p->product, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
           lt->cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed) ==
               CUBLAS_STATUS_SUCCESS &&
           lt->cublasLtMatrixLayoutCreate(&p->w, CUDA_R_16BF, (uint64_t)p->k, (uint64_t)p->n, p->k) == CUBLAS_STATUS_SUCCESS &&
           lt->cublasLtMatrixLayoutCreate(&p->x, CUDA_R_16BF, (uint64_t)p->k, (uint64_t)p->rows, p->k) == CUBLAS_STATUS_SUCCESS &&
           lt->cublasLtMatrixLayoutCreate(&p->y, y, (uint64_t)p->n, (uint64_t)p->rows, p->n) == CUBLAS_STATUS_SUCCESS;
}

static bool choose(moe_cuda_linear *l, plan *p) {
    const moe_cublas_lt *lt = l->lt;
    cublasLtMatmulPreference_t preference = NULL;
    cublasLtMatmulHeuristicResult_t best;
    const size_t bytes = WORKSPACE_BYTES;
    int found = 0;
    if (lt->cublasLtMatmulPreferenceCreate(&preference) != CUBLAS_STATUS_SUCCESS) return false;
    bool ok = lt->cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                                       sizeof bytes) == CUBLAS_STATUS_SUCCESS &&
              lt->cublasLtMatmulAlgoGetHeuristic(l->handle, p->product, p->w, p->x, p->y, p->y, preference, 1, &best, &found) ==
                  CUBLAS_STATUS_SUCCESS;
    lt->cublasLtMatmulPreferenceDestroy(preference);
    if (ok && found > 0) p->algo = best.algo;
    return ok && found > 0;
}

static plan *plan_of(moe_cuda_linear *l, const moe_cuda_product *a) {
    for (int32_t i = 0; i < MAX_PLANS; i++) {
        plan *p = &l->plans[i];
        if (p->used && p->rows == a->rows && p->n == a->n && p->k == a->k && p->out == a->out) return p;
    }
    plan *p = &l->plans[l->next];
    forget(l->lt, p);
    p->rows = a->rows;
    p->n = a->n;
    p->k = a->k;
    p->out = a->out;
    if (!describe(l->lt, p) || !choose(l, p)) {
        forget(l->lt, p);
        return NULL;
    }
    p->used = true;
    l->next = (l->next + 1) % MAX_PLANS;
    return p;
}

cudaError_t moe_cuda_linear_many(moe_cuda_linear *l, cudaStream_t stream, const moe_cuda_product *a) {
    const float one = 1, beta = a->out == MOE_CUDA_OUT_F32_ADD ? 1 : 0;
    plan *p = plan_of(l, a);
    if (!p) return cudaErrorNotSupported;
    cublasStatus_t status = l->lt->cublasLtMatmul(l->handle, p->product, &one, a->w, p->w, a->x, p->x, &beta, a->y, p->y, a->y,
                                                  p->y, &p->algo, l->workspace, WORKSPACE_BYTES, stream);
    if (status == CUBLAS_STATUS_SUCCESS) return cudaSuccess;
    cudaError_t error = cudaGetLastError();
    return error != cudaSuccess ? error : cudaErrorLaunchFailure;
}

cudaError_t moe_cuda_linear_run(moe_cuda_linear *l, const moe_cuda_queue *queue, const moe_cuda_product *a) {
    if (l->deterministic || a->rows <= (a->n <= NARROW ? FEW_ROWS_NARROW : FEW_ROWS)) return moe_cuda_linear_few(queue, a);
    cudaError_t error = moe_cuda_linear_many(l, queue->stream, a);
    return error == cudaErrorNotSupported ? moe_cuda_linear_few(queue, a) : error;
}
