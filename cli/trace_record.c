#include "cli/trace_record.h"

#include <string.h>

#include "common/alloc.h"

/* Texts are numbered in the order of submission, so that two passes over the same texts number them alike. */
static moe_status make_room(moe_trace_recorder *r, uint64_t request /* 1 … */, int32_t position, moe_error *err) {
    moe_trace *t = r->trace;
    if (request > MOE_TRACE_MAX_TEXTS || position >= MOE_TRACE_MAX_TOKENS)
        return moe_fail(err, MOE_OUT_OF_RANGE, "a trace takes %d texts of %d tokens", MOE_TRACE_MAX_TEXTS, MOE_TRACE_MAX_TOKENS);
    int32_t text = (int32_t)request - 1;
    if (text >= r->max_texts) {
        int32_t more = 2 * (text + 1);
        moe_trace_text *texts = moe_realloc(t->texts, (size_t)more, sizeof *texts);
        if (!texts) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a trace");
        memset(texts + r->max_texts, 0, (size_t)(more - r->max_texts) * sizeof *texts);
        t->texts = texts;
        r->max_texts = more;
    }
    if (text >= t->num_texts) t->num_texts = text + 1;
    return moe_trace_resize(t, text, position + 1, err);
}

static void put(const moe_trace *t, int32_t text, moe_trace_plane plane, int32_t token, int32_t layer, const int32_t *experts) {
    uint16_t *out = (uint16_t *)moe_trace_at(t, text, plane, token, layer);
    for (int32_t j = 0; j < t->top_k; j++) out[j] = (uint16_t)experts[j];
}

void moe_trace_on_layer(void *ctx, const moe_layer_view *view) {
    moe_trace_recorder *r = ctx;
    moe_trace *t = r->trace;
    for (int32_t row = 0; row < view->num_rows && r->status == MOE_OK; row++) {
        uint64_t request = view->requests[view->sequences[row]];
        int32_t token = view->positions[row], text = (int32_t)request - 1;
        const int32_t *experts = view->route->experts + (int64_t)row * t->top_k;
        if (view->layer == 0) r->status = make_room(r, request, token, &r->error);
        if (r->status != MOE_OK) return;
        put(t, text, r->pre_gate ? MOE_TRACE_PRE_GATE : MOE_TRACE_GATE, token, view->layer, experts);
        if (r->pre_gate) continue;
        if (view->layer == 0) put(t, text, MOE_TRACE_HINT, token, 0, experts);
        if (view->next) put(t, text, MOE_TRACE_HINT, token, view->layer + 1, view->next->experts + (int64_t)row * t->top_k);
    }
}
