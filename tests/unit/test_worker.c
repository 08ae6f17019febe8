/* The expert worker over the in-process transport with the cpu-ref backend: results bit for bit, batching, refusals, Load and
 * Drop. The clock is fake and both sides step in turn on this thread, but for the last test. */
#include "expert-worker/worker.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/inproc/inproc.h"
#include "common/log.h"
#include "common/metrics.h"
#include "common/random.h"
#include "cpu/cpu.h"
#include "proto/forward.h"
#include "tests/support/gated_backend.h"
#include "tests/support/test.h"

#define CHECKPOINT SOURCE_DIR "/tests/data/checkpoints/qwen3_moe"
#define ENDPOINT "inproc:w0"
#define CLUSTER "6f1c2a52-8f2e-4b6e-9a51-0a4f9c1b2d3e"
#define INCARNATION UINT64_C(0x1122334455667788)
#define MAX_ROWS 64
#define MAX_ROUNDS 1000
#define START_NS (1000 * MOE_NS_PER_S)
#define DEADLINE_NS (START_NS + 100 * MOE_NS_PER_S)

/* The fixture: hidden 64, 3 MoE layers of 16 experts, 4 a token. */
enum { H = 64, LAYERS = 3, EXPERTS = 16, TOP_K = 4, MAX_ASSIGNMENTS = MAX_ROWS * TOP_K };

typedef struct rig {
    moe_model *model;
    moe_clock clock;
    moe_inproc_hub *hub;
    moe_transport *transports[2]; /* the worker's, the client's */
    moe_backend *ref;
    moe_gated_backend gate;
    moe_worker *worker;
    moe_rpc *client;
    uint64_t link;
} rig;

static void make_client(rig *r, const char *cluster, uint64_t digest) {
    const moe_rpc_config config = {
        .transport = r->transports[1],
        .clock = &r->clock,
        .hello = {
            .cluster_uuid = cluster, .role = "router", .id = "r0", .profile = "", .incarnation = 7, .model_digest = digest}};
    assert_int_equal(moe_rpc_new(&config, &r->client, NULL), MOE_OK);
    assert_int_equal(moe_rpc_connect(r->client, ENDPOINT, &r->link, NULL), MOE_OK);
}

static void step_both(rig *r) {
    assert_int_equal(moe_worker_step(r->worker, 0, NULL), MOE_OK);
    assert_int_equal(moe_rpc_step(r->client, 0, NULL), MOE_OK);
}

static moe_peer connect_client(rig *r) {
    for (int i = 0; i < MAX_ROUNDS && !moe_rpc_peer_of_link(r->client, r->link); i++) step_both(r);
    const moe_rpc_peer *peer = moe_rpc_peer_of_link(r->client, r->link);
    assert_non_null(peer);
    return peer->peer;
}

static void rig_open_backend(rig *r, int32_t threads) {
    memset(r, 0, sizeof *r);
    assert_int_equal(moe_model_open(CHECKPOINT, &r->model, NULL), MOE_OK);
    assert_int_equal(moe_cpu_ref_open(&(moe_cpu_config){.threads = threads}, &r->ref, NULL), MOE_OK);
    moe_gated_init(&r->gate, r->ref);
}

static void rig_open_with(rig *r, int32_t max_queued_calls, int32_t max_batch_rows, bool checked, const moe_tier_options *tiers) {
    rig_open_backend(r, 0);
    r->clock = moe_clock_fake(START_NS);
    assert_int_equal(moe_inproc_hub_new(&r->clock, 1, &r->hub, NULL), MOE_OK);
    for (int i = 0; i < 2; i++) assert_int_equal(moe_inproc_open(r->hub, &r->transports[i], NULL), MOE_OK);
    char bound[MOE_ENDPOINT_BYTES];
    assert_int_equal(r->transports[0]->ops->listen(r->transports[0], ENDPOINT, bound, NULL), MOE_OK);
    const moe_worker_config config = {.model = r->model,
                                      .backend = tiers ? r->ref : &r->gate.base,
                                      .transport = r->transports[0],
                                      .clock = &r->clock,
                                      .cluster_uuid = CLUSTER,
                                      .id = "w0",
                                      .incarnation = INCARNATION,
                                      .max_queued_calls = max_queued_calls,
                                      .max_batch_rows = max_batch_rows,
                                      .reference = checked ? r->ref->ops->single : NULL,
                                      .tiers = tiers ? *tiers : (moe_tier_options){.piece_bytes = 0}};
    assert_int_equal(moe_worker_new(&config, &r->worker, NULL), MOE_OK);
    make_client(r, CLUSTER, r->model->digest);
    connect_client(r);
}

static void rig_open_checked(rig *r, int32_t max_queued_calls, int32_t max_batch_rows, bool checked) {
    rig_open_with(r, max_queued_calls, max_batch_rows, checked, NULL);
}

static void rig_open(rig *r, int32_t max_queued_calls, int32_t max_batch_rows) {
    rig_open_checked(r, max_queued_calls, max_batch_rows, false);
}

static void rig_close(rig *r) {
    moe_rpc_free(&r->client);
    moe_worker_free(&r->worker);
    moe_worker_free(&r->worker);
    for (int i = 0; i < 2; i++)
        if (r->transports[i]) r->transports[i]->ops->close(r->transports[i]);
    moe_inproc_hub_free(&r->hub);
    assert_int_equal(r->gate.num_loads, r->gate.num_frees);
    r->ref->ops->close(r->ref);
    moe_model_close(&r->model);
}

/* ---- calls ---- */

typedef struct reply {
    bool done;
    int count;
    moe_status status;
    char message[256];
    uint32_t not_held[EXPERTS];
    size_t num_not_held, num_not_finite;
    uint32_t not_finite[MAX_ROWS];
    uint32_t dropped;
    size_t num_loaded;
    Moesaic__V1__LoadedExpert loaded[LAYERS * EXPERTS];
    Moesaic__V1__ExpertId ids[LAYERS * EXPERTS];
    Moesaic__V1__StatsResponse stats;
    moe_forward_result result;
    float out[MAX_ASSIGNMENTS * H];
    int32_t out_rows; /* expected, for decoding */
    uint64_t call_id;
} reply;

static void keep_loaded(reply *to, size_t count, Moesaic__V1__LoadedExpert **loaded) {
    assert_true(count <= LAYERS * EXPERTS);
    to->num_loaded = count;
    for (size_t i = 0; i < count; i++) {
        to->loaded[i] = *loaded[i];
        to->ids[i] = *loaded[i]->id;
    }
}

static void keep_body(reply *to, const moe_rpc_reply *from) {
    const ProtobufCMessageDescriptor *type = from->body->descriptor;
    if (type == &moesaic__v1__forward_response__descriptor && from->status != MOE_OK) {
        const Moesaic__V1__ForwardResponse *body = (const void *)from->body;
        to->num_not_held = body->n_not_held;
        assert_true(body->n_not_held <= EXPERTS);
        if (body->n_not_held) memcpy(to->not_held, body->not_held, body->n_not_held * sizeof *body->not_held);
        assert_true(body->n_not_finite <= MAX_ROWS);
        to->num_not_finite = body->n_not_finite;
        if (body->n_not_finite) memcpy(to->not_finite, body->not_finite, body->n_not_finite * sizeof *body->not_finite);
        to->result.epoch = body->epoch;
    } else if (type == &moesaic__v1__forward_response__descriptor) {
        assert_int_equal(
            moe_forward_decode_reply(from, &(moe_forward_expected){MOE_F32, to->out_rows, H, INCARNATION}, &to->result, NULL),
            MOE_OK);
        memcpy(to->out, to->result.out, (size_t)to->out_rows * H * sizeof *to->out);
    } else if (type == &moesaic__v1__load_response__descriptor) {
        const Moesaic__V1__LoadResponse *body = (const void *)from->body;
        assert_true(body->incarnation == INCARNATION);
        keep_loaded(to, body->n_loaded, body->loaded);
    } else if (type == &moesaic__v1__drop_response__descriptor) {
        to->dropped = ((const Moesaic__V1__DropResponse *)from->body)->dropped;
    } else if (type == &moesaic__v1__stats_response__descriptor) {
        to->stats = *(const Moesaic__V1__StatsResponse *)from->body;
        assert_string_equal(to->stats.id, "w0");
        keep_loaded(to, to->stats.n_loaded, to->stats.loaded);
    }
}

static void on_reply(void *ctx, const moe_rpc_reply *from) {
    reply *to = ctx;
    to->count++;
    to->done = true;
    to->status = from->status;
    snprintf(to->message, sizeof to->message, "%s", from->message);
    if (from->body) keep_body(to, from);
}

static void wait_for(rig *r, reply *a) {
    for (int i = 0; i < MAX_ROUNDS && !a->done; i++) step_both(r);
    assert_true(a->done);
    assert_int_equal(a->count, 1);
}

static void send_call(rig *r, const char *method, const void *request, reply *answer) {
    memset(answer, 0, sizeof *answer);
    assert_int_equal(moe_rpc_call_start(r->client, connect_client(r), method, request, NULL, 0, DEADLINE_NS, on_reply, answer,
                                        &answer->call_id, NULL),
                     MOE_OK);
}

/* Load and Drop requests of `count` experts of a layer from `first`. */
static Moesaic__V1__ExpertId id_memory[LAYERS * EXPERTS], *id_pointers[LAYERS * EXPERTS];
static size_t name_experts(uint32_t layer, uint32_t first, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        moesaic__v1__expert_id__init(&id_memory[i]);
        id_memory[i].layer = layer + (first + i) / EXPERTS;
        id_memory[i].expert = (first + i) % EXPERTS;
        id_pointers[i] = &id_memory[i];
    }
    return count;
}

static Moesaic__V1__LoadRequest load_request(uint32_t layer, uint32_t first, uint32_t count) {
    Moesaic__V1__LoadRequest request = MOESAIC__V1__LOAD_REQUEST__INIT;
    request.incarnation = INCARNATION;
    request.fence = 5;
    request.epoch = 9;
    request.n_experts = name_experts(layer, first, count);
    request.experts = id_pointers;
    return request;
}

static void load(rig *r, uint32_t layer, uint32_t first, uint32_t count, reply *answer) {
    Moesaic__V1__LoadRequest request = load_request(layer, first, count);
    send_call(r, "/moesaic.v1.WorkerService/Load", &request, answer);
}

static void drop(rig *r, uint32_t layer, uint32_t first, uint32_t count, reply *answer) {
    Moesaic__V1__DropRequest request = MOESAIC__V1__DROP_REQUEST__INIT;
    request.incarnation = INCARNATION;
    request.fence = 5;
    request.n_experts = name_experts(layer, first, count);
    request.experts = id_pointers;
    send_call(r, "/moesaic.v1.WorkerService/Drop", &request, answer);
}

static void load_all(rig *r) {
    static reply answer;
    load(r, 0, 0, LAYERS * EXPERTS, &answer);
    wait_for(r, &answer);
    assert_int_equal(answer.status, MOE_OK);
}

static void stats(rig *r, reply *answer) {
    Moesaic__V1__StatsRequest request = MOESAIC__V1__STATS_REQUEST__INIT;
    send_call(r, "/moesaic.v1.WorkerService/Stats", &request, answer);
    wait_for(r, answer);
    assert_int_equal(answer->status, MOE_OK);
}

/* ---- problems: rows with experts, and what must come out ---- */

typedef struct problem {
    int32_t layer, rows, assignments, block_lo, block_hi;
    moe_combine_mode mode;
    float x[MAX_ROWS * H];
    uint32_t row_of[MAX_ASSIGNMENTS], expert_of[MAX_ASSIGNMENTS];
    float weight_of[MAX_ASSIGNMENTS];
    float expected[MAX_ASSIGNMENTS * H];
} problem;

/* Each row at TOP_K different experts, at random. */
static void make_problem(problem *p, int32_t layer, int32_t rows, moe_combine_mode mode, uint64_t seed) {
    moe_random random = {seed};
    bool chosen[MAX_ROWS][EXPERTS] = {{false}};
    *p = (problem){.layer = layer, .rows = rows, .mode = mode, .block_hi = MOE_FFN_BLOCKS};
    for (int32_t i = 0; i < rows * H; i++) p->x[i] = (float)(moe_random_unit(&random) * 4 - 2);
    for (int32_t row = 0; row < rows; row++) {
        for (int n = 0; n < TOP_K;) {
            uint64_t expert = moe_random_below(&random, EXPERTS);
            n += !chosen[row][expert];
            chosen[row][expert] = true;
        }
    }
    for (uint32_t expert = 0; expert < EXPERTS; expert++) {
        for (uint32_t row = 0; row < (uint32_t)rows; row++) {
            if (!chosen[row][expert]) continue;
            p->row_of[p->assignments] = row;
            p->expert_of[p->assignments] = expert;
            p->weight_of[p->assignments++] = (float)moe_random_unit(&random);
        }
    }
}

/* By the backend's own single operation, one assignment at a time. */
static void solve(const rig *r, problem *p) {
    memset(p->expected, 0, sizeof p->expected);
    for (int32_t a = 0; a < p->assignments; a++) {
        float y[H];
        r->ref->ops->single->ffn(p->x + p->row_of[a] * H, moe_model_expert(r->model, p->layer, (int32_t)p->expert_of[a]), 1,
                                 p->block_lo, p->block_hi, y);
        for (int i = 0; i < H; i++) {
            if (p->mode == MOE_COMBINE_EXACT)
                p->expected[a * H + i] = y[i];
            else
                p->expected[p->row_of[a] * H + (uint32_t)i] =
                    fmaf(p->weight_of[a], y[i], p->expected[p->row_of[a] * H + (uint32_t)i]);
        }
    }
}

static int32_t out_rows_of(const problem *p) { return p->mode == MOE_COMBINE_EXACT ? p->assignments : p->rows; }

static moe_forward_call forward_of(const rig *r, const problem *p) {
    return (moe_forward_call){.epoch = 3,
                              .incarnation = INCARNATION,
                              .model_digest = r->model->digest,
                              .cluster_uuid = CLUSTER,
                              .layer = p->layer,
                              .rows = p->rows,
                              .assignments = p->assignments,
                              .block_lo = p->block_lo,
                              .block_hi = p->block_hi,
                              .combine = p->mode,
                              .activations = p->x,
                              .assignment_rows = p->row_of,
                              .assignment_experts = p->expert_of,
                              .assignment_weights = p->mode == MOE_COMBINE_PARTIAL ? p->weight_of : NULL};
}

static void send_forward(rig *r, const moe_forward_call *call, int32_t out_rows, int64_t deadline_ns, reply *answer) {
    memset(answer, 0, sizeof *answer);
    answer->out_rows = out_rows;
    assert_int_equal(
        moe_forward_start(r->client, connect_client(r), call, H, deadline_ns, on_reply, answer, &answer->call_id, NULL), MOE_OK);
}

static void send_problem(rig *r, const problem *p, reply *answer) {
    moe_forward_call call = forward_of(r, p);
    send_forward(r, &call, out_rows_of(p), DEADLINE_NS, answer);
}

static uint64_t digest_of(const rig *r, const problem *p) {
    uint64_t all = 0, one;
    for (int32_t a = 0; a < p->assignments; a++) {
        if (a > 0 && p->expert_of[a] == p->expert_of[a - 1]) continue;
        assert_int_equal(moe_expert_digest(moe_model_expert(r->model, p->layer, (int32_t)p->expert_of[a]), &one, NULL), MOE_OK);
        all ^= one;
    }
    return all;
}

static void expect_solved(const rig *r, const problem *p, const reply *answer) {
    if (answer->status != MOE_OK) fail_msg("status %d: %s", answer->status, answer->message);
    assert_memory_equal(answer->out, p->expected, (size_t)out_rows_of(p) * H * sizeof(float));
    assert_true(answer->result.shard_digest == digest_of(r, p));
    assert_true(answer->result.incarnation == INCARNATION);
}

/* ---- tests ---- */

/* The rows of `whole` from `first` on as a problem of their own. */
static void take_rows(const problem *whole, uint32_t first, uint32_t count, problem *part) {
    *part = (problem){.layer = whole->layer,
                      .rows = (int32_t)count,
                      .block_lo = whole->block_lo,
                      .block_hi = whole->block_hi,
                      .mode = whole->mode};
    memcpy(part->x, whole->x + first * H, count * H * sizeof(float));
    for (int32_t a = 0; a < whole->assignments; a++) {
        if (whole->row_of[a] < first || whole->row_of[a] >= first + count) continue;
        part->row_of[part->assignments] = whole->row_of[a] - first;
        part->expert_of[part->assignments] = whole->expert_of[a];
        part->weight_of[part->assignments++] = whole->weight_of[a];
    }
}

#define MAX_PARTS 8

/* Sends the rows in `num_parts` calls in a shuffled order before the worker turns, so that it merges what max_batch_rows allows.
 */
static int send_in_parts(rig *r, const problem *whole, uint32_t num_parts, uint64_t seed) {
    static problem parts[MAX_PARTS];
    static reply answers[MAX_PARTS];
    uint32_t order[MAX_PARTS], size = (uint32_t)whole->rows / num_parts;
    moe_random random = {seed};
    int batches = r->gate.num_batches;
    for (uint32_t i = 0; i < num_parts; i++) {
        uint32_t first = i * size, end = i + 1 == num_parts ? (uint32_t)whole->rows : first + size;
        take_rows(whole, first, end - first, &parts[i]);
        solve(r, &parts[i]);
        order[i] = i;
    }
    for (uint32_t i = num_parts; i > 1; i--) {
        uint32_t j = (uint32_t)moe_random_below(&random, i), kept = order[j];
        order[j] = order[i - 1];
        order[i - 1] = kept;
    }
    for (uint32_t i = 0; i < num_parts; i++) send_problem(r, &parts[order[i]], &answers[order[i]]);
    for (uint32_t i = 0; i < num_parts; i++) wait_for(r, &answers[i]);
    for (uint32_t i = 0; i < num_parts; i++) expect_solved(r, &parts[i], &answers[i]);
    return r->gate.num_batches - batches;
}

static void same_bits_merged_split_and_in_any_order(void **state) {
    (void)state;
    static const int32_t slices[][2] = {{0, 8}, {4, 8}, {2, 3}}, limits[] = {1, 40, 100000};
    static problem whole;
    for (size_t l = 0; l < 3; l++) {
        rig r;
        rig_open(&r, 100, limits[l]);
        load_all(&r);
        for (uint32_t c = 0; c < 6; c++) {
            make_problem(&whole, (int32_t)c % LAYERS, 23, c % 2 ? MOE_COMBINE_PARTIAL : MOE_COMBINE_EXACT, 100 + c);
            whole.block_lo = slices[c % 3][0];
            whole.block_hi = slices[c % 3][1];
            for (uint32_t num_parts = 1; num_parts <= MAX_PARTS; num_parts++) {
                int batches = send_in_parts(&r, &whole, num_parts, num_parts * 7 + c);
                if (limits[l] == 1) assert_int_equal(batches, num_parts);
                if (limits[l] == 100000) assert_int_equal(batches, 1);
                if (limits[l] == 40 && num_parts == MAX_PARTS) assert_in_range(batches, 3, 4); /* of 23 × 4 assignments */
            }
        }
        rig_close(&r);
    }
}

static void one_expert_is_one_group_of_a_merged_batch(void **state) {
    (void)state;
    static problem whole;
    rig r;
    rig_open(&r, 100, 1000);
    load_all(&r);
    make_problem(&whole, 1, 40, MOE_COMBINE_EXACT, 5);
    assert_int_equal(send_in_parts(&r, &whole, 4, 1), 1);
    assert_int_equal(r.gate.last_assignments, 40 * TOP_K);
    assert_int_equal(r.gate.last_groups, EXPERTS);
    rig_close(&r);
}

static void unlike_calls_are_not_merged(void **state) {
    (void)state;
    static problem p[4];
    static reply answers[4];
    rig r;
    rig_open(&r, 100, 1000);
    load_all(&r);
    for (int i = 0; i < 4; i++)
        make_problem(&p[i], i == 1 ? 2 : 0, 4, i == 2 ? MOE_COMBINE_PARTIAL : MOE_COMBINE_EXACT, (uint64_t)i);
    p[3].block_hi = 4;
    int before = r.gate.num_batches;
    for (int i = 0; i < 4; i++) solve(&r, &p[i]);
    for (int i = 0; i < 4; i++) send_problem(&r, &p[i], &answers[i]);
    for (int i = 0; i < 4; i++) wait_for(&r, &answers[i]);
    for (int i = 0; i < 4; i++) expect_solved(&r, &p[i], &answers[i]);
    assert_int_equal(r.gate.num_batches - before, 4);
    rig_close(&r);
}

static void names_experts_that_it_does_not_hold(void **state) {
    (void)state;
    static problem p;
    static reply answer;
    rig r;
    rig_open(&r, 100, 1000);
    make_problem(&p, 1, 30, MOE_COMBINE_EXACT, 3); /* 30 × 4 of 16: all experts occur */
    load(&r, 1, 0, 13, &answer);
    wait_for(&r, &answer);
    send_problem(&r, &p, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_FAILED_PRECONDITION);
    assert_int_equal(answer.num_not_held, 3);
    for (uint32_t i = 0; i < 3; i++) assert_int_equal(answer.not_held[i], 13 + i);
    assert_int_equal(answer.result.epoch, 9); /* the Load's, newer than the call's */
    assert_int_equal(r.gate.num_batches, 0);
    rig_close(&r);
}

static void refuses_calls_for_others(void **state) {
    (void)state;
    static problem p;
    static reply answer;
    rig r;
    rig_open(&r, 100, 1000);
    load_all(&r);
    make_problem(&p, 0, 2, MOE_COMBINE_EXACT, 3);
    moe_forward_call good = forward_of(&r, &p), bad[4] = {good, good, good, good};
    static const moe_status codes[] = {MOE_FAILED_PRECONDITION, MOE_UNAVAILABLE, MOE_FAILED_PRECONDITION, MOE_INVALID_ARGUMENT};
    bad[0].model_digest++;
    bad[1].incarnation++;
    bad[2].cluster_uuid = "another";
    bad[3].layer = LAYERS;
    for (int i = 0; i < 4; i++) {
        send_forward(&r, &bad[i], p.assignments, DEADLINE_NS, &answer);
        wait_for(&r, &answer);
        assert_int_equal(answer.status, codes[i]);
    }
    assert_int_equal(r.gate.num_batches, 0);
    rig_close(&r);
}

static void refuses_peers_of_another_cluster_or_model(void **state) {
    (void)state;
    for (int i = 0; i < 2; i++) {
        rig r;
        rig_open(&r, 100, 1000);
        moe_rpc_free(&r.client);
        r.transports[1]->ops->close(r.transports[1]);
        assert_int_equal(moe_inproc_open(r.hub, &r.transports[1], NULL), MOE_OK);
        make_client(&r, i == 0 ? "another" : CLUSTER, i == 0 ? r.model->digest : r.model->digest + 1);
        for (int n = 0; n < 20; n++) step_both(&r);
        assert_null(moe_rpc_peer_of_link(r.client, r.link));
        rig_close(&r);
    }
}

/* Begins a job that the gate holds back, so that later calls queue up behind it. */
static void occupy(rig *r, problem *p, reply *answer) {
    r->gate.hold = true;
    make_problem(p, 0, 4, MOE_COMBINE_EXACT, 77);
    solve(r, p);
    send_problem(r, p, answer);
    for (int i = 0; i < MAX_ROUNDS && !r->gate.waiting; i++) step_both(r);
    assert_non_null(r->gate.waiting);
}

static void let_go(rig *r) {
    r->gate.hold = false;
    moe_gated_release(&r->gate);
}

static void drops_expired_calls_before_computing(void **state) {
    (void)state;
    static problem first, late, next;
    static reply first_answer, late_answers[2], next_answer;
    rig r;
    rig_open(&r, 100, 1000);
    load_all(&r);
    int64_t expired = moe_metric_value(MOE_METRIC_WORKER_EXPIRED);
    occupy(&r, &first, &first_answer);
    make_problem(&late, 0, 3, MOE_COMBINE_EXACT, 1);
    make_problem(&next, 0, 3, MOE_COMBINE_EXACT, 2);
    solve(&r, &next);
    moe_forward_call call = forward_of(&r, &late);
    send_forward(&r, &call, late.assignments, START_NS + MOE_NS_PER_S, &late_answers[0]);
    send_problem(&r, &next, &next_answer);
    step_both(&r); /* both are in the next batch by now */
    call.layer = 1;
    send_forward(&r, &call, late.assignments, START_NS + MOE_NS_PER_S, &late_answers[1]);
    step_both(&r); /* this one waits in the queue */
    r.clock.fake_now_ns += 2 * MOE_NS_PER_S;
    step_both(&r);
    let_go(&r);
    wait_for(&r, &first_answer);
    wait_for(&r, &next_answer);
    expect_solved(&r, &first, &first_answer);
    expect_solved(&r, &next, &next_answer);
    assert_int_equal(r.gate.num_batches, 2);
    assert_int_equal(r.gate.last_assignments, next.assignments);
    for (int i = 0; i < 2; i++) assert_int_equal(late_answers[i].status, MOE_DEADLINE_EXCEEDED);
    assert_int_equal(moe_metric_value(MOE_METRIC_WORKER_EXPIRED) - expired, 2);
    stats(&r, &next_answer);
    assert_int_equal(next_answer.stats.expired, 2);
    assert_int_equal(next_answer.stats.queued_calls, 0);
    rig_close(&r);
}

static void drops_cancelled_calls(void **state) {
    (void)state;
    static problem p[4];
    static reply answers[4];
    rig r;
    rig_open(&r, 100, 1000);
    load_all(&r);
    occupy(&r, &p[0], &answers[0]);
    for (int i = 1; i < 4; i++) {
        make_problem(&p[i], i == 3 ? 1 : 0, 3, MOE_COMBINE_EXACT, (uint64_t)i);
        solve(&r, &p[i]);
        send_problem(&r, &p[i], &answers[i]);
    }
    step_both(&r);                                /* 1 and 2 are in the next batch, 3 waits */
    moe_rpc_cancel(r.client, answers[0].call_id); /* being computed: its answer is for nobody */
    moe_rpc_cancel(r.client, answers[1].call_id);
    moe_rpc_cancel(r.client, answers[3].call_id);
    step_both(&r);
    let_go(&r);
    wait_for(&r, &answers[2]);
    expect_solved(&r, &p[2], &answers[2]);
    for (int i = 0; i < 10; i++) step_both(&r);
    assert_int_equal(r.gate.num_batches, 2);
    assert_int_equal(r.gate.last_assignments, p[2].assignments);
    assert_true(answers[0].count == 0 && answers[1].count == 0 && answers[3].count == 0);
    moe_worker_view view;
    moe_worker_get_view(r.worker, &view);
    assert_int_equal(view.queued_calls, 0);
    rig_close(&r);
}

static void joins_the_batch_that_waits(void **state) {
    (void)state;
    static problem p[3];
    static reply answers[3];
    rig r;
    rig_open(&r, 100, 1000);
    load_all(&r);
    occupy(&r, &p[0], &answers[0]);
    for (int i = 1; i < 3; i++) {
        make_problem(&p[i], 0, 3, MOE_COMBINE_PARTIAL, (uint64_t)i);
        solve(&r, &p[i]);
        send_problem(&r, &p[i], &answers[i]);
        step_both(&r);
    }
    let_go(&r);
    for (int i = 0; i < 3; i++) wait_for(&r, &answers[i]);
    for (int i = 0; i < 3; i++) expect_solved(&r, &p[i], &answers[i]);
    assert_int_equal(r.gate.num_batches, 2);
    rig_close(&r);
}

static void refuses_more_than_its_queue_takes(void **state) {
    (void)state;
    static problem p;
    static reply answers[5];
    rig r;
    rig_open(&r, 3, 1000);
    load_all(&r);
    occupy(&r, &p, &answers[0]);
    for (int i = 1; i < 5; i++) send_problem(&r, &p, &answers[i]);
    wait_for(&r, &answers[4]);
    assert_int_equal(answers[4].status, MOE_RESOURCE_EXHAUSTED);
    let_go(&r);
    for (int i = 0; i < 4; i++) wait_for(&r, &answers[i]);
    for (int i = 0; i < 4; i++) expect_solved(&r, &p, &answers[i]);
    send_problem(&r, &p, &answers[4]);
    wait_for(&r, &answers[4]);
    expect_solved(&r, &p, &answers[4]);
    rig_close(&r);
}

static void names_layer_and_expert_of_results_that_are_not_finite(void **state) {
    (void)state;
    static problem p;
    static reply answer;
    rig r;
    rig_open(&r, 100, 1000);
    load_all(&r);
    for (int mode = 0; mode < 2; mode++) {
        char what[64];
        make_problem(&p, 2, 4, mode ? MOE_COMBINE_PARTIAL : MOE_COMBINE_EXACT, 3);
        solve(&r, &p);
        r.gate.poison = true; /* row 0, or the first assignment */
        send_problem(&r, &p, &answer);
        wait_for(&r, &answer);
        int32_t a = 0;
        while (mode && p.row_of[a] != 0) a++;
        snprintf(what, sizeof what, "expert %u of MoE layer 2", p.expert_of[a]);
        assert_int_equal(answer.status, MOE_INTERNAL);
        assert_int_equal(answer.num_not_finite, 1);
        assert_int_equal(answer.not_finite[0], mode ? 0 : p.row_of[0]);
        if (!strstr(answer.message, what)) fail_msg("\"%s\" lacks \"%s\"", answer.message, what);
        r.gate.poison = false;
        send_problem(&r, &p, &answer);
        wait_for(&r, &answer);
        expect_solved(&r, &p, &answer);
    }
    rig_close(&r);
}

/* The known-answer batch tells whose fault a value is that is not finite: here the request's, so only its rows are named. */
static void checks_itself_after_results_that_are_not_finite(void **state) {
    (void)state;
    static problem p;
    static reply answer;
    moe_worker_view view;
    rig r;
    rig_open_checked(&r, 100, 1000, true);
    load_all(&r);
    for (int mode = 0; mode < 2; mode++) {
        make_problem(&p, 1, 4, mode ? MOE_COMBINE_PARTIAL : MOE_COMBINE_EXACT, 5);
        solve(&r, &p);
        int before = r.gate.num_batches;
        r.gate.poison_next = 1;
        send_problem(&r, &p, &answer);
        wait_for(&r, &answer);
        assert_int_equal(answer.status, MOE_INTERNAL);
        assert_int_equal(answer.num_not_finite, 1);
        int checks = r.gate.num_batches - before - 1;
        assert_in_range(checks, 1, TOP_K); /* the experts of the row */
        send_problem(&r, &p, &answer);
        wait_for(&r, &answer);
        expect_solved(&r, &p, &answer);
    }
    moe_worker_get_view(r.worker, &view);
    assert_string_equal(view.defect, "");
    rig_close(&r);
}

/* Results that are not finite, or jobs that fail, and a known-answer batch that goes the same way: no rows are blamed, the worker
 * is defective and refuses what comes. */
static void a_defective_worker_refuses_work(void **state) {
    (void)state;
    static problem p;
    static reply answers[3];
    moe_worker_view view;
    rig r;
    moe_log_init(MOE_LOG_OFF, "test");
    for (int lost = 0; lost < 2; lost++) {
        rig_open_checked(&r, 100, 1000, true);
        load_all(&r);
        make_problem(&p, 1, 4, MOE_COMBINE_EXACT, 5);
        r.gate.poison = !lost;
        r.gate.fail_jobs = lost;
        for (int i = 0; i < 2; i++) send_problem(&r, &p, &answers[i]);
        for (int i = 0; i < 2; i++) wait_for(&r, &answers[i]);
        for (int i = 0; i < 2; i++) {
            assert_true(i == 1 || answers[i].status == MOE_INTERNAL); /* the second may have been computed beside, or refused */
            assert_int_equal(answers[i].num_not_finite, 0);
        }
        moe_worker_get_view(r.worker, &view);
        assert_non_null(strstr(view.defect, lost ? "the device is gone" : "known-answer"));
        r.gate.poison = r.gate.fail_jobs = false;
        send_problem(&r, &p, &answers[2]);
        wait_for(&r, &answers[2]);
        assert_int_equal(answers[2].status, MOE_UNAVAILABLE);
        rig_close(&r);
    }
    /* closed while a call is held back */
    rig_open_checked(&r, 100, 1000, true);
    load_all(&r);
    make_problem(&p, 1, 4, MOE_COMBINE_EXACT, 5);
    r.gate.poison_next = 1;
    send_problem(&r, &p, &answers[0]);
    for (int i = 0; i < MAX_ROUNDS && r.gate.num_batches == 0; i++) step_both(&r);
    moe_worker_free(&r.worker);
    rig_close(&r);
}

static void loads_drops_and_reports(void **state) {
    (void)state;
    static reply answer;
    moe_worker_view view;
    rig r;
    rig_open(&r, 100, 1000);
    load(&r, 1, 4, 6, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_OK);
    assert_int_equal(answer.num_loaded, 6);
    uint64_t bytes = 0, digest;
    for (uint32_t i = 0; i < 6; i++) {
        assert_int_equal(answer.ids[i].layer, 1);
        assert_int_equal(answer.ids[i].expert, 4 + i);
        assert_int_equal(moe_expert_digest(moe_model_expert(r.model, 1, 4 + (int32_t)i), &digest, NULL), MOE_OK);
        assert_true(answer.loaded[i].digest == digest);
        assert_true(answer.loaded[i].bytes >= 3 * 48 * 64 * 2);
        bytes += answer.loaded[i].bytes;
    }
    moe_worker_get_view(r.worker, &view);
    assert_true(view.experts == 6 && (uint64_t)view.weight_bytes == bytes);
    load(&r, 1, 2, 4, &answer); /* two of them are there */
    wait_for(&r, &answer);
    assert_int_equal(answer.num_loaded, 4);
    assert_int_equal(r.gate.num_loads, 8);
    drop(&r, 1, 0, 5, &answer); /* 2, 3, 4 are held */
    wait_for(&r, &answer);
    assert_int_equal(answer.dropped, 3);
    assert_int_equal(r.gate.num_frees, 3);
    stats(&r, &answer);
    assert_int_equal(answer.num_loaded, 5);
    for (uint32_t i = 0; i < 5; i++) assert_int_equal(answer.ids[i].expert, 5 + i);
    assert_true(answer.stats.weight_bytes == bytes / 6 * 5 && answer.stats.incarnation == INCARNATION &&
                answer.stats.progress > 0);
    moe_worker_get_view(r.worker, &view);
    assert_int_equal(view.experts, 5);
    rig_close(&r);
}

static void counts_calls_rows_and_progress(void **state) {
    (void)state;
    static problem p;
    static reply answer;
    rig r;
    rig_open(&r, 100, 1000);
    load_all(&r);
    stats(&r, &answer);
    uint64_t progress = answer.stats.progress;
    make_problem(&p, 0, 5, MOE_COMBINE_EXACT, 9);
    solve(&r, &p);
    for (int i = 0; i < 3; i++) {
        send_problem(&r, &p, &answer);
        wait_for(&r, &answer);
        expect_solved(&r, &p, &answer);
        assert_true(answer.result.compute_ns > 0 && answer.result.epoch == 9);
    }
    stats(&r, &answer);
    assert_int_equal(answer.stats.calls, 3);
    assert_int_equal(answer.stats.rows, 3 * 5 * TOP_K);
    assert_true(answer.stats.compute_ns > 0);
    assert_true(answer.stats.progress >= progress + 3);
    rig_close(&r);
}

static int64_t residency_metrics(void) {
    return moe_metric_value(MOE_METRIC_EXPERT_HITS) + moe_metric_value(MOE_METRIC_EXPERT_LATE_HITS) +
           moe_metric_value(MOE_METRIC_EXPERT_MISSES);
}

static uint64_t residency_told(const reply *answer) {
    assert_true(answer->result.residency.present);
    return answer->result.residency.hits + answer->result.residency.late_hits + answer->result.residency.misses;
}

static void segment_done(moe_job *job) { *(bool *)job->owner = true; }

/* The first layer of 5 tokens, where its rows are. Returns how many distinct experts it has. */
static int32_t run_layer_in_place(rig *r) {
    static const int32_t ids[5] = {1, 2, 3, 4, 5}, positions[5] = {0, 1, 2, 3, 4}, sequences[5], block = 0;
    const moe_layer_experts experts = moe_worker_layer_experts(r->worker);
    const moe_backend_ops *ops = r->ref->ops;
    int32_t chosen[5 * TOP_K], distinct = 0;
    float weights[5 * TOP_K];
    bool done = false, seen[EXPERTS] = {false};
    moe_layer_call call = {.num_rows = 5, .experts = chosen, .step = 1};
    moe_kv *kv;
    assert_int_equal(ops->base_load(r->ref, r->model, NULL, NULL, &call.base, NULL), MOE_OK);
    assert_int_equal(ops->kv_create(r->ref, call.base, 1, &kv, NULL), MOE_OK);
    assert_int_equal(ops->rows_create(r->ref, call.base, 5, &call.rows, NULL), MOE_OK);
    const moe_kv_view view = {.blocks = &block, .num_blocks = 1};
    const moe_segment segment = {.num_rows = 5, .rows = call.rows, .kv = kv, .token_ids = ids, .positions = positions,
                                 .sequences = sequences, .views = &view, .num_views = 1, .want_gate = true,
                                 .route = {chosen, weights}};
    moe_job job = {.done = segment_done, .owner = &done};
    ops->segment_submit(r->ref, call.base, &segment, &job);
    assert_true(done && job.status == MOE_OK);
    experts.ops->begin(experts.ctx, &call);
    for (int i = 0; i < MAX_ROUNDS && !call.ended; i++) step_both(r);
    assert_true(call.ended && call.submitted && call.status == MOE_OK);
    for (int i = 0; i < 5 * TOP_K; i++) {
        distinct += !seen[chosen[i]];
        seen[chosen[i]] = true;
    }
    ops->rows_free(r->ref, call.rows);
    ops->kv_free(r->ref, kv);
    ops->base_free(r->ref, call.base);
    return distinct;
}

/* What calls of this process's engine cost the tiers is in its metrics, what those of others cost in their answers, and nothing in both. */
static void tells_each_once(void **state) {
    (void)state;
    static problem p;
    static reply answer;
    rig r;
    rig_open_with(&r, 100, 1000, false, &(moe_tier_options){.device = {.part = 0.5}, .eviction = "hint-aware"});
    const moe_layer_experts experts = moe_worker_layer_experts(r.worker);
    assert_false(experts.ops->ready(experts.ctx));
    load_all(&r);
    assert_true(experts.ops->ready(experts.ctx));
    make_problem(&p, 1, 1, MOE_COMBINE_EXACT, 9);
    solve(&r, &p);
    for (int i = 0; i < 3; i++) {
        int64_t before = residency_metrics(), rows = moe_metric_value(MOE_METRIC_WORKER_ROWS);
        send_problem(&r, &p, &answer);
        wait_for(&r, &answer);
        expect_solved(&r, &p, &answer);
        assert_int_equal(residency_told(&answer), TOP_K);
        assert_int_equal(residency_metrics(), before);
        int32_t distinct = run_layer_in_place(&r);
        assert_int_equal(residency_metrics() - before, distinct);
        assert_int_equal(moe_metric_value(MOE_METRIC_WORKER_ROWS) - rows, (1 + 5) * TOP_K);
    }
    stats(&r, &answer);
    assert_int_equal(answer.stats.calls, 6);
    assert_int_equal(answer.stats.rows, 3 * (1 + 5) * TOP_K);
    moe_worker_view view;
    moe_worker_get_view(r.worker, &view);
    assert_int_equal(view.rows, answer.stats.rows);
    drop(&r, 2, 3, 1, &answer);
    wait_for(&r, &answer);
    assert_false(experts.ops->ready(experts.ctx));
    rig_close(&r);
}

static void commands_need_the_right_incarnation_and_no_older_fence(void **state) {
    (void)state;
    static reply answer;
    rig r;
    rig_open(&r, 100, 1000);
    Moesaic__V1__LoadRequest request = load_request(0, 0, 1);
    request.incarnation++;
    send_call(&r, "/moesaic.v1.WorkerService/Load", &request, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_UNAVAILABLE);
    load(&r, 0, 0, 1, &answer); /* fence 5 */
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_OK);
    request = load_request(0, 1, 1);
    request.fence = 4;
    send_call(&r, "/moesaic.v1.WorkerService/Load", &request, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_FAILED_PRECONDITION);
    request.fence = 6;
    send_call(&r, "/moesaic.v1.WorkerService/Load", &request, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_OK);
    drop(&r, 0, 0, 2, &answer); /* fence 5 again */
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_FAILED_PRECONDITION);
    request = load_request(LAYERS - 1, EXPERTS - 1, 2); /* the second is behind the last layer */
    request.fence = 6;
    send_call(&r, "/moesaic.v1.WorkerService/Load", &request, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_INVALID_ARGUMENT);
    stats(&r, &answer);
    assert_int_equal(answer.num_loaded, 2);
    rig_close(&r);
}

static void a_failed_load_keeps_what_was_there(void **state) {
    (void)state;
    static problem p;
    static reply answer;
    rig r;
    rig_open(&r, 100, 1000);
    load_all(&r);
    drop(&r, 2, 3, 5, &answer);
    wait_for(&r, &answer);
    r.gate.fail_load = 3;
    load(&r, 2, 0, EXPERTS, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_RESOURCE_EXHAUSTED);
    if (!strstr(answer.message, "expert 5 of MoE layer 2 (18432 bytes")) fail_msg("%s", answer.message);
    stats(&r, &answer);
    assert_int_equal(answer.num_loaded, LAYERS * EXPERTS - 3);
    load(&r, 2, 0, EXPERTS, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_OK);
    make_problem(&p, 2, 8, MOE_COMBINE_EXACT, 1);
    solve(&r, &p);
    send_problem(&r, &p, &answer);
    wait_for(&r, &answer);
    expect_solved(&r, &p, &answer);
    rig_close(&r);
}

static void serves_calls_while_it_loads(void **state) {
    (void)state;
    static problem p;
    static reply loading, forward;
    rig r;
    rig_open(&r, 100, 1000);
    load(&r, 0, 0, EXPERTS, &loading);
    wait_for(&r, &loading);
    make_problem(&p, 0, 2, MOE_COMBINE_EXACT, 1);
    solve(&r, &p);
    load(&r, 1, 0, 2 * EXPERTS, &loading);
    send_problem(&r, &p, &forward);
    for (int i = 0; i < MAX_ROUNDS && !forward.done; i++) step_both(&r);
    expect_solved(&r, &p, &forward);
    assert_false(loading.done);
    wait_for(&r, &loading);
    assert_int_equal(loading.num_loaded, 2 * EXPERTS);
    rig_close(&r);
}

static void drops_an_expert_when_its_calls_have_ended(void **state) {
    (void)state;
    static problem p;
    static reply computing, queued, late, dropping, loading;
    rig r;
    rig_open(&r, 100, 1000);
    load_all(&r);
    occupy(&r, &p, &computing); /* layer 0 */
    send_problem(&r, &p, &queued);
    drop(&r, 0, 0, EXPERTS, &dropping);
    for (int i = 0; i < 10; i++) step_both(&r);
    assert_false(dropping.done);
    send_problem(&r, &p, &late); /* for new calls the experts are gone */
    wait_for(&r, &late);
    assert_int_equal(late.status, MOE_FAILED_PRECONDITION);
    load(&r, 0, (uint32_t)p.expert_of[0], 1, &loading); /* one is wanted again before it was freed */
    wait_for(&r, &loading);
    assert_int_equal(loading.status, MOE_OK);
    assert_int_equal(r.gate.num_loads, LAYERS * EXPERTS);
    let_go(&r);
    wait_for(&r, &computing);
    wait_for(&r, &queued);
    wait_for(&r, &dropping);
    expect_solved(&r, &p, &computing);
    expect_solved(&r, &p, &queued);
    assert_int_equal(dropping.status, MOE_OK);
    assert_int_equal(dropping.dropped, EXPERTS);
    assert_int_equal(r.gate.num_frees, EXPERTS - 1);
    stats(&r, &late);
    assert_int_equal(late.num_loaded, (LAYERS - 1) * EXPERTS + 1);
    rig_close(&r);
}

static void health(void **state) {
    (void)state;
    static reply answer;
    rig r;
    rig_open(&r, 100, 1000);
    Moesaic__V1__HealthCheckRequest request = MOESAIC__V1__HEALTH_CHECK_REQUEST__INIT;
    send_call(&r, "/moesaic.v1.Health/Check", &request, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_OK);
    request.service = (char *)"moesaic.v1.ClusterService";
    send_call(&r, "/moesaic.v1.Health/Check", &request, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_NOT_FOUND);
    rig_close(&r);
}

static void checks_prefetches(void **state) {
    (void)state;
    rig r;
    reply answer;
    uint32_t experts[] = {3, EXPERTS - 1, EXPERTS}, many[MOE_FORWARD_MAX_HINTS + 1] = {0};
    Moesaic__V1__PrefetchRequest request = MOESAIC__V1__PREFETCH_REQUEST__INIT;
    rig_open(&r, 8, 1024);
    request.incarnation = INCARNATION;
    request.layer = LAYERS - 1;
    request.expert = experts;
    request.n_expert = 2;
    send_call(&r, MOE_PREFETCH_METHOD, &request, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_OK); /* all it has is on the device: there is nothing to do */
    request.retired = experts;
    request.n_retired = 2;
    send_call(&r, MOE_PREFETCH_METHOD, &request, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_OK);
    request.n_retired = 3;
    send_call(&r, MOE_PREFETCH_METHOD, &request, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_INVALID_ARGUMENT);
    request.n_retired = 0;
    request.n_expert = 3;
    send_call(&r, MOE_PREFETCH_METHOD, &request, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_INVALID_ARGUMENT);
    request.expert = many;
    request.n_expert = MOE_FORWARD_MAX_HINTS + 1;
    send_call(&r, MOE_PREFETCH_METHOD, &request, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_INVALID_ARGUMENT);
    request.n_expert = 1;
    request.layer = LAYERS;
    send_call(&r, MOE_PREFETCH_METHOD, &request, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_INVALID_ARGUMENT);
    request.layer = 0;
    request.incarnation++;
    send_call(&r, MOE_PREFETCH_METHOD, &request, &answer);
    wait_for(&r, &answer);
    assert_int_equal(answer.status, MOE_UNAVAILABLE);
    rig_close(&r);
}

static void closing_answers_what_is_left(void **state) {
    (void)state;
    static problem p;
    static reply queued[2], loading;
    rig r;
    rig_open(&r, 100, 1000);
    load_all(&r);
    drop(&r, 2, 0, EXPERTS, &loading);
    wait_for(&r, &loading);
    make_problem(&p, 0, 4, MOE_COMBINE_EXACT, 77);
    r.gate.hold = true;
    solve(&r, &p);
    for (int i = 0; i < 2; i++) send_problem(&r, &p, &queued[i]); /* merged into one batch */
    for (int i = 0; i < MAX_ROUNDS && !r.gate.waiting; i++) step_both(&r);
    moe_gated_release(&r.gate); /* ended, but the worker has not looked yet */
    send_problem(&r, &p, &loading);
    assert_int_equal(moe_rpc_step(r.client, 0, NULL), MOE_OK);
    moe_worker_free(&r.worker);
    for (int i = 0; i < 10; i++) assert_int_equal(moe_rpc_step(r.client, 0, NULL), MOE_OK);
    for (int i = 0; i < 2; i++) assert_true(queued[i].done);
    for (int i = 0; i < 2; i++) expect_solved(&r, &p, &queued[i]);
    rig_close(&r);
}

static void survives_failed_allocations(void **state) {
    (void)state;
    static problem p;
    static reply answer;
    rig r;
    rig_open(&r, 100, 1000);
    load_all(&r);
    make_problem(&p, 0, 3, MOE_COMBINE_EXACT, 4);
    solve(&r, &p);
    int refused = 0, solved = 0;
    for (int n = 1; n < 40; n++) {
        send_problem(&r, &p, &answer);
        moe_alloc_fail_after(n);
        for (int i = 0; i < 3; i++) (void)moe_worker_step(r.worker, 0, NULL);
        moe_alloc_fail_after(0);
        for (int i = 0; i < MAX_ROUNDS && !answer.done; i++) {
            r.clock.fake_now_ns += 10 * MOE_NS_PER_MS; /* a lost message ends with its deadline */
            step_both(&r);
        }
        assert_true(answer.done);
        refused += answer.status == MOE_RESOURCE_EXHAUSTED;
        solved += answer.status == MOE_OK;
        if (answer.status == MOE_OK) expect_solved(&r, &p, &answer);
    }
    assert_true(refused >= 2 && solved >= 1);
    rig_close(&r);
}

/* ---- with threads ---- */

static void open_threaded(rig *r) {
    char bound[MOE_ENDPOINT_BYTES];
    rig_open_backend(r, 2);
    r->clock = *moe_clock_real();
    assert_int_equal(moe_inproc_hub_new(moe_clock_real(), 1, &r->hub, NULL), MOE_OK);
    for (int i = 0; i < 2; i++) assert_int_equal(moe_inproc_open(r->hub, &r->transports[i], NULL), MOE_OK);
    assert_int_equal(r->transports[0]->ops->listen(r->transports[0], ENDPOINT, bound, NULL), MOE_OK);
    const moe_worker_config config = {.model = r->model,
                                      .backend = r->ref,
                                      .transport = r->transports[0],
                                      .clock = moe_clock_real(),
                                      .cluster_uuid = CLUSTER,
                                      .id = "w0",
                                      .incarnation = INCARNATION,
                                      .max_queued_calls = 100,
                                      .max_batch_rows = 100};
    assert_int_equal(moe_worker_new(&config, &r->worker, NULL), MOE_OK);
    assert_int_equal(moe_worker_start(r->worker, NULL), MOE_OK);
    make_client(r, CLUSTER, r->model->digest);
}

/* Steps the client until the flag is set or 30 s have passed. */
static void wait_threaded(rig *r, const bool *done) {
    int64_t end_ns = moe_now_ns(moe_clock_real()) + 30 * MOE_NS_PER_S;
    while (!*done && moe_now_ns(moe_clock_real()) < end_ns) assert_int_equal(moe_rpc_step(r->client, end_ns, NULL), MOE_OK);
    assert_true(*done);
}

static moe_peer connect_threaded(rig *r) {
    int64_t end_ns = moe_now_ns(moe_clock_real()) + 30 * MOE_NS_PER_S;
    while (!moe_rpc_peer_of_link(r->client, r->link) && moe_now_ns(moe_clock_real()) < end_ns)
        assert_int_equal(moe_rpc_step(r->client, end_ns, NULL), MOE_OK);
    assert_non_null(moe_rpc_peer_of_link(r->client, r->link));
    return moe_rpc_peer_of_link(r->client, r->link)->peer;
}

static void run_threaded_round(rig *r, moe_peer peer, int num_layers, uint64_t seed) {
    static problem p[8];
    static reply answers[8];
    for (int i = 0; i < 8; i++) {
        make_problem(&p[i], i % num_layers, 6, i % 2 ? MOE_COMBINE_PARTIAL : MOE_COMBINE_EXACT, seed + (uint64_t)i);
        solve(r, &p[i]);
        moe_forward_call call = forward_of(r, &p[i]);
        memset(&answers[i], 0, sizeof answers[i]);
        answers[i].out_rows = out_rows_of(&p[i]);
        assert_int_equal(moe_forward_start(r->client, peer, &call, H, INT64_MAX, on_reply, &answers[i], NULL, NULL), MOE_OK);
    }
    for (int i = 0; i < 8; i++) wait_threaded(r, &answers[i].done);
    for (int i = 0; i < 8; i++) expect_solved(r, &p[i], &answers[i]);
}

static void load_threaded(rig *r, moe_peer peer, uint32_t layer, uint32_t count, reply *answer) {
    Moesaic__V1__LoadRequest request = load_request(layer, 0, count);
    memset(answer, 0, sizeof *answer);
    assert_int_equal(moe_rpc_call_start(r->client, peer, "/moesaic.v1.WorkerService/Load", &request.base, NULL, 0, INT64_MAX,
                                        on_reply, answer, NULL, NULL),
                     MOE_OK);
}

static void works_in_a_thread_of_its_own(void **state) {
    (void)state;
    static reply loaded;
    rig r;
    moe_worker_view view;
    open_threaded(&r);
    moe_peer peer = connect_threaded(&r);
    load_threaded(&r, peer, 0, 2 * EXPERTS, &loaded);
    wait_threaded(&r, &loaded.done);
    assert_int_equal(loaded.status, MOE_OK);
    load_threaded(&r, peer, 2, EXPERTS, &loaded); /* while the backend computes for the other layers */
    for (uint64_t round = 0; round < 10; round++) run_threaded_round(&r, peer, 2, round * 8);
    wait_threaded(&r, &loaded.done);
    assert_int_equal(loaded.status, MOE_OK);
    for (uint64_t round = 10; round < 20; round++) run_threaded_round(&r, peer, LAYERS, round * 8);
    moe_worker_get_view(r.worker, &view);
    assert_int_equal(view.experts, LAYERS * EXPERTS);
    moe_worker_stop(r.worker);
    moe_worker_stop(r.worker);
    rig_close(&r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_bits_merged_split_and_in_any_order),
        cmocka_unit_test(one_expert_is_one_group_of_a_merged_batch),
        cmocka_unit_test(unlike_calls_are_not_merged),
        cmocka_unit_test(names_experts_that_it_does_not_hold),
        cmocka_unit_test(refuses_calls_for_others),
        cmocka_unit_test(refuses_peers_of_another_cluster_or_model),
        cmocka_unit_test(drops_expired_calls_before_computing),
        cmocka_unit_test(drops_cancelled_calls),
        cmocka_unit_test(joins_the_batch_that_waits),
        cmocka_unit_test(refuses_more_than_its_queue_takes),
        cmocka_unit_test(names_layer_and_expert_of_results_that_are_not_finite),
        cmocka_unit_test(checks_itself_after_results_that_are_not_finite),
        cmocka_unit_test(a_defective_worker_refuses_work),
        cmocka_unit_test(loads_drops_and_reports),
        cmocka_unit_test(counts_calls_rows_and_progress),
        cmocka_unit_test(tells_each_once),
        cmocka_unit_test(commands_need_the_right_incarnation_and_no_older_fence),
        cmocka_unit_test(a_failed_load_keeps_what_was_there),
        cmocka_unit_test(serves_calls_while_it_loads),
        cmocka_unit_test(drops_an_expert_when_its_calls_have_ended),
        cmocka_unit_test(health),
        cmocka_unit_test(checks_prefetches),
        cmocka_unit_test(closing_answers_what_is_left),
        cmocka_unit_test(survives_failed_allocations),
        cmocka_unit_test(works_in_a_thread_of_its_own),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
