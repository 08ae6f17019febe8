/* The RPC front over the inproc transport and a scripted engine: every method, what it refuses, cancellation, drain and stop. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/inproc/inproc.h"
#include "router/rpc/rpc_front.h"
#include "tests/support/fake_inference.h"
#include "tests/support/test.h"

#define GENERATE "/moesaic.v1.InferenceService/Generate"
#define WAIT_NS (10 * MOE_NS_PER_S)

typedef struct fixture {
    fake_inference fake;
    moe_cluster_view cluster;
    moe_inproc_hub *hub;
    moe_transport *served, *calling;
    moe_rpc_front *front;
    moe_rpc *client;
    moe_peer peer;
} fixture;

typedef struct outcome {
    int items;
    bool ended;
    moe_status status;
    char text[512], finish[16], message[MOE_ERROR_MESSAGE_BYTES];
    uint32_t ids[64];
    float logprobs[64];
    size_t num_ids, num_logprobs;
    uint32_t prompt_tokens, completion_tokens;
    void (*look)(const ProtobufCMessage *body); /* at the last message */
} outcome;

static moe_status cluster_status(void *ctx, moe_cluster_status *out, moe_error *err) {
    (void)ctx;
    moe_status status = moe_cluster_status_resize(out, 2, 1, 1, err);
    if (status != MOE_OK) return status;
    out->epoch = 7;
    out->ready = out->redis_used = out->redis_up = true;
    out->redis_pid = 99;
    out->replicas = 2;
    snprintf(out->model, sizeof out->model, "demo");
    snprintf(out->workers[1].id, sizeof out->workers[1].id, "w1");
    out->workers[1].state = "suspect";
    out->workers[1].load = 0.25;
    out->workers[1].experts = 48;
    snprintf(out->routers[0].id, sizeof out->routers[0].id, "r0");
    out->routers[0].leader = true;
    out->layers[0] = (moe_layer_status){.max_over_mean = 1.5, .min_replicas = 1, .hint_recall = -1};
    return MOE_OK;
}

static moe_rpc_hello hello(const char *role, uint64_t incarnation) {
    return (moe_rpc_hello){.cluster_uuid = "u", .role = role, .id = role, .profile = "", .incarnation = incarnation};
}

static void connect_client(fixture *f) {
    uint64_t link;
    moe_error err = {0};
    assert_int_equal(moe_inproc_open(f->hub, &f->calling, &err), MOE_OK);
    moe_rpc_config config = {.transport = f->calling, .clock = moe_clock_real(), .hello = hello("operator", 2), .ctx = f};
    assert_int_equal(moe_rpc_new(&config, &f->client, &err), MOE_OK);
    assert_int_equal(moe_rpc_connect(f->client, "inproc:front", &link, &err), MOE_OK);
    int64_t until_ns = moe_now_ns(moe_clock_real()) + WAIT_NS;
    const moe_rpc_peer *peer = NULL;
    while (!(peer = moe_rpc_peer_of_link(f->client, link)) && moe_now_ns(moe_clock_real()) < until_ns)
        assert_int_equal(moe_rpc_step(f->client, until_ns, &err), MOE_OK);
    assert_non_null(peer);
    f->peer = peer->peer;
}

static int setup(void **state) {
    fixture *f = calloc(1, sizeof *f);
    moe_error err = {0};
    char bound[MOE_ENDPOINT_BYTES];
    fake_inference_start(&f->fake, SOURCE_DIR "/models/demo");
    f->cluster = (moe_cluster_view){.status = cluster_status};
    assert_int_equal(moe_inproc_hub_new(moe_clock_real(), 1, &f->hub, &err), MOE_OK);
    assert_int_equal(moe_inproc_open(f->hub, &f->served, &err), MOE_OK);
    assert_int_equal(f->served->ops->listen(f->served, "inproc:front", bound, &err), MOE_OK);
    moe_rpc_front_config config = {.transport = f->served,
                                   .clock = moe_clock_real(),
                                   .hello = hello("router", 1),
                                   .inference = &f->fake.inference,
                                   .cluster = &f->cluster};
    if (moe_rpc_front_start(&config, &f->front, &err) != MOE_OK) fail_msg("%s", err.message);
    connect_client(f);
    *state = f;
    return 0;
}

static int teardown(void **state) {
    fixture *f = *state;
    moe_rpc_free(&f->client);
    moe_rpc_front_stop(&f->front);
    moe_rpc_front_stop(&f->front);
    fake_inference_stop(&f->fake);
    f->calling->ops->close(f->calling);
    f->served->ops->close(f->served);
    moe_inproc_hub_free(&f->hub);
    free(f);
    return 0;
}

static void take_generated(outcome *o, const Moesaic__V1__GenerateResponse *item) {
    o->items++;
    strncat(o->text, item->text, sizeof o->text - strlen(o->text) - 1);
    snprintf(o->finish, sizeof o->finish, "%s", item->finish_reason);
    for (size_t i = 0; i < item->n_token_ids; i++) o->ids[o->num_ids++] = item->token_ids[i];
    for (size_t i = 0; i < item->n_logprobs; i++) o->logprobs[o->num_logprobs++] = item->logprobs[i]->logprob;
    o->prompt_tokens = item->prompt_tokens;
    o->completion_tokens = item->completion_tokens;
}

static void on_reply(void *ctx, const moe_rpc_reply *reply) {
    outcome *o = ctx;
    if (reply->body && reply->body->descriptor == &moesaic__v1__generate_response__descriptor)
        take_generated(o, (const Moesaic__V1__GenerateResponse *)reply->body);
    if (!reply->last) return;
    assert_false(o->ended);
    o->ended = true;
    o->status = reply->status;
    snprintf(o->message, sizeof o->message, "%s", reply->message);
    if (reply->status == MOE_OK && o->look) o->look(reply->body);
}

static uint64_t begin(fixture *f, const char *method, const ProtobufCMessage *request, outcome *o) {
    uint64_t id;
    moe_error err = {0};
    moe_status status = moe_rpc_call_start(f->client, f->peer, method, request, NULL, 0, INT64_MAX, on_reply, o, &id, &err);
    if (status != MOE_OK) fail_msg("%s", err.message);
    return id;
}

static void await(fixture *f, const outcome *o) {
    int64_t until_ns = moe_now_ns(moe_clock_real()) + WAIT_NS;
    while (!o->ended && moe_now_ns(moe_clock_real()) < until_ns)
        assert_int_equal(moe_rpc_step(f->client, until_ns, NULL), MOE_OK);
    assert_true(o->ended);
}

static outcome call(fixture *f, const char *method, const ProtobufCMessage *request, void (*look)(const ProtobufCMessage *)) {
    outcome o = {.look = look};
    begin(f, method, request, &o);
    await(f, &o);
    return o;
}

static Moesaic__V1__GenerateRequest generate_request(const char *prompt) {
    Moesaic__V1__GenerateRequest request = MOESAIC__V1__GENERATE_REQUEST__INIT;
    request.prompt = (char *)prompt;
    return request;
}

static void test_generate(void **state) {
    fixture *f = *state;
    Moesaic__V1__GenerateRequest request = generate_request("Once upon");
    outcome o = call(f, GENERATE, &request.base, NULL);
    assert_int_equal(o.status, MOE_OK);
    assert_string_equal(o.text, "Hello, world");
    assert_string_equal(o.finish, "stop");
    assert_true(o.items == 4 && o.num_ids == 3 && o.ids[0] == 11 && o.ids[2] == 13 && o.completion_tokens == 3);
    const fake_request *r = &f->fake.requests[0];
    assert_int_equal(o.prompt_tokens, r->prompt_tokens);
    /* nothing said: generation_config, and as many tokens as fit */
    assert_true(r->sampling.temperature == 0.7f && r->sampling.top_k == 40 && r->sampling.max_tokens == 2048);
    moe_token_ids ids = {0};
    assert_int_equal(moe_tokenizer_encode(f->fake.inference.tokenizer, "Once upon", 9, true, &ids, NULL), MOE_OK);
    assert_int_equal(ids.count, r->prompt_tokens);
    assert_memory_equal(ids.ids, r->prompt, (size_t)ids.count * sizeof *ids.ids);
    moe_free(ids.ids);
}

static void test_generate_with_sampling(void **state) {
    fixture *f = *state;
    uint32_t ids[] = {5, 6, 7}, stops[] = {9};
    char *stop[] = {(char *)"END"};
    Moesaic__V1__SamplingParams sampling = MOESAIC__V1__SAMPLING_PARAMS__INIT;
    Moesaic__V1__GenerateRequest request = generate_request("");
    request.prompt_token_ids = ids;
    request.n_prompt_token_ids = 3;
    request.model = (char *)"demo";
    request.sampling = &sampling;
    sampling.has_seed = sampling.has_logprobs = sampling.ignore_eos = true;
    sampling.seed = UINT64_MAX - 1;
    sampling.max_tokens = 12;
    sampling.stop = stop;
    sampling.n_stop = 1;
    sampling.stop_token_ids = stops;
    sampling.n_stop_token_ids = 1;
    f->fake.finish = MOE_FINISH_LENGTH;
    outcome o = call(f, GENERATE, &request.base, NULL);
    const moe_sampling_params *s = &f->fake.requests[0].sampling;
    assert_int_equal(o.status, MOE_OK);
    assert_string_equal(o.finish, "length");
    assert_true(o.num_logprobs == 3 && o.logprobs[0] == -0.5f && o.logprobs[2] == -1.5f);
    assert_true(f->fake.requests[0].prompt_tokens == 3 && f->fake.requests[0].prompt[2] == 7);
    assert_true(s->temperature == 0 && s->top_p == 1 && s->top_k == 0 && s->repetition_penalty == 1 && s->seed == UINT64_MAX - 1);
    assert_true(s->max_tokens == 12 && s->ignore_eos && s->num_stop_token_ids == 1 && s->logprobs == 0);
    assert_string_equal(f->fake.requests[0].stop[0], "END");
}

static void expect_failure(fixture *f, const Moesaic__V1__GenerateRequest *request, moe_status status, const char *named) {
    outcome o = call(f, GENERATE, &request->base, NULL);
    if (o.status != status || !strstr(o.message, named)) fail_msg("%s: %s", moe_status_name(o.status), o.message);
}

static void test_generate_refuses(void **state) {
    fixture *f = *state;
    uint32_t ids[] = {5, 8192};
    Moesaic__V1__SamplingParams sampling = MOESAIC__V1__SAMPLING_PARAMS__INIT;
    Moesaic__V1__GenerateRequest request = generate_request("a");
    request.model = (char *)"other";
    expect_failure(f, &request, MOE_NOT_FOUND, "other");
    request = generate_request("");
    expect_failure(f, &request, MOE_INVALID_ARGUMENT, "prompt");
    request.prompt_token_ids = ids;
    request.n_prompt_token_ids = 2;
    expect_failure(f, &request, MOE_INVALID_ARGUMENT, "8192");
    request.prompt = (char *)"and text";
    expect_failure(f, &request, MOE_INVALID_ARGUMENT, "not both");
    request = generate_request("a");
    request.sampling = &sampling;
    sampling.temperature = -1;
    expect_failure(f, &request, MOE_INVALID_ARGUMENT, "temperature");
    sampling.temperature = 0.0 / 0.0;
    expect_failure(f, &request, MOE_INVALID_ARGUMENT, "finite");
    sampling.temperature = 1;
    sampling.max_tokens = 5000;
    expect_failure(f, &request, MOE_INVALID_ARGUMENT, "5000");
    assert_int_equal(f->fake.num_requests, 0);
}

static void test_engine_errors_pass_through(void **state) {
    fixture *f = *state;
    Moesaic__V1__GenerateRequest request = generate_request("a");
    f->fake.submit_status = MOE_RESOURCE_EXHAUSTED;
    expect_failure(f, &request, MOE_RESOURCE_EXHAUSTED, "refuses");
    f->fake.submit_status = MOE_OK;
    f->fake.finish = MOE_FINISH_ERROR;
    f->fake.fail_status = MOE_UNAVAILABLE;
    f->fake.fail_message = "no replica of expert 5 is left";
    expect_failure(f, &request, MOE_UNAVAILABLE, "expert 5");
    f->fake.view = (moe_inference_view){0};
    expect_failure(f, &request, MOE_UNAVAILABLE, "placement map");
}

static void test_cancel(void **state) {
    fixture *f = *state;
    outcome o = {0};
    Moesaic__V1__GenerateRequest request = generate_request("a");
    fake_inference_permit(&f->fake, 1);
    uint64_t id = begin(f, GENERATE, &request.base, &o);
    int64_t until_ns = moe_now_ns(moe_clock_real()) + WAIT_NS;
    while (o.items == 0 && moe_now_ns(moe_clock_real()) < until_ns) moe_rpc_step(f->client, until_ns, NULL);
    assert_int_equal(o.items, 1);
    moe_rpc_cancel(f->client, id);
    fake_inference_await(&f->fake, &f->fake.num_cancelled, 1);
    fake_inference_await(&f->fake, &f->fake.num_ended, 1);
    assert_false(o.ended);
}

static void test_caller_gone(void **state) {
    fixture *f = *state;
    outcome o = {0};
    Moesaic__V1__GenerateRequest request = generate_request("a");
    fake_inference_permit(&f->fake, 0);
    begin(f, GENERATE, &request.base, &o);
    fake_inference_await(&f->fake, &f->fake.num_requests, 1);
    moe_rpc_free(&f->client);
    f->calling->ops->close(f->calling);
    fake_inference_await(&f->fake, &f->fake.num_cancelled, 1);
    connect_client(f);
}

static void look_at_tokens(const ProtobufCMessage *body) {
    assert_true(((const Moesaic__V1__TokenizeResponse *)body)->n_token_ids > 0);
}

static void look_at_models(const ProtobufCMessage *body) {
    const Moesaic__V1__ModelsResponse *r = (const Moesaic__V1__ModelsResponse *)body;
    assert_int_equal(r->n_models, 1);
    assert_string_equal(r->models[0]->id, "demo");
    assert_int_equal(r->models[0]->max_model_len, 2048);
}

static void look_at_status(const ProtobufCMessage *body) {
    const Moesaic__V1__StatusResponse *r = (const Moesaic__V1__StatusResponse *)body;
    assert_true(r->epoch == 7 && r->ready && r->replicas == 2 && r->n_workers == 2 && r->n_routers == 1 && r->n_layers == 1);
    assert_string_equal(r->workers[1]->id, "w1");
    assert_string_equal(r->workers[1]->state, "suspect");
    assert_string_equal(r->workers[0]->state, "joining");
    assert_true(r->workers[1]->load == 0.25 && r->workers[1]->experts == 48 && r->routers[0]->leader);
    assert_true(r->redis->used && r->redis->up && r->redis->pid == 99 && r->layers[0]->max_over_mean == 1.5);
}

static void look_at_workers(const ProtobufCMessage *body) {
    const Moesaic__V1__WorkersResponse *r = (const Moesaic__V1__WorkersResponse *)body;
    assert_int_equal(r->n_workers, 2);
    assert_string_equal(r->workers[1]->id, "w1");
}

static void test_what_tells(void **state) {
    fixture *f = *state;
    Moesaic__V1__TokenizeRequest tokenize = MOESAIC__V1__TOKENIZE_REQUEST__INIT;
    Moesaic__V1__ModelsRequest models = MOESAIC__V1__MODELS_REQUEST__INIT;
    Moesaic__V1__StatusRequest status = MOESAIC__V1__STATUS_REQUEST__INIT;
    Moesaic__V1__WorkersRequest workers = MOESAIC__V1__WORKERS_REQUEST__INIT;
    tokenize.text = (char *)"Hello";
    assert_int_equal(call(f, "/moesaic.v1.InferenceService/Tokenize", &tokenize.base, look_at_tokens).status, MOE_OK);
    assert_int_equal(call(f, "/moesaic.v1.InferenceService/Models", &models.base, look_at_models).status, MOE_OK);
    assert_int_equal(call(f, "/moesaic.v1.ClusterService/Status", &status.base, look_at_status).status, MOE_OK);
    assert_int_equal(call(f, "/moesaic.v1.ClusterService/Workers", &workers.base, look_at_workers).status, MOE_OK);
}

static int last_health;
static void look_at_health(const ProtobufCMessage *body) {
    last_health = (int)((const Moesaic__V1__HealthCheckResponse *)body)->status;
}

static int health(fixture *f, const char *service) {
    Moesaic__V1__HealthCheckRequest request = MOESAIC__V1__HEALTH_CHECK_REQUEST__INIT;
    request.service = (char *)service;
    assert_int_equal(call(f, "/moesaic.v1.Health/Check", &request.base, look_at_health).status, MOE_OK);
    return last_health;
}

static void test_health_and_drain(void **state) {
    fixture *f = *state;
    Moesaic__V1__GenerateRequest request = generate_request("a");
    outcome o = {0};
    assert_int_equal(health(f, ""), MOESAIC__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING);
    assert_int_equal(health(f, "moesaic.v1.InferenceService"), MOESAIC__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING);
    assert_int_equal(health(f, "x"), MOESAIC__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN);
    fake_inference_permit(&f->fake, 0);
    begin(f, GENERATE, &request.base, &o);
    fake_inference_await(&f->fake, &f->fake.num_requests, 1);
    moe_rpc_front_drain(f->front);
    assert_int_equal(health(f, ""), MOESAIC__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING);
    expect_failure(f, &request, MOE_UNAVAILABLE, "shutting down");
    fake_inference_permit(&f->fake, INT64_MAX);
    await(f, &o);
    assert_int_equal(o.status, MOE_OK);
}

static void test_stop_with_calls_in_flight(void **state) {
    fixture *f = *state;
    Moesaic__V1__GenerateRequest request = generate_request("a");
    outcome o = {0};
    fake_inference_permit(&f->fake, 1);
    begin(f, GENERATE, &request.base, &o);
    fake_inference_await(&f->fake, &f->fake.num_requests, 1);
    moe_rpc_front_stop(&f->front);
    assert_null(f->front);
    fake_inference_await(&f->fake, &f->fake.num_cancelled, 1);
    fake_inference_await(&f->fake, &f->fake.num_ended, 1);
}

int main(void) {
#define TEST(function) cmocka_unit_test_setup_teardown(function, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_generate),
        TEST(test_generate_with_sampling),
        TEST(test_generate_refuses),
        TEST(test_engine_errors_pass_through),
        TEST(test_cancel),
        TEST(test_caller_gone),
        TEST(test_what_tells),
        TEST(test_health_and_drain),
        TEST(test_stop_with_calls_in_flight),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
