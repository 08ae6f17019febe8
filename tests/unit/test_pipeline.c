/* How the pipeline degree is tuned: clusters as functions of time by size and degree, with noise. */
#include "router/engine/pipeline.h"

#include "common/random.h"
#include "tests/support/test.h"

#define MIB (INT64_C(1) << 20)

/* Stages that chunks go through one behind the other, and what each chunk costs beside. */
typedef struct cluster {
    double ns_per_byte, stages, chunk_ns;
    double noise; /* a layer takes up to this part more */
} cluster;

static double ideal_ns(const cluster *c, int64_t bytes, int32_t degree) {
    double stage_ns = c->ns_per_byte * (double)bytes / c->stages;
    return stage_ns * (1 + (c->stages - 1) / degree) + c->chunk_ns * degree;
}

static double best_ns(const cluster *c, int64_t bytes) {
    double best = ideal_ns(c, bytes, 1);
    for (int32_t degree = 1; degree <= MOE_PIPELINE_MAX_DEGREE && bytes / degree >= MOE_PIPELINE_MIN_CHUNK_BYTES; degree *= 2)
        best = ideal_ns(c, bytes, degree) < best ? ideal_ns(c, bytes, degree) : best;
    return best;
}

/* Time of so many layers beside that of the best degree. */
static double run(moe_pipeline *p, const cluster *c, int64_t bytes, int layers, moe_random *random) {
    double took = 0;
    for (int i = 0; i < layers; i++) {
        int32_t degree = moe_pipeline_degree(p, bytes);
        assert_true(degree >= 1 && degree <= MOE_PIPELINE_MAX_DEGREE && (degree & (degree - 1)) == 0);
        assert_true(degree == 1 || bytes / degree >= MOE_PIPELINE_MIN_CHUNK_BYTES);
        double ns = ideal_ns(c, bytes, degree);
        took += ns;
        moe_pipeline_observe(p, bytes, degree, (int64_t)(ns * (1 + c->noise * moe_random_unit(random))));
    }
    return took / (best_ns(c, bytes) * layers);
}

static const cluster gpu = {.ns_per_byte = 0.8, .stages = 4, .chunk_ns = 4e5, .noise = 0.1};
static const cluster free_chunks = {.ns_per_byte = 0.8, .stages = 4, .chunk_ns = 2e3, .noise = 0.1};
static const cluster dear_chunks = {.ns_per_byte = 0.8, .stages = 4, .chunk_ns = 6e7, .noise = 0.1};

static void test_finds_what_pays(void **state) {
    (void)state;
    const cluster *clusters[] = {&gpu, &free_chunks, &dear_chunks};
    for (size_t i = 0; i < 3; i++) {
        for (int64_t bytes = MIB / 4; bytes <= 1024 * MIB; bytes = bytes * 3 / 2) {
            moe_random random = {.state = i + 1};
            moe_pipeline p;
            moe_pipeline_init(&p);
            run(&p, clusters[i], bytes, 200, &random); /* a few forward steps */
            assert_true(run(&p, clusters[i], bytes, 2000, &random) < 1.05);
        }
    }
}

/* Where more than one chunk never pays, trying costs next to nothing from the first layer on. */
static void test_trying_is_cheap(void **state) {
    (void)state;
    const cluster single = {.ns_per_byte = 0.8, .stages = 1, .chunk_ns = 5e6, .noise = 0.1};
    moe_random random = {.state = 5};
    moe_pipeline p;
    moe_pipeline_init(&p);
    assert_true(run(&p, &single, 16 * MIB, 2000, &random) < 1.02);
}

static void test_follows_a_change(void **state) {
    (void)state;
    moe_random random = {.state = 7};
    moe_pipeline p;
    moe_pipeline_init(&p);
    run(&p, &free_chunks, 64 * MIB, 500, &random);
    int32_t many = moe_pipeline_degree(&p, 64 * MIB);
    run(&p, &dear_chunks, 64 * MIB, 1500, &random);
    assert_true(run(&p, &dear_chunks, 64 * MIB, 500, &random) < 1.1);
    assert_true(many >= 8);
    run(&p, &free_chunks, 64 * MIB, 1500, &random);
    assert_true(run(&p, &free_chunks, 64 * MIB, 500, &random) < 1.1);
}

static void test_small_layers_are_whole(void **state) {
    (void)state;
    moe_random random = {.state = 9};
    moe_pipeline p;
    moe_pipeline_init(&p);
    for (int64_t bytes = 1; bytes < 2 * MOE_PIPELINE_MIN_CHUNK_BYTES; bytes *= 3) {
        run(&p, &free_chunks, bytes, 300, &random);
        assert_int_equal(moe_pipeline_degree(&p, bytes), 1);
    }
}

/* Sizes have nothing to do with each other, and one held-up layer moves nothing. */
static void test_sizes_apart(void **state) {
    (void)state;
    moe_random random = {.state = 11};
    moe_pipeline p;
    moe_pipeline_init(&p);
    for (int i = 0; i < 300; i++) {
        run(&p, &free_chunks, 64 * MIB, 1, &random);
        run(&p, &dear_chunks, 4 * MIB, 1, &random);
    }
    int32_t large = moe_pipeline_degree(&p, 64 * MIB), small = moe_pipeline_degree(&p, 4 * MIB);
    assert_true(large >= 8 && small <= 2);
    moe_pipeline_observe(&p, 64 * MIB, large, INT64_C(60) * 1000 * 1000 * 1000);
    assert_true(run(&p, &free_chunks, 64 * MIB, 100, &random) < 1.1);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_finds_what_pays), cmocka_unit_test(test_trying_is_cheap),
                                       cmocka_unit_test(test_follows_a_change), cmocka_unit_test(test_small_layers_are_whole),
                                       cmocka_unit_test(test_sizes_apart)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
