/* The calls that tell: InferenceService.Tokenize and Models, ClusterService, Health. */
#include <string.h>

#include "common/alloc.h"
#include "router/rpc/rpc_front_internal.h"

void moe_rpc_handle_tokenize(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                             int num_payload) {
    (void)payload, (void)num_payload;
    const Moesaic__V1__TokenizeRequest *r = (const Moesaic__V1__TokenizeRequest *)request;
    const moe_tokenizer *tokenizer = ((moe_rpc_front *)ctx)->config.inference->tokenizer;
    moe_token_ids ids = {0};
    moe_error err;
    if (!tokenizer) {
        moe_rpc_fail(call, MOE_FAILED_PRECONDITION, "this router runs without a tokenizer", NULL);
        return;
    }
    moe_status status = moe_tokenizer_encode(tokenizer, r->text, strlen(r->text), r->add_special_tokens, &ids, &err);
    if (status == MOE_OK) {
        Moesaic__V1__TokenizeResponse response = MOESAIC__V1__TOKENIZE_RESPONSE__INIT;
        response.token_ids = (uint32_t *)ids.ids; /* ids are never negative */
        response.n_token_ids = (size_t)ids.count;
        moe_rpc_respond(call, &response.base, NULL, 0);
    } else {
        moe_rpc_fail(call, status, err.message, NULL);
    }
    moe_free(ids.ids);
}

void moe_rpc_handle_models(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload) {
    (void)request, (void)payload, (void)num_payload;
    const moe_inference *inference = ((moe_rpc_front *)ctx)->config.inference;
    Moesaic__V1__ModelInfo model = MOESAIC__V1__MODEL_INFO__INIT, *models[] = {&model};
    Moesaic__V1__ModelsResponse response = MOESAIC__V1__MODELS_RESPONSE__INIT;
    model.id = (char *)inference->model;
    model.max_model_len = (uint64_t)inference->max_model_len;
    response.models = models;
    response.n_models = 1;
    moe_rpc_respond(call, &response.base, NULL, 0);
}

/* protobuf-c wants arrays of pointers: the messages and the pointers to them, in one allocation each. */
typedef struct status_arrays {
    Moesaic__V1__WorkerStatus *workers, **worker_pointers;
    Moesaic__V1__RouterStatus *routers, **router_pointers;
    Moesaic__V1__LayerStatus *layers, **layer_pointers;
    Moesaic__V1__Operation operations[MOE_MAX_OPERATIONS], *operation_pointers[MOE_MAX_OPERATIONS];
} status_arrays;

static void free_arrays(status_arrays *a) {
    moe_free(a->workers);
    moe_free(a->worker_pointers);
    moe_free(a->routers);
    moe_free(a->router_pointers);
    moe_free(a->layers);
    moe_free(a->layer_pointers);
}

/* At least one of each, so that NULL always means out of memory. */
static bool make_arrays(const moe_cluster_status *status, status_arrays *a) {
    size_t workers = (size_t)status->num_workers + 1, routers = (size_t)status->num_routers + 1;
    size_t layers = (size_t)status->num_layers + 1;
    *a = (status_arrays){
        .workers = moe_calloc(workers, sizeof *a->workers),
        .worker_pointers = moe_calloc(workers, sizeof *a->worker_pointers),
        .routers = moe_calloc(routers, sizeof *a->routers),
        .router_pointers = moe_calloc(routers, sizeof *a->router_pointers),
        .layers = moe_calloc(layers, sizeof *a->layers),
        .layer_pointers = moe_calloc(layers, sizeof *a->layer_pointers),
    };
    return a->workers && a->worker_pointers && a->routers && a->router_pointers && a->layers && a->layer_pointers;
}

static void fill_workers(const moe_cluster_status *status, status_arrays *a) {
    for (int32_t i = 0; i < status->num_workers; i++) {
        moe_worker_status *from = &status->workers[i];
        Moesaic__V1__WorkerStatus *to = a->worker_pointers[i] = &a->workers[i];
        moesaic__v1__worker_status__init(to);
        to->id = from->id;
        to->pid = from->pid;
        to->host = from->host;
        to->endpoint = from->endpoint;
        to->profile = from->profile;
        to->state = (char *)from->state;
        to->experts = from->experts;
        to->load = from->load;
        to->incarnation = from->incarnation;
    }
}

static void fill_routers_and_layers(const moe_cluster_status *status, status_arrays *a) {
    for (int32_t i = 0; i < status->num_routers; i++) {
        moe_router_status *from = &status->routers[i];
        Moesaic__V1__RouterStatus *to = a->router_pointers[i] = &a->routers[i];
        moesaic__v1__router_status__init(to);
        to->id = from->id;
        to->pid = from->pid;
        to->host = from->host;
        to->state = (char *)from->state;
        to->leader = from->leader;
    }
    for (int32_t i = 0; i < status->num_layers; i++) {
        moe_layer_status *from = &status->layers[i];
        Moesaic__V1__LayerStatus *to = a->layer_pointers[i] = &a->layers[i];
        moesaic__v1__layer_status__init(to);
        to->max_over_mean = from->max_over_mean;
        to->cost_max_over_mean = from->cost_max_over_mean;
        to->min_replicas = &from->min_replicas;
        to->n_min_replicas = 1;
    }
}

static void fill_operations(const moe_cluster_status *status, status_arrays *a) {
    for (int32_t i = 0; i < status->num_operations; i++) {
        const moe_operation *from = &status->operations[i];
        Moesaic__V1__Operation *to = a->operation_pointers[i] = &a->operations[i];
        moesaic__v1__operation__init(to);
        to->id = (char *)from->id;
        to->kind = (char *)moe_operation_kind_name(from->kind);
        to->state = (char *)moe_operation_state_name(from->state);
        to->phase = (char *)from->phase;
        to->done = (uint32_t)from->done;
        to->total = (uint32_t)from->total;
        to->safe_to_stop = from->safe_to_stop;
        to->error = (char *)from->error;
        to->layer = (uint32_t)from->layer;
        to->expert = (uint32_t)from->expert;
        to->from = (char *)from->from;
        to->to = (char *)from->to;
    }
}

static void respond_status(moe_rpc_call *call, moe_cluster_status *status, const status_arrays *a) {
    Moesaic__V1__RedisStatus redis = MOESAIC__V1__REDIS_STATUS__INIT;
    Moesaic__V1__StatusResponse response = MOESAIC__V1__STATUS_RESPONSE__INIT;
    redis.used = status->redis_used;
    redis.up = status->redis_up;
    redis.pid = status->redis_pid;
    response.epoch = status->epoch;
    response.ready = status->ready;
    response.model = status->model;
    response.cluster_uuid = status->cluster_uuid;
    response.replicas = status->replicas;
    response.redis = &redis;
    response.workers = a->worker_pointers;
    response.n_workers = (size_t)status->num_workers;
    response.routers = a->router_pointers;
    response.n_routers = (size_t)status->num_routers;
    response.layers = a->layer_pointers;
    response.n_layers = (size_t)status->num_layers;
    response.operations = (Moesaic__V1__Operation **)a->operation_pointers;
    response.n_operations = (size_t)status->num_operations;
    response.migration = status->migration;
    response.moves = status->moves;
    response.expert_ns = status->expert_ns;
    response.row_ns = status->row_ns;
    moe_rpc_respond(call, &response.base, NULL, 0);
}

static void respond_workers(moe_rpc_call *call, const moe_cluster_status *status, const status_arrays *a) {
    Moesaic__V1__WorkersResponse response = MOESAIC__V1__WORKERS_RESPONSE__INIT;
    response.workers = a->worker_pointers;
    response.n_workers = (size_t)status->num_workers;
    moe_rpc_respond(call, &response.base, NULL, 0);
}

static void answer_cluster(moe_rpc_front *front, moe_rpc_call *call, bool workers_only) {
    const moe_cluster_view *cluster = front->config.cluster;
    moe_cluster_status cluster_status = {0};
    status_arrays arrays = {0};
    moe_error err;
    moe_status status = cluster ? cluster->status(cluster->ctx, &cluster_status, &err)
                                : moe_fail(&err, MOE_UNIMPLEMENTED, "this router has no cluster to tell about");
    if (status == MOE_OK && !make_arrays(&cluster_status, &arrays))
        status = moe_fail(&err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    if (status == MOE_OK) {
        fill_workers(&cluster_status, &arrays);
        fill_routers_and_layers(&cluster_status, &arrays);
        fill_operations(&cluster_status, &arrays);
    }
    if (status != MOE_OK)
        moe_rpc_fail(call, status, err.message, NULL);
    else if (workers_only)
        respond_workers(call, &cluster_status, &arrays);
    else
        respond_status(call, &cluster_status, &arrays);
    free_arrays(&arrays);
    moe_cluster_status_free(&cluster_status);
}

void moe_rpc_handle_status(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload) {
    (void)request, (void)payload, (void)num_payload;
    answer_cluster(ctx, call, false);
}

void moe_rpc_handle_workers(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                            int num_payload) {
    (void)request, (void)payload, (void)num_payload;
    answer_cluster(ctx, call, true);
}

/* As grpc.health.v1: "" is the process, else a service's full name. */
void moe_rpc_handle_health(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload) {
    (void)payload, (void)num_payload;
    moe_rpc_front *front = ctx;
    static const char *const services[] = {"", "moesaic.v1.InferenceService", "moesaic.v1.ClusterService", "moesaic.v1.Health"};
    const char *asked = ((const Moesaic__V1__HealthCheckRequest *)request)->service;
    Moesaic__V1__HealthCheckResponse response = MOESAIC__V1__HEALTH_CHECK_RESPONSE__INIT;
    moe_inference_view view;
    bool known = false;
    for (size_t i = 0; i < sizeof services / sizeof services[0]; i++) known |= strcmp(asked, services[i]) == 0;
    front->config.inference->ops->view(front->config.inference->ctx, &view);
    bool serving = view.ready && !atomic_load(&front->draining);
    if (!known)
        response.status = MOESAIC__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN;
    else
        response.status = serving ? MOESAIC__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
                                  : MOESAIC__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING;
    moe_rpc_respond(call, &response.base, NULL, 0);
}
