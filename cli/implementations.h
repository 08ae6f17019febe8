/* The one place that names implementations: which backend, transport and store stand behind the interfaces. */
#pragma once
#include "common/backend.h"
#include "common/clock.h"
#include "common/store.h"
#include "common/transport.h"

/* "cpu" or "cpu-ref"; `threads` compute threads. Another name is INVALID_ARGUMENT, naming those built in. */
moe_status moe_backend_open(const char *name, int32_t threads, moe_backend **out, moe_error *err);

/* A network transport for a process of `role`, which connects to peers of `server_role`. keys_dir NULL or "": ipc endpoints only.
 */
moe_status moe_network_open(const char *keys_dir, moe_role role, moe_transport **out, moe_error *err);

typedef struct moe_store_address {
    const char *address; /* "unix:/path" or "host:port" */
    const char *username, *password_file, *cluster;
} moe_store_address;
moe_status moe_store_open(const moe_store_address *address, moe_store **out, moe_error *err);
