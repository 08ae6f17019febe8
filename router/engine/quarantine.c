#include "router/engine/quarantine.h"

#include <stdio.h>
#include <string.h>

static moe_quarantine_entry *find(const moe_quarantine *q, const char *id) {
    for (int i = 0; i < q->count; i++)
        if (strcmp(q->entries[i].id, id) == 0) return (moe_quarantine_entry *)&q->entries[i];
    return NULL;
}

static int64_t last_trouble_ns(const moe_quarantine_entry *e) {
    return e->troubles_ns[(e->next + MOE_FLAP_LIMIT - 1) % MOE_FLAP_LIMIT];
}

/* A new entry; where the table is full, that of the worker which was quiet for longest. */
static moe_quarantine_entry *take_entry(moe_quarantine *q, const char *id) {
    moe_quarantine_entry *e = &q->entries[0];
    if (q->count < MOE_PLACEMENT_MAX_WORKERS) {
        e = &q->entries[q->count++];
    } else {
        for (int i = 1; i < q->count; i++)
            if (last_trouble_ns(&q->entries[i]) < last_trouble_ns(e)) e = &q->entries[i];
    }
    *e = (moe_quarantine_entry){.next = 0};
    snprintf(e->id, sizeof e->id, "%s", id);
    return e;
}

bool moe_quarantine_trouble(moe_quarantine *q, const char *id, int64_t now_ns) {
    moe_quarantine_entry *e = find(q, id);
    if (!e) e = take_entry(q, id);
    e->troubles_ns[e->next] = now_ns;
    e->next = (e->next + 1) % MOE_FLAP_LIMIT;
    int64_t oldest = e->troubles_ns[e->next];
    if (now_ns < e->until_ns || oldest == 0 || now_ns - oldest > MOE_FLAP_WINDOW_NS) return false;
    bool relapse = e->hold_ns && now_ns - e->until_ns < MOE_QUARANTINE_FORGET_NS;
    e->hold_ns = !relapse                                 ? MOE_QUARANTINE_NS
                 : 2 * e->hold_ns < MOE_QUARANTINE_MAX_NS ? 2 * e->hold_ns
                                                          : MOE_QUARANTINE_MAX_NS;
    e->until_ns = now_ns + e->hold_ns;
    memset(e->troubles_ns, 0, sizeof e->troubles_ns); /* a relapse takes as many again */
    return true;
}

int64_t moe_quarantine_until_ns(const moe_quarantine *q, const char *id) {
    const moe_quarantine_entry *e = find(q, id);
    return e ? e->until_ns : 0;
}
