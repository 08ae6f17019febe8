#include "cuda/cuda.h"
#include "cuda/device.h"
#include "cuda/tune.h"

moe_status moe_cuda_tune_experts(const moe_cuda_config *config, int32_t hidden, int32_t intermediate, bool gated,
                                 int32_t num_experts, moe_error *err) {
    moe_cuda_device device;
    moe_cuda_expert_device kernels;
    moe_cuda_tune tune;
    moe_cuda_tune_row row;
    moe_status status = moe_cuda_device_open(config->device, &device, err);
    if (status == MOE_OK)
        status = moe_cuda_check(moe_cuda_expert_device_open(device.arch == 80, &kernels), "preparing kernels", err);
    if (status == MOE_OK) status = moe_cuda_tune_read(config->tune_file, &tune, err);
    if (status == MOE_NOT_FOUND) {
        tune = (moe_cuda_tune){.count = 0};
        status = MOE_OK;
    }
    if (status == MOE_OK) status = moe_cuda_tune_measure(kernels, hidden, intermediate, gated, num_experts, &row, err);
    if (status == MOE_OK) status = moe_cuda_tune_add(&tune, &row, err);
    return status == MOE_OK ? moe_cuda_tune_write(config->tune_file, &tune, err) : status;
}
