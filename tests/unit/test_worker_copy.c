/* How experts come to a worker: from the checkpoint or copied from a peer, with digests and known-answer batches; what Stats tells
 * of them. Real workers on the in-process transport; the clock is fake but for the test with threads. */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "common/inproc/inproc.h"
#include "cpu/cpu.h"
#include "expert-worker/shard.h"
#include "expert-worker/worker.h"
#include "proto/forward.h"
#include "proto/rpc.h"
#include "tests/support/test.h"

#define CHECKPOINT SOURCE_DIR "/tests/data/checkpoints/qwen3_moe"
#define TWO_MATRICES SOURCE_DIR "/tests/data/checkpoints/switch_decoder" /* experts without a gate matrix */
#define UUID "00000000-0000-4000-8000-000000000001"
#define OK(call) assert_int_equal((call), MOE_OK)
#define WORKERS 2

typedef struct answer {
    bool done;
    moe_status status;
    char message[256];
    size_t num_loaded;
    uint64_t digests[8], rows, calls, holdings;
    bool leaving;
    uint64_t fetched_total;
    size_t fetched_bytes;
} answer;

static struct {
    moe_clock clock;
    const moe_clock *used;
    moe_inproc_hub *hub;
    moe_model *model;
    moe_backend *ref, *cpu;
    moe_backend faulty; /* cpu, but it packs another expert than it is given */
    moe_backend_ops faulty_ops;
    moe_transport *transports[WORKERS + 1];
    moe_worker *workers[WORKERS];
    moe_rpc *client;
    uint64_t links[WORKERS];
    int32_t threads; /* of each worker's loader; 0: a fake clock */
    moe_backend crowd; /* cpu, but it counts who loads at once */
    moe_backend_ops crowd_ops;
    _Atomic int loading, most, meet; /* a load waits until so many have been at it at once */
} t;

static moe_status load_another(moe_backend *b, const moe_ffn_weights *weights, int32_t lo, int32_t hi, moe_expert **out,
                               moe_error *err) {
    (void)b;
    (void)weights;
    return t.cpu->ops->expert_load(t.cpu, moe_model_expert(t.model, 0, 7), lo, hi, out, err);
}

static moe_status load_in_a_crowd(moe_backend *b, const moe_ffn_weights *weights, int32_t lo, int32_t hi, moe_expert **out,
                                  moe_error *err) {
    (void)b;
    int now = atomic_fetch_add(&t.loading, 1) + 1, most = atomic_load(&t.most);
    while (now > most && !atomic_compare_exchange_weak(&t.most, &most, now)) {}
    for (int i = 0; i < 60000 && atomic_load(&t.most) < atomic_load(&t.meet); i++)
        nanosleep(&(struct timespec){.tv_nsec = MOE_NS_PER_MS}, NULL);
    moe_status status = t.cpu->ops->expert_load(t.cpu, weights, lo, hi, out, err);
    atomic_fetch_sub(&t.loading, 1);
    return status;
}

static void cpu_submit(moe_backend *b, const moe_ffn_batch *batch, moe_job *job) {
    (void)b;
    t.cpu->ops->ffn_submit(t.cpu, batch, job);
}

static const char *own_profile(const moe_backend *b) {
    (void)b;
    return "own";
}

static void start_worker(int i, moe_backend *backend, int64_t rate, int32_t max_experts) {
    char endpoint[32], bound[MOE_ENDPOINT_BYTES];
    moe_error err;
    snprintf(endpoint, sizeof endpoint, "inproc:w%d", i);
    OK(moe_inproc_open(t.hub, &t.transports[i], &err));
    OK(t.transports[i]->ops->listen(t.transports[i], endpoint, bound, &err));
    const moe_worker_config config = {.model = t.model,
                                      .backend = backend,
                                      .transport = t.transports[i],
                                      .clock = t.used,
                                      .cluster_uuid = UUID,
                                      .id = i ? "w1" : "w0",
                                      .incarnation = 10 + (uint64_t)i,
                                      .max_queued_calls = 8,
                                      .max_batch_rows = 8,
                                      .reference = t.ref->ops->single,
                                      .load_threads = t.threads,
                                      .copy_bytes_per_s = rate,
                                      .max_experts = max_experts};
    OK(moe_worker_new(&config, &t.workers[i], &err));
    OK(moe_rpc_connect(t.client, endpoint, &t.links[i], &err));
}

/* `model` is taken over. */
static void open_with(moe_model *model, int32_t threads) {
    moe_error err;
    memset(&t, 0, sizeof t);
    t.model = model;
    t.threads = threads;
    t.clock = moe_clock_fake(1000 * MOE_NS_PER_S);
    t.used = threads ? moe_clock_real() : &t.clock;
    OK(moe_cpu_ref_open(&(moe_cpu_config){.threads = 0}, &t.ref, &err));
    OK(moe_cpu_open(&(moe_cpu_config){.threads = threads ? 1 : 0}, &t.cpu, &err));
    t.faulty_ops = *t.cpu->ops;
    t.faulty_ops.expert_load = load_another;
    t.faulty_ops.ffn_submit = cpu_submit;
    t.faulty_ops.profile = own_profile;
    t.faulty = (moe_backend){.ops = &t.faulty_ops, .dtype = t.cpu->dtype};
    t.crowd_ops = *t.cpu->ops;
    t.crowd_ops.expert_load = load_in_a_crowd;
    t.crowd_ops.ffn_submit = cpu_submit;
    t.crowd_ops.profile = own_profile;
    t.crowd = (moe_backend){.ops = &t.crowd_ops, .dtype = t.cpu->dtype};
    OK(moe_inproc_hub_new(t.used, 1, &t.hub, &err));
    OK(moe_inproc_open(t.hub, &t.transports[WORKERS], &err));
    const moe_rpc_config client = {
        .transport = t.transports[WORKERS],
        .clock = t.used,
        .hello = {.cluster_uuid = UUID, .role = "router", .id = "r0", .profile = "", .incarnation = 1, .model_digest = t.model->digest}};
    OK(moe_rpc_new(&client, &t.client, &err));
}

static void open_checkpoint(const char *dir, int32_t threads) {
    moe_model *model;
    OK(moe_model_open(dir, &model, NULL));
    open_with(model, threads);
}

static void open_all(int32_t threads) { open_checkpoint(CHECKPOINT, threads); }

static void close_all(void) {
    moe_rpc_free(&t.client);
    for (int i = 0; i < WORKERS; i++) moe_worker_free(&t.workers[i]);
    for (int i = 0; i <= WORKERS; i++)
        if (t.transports[i]) t.transports[i]->ops->close(t.transports[i]);
    moe_inproc_hub_free(&t.hub);
    t.cpu->ops->close(t.cpu);
    t.ref->ops->close(t.ref);
    moe_model_close(&t.model);
}

static void step(void) {
    moe_error err;
    for (int i = 0; i < WORKERS; i++)
        if (t.workers[i]) OK(moe_worker_step(t.workers[i], 0, &err));
    OK(moe_rpc_step(t.client, 0, &err));
    if (t.threads)
        nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
    else
        t.clock.fake_now_ns += MOE_NS_PER_MS;
}

static void on_reply(void *ctx, const moe_rpc_reply *reply) {
    answer *a = ctx;
    a->done = true;
    a->status = reply->status;
    snprintf(a->message, sizeof a->message, "%s", reply->message);
    if (!reply->body) return;
    if (reply->body->descriptor == &moesaic__v1__load_response__descriptor) {
        const Moesaic__V1__LoadResponse *r = (const void *)reply->body;
        a->num_loaded = r->n_loaded;
        for (size_t i = 0; i < r->n_loaded && i < 8; i++) a->digests[i] = r->loaded[i]->digest;
    } else if (reply->body->descriptor == &moesaic__v1__stats_response__descriptor) {
        const Moesaic__V1__StatsResponse *r = (const void *)reply->body;
        assert_int_equal(r->n_loaded_rows, r->n_loaded_calls);
        a->num_loaded = r->n_loaded;
        a->holdings = r->holdings;
        a->leaving = r->leaving;
        for (size_t i = 0; i < r->n_loaded_rows; i++) {
            a->rows += r->loaded_rows[i];
            a->calls += r->loaded_calls[i];
        }
    } else if (reply->body->descriptor == &moesaic__v1__fetch_response__descriptor) {
        a->fetched_total = ((const Moesaic__V1__FetchResponse *)reply->body)->total_bytes;
        a->fetched_bytes = reply->num_payload == 1 ? reply->payload[0].size : 0;
    }
}

static answer call(int worker, const char *method, const ProtobufCMessage *request) {
    answer a = {0};
    moe_error err;
    for (int i = 0; i < 5000 && !moe_rpc_peer_of_link(t.client, t.links[worker]); i++) step();
    moe_peer peer = moe_rpc_peer_of_link(t.client, t.links[worker])->peer;
    OK(moe_rpc_call_start(t.client, peer, method, request, NULL, 0, INT64_MAX, on_reply, &a, NULL, &err));
    for (int i = 0; i < 60000 && !a.done; i++) step();
    assert_true(a.done);
    return a;
}

typedef struct load {
    uint32_t layer, first, count;
    const char *source; /* NULL: checkpoint */
    uint64_t digest_salt;
    bool plain; /* a first share: no known answers, no digests but the one below */
    uint32_t wrong; /* plain: this one's digest is told wrongly; 0: none's */
} load;

static answer load_experts(int worker, load l) {
    Moesaic__V1__LoadRequest request = MOESAIC__V1__LOAD_REQUEST__INIT;
    Moesaic__V1__ExpertId ids[8], *pointers[8];
    uint64_t digests[8], told[8];
    for (uint32_t i = 0; i < l.count; i++) {
        moesaic__v1__expert_id__init(&ids[i]);
        ids[i].layer = l.layer;
        ids[i].expert = l.first + i;
        pointers[i] = &ids[i];
        OK(moe_expert_digest(moe_model_expert(t.model, (int32_t)l.layer, (int32_t)(l.first + i)), &digests[i], NULL));
        digests[i] ^= l.digest_salt;
        told[i] = !l.plain ? digests[i] : l.wrong == i && i > 0 ? digests[i] + 1 : 0;
    }
    request.incarnation = 10 + (uint64_t)worker;
    request.experts = pointers;
    request.n_experts = l.count;
    request.digests = told;
    request.n_digests = l.count;
    request.verify = !l.plain;
    if (l.source) {
        request.source_endpoint = (char *)l.source;
        request.source_incarnation = 10;
    }
    answer a = call(worker, "/moesaic.v1.WorkerService/Load", &request.base);
    for (uint32_t i = 0; a.status == MOE_OK && i < l.count; i++) assert_true(a.digests[i] == digests[i]);
    return a;
}

static answer stats(int worker, uint64_t known) {
    Moesaic__V1__StatsRequest request = MOESAIC__V1__STATS_REQUEST__INIT;
    request.known_holdings = known;
    return call(worker, "/moesaic.v1.WorkerService/Stats", &request.base);
}

static void test_verified_from_checkpoint_and_peer(void **state) {
    (void)state;
    for (int i = 0; i < 4; i++) {
        open_checkpoint(i / 2 ? TWO_MATRICES : CHECKPOINT, i % 2);
        start_worker(0, t.cpu, 0, 0);
        start_worker(1, t.cpu, 0, 0);
        assert_int_equal(load_experts(0, (load){.layer = 1, .first = 0, .count = 4}).status, MOE_OK);
        assert_int_equal(load_experts(1, (load){.layer = 1, .first = 1, .count = 3, .source = "inproc:w0"}).status, MOE_OK);
        assert_int_equal(stats(1, 0).num_loaded, 3);
        close_all();
    }
}

/* A model of generated weights: their digest is of what they follow from, and a worker makes them rather than copy them. */
static void test_generated_experts_are_made(void **state) {
    (void)state;
    moe_model *generated;
    OK(moe_model_open_dummy(CHECKPOINT, &(moe_dummy_options){.seed = 4}, &generated, NULL));
    open_with(generated, false);
    start_worker(1, t.cpu, 0, 0);
    int64_t before = moe_now_ns(t.used);
    assert_int_equal(load_experts(1, (load){.layer = 1, .first = 1, .count = 3, .source = "inproc:nobody"}).status, MOE_OK);
    assert_int_equal(stats(1, 0).num_loaded, 3);
    assert_true(moe_now_ns(t.used) - before < MOE_NS_PER_S); /* nobody was waited for */
    close_all();
}

/* Messages between the workers get lost: pieces are asked for again. What a peer cannot give comes from the checkpoint. */
static void test_copy_over_a_bad_network(void **state) {
    (void)state;
    open_all(false);
    start_worker(0, t.cpu, 0, 0);
    start_worker(1, t.cpu, 0, 0);
    OK(load_experts(0, (load){.layer = 0, .first = 0, .count = 2}).status);
    assert_int_equal(load_experts(1, (load){.layer = 0, .first = 0, .count = 4, .source = "inproc:w0"}).status, MOE_OK);
    assert_int_equal(load_experts(1, (load){.layer = 1, .first = 0, .count = 1, .source = "inproc:nobody"}).status, MOE_OK);
    moe_inproc_partition(t.hub, "inproc:w0", true, false);
    assert_int_equal(load_experts(1, (load){.layer = 1, .first = 1, .count = 1, .source = "inproc:w0"}).status, MOE_OK);
    assert_int_equal(stats(1, 0).num_loaded, 6);
    close_all();
}

static void test_wrong_digest_is_refused(void **state) {
    (void)state;
    open_all(false);
    start_worker(0, t.cpu, 0, 0);
    start_worker(1, t.cpu, 0, 0);
    answer a = load_experts(0, (load){.count = 1, .digest_salt = 1});
    assert_int_equal(a.status, MOE_DATA_LOSS);
    assert_non_null(strstr(a.message, "the cluster's is"));
    OK(load_experts(0, (load){.count = 1}).status);
    assert_int_equal(load_experts(0, (load){.count = 1, .digest_salt = 1}).status, MOE_DATA_LOSS); /* held already */
    assert_int_equal(load_experts(1, (load){.count = 1, .source = "inproc:w0", .digest_salt = 1}).status, MOE_DATA_LOSS);
    assert_int_equal(stats(1, 0).num_loaded, 0);
    close_all();
}

/* The bytes are right, what the backend made of them is not. */
static void test_known_answer_finds_a_bad_copy(void **state) {
    (void)state;
    for (int threads = 0; threads <= 1; threads++) {
        open_all(threads);
        start_worker(0, &t.faulty, 0, 0);
        answer a = load_experts(0, (load){.count = 1});
        assert_int_equal(a.status, MOE_INTERNAL);
        assert_non_null(strstr(a.message, "known-answer"));
        assert_int_equal(stats(0, 0).num_loaded, 0);
        OK(load_experts(0, (load){.first = 7, .count = 1}).status); /* which it packs rightly */
        close_all();
    }
}

static void test_copy_rate(void **state) {
    (void)state;
    open_all(false);
    const moe_ffn_weights *w = moe_model_expert(t.model, 0, 0);
    int64_t bytes = (int64_t)(moe_tensor_bytes(&w->gate) + moe_tensor_bytes(&w->up) + moe_tensor_bytes(&w->down));
    start_worker(0, t.cpu, 0, 0);
    start_worker(1, t.cpu, bytes, 0); /* one expert a second */
    OK(load_experts(0, (load){.first = 0, .count = 4}).status);
    int64_t began = t.clock.fake_now_ns;
    OK(load_experts(1, (load){.first = 0, .count = 4, .source = "inproc:w0"}).status);
    int64_t took = t.clock.fake_now_ns - began;
    assert_true(took >= 3 * MOE_NS_PER_S && took < 5 * MOE_NS_PER_S);
    close_all();
}

static void test_max_experts(void **state) {
    (void)state;
    open_all(false);
    start_worker(0, t.cpu, 0, 2);
    answer a = load_experts(0, (load){.count = 3});
    assert_int_equal(a.status, MOE_RESOURCE_EXHAUSTED);
    assert_int_equal(stats(0, 0).num_loaded, 2);
    close_all();
}

static void test_fetch_validates(void **state) {
    (void)state;
    open_all(false);
    start_worker(0, t.cpu, 0, 0);
    OK(load_experts(0, (load){.count = 1}).status);
    const struct {
        uint64_t incarnation, offset;
        uint32_t layer, expert, bytes;
        moe_status status;
    } rows[] = {{10, 0, 0, 0, 4096, MOE_OK},
                {11, 0, 0, 0, 4096, MOE_UNAVAILABLE},
                {10, 0, 0, 1, 4096, MOE_FAILED_PRECONDITION},
                {10, 0, 9999, 0, 4096, MOE_INVALID_ARGUMENT},
                {10, 0, 0, 9999, 4096, MOE_INVALID_ARGUMENT},
                {10, 2, 0, 0, 4096, MOE_INVALID_ARGUMENT},
                {10, 0, 0, 0, 0, MOE_INVALID_ARGUMENT},
                {10, UINT64_MAX - 3, 0, 0, 4, MOE_INVALID_ARGUMENT},
                {10, 1 << 30, 0, 0, 4, MOE_INVALID_ARGUMENT},
                {10, 0, 0, 0, UINT32_MAX - 3, MOE_OK}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Moesaic__V1__FetchRequest r = MOESAIC__V1__FETCH_REQUEST__INIT;
        r.incarnation = rows[i].incarnation;
        r.offset = rows[i].offset;
        r.layer = rows[i].layer;
        r.expert = rows[i].expert;
        r.max_bytes = rows[i].bytes;
        t.transports[WORKERS]->ops->wake(t.transports[WORKERS]);
        answer a = call(0, "/moesaic.v1.WorkerService/Fetch", &r.base);
        assert_int_equal(a.status, rows[i].status);
        if (i == 0) assert_int_equal(a.fetched_bytes, 4096);
    }
    close_all();
}

static void test_stats_lists_what_changed(void **state) {
    (void)state;
    open_all(false);
    start_worker(0, t.cpu, 0, 0);
    answer empty = stats(0, 0);
    assert_true(empty.holdings != 0 && empty.num_loaded == 0 && !empty.leaving);
    OK(load_experts(0, (load){.count = 2}).status);
    answer two = stats(0, empty.holdings);
    assert_int_equal(two.num_loaded, 2);
    assert_int_equal(stats(0, two.holdings).num_loaded, 0);
    moe_worker_leave(t.workers[0]);
    assert_true(stats(0, two.holdings).leaving);
    close_all();
}

static void open_crowd(int32_t threads, int meet) {
    open_all(threads);
    t.meet = meet;
    start_worker(0, &t.crowd, 0, 0);
}

/* Each thread has an expert, and they are held in the order in which they were asked for. */
static void test_first_share_is_packed_side_by_side(void **state) {
    (void)state;
    open_crowd(3, 3);
    assert_int_equal(load_experts(0, (load){.count = 8, .plain = true}).status, MOE_OK);
    assert_int_equal(t.most, 3);
    assert_int_equal(load_experts(0, (load){.layer = 1, .first = 4, .count = 8, .plain = true}).status, MOE_OK);
    assert_int_equal(load_experts(0, (load){.layer = 1, .first = 0, .count = 8, .plain = true}).status, MOE_OK); /* half are held */
    assert_int_equal(stats(0, 0).num_loaded, 20);
    assert_int_equal(t.most, 3);
    close_all();
}

static void test_what_follows_a_failure_is_not_kept(void **state) {
    (void)state;
    open_crowd(3, 2);
    answer a = load_experts(0, (load){.count = 8, .plain = true, .wrong = 2});
    assert_int_equal(a.status, MOE_DATA_LOSS);
    assert_non_null(strstr(a.message, "2 of 8 experts"));
    assert_int_equal(stats(0, 0).num_loaded, 2);
    assert_int_equal(load_experts(0, (load){.count = 8, .plain = true}).status, MOE_OK);
    assert_int_equal(stats(0, 0).num_loaded, 8);
    close_all();
}

static void test_no_more_than_may_be_held_is_begun(void **state) {
    (void)state;
    open_all(4);
    start_worker(0, &t.crowd, 0, 2);
    assert_int_equal(load_experts(0, (load){.count = 8, .plain = true}).status, MOE_RESOURCE_EXHAUSTED);
    assert_int_equal(stats(0, 0).num_loaded, 2);
    assert_true(t.most <= 2);
    close_all();
}

/* A worker may end, and a call may, while threads pack. */
static void test_ends_while_it_packs(void **state) {
    (void)state;
    for (int cancelled = 0; cancelled < 2; cancelled++) {
        open_crowd(4, 4);
        Moesaic__V1__LoadRequest request = MOESAIC__V1__LOAD_REQUEST__INIT;
        Moesaic__V1__ExpertId ids[8], *pointers[8];
        answer a = {0};
        uint64_t id;
        for (uint32_t i = 0; i < 8; i++) {
            moesaic__v1__expert_id__init(pointers[i] = &ids[i]);
            ids[i].expert = i;
        }
        request.incarnation = 10;
        request.experts = pointers;
        request.n_experts = 8;
        stats(0, 0);
        moe_peer peer = moe_rpc_peer_of_link(t.client, t.links[0])->peer;
        OK(moe_rpc_call_start(t.client, peer, "/moesaic.v1.WorkerService/Load", &request.base, NULL, 0, INT64_MAX, on_reply, &a, &id,
                              NULL));
        for (int i = 0; i < 60000 && atomic_load(&t.most) < 2; i++) step();
        t.meet = 0; /* they go on while it ends */
        if (cancelled) {
            moe_rpc_cancel(t.client, id);
            assert_int_equal(load_experts(0, (load){.layer = 1, .count = 8, .plain = true}).status, MOE_OK);
        }
        close_all();
    }
}

static void forward(void) {
    static float x[4096];
    const uint32_t row = 0, expert = 0;
    answer a = {0};
    moe_forward_call call = {.epoch = 1,
                             .incarnation = 10,
                             .model_digest = t.model->digest,
                             .cluster_uuid = UUID,
                             .rows = 1,
                             .assignments = 1,
                             .block_hi = MOE_FFN_BLOCKS,
                             .activations = x,
                             .assignment_rows = &row,
                             .assignment_experts = &expert};
    moe_peer peer = moe_rpc_peer_of_link(t.client, t.links[0])->peer;
    assert_true(t.model->config.hidden <= 4096);
    OK(moe_forward_start(t.client, peer, &call, t.model->config.hidden, INT64_MAX, on_reply, &a, NULL, NULL));
    for (int i = 0; i < 60000 && !a.done; i++) step();
    assert_int_equal(a.status, MOE_OK);
}

/* What is verified is one after another, and so is everything once calls are computed. */
static void test_one_at_a_time_beside_calls(void **state) {
    (void)state;
    open_crowd(4, 0);
    assert_int_equal(load_experts(0, (load){.count = 8}).status, MOE_OK);
    assert_int_equal(t.most, 1);
    forward();
    assert_int_equal(load_experts(0, (load){.layer = 1, .count = 8, .plain = true}).status, MOE_OK);
    assert_int_equal(t.most, 1);
    close_all();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_verified_from_checkpoint_and_peer),
        cmocka_unit_test(test_generated_experts_are_made),
        cmocka_unit_test(test_copy_over_a_bad_network),
        cmocka_unit_test(test_wrong_digest_is_refused),
        cmocka_unit_test(test_known_answer_finds_a_bad_copy),
        cmocka_unit_test(test_copy_rate),
        cmocka_unit_test(test_max_experts),
        cmocka_unit_test(test_fetch_validates),
        cmocka_unit_test(test_stats_lists_what_changed),
        cmocka_unit_test(test_first_share_is_packed_side_by_side),
        cmocka_unit_test(test_what_follows_a_failure_is_not_kept),
        cmocka_unit_test(test_no_more_than_may_be_held_is_begun),
        cmocka_unit_test(test_ends_while_it_packs),
        cmocka_unit_test(test_one_at_a_time_beside_calls),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
