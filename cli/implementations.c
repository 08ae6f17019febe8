#include "cli/implementations.h"

#include <string.h>

#include "common/redis/redis_store.h"
#include "common/zmq/zmq_transport.h"
#include "cpu/cpu.h"
#ifdef MOESAIC_HAS_CUDA
#include "cuda/cuda.h"
#endif

#define MOE_STORE_TIMEOUT_MS 500
#define MOE_NETWORK_LINGER_MS 100

#ifdef MOESAIC_HAS_CUDA
#define MOE_BACKEND_NAMES "cpu, cpu-ref, cuda"
#else
#define MOE_BACKEND_NAMES "cpu, cpu-ref"
#endif

moe_status moe_backend_open(const moe_backend_config *config, moe_backend **out, moe_error *err) {
    moe_cpu_config cpu = {.threads = config->threads, .isa = NULL};
    if (strcmp(config->name, "cpu") == 0) return moe_cpu_open(&cpu, out, err);
    if (strcmp(config->name, "cpu-ref") == 0) return moe_cpu_ref_open(&cpu, out, err);
#ifdef MOESAIC_HAS_CUDA
    moe_cuda_config cuda = {.device = config->device,
                            .dtype = config->dtype,
                            .deterministic = config->deterministic,
                            .tune_file = config->tune_file};
    if (strcmp(config->name, "cuda") == 0) return moe_cuda_open(&cuda, out, err);
#endif
    return moe_fail(err, MOE_INVALID_ARGUMENT, "no backend is called '%s'; this build has: " MOE_BACKEND_NAMES, config->name);
}

moe_status moe_network_open(const char *keys_dir, moe_role role, moe_transport **out, moe_error *err) {
    moe_curve_keys keys;
    bool authenticated = keys_dir && *keys_dir;
    if (authenticated) {
        moe_status status = moe_curve_keys_read(keys_dir, role, &keys, err);
        if (status != MOE_OK) return status;
    }
    moe_zmq_config config = {.clock = moe_clock_real(), .keys = authenticated ? &keys : NULL, .linger_ms = MOE_NETWORK_LINGER_MS};
    return moe_zmq_open(&config, out, err);
}

moe_status moe_store_open(const moe_store_address *a, moe_store **out, moe_error *err) {
    moe_redis_config config = {.address = a->address,
                               .username = a->username,
                               .password_file = a->password_file,
                               .cluster = a->cluster,
                               .timeout_ms = MOE_STORE_TIMEOUT_MS};
    return moe_redis_open(&config, out, err);
}
