/* The cost model of cold experts, against times that are worked out by hand, against all divisions of small batches, and against layers of
 * which all experts are copied, or all are the host's. */
#include "expert-worker/cold.h"

#include <math.h>
#include <string.h>

#include "common/random.h"
#include "tests/support/test.h"

#define MB (INT64_C(1) << 20)
enum { TRIALS = 3000, MOST = 8 };

/* A copy of 1 MB takes 100 us, an expert on the device 10 us, on the host 60 us and 40 us a row. */
static const moe_cold_costs COSTS = {.copy_byte_ns = 100e3 / (double)MB, .device = {10e3, 0}, .host = {20e3, 40e3}};

/* When the batch ends if `host_set` says who computes the groups, in their order. */
static double end_of(const moe_cold_costs *c, moe_cold_queues q, const moe_cold_group *g, int32_t count, unsigned host_set) {
    for (int32_t i = 0; i < count; i++) {
        double *queue = q.one_processor ? &q.device_ns : &q.host_ns;
        if (host_set >> i & 1) {
            *queue += c->host.expert_ns + c->host.row_ns * g[i].rows;
        } else {
            q.link_ns += c->copy_byte_ns * (double)g[i].left_bytes;
            if (q.device_ns < q.link_ns) q.device_ns = q.link_ns;
            q.device_ns += c->device.expert_ns + c->device.row_ns * g[i].rows;
        }
    }
    return q.device_ns > q.host_ns ? q.device_ns : q.host_ns;
}

static unsigned set_of(const moe_cold_group *g, int32_t count) {
    unsigned set = 0;
    for (int32_t i = 0; i < count; i++) set |= (unsigned)g[i].host << i;
    return set;
}

static void one_expert(void **state) {
    (void)state;
    moe_cold_group few = {.left_bytes = MB, .rows = 1}, many = {.left_bytes = MB, .rows = 3}, near = {.left_bytes = MB / 4, .rows = 1};
    moe_cold_split(&COSTS, (moe_cold_queues){.link_ns = 0}, &few, 1);
    assert_true(few.host); /* 60 us against 110 */
    moe_cold_split(&COSTS, (moe_cold_queues){.link_ns = 0}, &many, 1);
    assert_false(many.host); /* 140 us against 110 */
    moe_cold_split(&COSTS, (moe_cold_queues){.link_ns = 0}, &near, 1);
    assert_false(near.host); /* a hint has copied most of it: 35 us */
    moe_cold_split(&COSTS, (moe_cold_queues){.link_ns = 31e3}, &many, 1);
    assert_false(many.host); /* behind other copies: 141 us, which is hardly more */
    moe_cold_split(&COSTS, (moe_cold_queues){.link_ns = 40e3}, &many, 1);
    assert_true(many.host); /* 150 us */
    moe_cold_split(&COSTS, (moe_cold_queues){.host_ns = 51e3}, &few, 1);
    assert_false(few.host); /* the host is busy: 111 us */
    moe_cold_split(&COSTS, (moe_cold_queues){.device_ns = 101e3}, &many, 1);
    assert_false(many.host); /* a busy device hides a part of the copy: 111 us */
    moe_cold_split(&COSTS, (moe_cold_queues){.device_ns = 101e3, .one_processor = true}, &few, 1);
    assert_true(few.host); /* the host's turn comes after the device's, but so does a copy: 161 us against 211 */
}

static void both_sides_at_once(void **state) {
    (void)state;
    moe_cold_group g[6];
    for (int32_t i = 0; i < 6; i++) g[i] = (moe_cold_group){.left_bytes = MB, .rows = 1, .index = i};
    g[3].rows = 20;
    g[5].left_bytes = MB / 2;
    moe_cold_split(&COSTS, (moe_cold_queues){.link_ns = 0}, g, 6);
    assert_int_equal(g[0].index, 3); /* by rows, then what is half there, then as they came */
    assert_int_equal(g[1].index, 5);
    assert_int_equal(g[2].index, 0);
    assert_int_equal(g[5].index, 4);
    assert_false(g[0].host || g[1].host);
    assert_true(g[5].host);
    int32_t on_host = 0;
    for (int32_t i = 0; i < 6; i++) on_host += g[i].host;
    assert_int_equal(on_host, 4); /* the device until 160 us, the host until 240 */
    /* costs that nobody knows yet: the device, so that they are measured */
    moe_cold_split(&(moe_cold_costs){.copy_byte_ns = 0}, (moe_cold_queues){.link_ns = 0}, g, 6);
    assert_int_equal(set_of(g, 6), 0);
}

/* What a job of the host costs beside its experts: it must be worth while. */
static void fixed_costs(void **state) {
    (void)state;
    moe_cold_group g[3];
    moe_cold_costs c = COSTS;
    c.host_job_ns = 60e3;
    c.host_rows_ns = 20e3;
    for (int32_t count = 1; count <= 3; count++) {
        for (int32_t i = 0; i < count; i++) g[i] = (moe_cold_group){.left_bytes = MB, .rows = 1, .index = i};
        moe_cold_split(&c, (moe_cold_queues){.link_ns = 0}, g, count);
        /* 140 us against 110; against 210 beside a copy; two of the host 200 us, beside a copy, against 310 */
        assert_int_equal(set_of(g, count), count == 1 ? 0 : count == 2 ? 2 : 6);
    }
    c = COSTS;
    c.host_job_ns = 46e3;
    moe_cold_split(&c, (moe_cold_queues){.link_ns = 0}, g, 1);
    assert_false(g[0].host); /* 106 us against 110 are not worth it */
    moe_cold_split(&c, (moe_cold_queues){.link_ns = 0, .host_ns = 1e6}, g, 3);
    assert_int_equal(set_of(g, 3), 0);
}

/* Of experts that cost the same those are copied that will be wanted again. */
static void by_rank(void **state) {
    (void)state;
    static const double ranks[] = {-INFINITY, 3, -INFINITY, 7, 1};
    static const int32_t order[] = {3, 1, 4, 0, 2};
    moe_cold_group g[5];
    for (int32_t i = 0; i < 5; i++) g[i] = (moe_cold_group){.left_bytes = MB, .rows = 1, .index = i, .rank = ranks[i]};
    moe_cold_split(&COSTS, (moe_cold_queues){.link_ns = 0}, g, 5);
    for (int32_t i = 0; i < 5; i++) assert_int_equal(g[i].index, order[i]);
    assert_false(g[0].host);
    assert_true(g[4].host);
    g[1] = (moe_cold_group){.left_bytes = MB / 2, .rows = 1, .index = 5, .rank = -INFINITY}; /* half there: before them all */
    moe_cold_split(&COSTS, (moe_cold_queues){.link_ns = 0}, g, 5);
    assert_int_equal(g[0].index, 5);
}

/* One after another is not optimal: within a half of the best division, and within 3 % of it in the mean. */
static void near_the_best(void **state) {
    (void)state;
    moe_random random = {17};
    double sum = 0;
    for (int trial = 0; trial < TRIALS; trial++) {
        moe_cold_group g[MOST];
        int32_t count = 1 + (int32_t)moe_random_below(&random, MOST);
        moe_cold_costs c = {.copy_byte_ns = 10e3 * (1 + 20 * moe_random_unit(&random)) / (double)MB,
                            .device = {1e3 + 2e4 * moe_random_unit(&random), 1e3 * moe_random_unit(&random)},
                            .host = {1e3 + 1e5 * moe_random_unit(&random), 5e4 * moe_random_unit(&random)}};
        moe_cold_queues q = {.link_ns = 5e4 * moe_random_unit(&random), .device_ns = 5e4 * moe_random_unit(&random), .host_ns = 0};
        for (int32_t i = 0; i < count; i++)
            g[i] = (moe_cold_group){.left_bytes = trial % 2 ? MB : (int64_t)moe_random_below(&random, (uint64_t)MB),
                                    .rows = 1 + (int32_t)moe_random_below(&random, 9)};
        moe_cold_split(&c, q, g, count);
        double best = 1e18, got = end_of(&c, q, g, count, set_of(g, count));
        for (unsigned set = 0; set < 1u << count; set++) {
            double end = end_of(&c, q, g, count, set);
            best = end < best ? end : best;
        }
        assert_true(got >= best * 0.999999);
        if (got > best * 1.5) fail_msg("trial %d: %.0f, the best is %.0f", trial, got, best);
        sum += got / best;
    }
    assert_true(sum / TRIALS < 1.03);
}

/* ---- a layer after another, on a GPU's figures ---- */

#define EXPERT_BYTES INT64_C(9437184)
enum { MOST_COLD = 32, LAYERS = 4000, LEARNT = 500 };

/* Copies at 53 GB/s: 178 us an expert. */
static const moe_cold_costs GPU = {.copy_byte_ns = 1 / 53.0, .device = {10e3, 0}, .host = {80e3, 20e3}, .host_job_ns = 60e3, .host_rows_ns = 20e3};

typedef struct layer {
    moe_cold_group groups[MOST_COLD];
    int32_t count;
    double link_ns; /* of copies under way */
} layer;

static layer random_layer(moe_random *random, bool under_way, int32_t most_rows) {
    layer l = {.count = 1 + (int32_t)moe_random_below(random, MOST_COLD)};
    if (under_way) l.link_ns = 265e3 * moe_random_unit(random);
    for (int32_t i = 0; i < l.count; i++) {
        moe_cold_group *g = &l.groups[i];
        *g = (moe_cold_group){.left_bytes = EXPERT_BYTES, .rows = 1 + (int32_t)moe_random_below(random, (uint64_t)most_rows), .index = i};
        if (under_way && i < 2) g->left_bytes = (int64_t)moe_random_below(random, 3) * EXPERT_BYTES / 2;
    }
    return l;
}

/* When the layer has been computed, by what things cost in truth. */
static double run_layer(const moe_cold_costs *truth, const layer *l) {
    double link_ns = l->link_ns, device_ns = 0, host_ns = 0;
    for (int32_t i = 0; i < l->count; i++) {
        const moe_cold_group *g = &l->groups[i];
        if (g->host) {
            host_ns += moe_cold_compute_ns(&truth->host, 1, g->rows);
            continue;
        }
        link_ns += truth->copy_byte_ns * (double)g->left_bytes;
        device_ns = (link_ns > device_ns ? link_ns : device_ns) + moe_cold_compute_ns(&truth->device, 1, g->rows);
    }
    if (host_ns > 0) host_ns += truth->host_job_ns + truth->host_rows_ns;
    return device_ns > host_ns ? device_ns : host_ns;
}

static double run_all_alike(const moe_cold_costs *truth, layer l, bool host) {
    for (int32_t i = 0; i < l.count; i++) l.groups[i].host = host;
    return run_layer(truth, &l);
}

static double better(const moe_cold_costs *truth, const layer *l) {
    double fetch_ns = run_all_alike(truth, *l, false), host_ns = run_all_alike(truth, *l, true);
    return fetch_ns < host_ns ? fetch_ns : host_ns;
}

/* Every layer within 5 % of the better of the two ways alone, whatever the fixed costs. */
static void as_good_as_either(void **state) {
    (void)state;
    moe_random random = {5};
    int32_t none = 0, all = 0, gained = 0;
    for (int trial = 0; trial < LAYERS; trial++) {
        moe_cold_costs c = GPU;
        c.host_job_ns = 400e3 * moe_random_unit(&random);
        c.host.expert_ns = 400e3 * moe_random_unit(&random);
        layer l = random_layer(&random, trial & 1, trial & 2 ? 8 : 1);
        double best = better(&c, &l);
        int32_t on_host = 0;
        moe_cold_split(&c, (moe_cold_queues){.link_ns = l.link_ns}, l.groups, l.count);
        for (int32_t i = 0; i < l.count; i++) on_host += l.groups[i].host;
        double got = run_layer(&c, &l);
        if (got > 1.05 * best) fail_msg("trial %d: %.0f us, the better is %.0f us", trial, got / 1e3, best / 1e3);
        none += on_host == 0;
        all += on_host == l.count;
        gained += got < 0.8 * best;
    }
    assert_true(none > 0 && all > 0 && gained > 0);
}

/* Layers that are divided by what is believed, which follows what is measured. Returns the sum of their times as a multiple of what it
 * is with the truth known, from when it should be learnt. */
static double learn(moe_cold_costs *believed, const moe_cold_costs *truth, bool held_up) {
    moe_random random = {11};
    double sum = 0, sum_known = 0;
    for (int n = 0; n < LAYERS; n++) {
        layer l = random_layer(&random, n & 1, 1);
        l.count = 1 + l.count % 4; /* as of one request */
        layer known = l;
        int32_t experts = 0;
        moe_cold_split(truth, (moe_cold_queues){.link_ns = l.link_ns}, known.groups, l.count);
        moe_cold_split(believed, (moe_cold_queues){.link_ns = l.link_ns}, l.groups, l.count);
        for (int32_t i = 0; i < l.count; i++) experts += l.groups[i].host;
        if (n >= LEARNT) sum += run_layer(truth, &l);
        if (n >= LEARNT) sum_known += run_layer(truth, &known);
        if (experts == 0) {
            moe_cold_host_unused(believed);
            continue;
        }
        double pause = held_up && moe_random_below(&random, 100) == 0 ? 50e6 : 0, noise = 0.8 + 0.4 * moe_random_unit(&random);
        moe_cold_observe_compute(&believed->host, experts, experts,
                                 (int64_t)(noise * moe_cold_compute_ns(&truth->host, experts, experts) + pause));
        moe_cold_observe_fixed(&believed->host_job_ns, (int64_t)(noise * truth->host_job_ns + pause));
        moe_cold_observe_fixed(&believed->host_rows_ns, (int64_t)(noise * truth->host_rows_ns));
    }
    return sum / sum_known;
}

/* From nothing, from far too much, and while a job in a hundred takes 50 ms; and for a host that is slower than copies are. */
static void learnt(void **state) {
    (void)state;
    moe_cold_costs slow = GPU;
    slow.host.expert_ns = 1e6;
    for (int held_up = 0; held_up < 2; held_up++) {
        moe_cold_costs from_nothing = GPU, from_much = GPU, of_slow = GPU;
        from_nothing.host_job_ns = from_nothing.host_rows_ns = 0;
        from_much.host_job_ns = 600e3;
        double nothing = learn(&from_nothing, &GPU, held_up), much = learn(&from_much, &GPU, held_up);
        double of = learn(&of_slow, &slow, held_up);
        if (nothing > 1.02 || much > 1.02 || of > 1.02) fail_msg("times what is known to be best: %.3f, %.3f, %.3f", nothing, much, of);
        if (held_up) continue;
        assert_true(from_nothing.host_job_ns > 45e3 && from_nothing.host_job_ns < 75e3);
        assert_true(from_much.host_job_ns > 45e3 && from_much.host_job_ns < 75e3);
    }
}

/* A pause of 50 ms is a sixteenth of three times and 50 us more; and it wears off. */
static void held_up_once(void **state) {
    (void)state;
    double cost_ns = 80e3;
    moe_cold_observe_fixed(&cost_ns, INT64_C(50000000));
    assert_true(cost_ns > 93e3 && cost_ns < 94e3);
    for (int i = 0; i < 40; i++) moe_cold_observe_fixed(&cost_ns, 80000);
    assert_true(cost_ns > 80e3 && cost_ns < 82e3);
    moe_cold_observe_fixed(&cost_ns, -5); /* measured with two clocks */
    assert_true(cost_ns > 75e3 && cost_ns < 77e3);
    moe_cold_costs c = GPU;
    for (int i = 0; i < 4096; i++) moe_cold_host_unused(&c);
    assert_true(c.host_job_ns > 22e3 && c.host_job_ns < 22.1e3); /* 60 / e */
    assert_true(c.host.expert_ns > 29.4e3 && c.host.expert_ns < 29.5e3);
    assert_true(c.copy_byte_ns == GPU.copy_byte_ns && c.device.expert_ns == GPU.device.expert_ns);
}

static void costs_follow_what_is_measured(void **state) {
    (void)state;
    moe_cold_compute cost = {.expert_ns = 1000, .row_ns = 100};
    for (int i = 0; i < 200; i++) moe_cold_observe_compute(&cost, 2, 10, 9000); /* three times as long */
    assert_true(cost.expert_ns > 2990 && cost.expert_ns < 3010 && cost.row_ns > 299 && cost.row_ns < 301);
    double before = cost.expert_ns;
    moe_cold_observe_compute(&cost, 2, 10, INT64_C(1000000000)); /* held up */
    assert_true(cost.expert_ns <= 1.5 * before);
    before = cost.expert_ns;
    moe_cold_observe_compute(&cost, 2, 10, 0); /* not measured */
    assert_true(cost.expert_ns == before);
    moe_cold_compute none = {.expert_ns = 0};
    moe_cold_observe_compute(&none, 4, 4, 8000);
    assert_true(none.expert_ns == 2000);
    double byte_ns = 0;
    moe_cold_observe_copy(&byte_ns, 1000, 500);
    assert_true(byte_ns == 0.5);
    for (int i = 0; i < 200; i++) moe_cold_observe_copy(&byte_ns, 1000, 250);
    assert_true(byte_ns > 0.249 && byte_ns < 0.251);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_expert),
        cmocka_unit_test(both_sides_at_once),
        cmocka_unit_test(fixed_costs),
        cmocka_unit_test(by_rank),
        cmocka_unit_test(near_the_best),
        cmocka_unit_test(as_good_as_either),
        cmocka_unit_test(learnt),
        cmocka_unit_test(held_up_once),
        cmocka_unit_test(costs_follow_what_is_measured),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
