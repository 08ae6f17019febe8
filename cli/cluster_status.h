/* What a router tells of its cluster: the controller's view and the engine's, put together for the fronts. Any thread. */
#pragma once
#include "router/engine/engine.h"
#include "router/placement/controller.h"
#include "router/status.h"

typedef struct moe_cluster_reporter moe_cluster_reporter;

typedef struct moe_cluster_reporter_config { /* all borrowed */
    moe_engine *engine;
    moe_controller *controller; /* NULL for a dense model */
    const moe_model *model;
    const char *served_name, *cluster_uuid;
    moe_expert_budget expert_budget; /* of the engine */
    bool redis_used;
    const char *run_dir; /* of the `serve` that started this router: its cluster.json knows the Redis; NULL: none did */
} moe_cluster_reporter_config;

moe_status moe_cluster_reporter_new(const moe_cluster_reporter_config *config, moe_cluster_reporter **out, moe_error *err);
void moe_cluster_reporter_free(moe_cluster_reporter **reporter); /* NULLs; idempotent */

/* The newest map, from which loads by worker are told. */
void moe_cluster_reporter_set_map(moe_cluster_reporter *reporter, moe_placement *map);

/* This process's figures under a budget; `budget` is "" without one. */
void moe_cluster_budget_status(moe_expert_budget budget, const moe_model_config *model, moe_expert_budget_status *out);

const moe_cluster_view *moe_cluster_reporter_view(const moe_cluster_reporter *reporter);
