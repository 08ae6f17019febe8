#include "expert-worker/residency.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "common/alloc.h"
#include "common/clock.h"
#include "expert-worker/host_experts.h"
#include "expert-worker/residency_internal.h"

#define POLL_NS (100 * MOE_NS_PER_US)
#define ROUNDING 1e-6 /* a third of 96 experts is 32, however the third was written */

/* ---- budgets ---- */

static int32_t share_of(const moe_residency *r) {
    double share = r->config.tiers.share;
    return share > 0 && share < 1 ? (int32_t)ceil(share * r->num_entries - ROUNDING) : r->num_entries;
}

/* How many places of `each` bytes a limit allows. */
static int64_t places(const moe_residency *r, moe_memory_limit limit, int64_t each) {
    if (!moe_memory_limited(limit)) return r->num_entries;
    int64_t count = limit.bytes > 0 ? limit.bytes / each : (int64_t)floor(limit.part * share_of(r) + ROUNDING);
    return count < r->num_entries ? count : r->num_entries;
}

/* Of the device's slots: as told, or what a budget takes. */
static int64_t device_places(const moe_residency *r, int32_t least) {
    const moe_tier_options *t = &r->config.tiers;
    if (moe_memory_limited(t->device)) return places(r, t->device, r->size.slot_bytes);
    double part = moe_expert_budget_part(t->budget, &r->config.model->config);
    int64_t count = (int64_t)ceil(part * share_of(r) - ROUNDING) + MOE_RESIDENCY_SPARE_SLOTS;
    if (count < least) count = least;
    return count < r->num_entries ? count : r->num_entries;
}

static moe_status too_little(const moe_residency *r, const char *option, int64_t got, int64_t least, int64_t each,
                             const char *why, moe_error *err) {
    return moe_fail(
        err, MOE_INVALID_ARGUMENT,
        "%s: room for %lld experts of %lld bytes is too little; %s takes %lld: at least %lld bytes, or %.1f%% of a share of "
        "%d experts",
        option, (long long)got, (long long)each, why, (long long)least, (long long)(least * each),
        100.0 * (double)least / share_of(r), share_of(r));
}

moe_status residency_count_places(moe_residency *r, moe_error *err) {
    char why[96];
    int32_t least = r->config.model->config.top_k + MOE_RESIDENCY_SPARE_SLOTS;
    if (least > r->num_entries) least = r->num_entries;
    int64_t slots = device_places(r, least),
            images = places(r, r->config.tiers.host, r->size.image_bytes);
    snprintf(why, sizeof why, "a token's %d experts and %d being copied", r->config.model->config.top_k,
             MOE_RESIDENCY_SPARE_SLOTS);
    if (slots < least) return too_little(r, "--device-memory", slots, least, r->size.slot_bytes, why, err);
    if (images < MOE_RESIDENCY_MIN_IMAGES)
        return too_little(r, "--host-memory", images, MOE_RESIDENCY_MIN_IMAGES, r->size.image_bytes,
                          "an expert being packed and one being copied", err);
    r->num_slots = (int32_t)slots;
    r->num_images = (int32_t)images;
    return MOE_OK;
}

static moe_status check_alike(const moe_residency *r, moe_error *err) {
    const moe_ffn_weights *first = moe_model_expert(r->config.model, 0, 0);
    for (int32_t i = 1; i < r->num_entries; i++) {
        const moe_ffn_weights *w = first + i;
        if (w->gate.dtype == first->gate.dtype && w->up.dtype == first->up.dtype && w->down.dtype == first->down.dtype) continue;
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "--device-memory: this checkpoint stores its experts in different types, which cannot share slots");
    }
    return MOE_OK;
}

/* ---- making and freeing ---- */

moe_status residency_open_slots(moe_residency *r, moe_error *err) {
    const moe_residency_config *c = &r->config;
    const moe_eviction_config eviction = {.policy = c->tiers.eviction,
                                          .num_experts = r->num_entries,
                                          .num_layers = c->model->config.num_moe_layers,
                                          .half_life = MOE_EVICTION_HALF_LIFE_BATCHES};
    r->slot = moe_calloc((size_t)r->num_slots, sizeof *r->slot);
    r->ready_entry = moe_calloc((size_t)r->num_slots, sizeof *r->ready_entry);
    if (!r->slot || !r->ready_entry)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the table of %d slots", r->num_slots);
    for (int32_t i = 0; i < r->num_slots; i++) r->ready_entry[i] = -1;
    moe_status status = moe_eviction_new(&eviction, &r->eviction, err);
    if (status == MOE_OK)
        status = c->backend->ops->slots_create(c->backend, moe_model_expert(c->model, 0, 0), 0, MOE_FFN_BLOCKS, r->num_slots, &r->slots,
                                               err);
    for (int32_t i = 0; status == MOE_OK && i < r->num_slots; i++)
        r->slot[i] = (residency_slot){.expert = c->backend->ops->slot(r->slots, i), .entry = -1};
    r->num_empty = r->num_slots;
    r->num_ready = r->first_empty = 0;
    return status;
}

void residency_close_slots(moe_residency *r) {
    if (r->slots) r->config.backend->ops->slots_free(r->config.backend, r->slots);
    moe_free(r->slot);
    moe_free(r->ready_entry);
    moe_eviction_free(&r->eviction);
    r->slots = NULL;
    r->slot = NULL;
    r->ready_entry = NULL;
    r->num_slots = r->num_empty = r->num_ready = 0;
}

static int64_t piece_bytes(int64_t image_bytes) {
    int64_t bytes = (image_bytes + MOE_RESIDENCY_EXPERT_PIECES - 1) / MOE_RESIDENCY_EXPERT_PIECES;
    bytes = (bytes + MOE_RESIDENCY_MIN_PIECE_BYTES - 1) / MOE_RESIDENCY_MIN_PIECE_BYTES * MOE_RESIDENCY_MIN_PIECE_BYTES;
    return bytes < MOE_RESIDENCY_MAX_PIECE_BYTES ? bytes : MOE_RESIDENCY_MAX_PIECE_BYTES;
}

static moe_status open_parts(moe_residency *r, moe_error *err) {
    const moe_residency_config *c = &r->config;
    r->entries = moe_calloc((size_t)r->num_entries, sizeof *r->entries);
    r->images = moe_calloc((size_t)r->num_images, sizeof *r->images);
    r->held = moe_calloc((size_t)c->model->config.num_moe_layers, sizeof *r->held);
    if (!r->entries || !r->images || !r->held)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the table of %d experts", r->num_entries);
    for (int32_t i = 0; i < r->num_entries; i++) r->entries[i] = (residency_entry){.wish = WISH_NONE, .slot = -1};
    moe_image_pool_init(&r->pool, c->backend, r->size.image_bytes, r->num_images);
    for (int32_t i = 0; i < r->num_images; i++) r->images[i] = (moe_image){.pool = &r->pool, .expert = -1};
    moe_status status = residency_open_slots(r, err);
    if (status == MOE_OK && c->tiers.cold != MOE_COLD_FETCH)
        status = moe_host_experts_create(c->backend, c->host, moe_model_expert(c->model, 0, 0), r->num_images, &r->host_experts, err);
    const moe_loader_config packer = {
        .model = c->model, .backend = c->backend, .transport = c->transport, .threads = c->tiers.threaded, .tiers = true};
    if (status == MOE_OK) status = moe_loader_init(&r->packer, &packer, err);
    return status;
}

moe_status moe_residency_new(const moe_residency_config *config, moe_residency **out, moe_error *err) {
    const moe_model_config *model = &config->model->config;
    *out = NULL;
    MOE_ASSERT(model->num_moe_layers > 0 && moe_tiers_wanted(&config->tiers, model));
    MOE_ASSERT(config->tiers.cold == MOE_COLD_FETCH || config->host);
    moe_residency *r = moe_calloc(1, sizeof *r);
    if (!r) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the experts' tiers");
    r->config = *config;
    pthread_mutex_init(&r->mutex, NULL);
    r->most_out = MOE_RESIDENCY_PIECES;
    r->num_entries = model->num_moe_layers * model->num_experts;
    for (int level = 0; level < WISH_NONE; level++) TAILQ_INIT(&r->wishes[level]);
    r->size = config->backend->ops->expert_size(config->backend, moe_model_expert(config->model, 0, 0), 0, MOE_FFN_BLOCKS);
    if (r->config.tiers.piece_bytes == 0) r->config.tiers.piece_bytes = piece_bytes(r->size.image_bytes);
    moe_status status = check_alike(r, err);
    if (status == MOE_OK) status = residency_count_places(r, err);
    if (status == MOE_OK) status = open_parts(r, err);
    if (status == MOE_OK)
        *out = r;
    else
        moe_residency_free(&r);
    return status;
}

void residency_await_pieces(moe_residency *r) {
    moe_backend *backend = r->config.backend;
    while (r->pieces_out > 0) {
        if (backend->ops->poll) backend->ops->poll(backend);
        residency_collect(r);
        if (r->pieces_out > 0) nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    }
}

void moe_residency_free(moe_residency **residency) {
    moe_residency *r = *residency;
    *residency = NULL;
    if (!r) return;
    residency_await_pieces(r);
    pthread_mutex_lock(&r->mutex); /* whoever ended the last piece has left it */
    pthread_mutex_unlock(&r->mutex);
    pthread_mutex_destroy(&r->mutex);
    moe_loader_close(&r->packer);
    residency_close_slots(r);
    if (r->host_experts) r->config.host->ops->host_experts_free(r->config.host, r->host_experts);
    moe_image_pool_close(&r->pool);
    moe_free(r->entries);
    moe_free(r->images);
    moe_free(r->held);
    moe_free(r);
}

moe_cold_experts moe_residency_cold(const moe_residency *r) { return r->config.tiers.cold; }
bool moe_residency_shares_processor(const moe_residency *r) { return r->config.host == r->config.backend; }
moe_cold_costs *moe_residency_costs(moe_residency *r) { return &r->config.tiers.costs; }
int32_t moe_residency_slots(const moe_residency *r) { return r->num_slots; }
int32_t moe_residency_resident(const moe_residency *r) { return r->num_ready; }
int64_t moe_residency_device_bytes(const moe_residency *r) { return r->num_slots * r->size.slot_bytes; }
int64_t moe_residency_image_bytes(const moe_residency *r) { return r->size.image_bytes; }
moe_residency_counts moe_residency_counted(const moe_residency *r) { return r->counts; }
const moe_error *moe_residency_failure(const moe_residency *r) { return r->failure.code == MOE_OK ? NULL : &r->failure; }

/* ---- what the shard holds ---- */

void moe_residency_hold(moe_residency *r, int32_t layer, int32_t expert, moe_image *image) {
    residency_entry *e = residency_at(r, layer, expert);
    MOE_ASSERT(!e->held);
    e->held = true;
    e->image = image;
    if (image) {
        image->lent = false;
        image->expert = residency_number(r, e);
        image->last_use = ++r->use;
    }
    int32_t even = r->num_slots / r->config.model->config.num_moe_layers;
    if (++r->held[layer] <= even && r->num_empty > 0) residency_set_wish(r, e, WISH_SPARE);
}

void moe_residency_held_all(moe_residency *r) {
    int32_t layers = r->config.model->config.num_moe_layers;
    for (int32_t i = 0; i < r->num_entries && r->num_empty > 0; i++) {
        residency_entry *e = residency_at(r, i % layers, i / layers);
        if (e->held && e->slot < 0 && e->wish == WISH_NONE) residency_set_wish(r, e, WISH_SPARE);
    }
}

void moe_residency_drop(moe_residency *r, int32_t layer, int32_t expert) {
    residency_entry *e = residency_at(r, layer, expert);
    MOE_ASSERT(e->held && e->needed == 0 && e->expected == 0 && e->imaged == 0);
    residency_set_wish(r, e, WISH_NONE);
    residency_give_up(r, e);
    if (e->slot >= 0) residency_empty_slot(r, e);
    if (e->image) e->image->expert = -1; /* pieces that still read it keep it from being packed into */
    e->image = NULL;
    e->held = false;
    r->held[layer]--;
}

/* ---- what calls want ---- */

/* A stronger wish takes the place of a weaker one. */
static void wish(moe_residency *r, residency_entry *e, residency_wish level) {
    bool on_its_way = e->slot >= 0 && e->wish == WISH_NONE; /* whole, or its last piece was submitted */
    if (e->held && !on_its_way && level < e->wish) residency_set_wish(r, e, level);
}

/* Whether a call that waits has its experts copied. Where the host may compute them its batch decides that, but while another batch is
 * under way a link of its own would have nothing else to do. */
static bool copies_expected(const moe_residency *r) {
    moe_cold_experts cold = r->config.tiers.cold;
    return cold == MOE_COLD_FETCH || (cold == MOE_COLD_AUTO && r->needs > 0 && !moe_residency_shares_processor(r));
}

/* What is still wanted of an expert that a batch needs no more, or a call, or a hint. */
void residency_weaken(moe_residency *r, residency_entry *e) {
    if (e->wish >= WISH_HOTTER || (e->imaged > 0 && !e->image)) return;
    if (e->expected > 0 && copies_expected(r)) {
        residency_set_wish(r, e, WISH_EXPECTED);
        return;
    }
    if (moe_eviction_announced(r->eviction, residency_number(r, e))) {
        residency_set_wish(r, e, WISH_HINTED);
        return;
    }
    residency_set_wish(r, e, WISH_NONE);
    residency_give_up(r, e);
}

void moe_residency_hint(moe_residency *r, uint64_t step, int32_t layer, int32_t expert) {
    residency_entry *e = residency_at(r, layer, expert);
    if (!e->held) return;
    moe_eviction_hinted(r->eviction, residency_number(r, e), step, r->batches + MOE_EVICTION_HINT_BATCHES);
    wish(r, e, WISH_HINTED);
}

void moe_residency_retire(moe_residency *r, int32_t layer, int32_t expert) {
    moe_eviction_retired(r->eviction, residency_number(r, residency_at(r, layer, expert)));
}

bool moe_residency_has(const moe_residency *r, int32_t layer, int32_t expert) {
    const residency_entry *e = &r->entries[(int64_t)layer * r->config.model->config.num_experts + expert];
    return residency_ready(r, e);
}

void moe_residency_reached(moe_residency *r, uint64_t step, int32_t layer) {
    int32_t num_experts = r->config.model->config.num_experts;
    residency_entry *e, *following;
    moe_eviction_ran(r->eviction, step, 0, (layer + 1) * num_experts, r->batches);
    for (e = TAILQ_FIRST(&r->wishes[WISH_HINTED]); e; e = following) {
        following = TAILQ_NEXT(e, link);
        if (!moe_eviction_announced(r->eviction, residency_number(r, e))) residency_weaken(r, e);
    }
}

void moe_residency_expect(moe_residency *r, int32_t layer, int32_t expert) {
    residency_entry *e = residency_at(r, layer, expert);
    if (residency_ready(r, e))
        r->counts.hits++;
    else if (e->slot >= 0 || e->wish < WISH_HOTTER)
        r->counts.late_hits++;
    else
        r->counts.misses++;
    e->expected++;
    if (copies_expected(r)) wish(r, e, WISH_EXPECTED);
}

void moe_residency_unexpect(moe_residency *r, int32_t layer, int32_t expert) {
    residency_entry *e = residency_at(r, layer, expert);
    MOE_ASSERT(e->expected > 0);
    if (--e->expected == 0 && e->needed == 0) residency_weaken(r, e);
}

void moe_residency_need(moe_residency *r, int32_t layer, int32_t expert) {
    residency_entry *e = residency_at(r, layer, expert);
    MOE_ASSERT(e->held);
    e->needed++;
    r->needs++;
    wish(r, e, WISH_NEEDED);
}

void moe_residency_unneed(moe_residency *r, int32_t layer, int32_t expert) {
    residency_entry *e = residency_at(r, layer, expert);
    MOE_ASSERT(e->needed > 0);
    r->needs--;
    if (--e->needed == 0) residency_weaken(r, e);
}

moe_expert *moe_residency_acquire(moe_residency *r, int32_t layer, int32_t expert) {
    residency_entry *e = residency_at(r, layer, expert);
    MOE_ASSERT(e->needed > 0 || e->imaged > 0);
    if (!residency_ready(r, e)) return NULL;
    residency_slot *s = &r->slot[e->slot];
    s->users++;
    moe_eviction_used(r->eviction, residency_number(r, e), r->batches);
    s->used = true;
    return s->expert;
}

void moe_residency_release(moe_residency *r, int32_t layer, int32_t expert) {
    residency_entry *e = residency_at(r, layer, expert);
    MOE_ASSERT(residency_ready(r, e) && r->slot[e->slot].users > 0);
    r->slot[e->slot].users--;
}

void moe_residency_need_image(moe_residency *r, int32_t layer, int32_t expert) {
    residency_entry *e = residency_at(r, layer, expert);
    MOE_ASSERT(e->held);
    e->imaged++;
    r->needs++;
    if (!e->image) wish(r, e, WISH_NEEDED);
}

void moe_residency_unneed_image(moe_residency *r, int32_t layer, int32_t expert) {
    residency_entry *e = residency_at(r, layer, expert);
    MOE_ASSERT(e->imaged > 0);
    r->needs--;
    if (--e->imaged == 0 && e->needed == 0) residency_weaken(r, e);
}

bool moe_residency_has_image(moe_residency *r, int32_t layer, int32_t expert) {
    return residency_at(r, layer, expert)->image != NULL;
}

static int64_t left_bytes(const moe_residency *r, const residency_entry *e) {
    return r->size.image_bytes - (e->slot >= 0 ? r->slot[e->slot].submitted_bytes : 0);
}

int64_t moe_residency_left_bytes(moe_residency *r, int32_t layer, int32_t expert) {
    return left_bytes(r, residency_at(r, layer, expert));
}

double moe_residency_link_ns(const moe_residency *r) {
    const residency_entry *e;
    int64_t bytes = 0;
    for (int i = 0; i < MOE_RESIDENCY_MAX_PIECES; i++)
        if (r->pieces[i].busy) bytes += r->pieces[i].fill.bytes;
    TAILQ_FOREACH(e, &r->wishes[WISH_NEEDED], link) {
        if (e->needed > 0) bytes += left_bytes(r, e);
    }
    return r->config.tiers.costs.copy_byte_ns * (double)bytes;
}

double moe_residency_rank(moe_residency *r, int32_t layer, int32_t expert) {
    return moe_eviction_rank(r->eviction, residency_number(r, residency_at(r, layer, expert)));
}

void moe_residency_forgo(moe_residency *r, int32_t layer, int32_t expert) {
    residency_entry *e = residency_at(r, layer, expert);
    if (e->wish != WISH_EXPECTED || e->expected > 1 || e->needed > 0 || e->slot >= 0) return;
    residency_set_wish(r, e, moe_eviction_announced(r->eviction, residency_number(r, e)) ? WISH_HINTED : WISH_NONE);
}

moe_expert *moe_residency_acquire_image(moe_residency *r, int32_t layer, int32_t expert, int32_t rows) {
    residency_entry *e = residency_at(r, layer, expert);
    MOE_ASSERT(e->imaged > 0 && e->image);
    e->image->users++;
    e->image->last_use = ++r->use;
    moe_eviction_used(r->eviction, residency_number(r, e), r->batches);
    r->counts.host_experts++;
    r->counts.host_rows += (uint64_t)rows;
    return r->config.host->ops->host_expert(r->host_experts, (int32_t)(e->image - r->images), e->image->memory);
}

void moe_residency_release_image(moe_residency *r, int32_t layer, int32_t expert) {
    residency_entry *e = residency_at(r, layer, expert);
    MOE_ASSERT(e->image && e->image->users > 0);
    e->image->users--;
    wish(r, e, WISH_HOTTER);
}

void moe_residency_batch_ended(moe_residency *r) { r->batches++; }

void moe_residency_turn(moe_residency *r) {
    do {
        residency_collect(r);
        residency_copy(r);
    } while (moe_residency_has_work(r)); /* a backend without threads copies inside the submission */
}

bool moe_residency_has_work(moe_residency *r) {
    for (int i = 0; i < MOE_RESIDENCY_MAX_PIECES; i++)
        if (r->pieces[i].busy && atomic_load(&r->pieces[i].done)) return true;
    return moe_loader_done(&r->packer);
}

bool moe_residency_copying(const moe_residency *r) { return r->pieces_out > 0; }

uint64_t moe_residency_progress(const moe_residency *r) { return r->pieces_ended + r->counts.packed; }
