/* The tiers of experts on a backend whose copies the test ends one by one: what is copied first, what is given up, what makes room,
 * what is counted; and batches in passes, bit for bit those of a backend that has all experts. */
#include "expert-worker/residency.h"

#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/elements.h"
#include "common/random.h"
#include "cpu/cpu.h"
#include "expert-worker/batcher.h"
#include "tests/support/slow_backend.h"
#include "tests/support/stub_transport.h"
#include "tests/support/test.h"

/* The fixture: hidden 64, 3 MoE layers of 16 experts, 4 a token. */
enum { H = 64, LAYERS = 3, EXPERTS = 16, TOP_K = 4 };
#define STEP UINT64_C(77)

typedef struct rig {
    moe_model *model;
    moe_backend *real;
    moe_slow_backend slow;
    stub_transport transport;
    moe_shard shard;
    moe_residency *residency;
    int64_t slot_bytes, image_bytes;
} rig;

static moe_status open_tiers(rig *r, moe_tier_options tiers, moe_error *err) {
    memset(r, 0, sizeof *r);
    assert_int_equal(moe_model_open(SOURCE_DIR "/tests/data/checkpoints/qwen3_moe", &r->model, NULL), MOE_OK);
    assert_int_equal(moe_cpu_ref_open(&(moe_cpu_config){.threads = 0}, &r->real, NULL), MOE_OK);
    moe_slow_init(&r->slow, r->real);
    stub_init(&r->transport);
    moe_expert_size size = r->real->ops->expert_size(r->real, r->model->experts, 0, MOE_FFN_BLOCKS);
    r->slot_bytes = size.slot_bytes;
    r->image_bytes = size.image_bytes;
    assert_true(r->image_bytes < MOE_RESIDENCY_MIN_PIECE_BYTES); /* one piece an expert */
    assert_int_equal(moe_shard_init(&r->shard, r->model, &r->slow.base, NULL), MOE_OK);
    if (!tiers.eviction) tiers.eviction = "hint-aware";
    const moe_residency_config config = {.model = r->model,
                                         .backend = &r->slow.base,
                                         .host = &r->slow.base,
                                         .transport = &r->transport.base,
                                         .tiers = tiers};
    moe_status status = moe_residency_new(&config, &r->residency, err);
    r->shard.residency = r->residency;
    return status;
}

static void close_tiers(rig *r) {
    r->slow.at_once = true;
    while (r->slow.num_fills) moe_slow_end(&r->slow);
    moe_shard_free(&r->shard);
    moe_residency_free(&r->residency);
    moe_residency_free(&r->residency);
    r->real->ops->close(r->real);
    stub_close(&r->transport);
    moe_model_close(&r->model);
}

/* As control does it with a loaded expert. */
static void hold(rig *r, int32_t layer, int32_t expert) {
    moe_image *image = moe_residency_take_image(r->residency);
    if (image) {
        if (!image->memory) image->memory = moe_image_pool_take(image->pool);
        r->real->ops->expert_pack(r->real, moe_model_expert(r->model, layer, expert), 0, MOE_FFN_BLOCKS, image->memory);
    }
    moe_shard_adopt(&r->shard, layer, expert, &(moe_held_expert){.digest = 1, .bytes = r->image_bytes});
    moe_residency_hold(r->residency, layer, expert, image);
}

/* One layer after the other, as control does. */
static void hold_layers(rig *r, int32_t from, int32_t to) {
    for (int32_t layer = from; layer < to; layer++)
        for (int32_t e = 0; e < EXPERTS; e++) {
            hold(r, layer, e);
            moe_residency_turn(r->residency);
        }
}

/* `slots` slots that are all taken, by experts 0 … slots - 1 of layer 0. */
static void open_full_cold(rig *r, int32_t slots, int32_t images, moe_cold_experts cold) {
    moe_error err;
    moe_memory_limit host = {.part = (double)images / (LAYERS * EXPERTS)};
    if (images == 0) host.part = 0;
    moe_tier_options tiers = {.device = {.part = (double)slots / (LAYERS * EXPERTS)}, .host = host, .cold = cold};
    if (open_tiers(r, tiers, &err) != MOE_OK) fail_msg("%s", err.message);
    assert_int_equal(moe_residency_slots(r->residency), slots);
    r->slow.at_once = true;
    hold_layers(r, 0, 1);
    moe_residency_held_all(r->residency);
    hold_layers(r, 1, LAYERS);
    moe_residency_held_all(r->residency);
    moe_residency_turn(r->residency);
    assert_int_equal(moe_residency_resident(r->residency), slots);
    r->slow.at_once = false;
}

static void open_full(rig *r, int32_t slots, int32_t images) { open_full_cold(r, slots, images, MOE_COLD_FETCH); }

/* Which expert the nth outstanding copy is of. */
static int32_t copied(const rig *r, int n) {
    assert_true(n < r->slow.num_fills);
    uint8_t *want = malloc((size_t)r->image_bytes);
    int32_t found = -1;
    memset(want, 0, (size_t)r->image_bytes);
    for (int32_t i = 0; i < LAYERS * EXPERTS && found < 0; i++) {
        r->real->ops->expert_pack(r->real, &r->model->experts[i], 0, MOE_FFN_BLOCKS, want);
        if (memcmp(want, r->slow.fills[n]->image, (size_t)r->image_bytes) == 0) found = i;
    }
    free(want);
    return found;
}

static void end_one(rig *r) {
    moe_slow_end(&r->slow);
    moe_residency_turn(r->residency);
}

static bool resident(rig *r, int32_t layer, int32_t expert) {
    moe_residency_need(r->residency, layer, expert);
    bool yes = moe_residency_acquire(r->residency, layer, expert) != NULL;
    if (yes) moe_residency_release(r->residency, layer, expert);
    moe_residency_unneed(r->residency, layer, expert);
    return yes;
}

static void refusals(void **state) {
    (void)state;
    rig r;
    moe_error err;
    const moe_tier_options small[] = {{.device = {.bytes = 5 * 3 * H * 32 * 2 - 1}},
                                      {.device = {.part = 0.05}},
                                      {.device = {.part = 0.5}, .host = {.bytes = 1}},
                                      {.device = {.part = 0.5}, .eviction = "belady"}};
    const char *const says[] = {"--device-memory", "at least", "--host-memory", "belady"};
    for (size_t i = 0; i < sizeof small / sizeof *small; i++) {
        assert_int_equal(open_tiers(&r, small[i], &err), MOE_INVALID_ARGUMENT);
        assert_null(r.residency);
        if (!strstr(err.message, says[i])) fail_msg("%s", err.message);
        close_tiers(&r);
    }
    /* what the message calls the least works, and a byte less does not */
    assert_int_equal(open_tiers(&r, (moe_tier_options){.device = {.bytes = 1}}, &err), MOE_INVALID_ARGUMENT);
    const char *at = strstr(err.message, "at least ");
    assert_non_null(at);
    int64_t least = strtoll(at + strlen("at least "), NULL, 10);
    assert_int_equal(least, (TOP_K + 1) * r.slot_bytes);
    close_tiers(&r);
    assert_int_equal(open_tiers(&r, (moe_tier_options){.device = {.bytes = least - 1}}, &err), MOE_INVALID_ARGUMENT);
    close_tiers(&r);
    assert_int_equal(open_tiers(&r, (moe_tier_options){.device = {.bytes = least}}, &err), MOE_OK);
    assert_int_equal(moe_residency_slots(r.residency), TOP_K + 1);
    close_tiers(&r);
    /* percentages are of the share */
    assert_int_equal(open_tiers(&r, (moe_tier_options){.device = {.part = 0.25}, .share = 1.0 / 2}, &err), MOE_OK);
    assert_int_equal(moe_residency_slots(r.residency), LAYERS * EXPERTS / 2 / 4);
    close_tiers(&r);
}

static int32_t resident_in(const rig *r, int32_t layer) {
    int32_t count = 0;
    for (int32_t e = 0; e < EXPERTS; e++) count += moe_residency_has(r->residency, layer, e);
    return count;
}

/* Experts come layer by layer, and each layer gets as many slots; what a layer with few experts leaves is shared in the end. */
static void even_filling(void **state) {
    (void)state;
    for (int32_t few = 0; few <= 1; few++) {
        rig r;
        moe_error err;
        assert_int_equal(open_tiers(&r, (moe_tier_options){.device = {.part = 0.5}}, &err), MOE_OK);
        r.slow.at_once = true;
        int32_t slots = LAYERS * EXPERTS / 2, even = slots / LAYERS;
        hold_layers(&r, 0, LAYERS - 1);
        for (int32_t layer = 0; layer < LAYERS - 1; layer++) assert_int_equal(resident_in(&r, layer), even);
        if (few)
            hold(&r, LAYERS - 1, 5);
        else
            hold_layers(&r, LAYERS - 1, LAYERS);
        moe_residency_turn(r.residency);
        assert_int_equal(resident_in(&r, LAYERS - 1), few ? 1 : even);
        moe_residency_held_all(r.residency);
        moe_residency_turn(r.residency);
        assert_int_equal(moe_residency_resident(r.residency), slots);
        for (int32_t layer = 0; layer < LAYERS - 1; layer++)
            assert_in_range(resident_in(&r, layer), few ? (slots - 1) / 2 : even, few ? slots / 2 : even);
        if (!few) {
            assert_int_equal(moe_residency_resize(r.residency, (moe_memory_limit){.part = 0.25}, MOE_COLD_FETCH, NULL, &err), MOE_OK);
            for (int32_t layer = 0; layer < LAYERS; layer++) assert_int_equal(resident_in(&r, layer), even / 2);
        }
        close_tiers(&r);
    }
}

static void urgent_first(void **state) {
    (void)state;
    rig r;
    open_full(&r, 8, 0);
    for (int32_t e = 0; e < 3; e++) moe_residency_hint(r.residency, STEP, 1, e);
    moe_residency_expect(r.residency, 2, 5);
    moe_residency_need(r.residency, 2, 9);
    moe_residency_turn(r.residency);
    assert_int_equal(r.slow.num_fills, MOE_RESIDENCY_PIECES);
    assert_int_equal(copied(&r, 0), 2 * EXPERTS + 9); /* a batch needs it */
    assert_int_equal(copied(&r, 1), 2 * EXPERTS + 5); /* a call waits for it */
    assert_int_equal(copied(&r, 2), 1 * EXPERTS + 0); /* hints, in their order */
    assert_null(moe_residency_acquire(r.residency, 2, 9)); /* not before it is there whole */
    end_one(&r);
    assert_int_equal(r.slow.num_fills, MOE_RESIDENCY_PIECES);
    assert_int_equal(copied(&r, 2), 1 * EXPERTS + 1);
    assert_non_null(moe_residency_acquire(r.residency, 2, 9));
    moe_residency_release(r.residency, 2, 9);
    moe_residency_unneed(r.residency, 2, 9);
    assert_int_equal(moe_residency_counted(r.residency).misses, 1);
    moe_residency_unexpect(r.residency, 2, 5);
    close_tiers(&r);
}

/* Where the loop comes back to an idle link, one more piece is on its way the next time. */
static void more_for_a_slow_loop(void **state) {
    (void)state;
    rig r;
    open_full(&r, LAYERS * EXPERTS / 2, 0); /* half of each layer, so that half of layer 0 can make room */
    for (int32_t i = EXPERTS; i < LAYERS * EXPERTS; i++) moe_residency_hint(r.residency, STEP, i / EXPERTS, i % EXPERTS);
    for (int32_t most = MOE_RESIDENCY_PIECES; most < MOE_RESIDENCY_PIECES + 2; most++) {
        moe_residency_turn(r.residency);
        assert_int_equal(r.slow.num_fills, most);
        while (r.slow.num_fills) moe_slow_end(&r.slow);
    }
    close_tiers(&r);
}

static void hints_that_fail(void **state) {
    (void)state;
    rig r;
    open_full(&r, 8, 0);
    for (int32_t e = 0; e < MOE_RESIDENCY_PIECES + 2; e++) moe_residency_hint(r.residency, STEP, 1, e);
    moe_residency_turn(r.residency);
    assert_int_equal(r.slow.num_fills, MOE_RESIDENCY_PIECES);
    /* the layer is reached, and wants expert 1 alone: the two that no copy was begun for are forgotten */
    moe_residency_expect(r.residency, 1, 1);
    moe_residency_reached(r.residency, STEP, 1);
    moe_residency_expect(r.residency, 0, 7); /* resident since the start */
    moe_residency_reached(r.residency, STEP, 1);
    moe_residency_turn(r.residency);
    while (r.slow.num_fills) end_one(&r);
    assert_int_equal(r.slow.fills_ended, 8 + MOE_RESIDENCY_PIECES);
    moe_residency_counts counts = moe_residency_counted(r.residency);
    assert_int_equal(counts.late_hits, 1);
    assert_int_equal(counts.hits, 1);
    assert_int_equal(counts.misses, 0);
    moe_residency_unexpect(r.residency, 1, 1);
    moe_residency_unexpect(r.residency, 0, 7);
    /* what was loaded for nothing counts as waste once it makes room */
    uint64_t before = counts.wasted_bytes;
    for (int32_t e = 0; e < 8; e++) {
        moe_residency_need(r.residency, 2, e);
        moe_residency_turn(r.residency);
        while (r.slow.num_fills) end_one(&r);
        assert_non_null(moe_residency_acquire(r.residency, 2, e));
        moe_residency_release(r.residency, 2, e);
        moe_residency_unneed(r.residency, 2, e);
        moe_residency_batch_ended(r.residency);
    }
    assert_true(moe_residency_counted(r.residency).wasted_bytes > before);
    close_tiers(&r);
}

/* What a hint announced is not evicted for another hint, but for what a batch needs. */
static void announced_stays(void **state) {
    (void)state;
    rig r;
    open_full(&r, 5, 0);
    for (int32_t e = 0; e < 5; e++) moe_residency_hint(r.residency, STEP, 1, e);
    moe_residency_turn(r.residency);
    while (r.slow.num_fills) end_one(&r);
    for (int32_t e = 0; e < 5; e++) assert_true(resident(&r, 1, e));
    moe_residency_hint(r.residency, STEP + 1, 2, 3);
    moe_residency_turn(r.residency);
    assert_int_equal(r.slow.num_fills, 0);
    moe_residency_need(r.residency, 0, 0);
    moe_residency_turn(r.residency);
    assert_int_equal(r.slow.num_fills, 1);
    end_one(&r);
    assert_non_null(moe_residency_acquire(r.residency, 0, 0));
    moe_residency_release(r.residency, 0, 0);
    moe_residency_unneed(r.residency, 0, 0);
    /* once the first step has passed the layer, the second step's expert comes */
    moe_residency_reached(r.residency, STEP, 1);
    moe_residency_turn(r.residency);
    assert_int_equal(r.slow.num_fills, 1);
    assert_int_equal(copied(&r, 0), 2 * EXPERTS + 3);
    close_tiers(&r);
}

/* What was announced is late, and no miss, when its layer comes before its copy has begun: the copy is still to come. */
static void announced_in_vain_is_late(void **state) {
    (void)state;
    rig r;
    open_full(&r, 8, 0);
    for (int32_t e = 0; e < MOE_RESIDENCY_PIECES + 2; e++) moe_residency_hint(r.residency, STEP, 1, e);
    moe_residency_turn(r.residency);
    for (int32_t e = 0; e < MOE_RESIDENCY_PIECES + 2; e++) moe_residency_expect(r.residency, 1, e);
    moe_residency_reached(r.residency, STEP, 1);
    while (r.slow.num_fills) end_one(&r);
    moe_residency_counts counts = moe_residency_counted(r.residency);
    assert_int_equal(counts.late_hits, MOE_RESIDENCY_PIECES + 2);
    assert_int_equal(counts.misses, 0);
    assert_int_equal(counts.wasted_bytes, (MOE_RESIDENCY_PIECES + 2) * r.image_bytes); /* of what made room, unused */
    for (int32_t e = 0; e < MOE_RESIDENCY_PIECES + 2; e++) {
        assert_true(resident(&r, 1, e));
        moe_residency_unexpect(r.residency, 1, e);
    }
    close_tiers(&r);
}

/* What had to make room for a batch comes back while it is still announced. */
static void announced_comes_back(void **state) {
    (void)state;
    rig r;
    open_full(&r, 5, 0);
    for (int32_t e = 0; e < 5; e++) moe_residency_hint(r.residency, STEP, 1, e);
    moe_residency_turn(r.residency);
    while (r.slow.num_fills) end_one(&r);
    moe_residency_need(r.residency, 0, 0);
    moe_residency_turn(r.residency);
    end_one(&r);
    assert_true(resident(&r, 0, 0));
    moe_residency_unneed(r.residency, 0, 0);
    moe_residency_turn(r.residency);
    while (r.slow.num_fills) end_one(&r);
    for (int32_t e = 0; e < 5; e++) assert_true(resident(&r, 1, e));
    close_tiers(&r);
}

/* What a call waits for stays, though its hint has ended and nobody has used it yet, but for what a batch needs. */
static void expected_stays(void **state) {
    (void)state;
    rig r;
    open_full(&r, 5, 0);
    for (int32_t e = 0; e < 5; e++) moe_residency_hint(r.residency, STEP, 1, e);
    moe_residency_turn(r.residency);
    while (r.slow.num_fills) end_one(&r);
    for (int32_t e = 0; e < 5; e++) moe_residency_expect(r.residency, 1, e);
    moe_residency_reached(r.residency, STEP, 1);
    assert_int_equal(moe_residency_counted(r.residency).hits, 5);
    moe_residency_hint(r.residency, STEP, 2, 0);
    moe_residency_expect(r.residency, 2, 1);
    moe_residency_turn(r.residency);
    assert_int_equal(r.slow.num_fills, 0);
    moe_residency_need(r.residency, 2, 1);
    moe_residency_turn(r.residency);
    assert_int_equal(r.slow.num_fills, 1);
    assert_int_equal(copied(&r, 0), 2 * EXPERTS + 1);
    moe_residency_unneed(r.residency, 2, 1);
    while (r.slow.num_fills) end_one(&r);
    moe_residency_unexpect(r.residency, 2, 1);
    for (int32_t e = 0; e < 5; e++) moe_residency_unexpect(r.residency, 1, e);
    moe_residency_turn(r.residency);
    assert_int_equal(r.slow.num_fills, 1); /* now the hint */
    assert_int_equal(copied(&r, 0), 2 * EXPERTS + 0);
    close_tiers(&r);
}

static void users_keep_slots(void **state) {
    (void)state;
    rig r;
    open_full(&r, 5, 0);
    moe_expert *used[5];
    for (int32_t e = 0; e < 5; e++) {
        moe_residency_need(r.residency, 0, e);
        used[e] = moe_residency_acquire(r.residency, 0, e);
        assert_non_null(used[e]);
    }
    moe_residency_need(r.residency, 1, 1);
    moe_residency_turn(r.residency);
    assert_int_equal(r.slow.num_fills, 0); /* every slot is in use */
    moe_residency_release(r.residency, 0, 3);
    moe_residency_turn(r.residency);
    assert_int_equal(r.slow.num_fills, 0); /* still needed */
    moe_residency_unneed(r.residency, 0, 3);
    moe_residency_turn(r.residency);
    assert_int_equal(r.slow.num_fills, 1);
    assert_ptr_equal(r.slow.fills[0]->slot, used[3]);
    end_one(&r);
    assert_ptr_equal(moe_residency_acquire(r.residency, 1, 1), used[3]);
    moe_residency_release(r.residency, 1, 1);
    moe_residency_unneed(r.residency, 1, 1);
    for (int32_t e = 0; e < 5; e++) {
        if (e == 3) continue;
        moe_residency_release(r.residency, 0, e);
        moe_residency_unneed(r.residency, 0, e);
    }
    close_tiers(&r);
}

/* Dropped while its copy is on its way: the slot is not given to anyone before the copy has ended. */
static void drop_meanwhile(void **state) {
    (void)state;
    rig r;
    open_full(&r, 5, 0);
    moe_residency_hint(r.residency, STEP, 1, 0);
    moe_residency_turn(r.residency);
    assert_int_equal(r.slow.num_fills, 1);
    moe_expert *slot = r.slow.fills[0]->slot;
    moe_shard_drop(&r.shard, 1, 0);
    for (int32_t e = 1; e < 6; e++) moe_residency_need(r.residency, 1, e);
    moe_residency_turn(r.residency);
    for (int i = 1; i < r.slow.num_fills; i++) assert_ptr_not_equal(r.slow.fills[i]->slot, slot);
    while (r.slow.num_fills) end_one(&r);
    for (int32_t e = 1; e < 6; e++) assert_non_null(moe_residency_acquire(r.residency, 1, e));
    for (int32_t e = 1; e < 6; e++) {
        moe_residency_release(r.residency, 1, e);
        moe_residency_unneed(r.residency, 1, e);
    }
    hold(&r, 1, 0);
    assert_false(resident(&r, 1, 0));
    close_tiers(&r);
}

static void lost_device(void **state) {
    (void)state;
    rig r;
    open_full(&r, 5, 0);
    assert_null(moe_residency_failure(r.residency));
    r.slow.fail_next = true;
    moe_residency_need(r.residency, 1, 0);
    moe_residency_turn(r.residency);
    end_one(&r);
    assert_non_null(moe_residency_failure(r.residency));
    assert_non_null(strstr(moe_residency_failure(r.residency)->message, "the link is gone"));
    moe_residency_unneed(r.residency, 1, 0);
    close_tiers(&r);
}

/* ---- batches in passes ---- */

static moe_work *make_work(int32_t rows, moe_combine_mode mode, moe_random *random) {
    moe_work *w = moe_calloc(1, sizeof *w);
    int32_t *row_of = calloc((size_t)(rows * TOP_K), sizeof *row_of), *expert_of = calloc((size_t)(rows * TOP_K), sizeof *expert_of);
    float *weight_of = calloc((size_t)(rows * TOP_K), sizeof *weight_of), *x = moe_alloc_aligned((size_t)rows * H, sizeof *x);
    int32_t a = 0;
    for (int32_t i = 0; i < rows * H; i++) x[i] = (float)(2 * moe_random_unit(random) - 1);
    bool chosen[EXPERTS][16] = {{false}};
    for (int32_t row = 0; row < rows; row++)
        for (int32_t j = 0; j < TOP_K; j++) {
            int32_t e = (int32_t)moe_random_below(random, EXPERTS);
            while (chosen[e][row]) e = (e + 1) % EXPERTS;
            chosen[e][row] = true;
        }
    for (int32_t e = 0; e < EXPERTS; e++)
        for (int32_t row = 0; row < rows; row++) {
            if (!chosen[e][row]) continue;
            row_of[a] = row;
            expert_of[a] = e;
            weight_of[a++] = (float)moe_random_unit(random);
        }
    *w = (moe_work){.layer = 1, .rows = rows, .assignments = a, .block_hi = MOE_FFN_BLOCKS, .mode = mode, .x = x, .row_of = row_of,
                    .expert_of = expert_of, .weight_of = weight_of};
    return w;
}

static void free_work(moe_work *w) {
    free((void *)(uintptr_t)w->row_of);
    free((void *)(uintptr_t)w->expert_of);
    free((void *)(uintptr_t)w->weight_of);
    moe_free(w->x);
    moe_free(w);
}

static void ignore_done(moe_job *job) { (void)job; }

static void run(moe_backend *b, const moe_ffn_batch *batch) {
    moe_job job = {.done = ignore_done};
    b->ops->ffn_submit(b, batch, &job);
    assert_int_equal(job.status, MOE_OK);
}

/* The same batch on a backend where every expert has a handle of its own. */
static void *computed_at_once(rig *r, moe_batch *batch, size_t bytes) {
    moe_shard whole;
    assert_int_equal(moe_shard_init(&whole, r->model, r->real, NULL), MOE_OK);
    for (int32_t e = 0; e < EXPERTS; e++) {
        moe_held_expert held = {.bytes = 1};
        assert_int_equal(r->real->ops->expert_load(r->real, moe_model_expert(r->model, 1, e), 0, MOE_FFN_BLOCKS, &held.handle, NULL), MOE_OK);
        moe_shard_adopt(&whole, 1, e, &held);
    }
    assert_int_equal(moe_batch_assemble(batch, &whole, NULL), MOE_OK);
    run(r->real, &batch->ffn);
    void *out = malloc(bytes);
    assert_non_null(out);
    memcpy(out, batch->ffn.out, bytes);
    moe_shard_free(&whole);
    return out;
}

/* Runs the pass that is ready there; false where none is. */
static bool run_pass(rig *r, moe_passes *p, moe_pass_place place) {
    const moe_ffn_batch *ffn;
    assert_int_equal(moe_passes_next(p, place, &ffn, NULL), MOE_OK);
    if (ffn) run(&r->slow.base, ffn);
    return ffn != NULL;
}

/* The number of the device's passes. */
static int in_passes(rig *r, moe_batch *batch, uint64_t seed) {
    moe_passes passes = {.batch = NULL};
    moe_random random = {seed};
    int count = 0;
    assert_int_equal(moe_batch_assemble(batch, &r->shard, NULL), MOE_OK);
    memset(batch->ffn.out, 0xff, batch->parts[MOE_BATCH_OUT].bytes);
    assert_int_equal(moe_passes_begin(&passes, batch, &r->shard, NULL), MOE_OK);
    for (int turns = 0; passes.batch; turns++) {
        assert_true(turns < 1000);
        moe_residency_turn(r->residency);
        bool device = run_pass(r, &passes, MOE_PASS_DEVICE);
        bool host = moe_residency_cold(r->residency) != MOE_COLD_FETCH && run_pass(r, &passes, MOE_PASS_HOST);
        if (host && moe_random_below(&random, 2)) { /* either may end first */
            moe_passes_ended(&passes, MOE_PASS_HOST);
            host = false;
        }
        if (device) moe_passes_ended(&passes, MOE_PASS_DEVICE);
        if (host) moe_passes_ended(&passes, MOE_PASS_HOST);
        count += device;
        if (device || host || !passes.batch) continue;
        if (moe_residency_cold(r->residency) == MOE_COLD_FETCH) assert_true(r->slow.num_fills > 0); /* else it would wait for ever */
        for (int64_t n = 1 + (int64_t)moe_random_below(&random, 3); n > 0 && r->slow.num_fills; n--) moe_slow_end(&r->slow);
    }
    return count;
}

/* Batches of ever more rows, bit for bit. The most passes that the device took for one of them. */
static int check_batches(rig *r, int trials) {
    moe_random random = {11};
    int most = 0;
    for (int trial = 0; trial < trials; trial++) {
        moe_combine_mode mode = trial % 2 ? MOE_COMBINE_PARTIAL : MOE_COMBINE_EXACT;
        moe_batch batch;
        assert_int_equal(moe_batch_init(&batch, &r->slow.base, EXPERTS, NULL), MOE_OK);
        moe_work *w = make_work(1 + trial, mode, &random);
        moe_batch_add(&batch, w);
        size_t bytes = (size_t)moe_work_out_rows(w) * H * sizeof(float);
        void *want = computed_at_once(r, &batch, bytes);
        int count = in_passes(r, &batch, (uint64_t)trial);
        most = count > most ? count : most;
        assert_memory_equal(batch.ffn.out, want, bytes);
        free(want);
        moe_batch_remove(&batch, w);
        moe_batch_free(&batch);
        free_work(w);
    }
    return most;
}

static void passes(void **state) {
    (void)state;
    for (int images = 0; images <= MOE_RESIDENCY_MIN_IMAGES; images += MOE_RESIDENCY_MIN_IMAGES) {
        rig r;
        open_full(&r, TOP_K + 1, images);
        assert_true(check_batches(&r, 12) >= 3); /* 16 experts through 5 slots */
        assert_int_equal(moe_residency_counted(r.residency).host_experts, 0);
        if (images) assert_true(moe_residency_counted(r.residency).packed > 0);
        close_tiers(&r);
    }
}

/* The host computes what is not in a slot, from images that are there and from such as must be packed first. */
static void host_passes(void **state) {
    (void)state;
    for (int images = 0; images <= MOE_RESIDENCY_MIN_IMAGES; images += MOE_RESIDENCY_MIN_IMAGES) {
        rig r;
        open_full_cold(&r, TOP_K + 1, images, MOE_COLD_HOST);
        check_batches(&r, 12);
        moe_residency_counts counts = moe_residency_counted(r.residency);
        assert_true(counts.host_experts > 0 && counts.host_rows > counts.host_experts);
        if (images) assert_true(counts.packed > 0);
        close_tiers(&r);
    }
}

/* The host computes the expert once, as a batch that finds it cold would. */
static void use_on_host(rig *r, int32_t layer, int32_t expert) {
    moe_residency_need_image(r->residency, layer, expert);
    assert_non_null(moe_residency_acquire_image(r->residency, layer, expert, 1));
    moe_residency_release_image(r->residency, layer, expert);
    moe_residency_unneed_image(r->residency, layer, expert);
    moe_residency_batch_ended(r->residency);
    moe_residency_turn(r->residency);
}

/* A batch of layer 0 that wants experts 0 … count - 1, which are on the device. */
static void run_layer_0(rig *r, int32_t count) {
    for (int32_t e = 0; e < count; e++) assert_true(resident(r, 0, e));
    moe_residency_batch_ended(r->residency);
}

/* A cold expert comes into a slot once it is used more than one that has one, in the background, and not for every use. */
static void hot_experts_earn_slots(void **state) {
    (void)state;
    rig r;
    open_full_cold(&r, 5, 0, MOE_COLD_HOST);
    for (int batch = 0; batch < 8; batch++) run_layer_0(&r, 5);
    moe_residency_expect(r.residency, 1, 7);
    moe_residency_turn(r.residency);
    assert_int_equal(r.slow.num_fills, 0); /* a call that waits copies nothing */
    moe_residency_unexpect(r.residency, 1, 7);
    for (int batch = 0; batch < 8; batch++) use_on_host(&r, 1, 7);
    assert_int_equal(r.slow.num_fills, 0); /* used by every batch of its layer, as those in slots are */
    for (int batch = 0; batch < 3; batch++) run_layer_0(&r, 4);
    use_on_host(&r, 1, 7);
    assert_int_equal(r.slow.num_fills, 0); /* not half as often again as the one that is left out */
    for (int batch = 0; batch < 3; batch++) run_layer_0(&r, 4);
    use_on_host(&r, 1, 7);
    assert_int_equal(r.slow.num_fills, 1);
    assert_int_equal(copied(&r, 0), EXPERTS + 7);
    use_on_host(&r, 1, 7); /* it still computes while the copy is on its way */
    end_one(&r);
    assert_true(resident(&r, 1, 7));
    for (int32_t e = 0; e < 5; e++) assert_int_equal(resident(&r, 0, e), e < 4);
    /* another one that has become rare makes room, too */
    for (int batch = 0; batch < 12; batch++) run_layer_0(&r, 3);
    for (int batch = 0; batch < 12; batch++) use_on_host(&r, 2, 3);
    assert_int_equal(copied(&r, 0), 2 * EXPERTS + 3);
    while (r.slow.num_fills) end_one(&r);
    close_tiers(&r);
}

/* Neither an image that is needed nor one that the host reads makes room for another. */
static void images_in_use_stay(void **state) {
    (void)state;
    rig r;
    open_full_cold(&r, 5, MOE_RESIDENCY_MIN_IMAGES, MOE_COLD_HOST);
    for (int32_t e = 8; e < 11; e++) moe_residency_need_image(r.residency, 1, e);
    for (int turn = 0; turn < 4; turn++) moe_residency_turn(r.residency);
    assert_true(moe_residency_has_image(r.residency, 1, 8) && moe_residency_has_image(r.residency, 1, 9));
    assert_false(moe_residency_has_image(r.residency, 1, 10)); /* two images are all there are */
    assert_int_equal(r.slow.num_fills, 0);
    assert_non_null(moe_residency_acquire_image(r.residency, 1, 8, 2));
    moe_residency_turn(r.residency);
    assert_false(moe_residency_has_image(r.residency, 1, 10));
    moe_residency_release_image(r.residency, 1, 8);
    moe_residency_unneed_image(r.residency, 1, 8);
    for (int turn = 0; turn < 4; turn++) moe_residency_turn(r.residency);
    assert_true(moe_residency_has_image(r.residency, 1, 9) && moe_residency_has_image(r.residency, 1, 10));
    for (int32_t e = 9; e < 11; e++) moe_residency_unneed_image(r.residency, 1, e);
    close_tiers(&r);
}

/* Where copies cost much, cold experts are the host's; where they cost nothing, the device's; and else both sides have work. */
static void auto_divides(void **state) {
    (void)state;
    static const double byte_ns[] = {1e3, 1e-9, 1};
    for (int i = 0; i < 3; i++) {
        rig r;
        open_full_cold(&r, TOP_K + 1, 0, MOE_COLD_AUTO);
        moe_cold_costs *costs = moe_residency_costs(r.residency);
        *costs = (moe_cold_costs){.copy_byte_ns = byte_ns[i], .device = {1, 1}, .host = {10e3, 1e3}};
        if (i == 1) costs->host.expert_ns = 1e15; /* copies are measured, too, and this machine may be slow */
        check_batches(&r, 12);
        uint64_t on_host = moe_residency_counted(r.residency).host_experts;
        int64_t copies = r.slow.fills_ended - (TOP_K + 1);
        if (i == 0) assert_true(on_host > 0 && copies == 0);
        if (i == 1) assert_true(on_host == 0 && copies > 0);
        if (i == 2) assert_true(on_host > 0 && copies > 0);
        close_tiers(&r);
    }
}

/* ---- the batcher ---- */

typedef struct answered {
    int count;
    moe_status status;
    float out[EXPERTS * H];
} answered;

static void keep_answer(void *ctx, moe_work *w) {
    answered *a = ctx;
    a->count++;
    a->status = w->status;
    if (w->status == MOE_OK) memcpy(a->out, w->out, sizeof a->out);
}

static void open_batcher(rig *r, answered *a, moe_batcher *b) {
    const moe_batcher_config config = {.shard = &r->shard,
                                       .backend = &r->slow.base,
                                       .host = &r->slow.base,
                                       .transport = &r->transport.base,
                                       .clock = moe_clock_real(),
                                       .max_queued_calls = 4,
                                       .max_batch_rows = 64,
                                       .answer = keep_answer,
                                       .ctx = a};
    *a = (answered){.count = 0};
    assert_int_equal(moe_batcher_init(b, &config, NULL), MOE_OK);
    r->slow.slow_batches = true;
}

/* One row for each expert of layer 0, of which some are in slots. */
static void add_call(moe_batcher *b, moe_rpc_call *call) {
    static float x[H];
    uint32_t rows[EXPERTS] = {0}, experts[EXPERTS];
    for (uint32_t e = 0; e < EXPERTS; e++) experts[e] = e;
    for (int i = 0; i < H; i++) x[i] = (float)(i % 7) / 4;
    const moe_forward_call decoded = {.rows = 1,
                                      .assignments = EXPERTS,
                                      .block_hi = MOE_FFN_BLOCKS,
                                      .combine = MOE_COMBINE_EXACT,
                                      .activations = x,
                                      .assignment_rows = rows,
                                      .assignment_experts = experts};
    *call = (moe_rpc_call){.deadline_ns = INT64_MAX};
    assert_int_equal(moe_batcher_add(b, &decoded, call, NULL), MOE_OK);
}

/* Device and host compute at once; the batch ends when both have. A failure of either ends it, not before the other has ended. */
static void device_and_host_at_once(void **state) {
    (void)state;
    float want[EXPERTS * H];
    for (int failing = 0; failing <= 2; failing++) { /* 1: the device's job, 2: the host's */
        rig r;
        answered a;
        moe_batcher b;
        moe_rpc_call call;
        open_full_cold(&r, 5, 0, MOE_COLD_HOST);
        open_batcher(&r, &a, &b);
        add_call(&b, &call);
        moe_batcher_turn(&b);
        assert_int_equal(r.slow.num_batches, 2);
        assert_int_equal(r.slow.batches[0]->num_groups, 5);
        assert_int_equal(r.slow.batches[1]->num_groups, EXPERTS - 5);
        assert_int_equal(r.slow.num_fills, 0);
        for (int job = 1; job <= 2; job++) {
            r.slow.fail_next_batch = job == failing;
            moe_slow_end_batch(&r.slow);
            moe_batcher_turn(&b);
            assert_int_equal(a.count, job == 2);
        }
        assert_int_equal(a.status, failing ? MOE_INTERNAL : MOE_OK);
        if (failing == 0) memcpy(want, a.out, sizeof want);
        r.slow.slow_batches = false; /* and the next batch is computed */
        r.slow.at_once = true;
        add_call(&b, &call);
        while (a.count < 2) moe_batcher_turn(&b);
        assert_int_equal(a.status, MOE_OK);
        assert_memory_equal(a.out, want, sizeof want);
        moe_batcher_close(&b);
        close_tiers(&r);
    }
}

/* Copied, computed by the host, or divided: the same bits. */
static void same_bits_however(void **state) {
    (void)state;
    float want[EXPERTS * H];
    for (int cold = MOE_COLD_FETCH; cold <= MOE_COLD_AUTO; cold++) {
        rig r;
        answered a;
        moe_batcher b;
        moe_rpc_call call;
        open_full_cold(&r, 5, 0, (moe_cold_experts)cold);
        *moe_residency_costs(r.residency) = (moe_cold_costs){.copy_byte_ns = 1, .device = {1, 1}, .host = {20e3, 1e3}};
        open_batcher(&r, &a, &b);
        add_call(&b, &call);
        while (a.count < 1) {
            moe_batcher_turn(&b);
            if (r.slow.num_batches) moe_slow_end_batch(&r.slow);
            if (r.slow.num_fills) moe_slow_end(&r.slow);
        }
        assert_int_equal(a.status, MOE_OK);
        if (cold == MOE_COLD_FETCH) memcpy(want, a.out, sizeof want);
        assert_memory_equal(a.out, want, sizeof want);
        moe_batcher_close(&b);
        close_tiers(&r);
    }
}

static void give_up_passes_of(moe_cold_experts cold) {
    rig r;
    moe_random random = {3};
    open_full_cold(&r, TOP_K + 1, 0, cold);
    moe_batch batch;
    moe_passes p = {.batch = NULL};
    const moe_ffn_batch *ffn;
    assert_int_equal(moe_batch_init(&batch, &r.slow.base, EXPERTS, NULL), MOE_OK);
    moe_work *w = make_work(8, MOE_COMBINE_EXACT, &random);
    moe_batch_add(&batch, w);
    assert_int_equal(moe_batch_assemble(&batch, &r.shard, NULL), MOE_OK);
    assert_int_equal(moe_passes_begin(&p, &batch, &r.shard, NULL), MOE_OK);
    moe_residency_turn(r.residency);
    if (r.slow.num_fills) end_one(&r);
    assert_int_equal(moe_passes_next(&p, MOE_PASS_DEVICE, &ffn, NULL), MOE_OK);
    if (!ffn && cold != MOE_COLD_FETCH) assert_int_equal(moe_passes_next(&p, MOE_PASS_HOST, &ffn, NULL), MOE_OK);
    assert_non_null(ffn);
    moe_passes_give_up(&p);
    moe_passes_give_up(&p);
    while (r.slow.num_fills) end_one(&r);
    for (int32_t e = 0; e < EXPERTS; e++) moe_shard_drop(&r.shard, 1, e); /* nothing needs them any more */
    moe_batch_remove(&batch, w);
    moe_batch_free(&batch);
    free_work(w);
    close_tiers(&r);
}

static void give_up_passes(void **state) {
    (void)state;
    give_up_passes_of(MOE_COLD_FETCH);
    give_up_passes_of(MOE_COLD_HOST);
    give_up_passes_of(MOE_COLD_AUTO);
}

static void out_of_memory(void **state) {
    (void)state;
    for (int64_t nth = 1;; nth++) {
        rig r;
        moe_error err;
        memset(&r, 0, sizeof r);
        assert_int_equal(open_tiers(&r, (moe_tier_options){.device = {.part = 0.5}}, &err), MOE_OK);
        moe_residency *second;
        const moe_residency_config config = {.model = r.model,
                                             .backend = &r.slow.base,
                                             .host = &r.slow.base,
                                             .transport = &r.transport.base,
                                             .tiers = {.device = {.part = 0.5}, .eviction = "lru", .cold = MOE_COLD_HOST}};
        moe_alloc_fail_after(nth);
        moe_status status = moe_residency_new(&config, &second, &err);
        moe_alloc_fail_after(0);
        if (status == MOE_OK) moe_residency_free(&second);
        close_tiers(&r);
        if (status == MOE_OK) {
            assert_true(nth > 5);
            return;
        }
        assert_int_equal(status, MOE_RESOURCE_EXHAUSTED);
        assert_null(second);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(even_filling), cmocka_unit_test(more_for_a_slow_loop),
        cmocka_unit_test(refusals),        cmocka_unit_test(urgent_first),   cmocka_unit_test(hints_that_fail),
        cmocka_unit_test(announced_stays), cmocka_unit_test(announced_in_vain_is_late), cmocka_unit_test(announced_comes_back), cmocka_unit_test(expected_stays), cmocka_unit_test(users_keep_slots), cmocka_unit_test(drop_meanwhile),
        cmocka_unit_test(lost_device),     cmocka_unit_test(passes),         cmocka_unit_test(give_up_passes),
        cmocka_unit_test(host_passes),     cmocka_unit_test(hot_experts_earn_slots), cmocka_unit_test(images_in_use_stay),
        cmocka_unit_test(auto_divides),    cmocka_unit_test(device_and_host_at_once), cmocka_unit_test(same_bits_however),
        cmocka_unit_test(out_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
