/* Copies of the residency: which expert's piece is next, which slot and image it takes, what is given up. */
#include <stdio.h>

#include "expert-worker/residency_internal.h"

void residency_fail(moe_residency *r, const moe_error *why) {
    if (r->failure.code != MOE_OK) return;
    r->failure = *why;
    r->failure.code = MOE_INTERNAL; /* whatever it was: this worker cannot go on, others can */
}

void residency_set_wish(moe_residency *r, residency_entry *e, residency_wish wish) {
    if (e->wish != WISH_NONE) TAILQ_REMOVE(&r->wishes[e->wish], e, link);
    e->wish = (uint8_t)wish;
    if (wish != WISH_NONE) TAILQ_INSERT_TAIL(&r->wishes[wish], e, link);
}

/* ---- slots ---- */

static void note_copy(const moe_residency *r, const residency_slot *s, int32_t entry, moe_timeline_kind kind) {
    int32_t num_experts = r->config.model->config.num_experts;
    moe_timeline_add(r->config.timeline, kind, entry / num_experts, entry % num_experts, s->began_ns);
}

static void set_empty(moe_residency *r, residency_slot *s) {
    int32_t slot = (int32_t)(s - r->slot);
    s->state = SLOT_EMPTY;
    s->entry = -1;
    r->num_empty++;
    if (slot < r->first_empty) r->first_empty = slot;
}

void residency_slot_ready(moe_residency *r, int32_t slot, int32_t entry) {
    r->slot[slot].state = SLOT_READY;
    r->ready_entry[slot] = entry;
    r->num_ready++;
    moe_eviction_loaded(r->eviction, entry, r->batches);
}

void residency_empty_slot(moe_residency *r, residency_entry *e) {
    residency_slot *s = &r->slot[e->slot];
    MOE_ASSERT(s->state == SLOT_READY && s->users == 0);
    if (!s->used) r->counts.wasted_bytes += (uint64_t)r->size.image_bytes;
    r->ready_entry[e->slot] = -1;
    e->slot = -1;
    r->num_ready--;
    set_empty(r, s);
}

void residency_give_up(moe_residency *r, residency_entry *e) {
    if (e->slot < 0 || r->slot[e->slot].state != SLOT_FILLING) return;
    residency_slot *s = &r->slot[e->slot];
    r->counts.wasted_bytes += (uint64_t)s->submitted_bytes;
    note_copy(r, s, s->entry, MOE_TIMELINE_GIVEN_UP);
    e->slot = s->entry = -1;
    if (s->pieces == 0) set_empty(r, s);
}

static bool not_needed(void *ctx, int32_t slot) {
    const moe_residency *r = ctx;
    const residency_slot *s = &r->slot[slot];
    return s->users == 0 && r->entries[s->entry].needed == 0;
}

static bool not_wanted(void *ctx, int32_t slot) {
    const moe_residency *r = ctx;
    return not_needed(ctx, slot) && r->entries[r->slot[slot].entry].expected == 0;
}

static int32_t victim_of(moe_residency *r, bool (*may_go)(void *ctx, int32_t slot)) {
    return moe_eviction_victim(r->eviction, r->ready_entry, r->num_slots, may_go, r);
}

static int32_t first_empty(moe_residency *r) {
    if (r->num_empty == 0) return -1;
    while (r->slot[r->first_empty].state != SLOT_EMPTY) r->first_empty++;
    return r->first_empty;
}

/* What a batch needs goes before a copy for later that has not been submitted whole. */
static int32_t take_over(moe_residency *r) {
    for (int32_t i = 0; i < r->num_slots; i++) {
        const residency_slot *s = &r->slot[i];
        if (s->state != SLOT_FILLING || s->entry < 0 || s->pieces > 0) continue;
        if (r->entries[s->entry].needed > 0) continue;
        residency_give_up(r, &r->entries[s->entry]);
        return i;
    }
    return -1;
}

/* What is known of the slots while wishes of one level are looked through. */
typedef struct search {
    bool full;       /* no slot is to be had */
    int32_t coldest; /* the slot that a hotter expert may have; -1: not known */
} search;

static int32_t none(search *found) {
    found->full = true;
    return -1;
}

/* An expert that was announced, or that a call waits for, makes room for what is needed alone; without a need the hotter one stays. */
static int32_t slot_for(moe_residency *r, const residency_entry *e, search *found) {
    residency_wish wish = (residency_wish)e->wish;
    int32_t slot = first_empty(r);
    if (slot >= 0) return slot;
    if (wish == WISH_SPARE) return none(found);
    slot = wish == WISH_HOTTER && found->coldest >= 0 ? found->coldest : victim_of(r, not_wanted);
    if (slot < 0 && wish == WISH_NEEDED) slot = victim_of(r, not_needed);
    if (slot < 0 && wish == WISH_NEEDED) slot = take_over(r);
    if (slot < 0) return none(found);
    if (r->slot[slot].state != SLOT_READY) return slot; /* taken over */
    residency_entry *victim = &r->entries[r->slot[slot].entry];
    bool announced = moe_eviction_announced(r->eviction, residency_number(r, victim));
    if (wish != WISH_NEEDED && announced) return none(found);
    bool hotter = moe_eviction_hotter(r->eviction, residency_number(r, e), residency_number(r, victim));
    found->coldest = wish == WISH_HOTTER && !hotter ? slot : -1;
    if (found->coldest >= 0) return -1;
    residency_empty_slot(r, victim);
    if (victim->expected == 0 && !announced) return slot;
    residency_set_wish(r, victim, WISH_EXPECTED); /* it is to come back, */
    residency_weaken(r, victim);                  /* as far as it is wanted */
    return slot;
}

/* ---- images ---- */

static bool image_free(const moe_image *i) { return !i->lent && i->users == 0; }

moe_image *moe_residency_take_image(moe_residency *r) {
    for (int32_t i = 0; i < r->num_images; i++) {
        if (!image_free(&r->images[i]) || r->images[i].expert >= 0) continue;
        r->images[i].lent = true;
        return &r->images[i];
    }
    return NULL;
}

/* Whether an image may go for an expert that is wanted as `wish`: none that is being copied, and none that is wanted as much. */
static bool image_replaceable(const moe_residency *r, const moe_image *m, residency_wish wish) {
    if (!image_free(m)) return false;
    if (m->expert < 0) return true;
    const residency_entry *e = &r->entries[m->expert];
    return e->imaged == 0 && e->wish > wish && (e->slot < 0 || residency_ready(r, e));
}

static moe_image *replace_image(moe_residency *r, residency_wish wish) {
    moe_image *oldest = NULL;
    for (int32_t i = 0; i < r->num_images; i++) {
        moe_image *m = &r->images[i];
        if (image_replaceable(r, m, wish) && (!oldest || m->last_use < oldest->last_use)) oldest = m;
    }
    if (oldest && oldest->expert >= 0) r->entries[oldest->expert].image = NULL;
    if (oldest) oldest->expert = -1;
    return oldest;
}

void moe_residency_return_image(moe_image *image) {
    if (!image) return;
    image->lent = false;
    image->expert = -1;
    image->last_use = 0;
}

/* Begins to make the image of an expert that is in the checkpoint alone, one at a time. */
static void pack(moe_residency *r, const residency_entry *e) {
    int32_t number = residency_number(r, e), num_experts = r->config.model->config.num_experts;
    if (!moe_loader_idle(&r->packer)) return;
    moe_image *image = moe_residency_take_image(r);
    if (!image) image = replace_image(r, (residency_wish)e->wish);
    if (!image) return;
    image->lent = true;
    r->counts.packed++;
    const moe_loader_task task = {.layer = number / num_experts, .expert = number % num_experts, .image = image, .known = true};
    moe_loader_start(&r->packer, &task);
}

static void take_packed(moe_residency *r) {
    moe_loader_task task;
    if (!moe_loader_take(&r->packer, &task)) return;
    residency_entry *e = residency_at(r, task.layer, task.expert);
    if (task.status != MOE_OK) residency_fail(r, &task.error);
    if (task.status != MOE_OK || !e->held || e->image) {
        moe_residency_return_image(task.image);
        return;
    }
    task.image->lent = false;
    task.image->expert = residency_number(r, e);
    task.image->last_use = ++r->use;
    e->image = task.image;
    if (e->imaged > 0 && e->needed == 0) residency_weaken(r, e); /* the host computes it */
}

/* ---- pieces ---- */

/* The wake is inside the lock, so that who sees `done` may free residency and transport. */
static void on_piece(moe_job *job) {
    residency_piece *p = job->owner;
    moe_residency *r = p->residency;
    pthread_mutex_lock(&r->mutex);
    if (r->config.ended) atomic_fetch_add(r->config.ended, 1);
    atomic_store(&p->done, true);
    r->config.transport->ops->wake(r->config.transport);
    pthread_mutex_unlock(&r->mutex);
}

static residency_piece *free_piece(moe_residency *r) {
    if (r->pieces_out >= r->most_out) return NULL;
    for (int i = 0; i < MOE_RESIDENCY_MAX_PIECES; i++)
        if (!r->pieces[i].busy) return &r->pieces[i];
    return NULL;
}

static void submit_piece(moe_residency *r, residency_entry *e, residency_piece *p) {
    residency_slot *s = &r->slot[e->slot];
    int64_t left = r->size.image_bytes - s->submitted_bytes;
    int64_t bytes = left < r->config.tiers.piece_bytes ? left : r->config.tiers.piece_bytes;
    p->fill = (moe_slot_fill){s->expert, e->image->memory, s->submitted_bytes, bytes};
    p->job = (moe_job){.done = on_piece, .owner = p};
    p->residency = r;
    p->slot = s;
    p->image = e->image;
    p->busy = true;
    atomic_store(&p->done, false);
    p->image->users++;
    p->image->last_use = ++r->use;
    s->pieces++;
    s->submitted_bytes += bytes;
    r->pieces_out++;
    if (s->submitted_bytes == r->size.image_bytes) residency_set_wish(r, e, WISH_NONE);
    r->config.backend->ops->slot_fill_submit(r->config.backend, &p->fill, &p->job);
}

static void end_piece(moe_residency *r, residency_piece *p) {
    residency_slot *s = p->slot;
    moe_error why;
    p->busy = false;
    r->pieces_out--;
    r->pieces_ended++;
    p->image->users--;
    s->pieces--;
    r->counts.copied_bytes += (uint64_t)p->fill.bytes;
    moe_cold_observe_copy(&r->config.tiers.costs.copy_byte_ns, p->fill.bytes, p->job.status == MOE_OK ? p->job.copy_ns : 0);
    if (p->job.status != MOE_OK) {
        moe_fail(&why, p->job.status, "copying an expert to the device: %.200s", p->job.message);
        residency_fail(r, &why);
    }
    if (s->pieces > 0) return;
    if (s->entry < 0) {
        set_empty(r, s);
    } else if (s->submitted_bytes == r->size.image_bytes) {
        residency_slot_ready(r, (int32_t)(s - r->slot), s->entry);
        note_copy(r, s, s->entry, s->ahead ? MOE_TIMELINE_AHEAD : MOE_TIMELINE_DEMAND);
    }
}

static bool wished_for(const moe_residency *r) {
    for (int level = 0; level < WISH_SPARE; level++)
        if (!TAILQ_EMPTY(&r->wishes[level])) return true;
    return false;
}

/* The loop may have been away for long, with a large batch: the next time more is on its way. */
static void adapt(moe_residency *r, int32_t ended) {
    r->calm += ended;
    bool idle = ended > 0 && r->pieces_out == 0 && wished_for(r);
    if (idle && r->most_out < MOE_RESIDENCY_MAX_PIECES)
        r->most_out++;
    else if (r->calm >= MOE_RESIDENCY_CALM_PIECES && r->most_out > MOE_RESIDENCY_PIECES)
        r->most_out--;
    else if (!idle)
        return;
    r->calm = 0;
}

void residency_collect(moe_residency *r) {
    int32_t out = r->pieces_out;
    for (int i = 0; i < MOE_RESIDENCY_MAX_PIECES; i++)
        if (r->pieces[i].busy && atomic_load(&r->pieces[i].done)) end_piece(r, &r->pieces[i]);
    adapt(r, out - r->pieces_out);
    take_packed(r);
}

/* Brings the expert a piece further; false where that must wait for an image or a slot. */
static bool advance(moe_residency *r, residency_entry *e, residency_piece *p, search *found) {
    if (e->wish == WISH_SPARE && e->slot < 0 && r->num_empty == 0) {
        residency_set_wish(r, e, WISH_NONE);
        return false;
    }
    if (!e->image && e->wish != WISH_HOTTER) {
        pack(r, e);
        return false;
    }
    if (e->slot < 0) {
        int32_t slot = found->full || !e->image ? -1 : slot_for(r, e, found);
        if (slot < 0 && e->wish == WISH_HOTTER) residency_set_wish(r, e, WISH_NONE); /* until it is used again */
        if (slot < 0) return false;
        residency_slot *s = &r->slot[slot];
        if (s->state == SLOT_EMPTY) r->num_empty--;
        *s = (residency_slot){.expert = s->expert, .state = SLOT_FILLING, .entry = residency_number(r, e)};
        s->ahead = e->wish == WISH_HINTED;
        s->began_ns = moe_timeline_now(r->config.timeline);
        e->slot = slot;
    }
    submit_piece(r, e, p);
    return true;
}

void residency_copy(moe_residency *r) {
    for (int level = 0; level < WISH_NONE && r->failure.code == MOE_OK; level++) {
        residency_entry *e, *following;
        search found = {.coldest = -1};
        for (e = TAILQ_FIRST(&r->wishes[level]); e; e = following) {
            following = TAILQ_NEXT(e, link);
            while (e->wish == level) {
                residency_piece *p = free_piece(r);
                if (!p) return;
                if (!advance(r, e, p, &found)) break;
            }
        }
    }
}
