#include "cli/implementations.h"

#include <string.h>

#include "common/redis/redis_store.h"
#include "common/zmq/zmq_transport.h"
#include "cpu/cpu.h"

#define MOE_STORE_TIMEOUT_MS 500
#define MOE_NETWORK_LINGER_MS 100

moe_status moe_backend_open(const char *name, int32_t threads, moe_backend **out, moe_error *err) {
    moe_cpu_config cpu = {.threads = threads, .isa = NULL};
    if (strcmp(name, "cpu") == 0) return moe_cpu_open(&cpu, out, err);
    if (strcmp(name, "cpu-ref") == 0) return moe_cpu_ref_open(&cpu, out, err);
    return moe_fail(err, MOE_INVALID_ARGUMENT, "no backend is called '%s'; this build has: cpu, cpu-ref", name);
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
