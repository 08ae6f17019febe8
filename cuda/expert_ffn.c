/* The expert FFN's one entry: which kernels a device and a batch take. */
#include "cuda/expert_kernels.h"
#include "cuda/tune.h"

cudaError_t moe_cuda_expert_device_open(bool force_sm80, moe_cuda_expert_device *out) {
    int device, major, minor, sms;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    out->arch = major == 9 && minor == 0 && !force_sm80 ? 90 : 80; /* sm_90a code runs on 9.0 alone */
    out->num_sms = sms;
    return out->arch == 90 ? moe_cuda_expert_sm90_open() : moe_cuda_expert_sm80_open();
}

cudaError_t moe_cuda_expert_ffn(const moe_cuda_ffn *args, cudaStream_t stream) {
    moe_cuda_ffn ffn = *args;
    if (!moe_cuda_expert_supported(ffn.hidden, ffn.width, ffn.width_first) || ffn.num_groups < 1 ||
        ffn.num_groups > MOE_CUDA_MAX_GROUPS)
        return cudaErrorInvalidValue;
    if (ffn.num_assignments < 1) return cudaSuccess;
    if (ffn.tile_tokens == 0) ffn.tile_tokens = moe_cuda_tune_tile(NULL, ffn.hidden, ffn.width, ffn.num_assignments, ffn.num_groups);
    return ffn.device.arch == 90 ? moe_cuda_expert_ffn_sm90(&ffn, stream) : moe_cuda_expert_ffn_sm80(&ffn, stream);
}
