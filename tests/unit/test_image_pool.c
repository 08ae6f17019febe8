/* Slabs of the images' host memory: their sizes, their bound, and what happens where the host has no room for one. */
#include "expert-worker/image_pool.h"

#include <string.h>

#include "cpu/cpu.h"
#include "tests/support/test.h"

#define MIB ((int64_t)1 << 20)

static moe_backend *cpu;
static moe_backend_ops ops;
static moe_backend scarce; /* its host_alloc gives `largest` bytes at most, and is counted */
static int64_t largest;
static int allocations;

static void *scarce_alloc(moe_backend *b, size_t bytes) {
    (void)b;
    if ((int64_t)bytes > largest) return NULL;
    allocations++;
    return cpu->ops->host_alloc(cpu, bytes);
}

static void scarce_free(moe_backend *b, void *memory) {
    (void)b;
    if (memory) allocations--;
    cpu->ops->host_free(cpu, memory);
}

static void open_pool(moe_image_pool *pool, int64_t image_bytes, int32_t max_images, int64_t most) {
    largest = most;
    allocations = 0;
    moe_image_pool_init(pool, &scarce, image_bytes, max_images);
}

/* Takes and writes `count` images; none may share memory with another. */
static void take(moe_image_pool *pool, uint8_t **images, int count) {
    for (int i = 0; i < count; i++) {
        images[i] = moe_image_pool_take(pool);
        assert_non_null(images[i]);
        memset(images[i], i + 1, (size_t)pool->image_bytes);
    }
    for (int i = 0; i < count; i++)
        assert_true(images[i][0] == i + 1 && images[i][pool->image_bytes - 1] == i + 1);
}

static void test_small_images_share_a_slab(void **state) {
    moe_image_pool pool;
    uint8_t *images[7];
    (void)state;
    open_pool(&pool, 192, 7, MIB);
    take(&pool, images, 7);
    assert_int_equal(allocations, 1);
    assert_int_equal(moe_image_pool_bytes(&pool), 7 * 192); /* never more than there may be */
    moe_image_pool_close(&pool);
    moe_image_pool_close(&pool);
    assert_int_equal(allocations, 0);
}

static void test_slabs_grow(void **state) {
    static const int64_t after[] = {1, 2, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16, 16, 16, 16, 16, 26}; /* images with memory: ×2, 256 MiB more at most */
    moe_image_pool pool;
    (void)state;
    open_pool(&pool, 25 * MIB, 40, INT64_MAX);
    for (int i = 0; i < 17; i++) {
        assert_non_null(moe_image_pool_take(&pool));
        assert_int_equal(moe_image_pool_bytes(&pool) / (25 * MIB), after[i]);
    }
    moe_image_pool_close(&pool);
}

static void test_smaller_slabs_where_memory_is_short(void **state) {
    moe_image_pool pool;
    uint8_t *images[4];
    (void)state;
    open_pool(&pool, MIB, 12, 3 * MIB);
    take(&pool, images, 4);
    assert_int_equal(allocations, 2);
    largest = 0;
    while (pool.taken < pool.room) assert_non_null(moe_image_pool_take(&pool));
    assert_null(moe_image_pool_take(&pool));
    largest = MIB;
    assert_non_null(moe_image_pool_take(&pool));
    moe_image_pool_close(&pool);
    assert_int_equal(allocations, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_small_images_share_a_slab), cmocka_unit_test(test_slabs_grow),
                                       cmocka_unit_test(test_smaller_slabs_where_memory_is_short)};
    assert_int_equal(moe_cpu_open(&(moe_cpu_config){.threads = 0}, &cpu, NULL), MOE_OK);
    ops = *cpu->ops;
    ops.host_alloc = scarce_alloc;
    ops.host_free = scarce_free;
    scarce = (moe_backend){.ops = &ops, .dtype = cpu->dtype};
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    cpu->ops->close(cpu);
    return failed;
}
