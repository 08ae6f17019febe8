#include "cli/implementations.h"

#include <string.h>

#include "common/model/family.h"
#include "common/joined.h"
#include "common/model/pre_gates.h"
#include "common/redis/redis_store.h"
#include "common/shm/shm_transport.h"
#include "common/zmq/zmq_transport.h"
#include "cpu/cpu.h"
#ifdef MOESAIC_HAS_CUDA
#include "cuda/cuda.h"
#endif

#define MOE_STORE_TIMEOUT_MS 500
#define MOE_NETWORK_LINGER_MS 100

static moe_status open_weights(const moe_model_source *source, moe_model **out, moe_error *err) {
    if (source->dummy) return moe_model_open_dummy(source->dir, &source->generated, out, err);
    if (source->generated.num_layers)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--layers %d: a checkpoint is used whole; layers are for --load-format dummy",
                        source->generated.num_layers);
    return moe_model_open(source->dir, out, err);
}

moe_status moe_model_source_open(const moe_model_source *source, moe_model **out, moe_error *err) {
    moe_status status = open_weights(source, out, err);
    if (status != MOE_OK || !source->pre_gates) return status;
    status = moe_model_use_pre_gates(*out, source->pre_gates, err);
    if (status == MOE_OK) return MOE_OK;
    moe_model_close(out);
    return moe_fail_prefix(err, status, "--pre-gates");
}

#ifdef MOESAIC_HAS_CUDA
static moe_cuda_config cuda_config(const moe_backend_config *c) {
    return (moe_cuda_config){
        .device = c->device, .dtype = c->dtype, .deterministic = c->deterministic, .tune_file = c->tune_file};
}

static moe_status open_cuda(const moe_backend_config *config, moe_backend **out, moe_error *err) {
    moe_cuda_config cuda = cuda_config(config);
    moe_status status = moe_cuda_open(&cuda, out, err);
    return status == MOE_UNAVAILABLE ? moe_fail_prefix(err, status, "--backend cuda (--backend cpu needs no GPU)") : status;
}

moe_status moe_backend_tune(const moe_backend_config *config, const moe_model_config *model, moe_error *err) {
    moe_cuda_config cuda = cuda_config(config);
    if (strcmp(config->name, "cuda") != 0 || !config->tune_file)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--tune: needs --backend cuda and --tune-file FILE");
    return moe_cuda_tune_experts(&cuda, model->hidden, model->expert_intermediate, !model->family->relu, model->num_experts, err);
}

static moe_status cuda_devices(moe_device_name names[MOE_MAX_DEVICES], int32_t *count, moe_error *err) {
    moe_status status = moe_cuda_device_count(count, err);
    if (*count > MOE_MAX_DEVICES) *count = MOE_MAX_DEVICES;
    for (int32_t i = 0; i < *count && status == MOE_OK; i++) status = moe_cuda_device_name(i, names[i], sizeof names[i], err);
    return status;
}
#else
#define NO_CUDA                                                                                         \
    "--backend cuda: this build has no CUDA backend (it needs the CUDA toolkit when it is configured; " \
    "-DMOESAIC_CUDA=ON says what is missing); --backend cpu works"

static moe_status open_cuda(const moe_backend_config *config, moe_backend **out, moe_error *err) {
    (void)config;
    (void)out;
    return moe_fail(err, MOE_UNIMPLEMENTED, NO_CUDA);
}

moe_status moe_backend_tune(const moe_backend_config *config, const moe_model_config *model, moe_error *err) {
    (void)config;
    (void)model;
    return moe_fail(err, MOE_UNIMPLEMENTED, NO_CUDA);
}

static moe_status cuda_devices(moe_device_name names[MOE_MAX_DEVICES], int32_t *count, moe_error *err) {
    (void)names;
    *count = 0;
    return moe_fail(err, MOE_UNIMPLEMENTED, NO_CUDA);
}
#endif

moe_status moe_backend_devices(const char *backend, moe_device_name names[MOE_MAX_DEVICES], int32_t *count, moe_error *err) {
    *count = 0;
    if (strcmp(backend, "cuda") != 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--devices auto: GPUs are for --backend cuda, not %s", backend);
    return cuda_devices(names, count, err);
}

moe_status moe_backend_open(const moe_backend_config *config, moe_backend **out, moe_error *err) {
    moe_cpu_config cpu = {.threads = config->threads, .dtype = config->dtype, .isa = NULL};
    if (strcmp(config->name, "cpu") == 0) return moe_cpu_open(&cpu, out, err);
    if (strcmp(config->name, "cpu-ref") == 0) return moe_cpu_ref_open(&cpu, out, err);
    if (strcmp(config->name, "cuda") == 0) return open_cuda(config, out, err);
    return moe_fail(err, MOE_INVALID_ARGUMENT, "no backend is called '%s'; there are: cpu, cpu-ref, cuda", config->name);
}

moe_status moe_host_backend_open(const moe_backend_config *config, moe_backend *device, moe_backend **out, moe_error *err) {
    const moe_cpu_config cpu = {.threads = config->threads, .dtype = config->dtype, .background = true};
    *out = NULL;
    if (strcmp(config->name, "cuda") == 0 && config->deterministic)
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "--cold-experts: not with --deterministic, because the host's last bits are not the GPU's, and which of them "
                        "computes an expert depends on what is on the GPU; --cold-experts fetch works");
    if (strcmp(config->name, "cuda") == 0) return moe_cpu_open(&cpu, out, err);
    *out = device;
    return MOE_OK;
}

void moe_host_backend_close(moe_backend **host, const moe_backend *device) {
    if (*host && *host != device) (*host)->ops->close(*host);
    *host = NULL;
}

moe_status moe_network_open(const char *keys_dir, moe_role role, int64_t poll_us, moe_transport **out, moe_error *err) {
    moe_curve_keys keys;
    bool authenticated = keys_dir && *keys_dir;
    if (authenticated) {
        moe_status status = moe_curve_keys_read(keys_dir, role, &keys, err);
        if (status != MOE_OK) return status;
    }
    const moe_clock *clock = moe_clock_real();
    moe_shm_config shm = {.clock = clock, .linger_ms = MOE_NETWORK_LINGER_MS, .poll_ns = poll_us * MOE_NS_PER_US};
    moe_zmq_config zmq = {.clock = clock,
                          .keys = authenticated ? &keys : NULL,
                          .linger_ms = MOE_NETWORK_LINGER_MS,
                          .poll_ns = poll_us * MOE_NS_PER_US};
    moe_transport *near, *far;
    moe_status status = moe_shm_open(&shm, &near, err);
    if (status != MOE_OK) return status;
    status = moe_zmq_open(&zmq, &far, err);
    if (status == MOE_OK) return moe_joined_open(near, far, clock, out, err);
    near->ops->close(near);
    return status;
}

moe_status moe_store_open(const moe_store_address *a, moe_store **out, moe_error *err) {
    moe_redis_config config = {.address = a->address,
                               .username = a->username,
                               .password_file = a->password_file,
                               .cluster = a->cluster,
                               .timeout_ms = MOE_STORE_TIMEOUT_MS};
    return moe_redis_open(&config, out, err);
}
