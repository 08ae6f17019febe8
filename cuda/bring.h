/* What a batch, a segment or a step brings from pinned host memory. The copy engine of that direction stays with one stream for
 * long while it has work queued, so that a few kilobytes would wait for megabytes of experts that somebody will want later: kernels
 * read the host's memory directly instead. */
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MOE_CUDA_BRING_BYTES ((size_t)4 << 20) /* more takes the copy engine, which needs no SM, but comes behind experts on their way */

/* As cudaMemcpyAsync and cudaMemcpy2DAsync from pinned host memory to the device; not to be captured. The next launch of the stream
 * must not read what was brought before it has waited for its predecessor; those after it may. */
cudaError_t moe_cuda_bring(void *to, const void *from, size_t bytes, cudaStream_t stream);
/* The first `bytes` of `rows` rows, `pitch` bytes apart on both sides. */
cudaError_t moe_cuda_bring_rows(void *to, const void *from, size_t pitch, size_t bytes, size_t rows, cudaStream_t stream);
/* to[places[i], :] = from[i, :] for `rows` rows of `width` float32; places: device, may have been brought just before. */
cudaError_t moe_cuda_bring_to_places(float *to, const float *from, const int32_t *places, size_t rows, size_t width, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
