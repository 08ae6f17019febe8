/* Another number of slots in a running process, for measurements: images stay, so that nothing is read or packed again. */
#include <time.h>

#include "common/clock.h"
#include "expert-worker/residency_internal.h"

#define WINDOW 4 /* whole experts on their way at once: enough that the link never waits for us */
#define MEASURE_NS (20 * MOE_NS_PER_MS)
#define POLL_NS (10 * MOE_NS_PER_US)

typedef struct whole_copy {
    moe_slot_fill fill;
    moe_job job;
    _Atomic bool done;
} whole_copy;

static void on_copied(moe_job *job) { atomic_store(&((whole_copy *)job->owner)->done, true); }

static void await_copy(const moe_residency *r, const whole_copy *copy) {
    moe_backend *backend = r->config.backend;
    while (!atomic_load(&copy->done)) {
        if (backend->ops->poll)
            backend->ops->poll(backend);
        else
            nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    }
}

static void submit(const moe_residency *r, whole_copy *copy, moe_expert *slot, const moe_image *image) {
    copy->fill = (moe_slot_fill){slot, image->memory, 0, r->size.image_bytes};
    copy->job = (moe_job){.done = on_copied, .owner = copy};
    atomic_store(&copy->done, false);
    r->config.backend->ops->slot_fill_submit(r->config.backend, &copy->fill, &copy->job);
}

static void set_ready(moe_residency *r, residency_entry *e, int32_t slot) {
    e->slot = slot;
    r->slot[slot] = (residency_slot){.expert = r->slot[slot].expert,
                                     .entry = residency_number(r, e),
                                     .submitted_bytes = r->size.image_bytes,
                                     .used = true}; /* nobody asked for it, so it cannot be wasted */
    r->num_empty--;
    residency_slot_ready(r, slot, residency_number(r, e));
}

/* The first experts of each layer with images, one to each slot. Returns how many there are. */
static int32_t assign(moe_residency *r) {
    const moe_model_config *model = &r->config.model->config;
    int32_t count = 0;
    for (int32_t i = 0; i < r->num_entries && count < r->num_slots; i++) {
        residency_entry *e = residency_at(r, i % model->num_moe_layers, i / model->num_moe_layers);
        if (e->image) set_ready(r, e, count++);
    }
    return count;
}

/* Copies what was assigned to the first `count` slots. */
static moe_status copy_all(const moe_residency *r, int32_t count, moe_error *err) {
    whole_copy copies[WINDOW];
    moe_status status = MOE_OK;
    for (int32_t i = 0; i < count + WINDOW; i++) {
        whole_copy *c = &copies[i % WINDOW];
        if (i >= WINDOW && i - WINDOW < count) await_copy(r, c);
        if (i >= WINDOW && i - WINDOW < count && c->job.status != MOE_OK)
            status = moe_fail(err, c->job.status, "copying an expert to the device: %.200s", c->job.message);
        if (i < count) submit(r, c, r->slot[i].expert, r->entries[r->slot[i].entry].image);
    }
    return status;
}

/* Once, since new memory is slow at first, and again for the clock. */
static moe_status fill(moe_residency *r, double *copy_bytes_per_s, moe_error *err) {
    int32_t count = assign(r);
    moe_status status = copy_all(r, count, err);
    int64_t began_ns = moe_now_ns(moe_clock_real()), took_ns = 0, copied = 0;
    while (status == MOE_OK && count > 0 && took_ns < MEASURE_NS) {
        status = copy_all(r, count, err);
        copied += count * r->size.image_bytes;
        took_ns = moe_now_ns(moe_clock_real()) - began_ns;
    }
    if (copy_bytes_per_s) *copy_bytes_per_s = took_ns > 0 ? (double)copied * (double)MOE_NS_PER_S / (double)took_ns : 0;
    return status;
}

/* Nothing is wanted or copied any more. */
static void settle(moe_residency *r) {
    for (int32_t i = 0; i < r->num_entries; i++) {
        residency_entry *e = &r->entries[i];
        MOE_ASSERT(e->needed == 0 && e->expected == 0);
        residency_set_wish(r, e, WISH_NONE);
        residency_give_up(r, e);
    }
    residency_await_pieces(r);
    for (int32_t i = 0; i < r->num_entries; i++) r->entries[i].slot = -1;
}

moe_status moe_residency_resize(moe_residency *r, moe_memory_limit device, moe_cold_experts cold, double *copy_bytes_per_s,
                                moe_error *err) {
    MOE_ASSERT(cold == MOE_COLD_FETCH || r->config.host);
    moe_memory_limit before = r->config.tiers.device;
    int32_t num_slots = r->num_slots, num_images = r->num_images;
    r->config.tiers.device = device;
    moe_status status = residency_count_places(r, err);
    int32_t wanted = r->num_slots;
    r->num_slots = num_slots;
    r->num_images = num_images;
    if (status != MOE_OK) {
        r->config.tiers.device = before;
        return status;
    }
    settle(r);
    r->config.tiers.cold = cold;
    residency_close_slots(r);
    r->num_slots = wanted;
    status = residency_open_slots(r, err);
    return status == MOE_OK ? fill(r, copy_bytes_per_s, err) : status;
}
