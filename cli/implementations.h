/* The one place that names implementations: which backend, transport and store stand behind the interfaces. */
#pragma once
#include "cli/device_lease.h"
#include "cli/device_list.h"
#include "common/backend.h"
#include "common/clock.h"
#include "common/store.h"
#include "common/transport.h"

/* Where a model's weights come from. */
typedef struct moe_model_source {
    const char *dir;
    bool dummy; /* generated for DIR/config.json's shape; else DIR's safetensors */
    moe_dummy_options generated;
    const char *pre_gates; /* a file, or MOE_PRE_GATES_NEXT_GATE; NULL: the checkpoint's, if any */
} moe_model_source;

/* As moe_model_open, moe_model_open_dummy and moe_model_use_pre_gates. INVALID_ARGUMENT: a number of layers for a checkpoint. */
moe_status moe_model_source_open(const moe_model_source *source, moe_model **out, moe_error *err);

typedef struct moe_backend_config {
    const char *name;      /* "cpu", "cpu-ref" or "cuda" */
    int32_t threads;       /* compute threads of the CPU backends */
    int32_t device;        /* number of the GPU, for cuda */
    moe_dtype dtype;       /* of activations, KV cache and payloads: MOE_F32 or MOE_BF16 */
    bool deterministic;    /* cuda: one kernel and order for a row at every batch size; the CPU backends always are */
    const char *tune_file; /* cuda: measured thresholds between kernels; NULL: built in */
} moe_backend_config;

/* Another name is INVALID_ARGUMENT, naming those built in; a dtype or device that the backend lacks is the backend's error. */
moe_status moe_backend_open(const moe_backend_config *config, moe_backend **out, moe_error *err);

/* The backend that computes experts from images in host memory beside `device` (--cold-experts): a CPU backend is its own; a GPU's is a
 * `cpu` backend of config->threads, for moe_host_backend_close. INVALID_ARGUMENT: a deterministic GPU. */
moe_status moe_host_backend_open(const moe_backend_config *config, moe_backend *device, moe_backend **out, moe_error *err);
void moe_host_backend_close(moe_backend **host, const moe_backend *device); /* where it is another one; NULLs; idempotent */

/* The GPUs that this process sees, for --devices auto; *count at most MOE_MAX_DEVICES. INVALID_ARGUMENT: another backend than cuda;
 * UNIMPLEMENTED: not built; UNAVAILABLE: no driver, or no GPU. */
moe_status moe_backend_devices(const char *backend, moe_device_name names[MOE_MAX_DEVICES], int32_t *count, moe_error *err);

/* Measures which kernels suit a model's experts on config->device and puts it into config->tune_file. Blocks for seconds.
 * INVALID_ARGUMENT: another backend than cuda, or no file; UNIMPLEMENTED: not built; else the backend's error. */
moe_status moe_backend_tune(const moe_backend_config *config, const moe_model_config *model, moe_error *err);

/* A transport to other processes for one of `role`: reaches shm, ipc and tcp endpoints. keys_dir NULL or "": no tcp. poll_us: how
 * long a wait may poll before it sleeps; 0: never. */
moe_status moe_network_open(const char *keys_dir, moe_role role, int64_t poll_us, moe_transport **out, moe_error *err);

typedef struct moe_store_address {
    const char *address; /* "unix:/path" or "host:port" */
    const char *username, *password_file, *cluster;
} moe_store_address;
moe_status moe_store_open(const moe_store_address *address, moe_store **out, moe_error *err);
