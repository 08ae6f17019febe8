#include "tests/support/residency_check.h"

#include "expert-worker/residency_internal.h"
#include "tests/support/test.h"

static void check_slots(const moe_residency *r) {
    int32_t empty = 0, ready = 0, pieces = 0;
    for (int32_t i = 0; i < r->num_slots; i++) {
        const residency_slot *s = &r->slot[i];
        empty += s->state == SLOT_EMPTY;
        ready += s->state == SLOT_READY;
        pieces += s->pieces;
        assert_true(s->users >= 0 && s->pieces >= 0 && s->submitted_bytes <= r->size.image_bytes);
        if (s->state != SLOT_FILLING) assert_int_equal(s->pieces, 0); /* what is read is not written */
        if (s->state != SLOT_READY) assert_int_equal(s->users, 0);    /* what is written is not read */
        if (s->state == SLOT_READY) assert_true(s->entry >= 0 && s->submitted_bytes == r->size.image_bytes);
        if (s->entry >= 0) assert_int_equal(r->entries[s->entry].slot, i);
    }
    assert_int_equal(empty, r->num_empty);
    assert_int_equal(ready, r->num_ready);
    assert_int_equal(pieces, r->pieces_out);
}

static void check_entries(const moe_residency *r) {
    int32_t listed = 0, wished = 0, needs = 0;
    const residency_entry *e;
    for (int level = 0; level < WISH_NONE; level++) TAILQ_FOREACH(e, &r->wishes[level], link) {
        assert_int_equal(e->wish, level);
        listed++;
    }
    for (int32_t i = 0; i < r->num_entries; i++) {
        e = &r->entries[i];
        wished += e->wish != WISH_NONE;
        needs += e->needed + e->imaged;
        assert_true(e->needed >= 0 && e->expected >= 0 && e->imaged >= 0);
        if (e->imaged > 0 && e->wish != WISH_NEEDED) assert_non_null(e->image); /* there, or packed next */
        if (e->imaged > 0 && e->needed == 0 && e->wish == WISH_NEEDED) assert_null(e->image); /* no copy is made for it */
        if (!e->held) assert_true(e->slot < 0 && !e->image && e->wish == WISH_NONE && e->needed == 0 && e->imaged == 0);
        if (e->slot >= 0) assert_int_equal(r->slot[e->slot].entry, i);
        if (e->image) assert_int_equal(e->image->expert, i);
        if (e->needed > 0 && e->wish != WISH_NEEDED) assert_true(e->slot >= 0); /* there, or all of it on its way */
    }
    assert_int_equal(listed, wished);
    assert_int_equal(needs, r->needs);
}

static void check_images(const moe_residency *r) {
    int32_t users = 0;
    for (int32_t i = 0; i < r->num_images; i++) {
        const moe_image *m = &r->images[i];
        users += m->users;
        assert_true(m->users >= 0 && (m->users == 0 || m->memory));
        if (m->lent) assert_int_equal(m->users, 0); /* what is packed into is not copied from */
        if (m->expert >= 0) assert_ptr_equal(r->entries[m->expert].image, m);
    }
    /* each piece has its image; and so has each expert that the host computes */
    assert_true(r->config.tiers.cold == MOE_COLD_FETCH ? users == r->pieces_out : users >= r->pieces_out);
}

void residency_check(const moe_residency *r) {
    check_slots(r);
    check_entries(r);
    check_images(r);
    assert_true(r->counts.wasted_bytes <= r->counts.copied_bytes + (uint64_t)(r->pieces_out * r->size.image_bytes));
    assert_int_equal(r->failure.code, MOE_OK);
}

void residency_counts_add(moe_residency_counts *to, const moe_residency_counts *more) {
    to->hits += more->hits;
    to->late_hits += more->late_hits;
    to->misses += more->misses;
    to->copied_bytes += more->copied_bytes;
    to->wasted_bytes += more->wasted_bytes;
    to->packed += more->packed;
    to->host_experts += more->host_experts;
    to->host_rows += more->host_rows;
}
