/* The settings that one `moesaic bench` measures one after another, with the model loaded once. */
#pragma once
#include "cli/router_node.h"
#include "common/options.h"

#define MOE_BENCH_MAX_SETTINGS 64
#define MOE_BENCH_SETTING_BYTES 64

typedef struct moe_bench_setting {
    moe_router_node_setting node;
    char gating[16], cold_experts[16], device_memory[MOE_BENCH_SETTING_BYTES], dummy_routing[MOE_BENCH_SETTING_BYTES]; /* as written;
                                                                                                                "": not given */
} moe_bench_setting;

/* Those of --sweep, separated by ';', each a list of words such as `gating=gate device-memory=25% cold-experts=auto
 * dummy-routing=zipf:1.0`; what a
 * setting does not name is as the options of these names say. Without --sweep one setting, of the options. INVALID_ARGUMENT, also
 * where only some have a device-memory. */
moe_status moe_bench_settings(const moe_options *options, moe_bench_setting settings[MOE_BENCH_MAX_SETTINGS], int32_t *count,
                              moe_error *err);
