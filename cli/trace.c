#include "cli/trace.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/alloc.h"
#include "common/model/config.h"

#define VERSION 1

static const char magic[8] = {'M', 'O', 'E', 'T', 'R', 'A', 'C', 'E'};

typedef struct header {
    char magic[8];
    uint32_t version, layers, experts, top_k, planes, texts;
    uint64_t expert_bytes;
} header;

static size_t plane_elements(const moe_trace *t, int32_t tokens) {
    return (size_t)tokens * (size_t)t->num_layers * (size_t)t->top_k;
}

moe_status moe_trace_resize(moe_trace *t, int32_t text, int32_t num_tokens, moe_error *err) {
    moe_trace_text *into = &t->texts[text];
    size_t had = plane_elements(t, into->num_tokens), has = plane_elements(t, num_tokens);
    if (num_tokens <= into->num_tokens) return MOE_OK;
    for (int32_t plane = 0; plane < t->num_planes; plane++) {
        uint16_t *routes = moe_realloc(into->routes[plane], has, sizeof *routes);
        if (!routes) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a trace");
        memset(routes + had, 0, (has - had) * sizeof *routes);
        into->routes[plane] = routes;
    }
    into->num_tokens = num_tokens;
    return MOE_OK;
}

void moe_trace_free(moe_trace *t) {
    for (int32_t i = 0; i < t->num_texts; i++)
        for (int plane = 0; plane < MOE_TRACE_PLANES; plane++) moe_free(t->texts[i].routes[plane]);
    moe_free(t->texts);
    *t = (moe_trace){0};
}

static bool write_text(FILE *f, const moe_trace *t, const moe_trace_text *text) {
    uint32_t tokens = (uint32_t)text->num_tokens;
    size_t elements = plane_elements(t, text->num_tokens);
    bool written = fwrite(&tokens, sizeof tokens, 1, f) == 1;
    for (int32_t plane = 0; plane < t->num_planes && elements; plane++)
        written = written && fwrite(text->routes[plane], sizeof **text->routes, elements, f) == elements;
    return written;
}

moe_status moe_trace_write(const moe_trace *t, const char *file, moe_error *err) {
    char part[PATH_MAX];
    if (snprintf(part, sizeof part, "%s.part", file) >= PATH_MAX)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%.128s…: the path is too long", file);
    FILE *f = fopen(part, "wb");
    if (!f) return moe_fail(err, MOE_PERMISSION_DENIED, "cannot write %s: %s", part, strerror(errno));
    header h = {.version = VERSION,
                .layers = (uint32_t)t->num_layers,
                .experts = (uint32_t)t->num_experts,
                .top_k = (uint32_t)t->top_k,
                .planes = (uint32_t)t->num_planes,
                .texts = (uint32_t)t->num_texts,
                .expert_bytes = (uint64_t)t->expert_bytes};
    memcpy(h.magic, magic, sizeof magic);
    bool written = fwrite(&h, sizeof h, 1, f) == 1;
    for (int32_t i = 0; i < t->num_texts && written; i++) written = write_text(f, t, &t->texts[i]);
    if (fclose(f) == 0 && written && rename(part, file) == 0) return MOE_OK;
    moe_status status = moe_fail(err, MOE_DATA_LOSS, "cannot write %s: %s", file, strerror(errno));
    unlink(part);
    return status;
}

static bool header_sound(const header *h) {
    return memcmp(h->magic, magic, sizeof magic) == 0 && h->version == VERSION && h->layers >= 1 && h->layers <= MOE_MAX_LAYERS &&
           h->experts >= 1 && h->experts <= MOE_MAX_EXPERTS && h->top_k >= 1 && h->top_k <= MOE_MAX_TOP_K &&
           h->top_k <= h->experts && (h->planes == 2 || h->planes == 3) && h->texts <= MOE_TRACE_MAX_TEXTS &&
           h->expert_bytes <= INT64_MAX / MOE_MAX_EXPERTS;
}

/* Piece by piece, so that a length that lies takes no more memory than the file has. */
#define READ_TOKENS 4096

static moe_status read_text(FILE *f, moe_trace *t, int32_t index, moe_error *err) {
    moe_trace_text *text = &t->texts[index];
    uint32_t tokens;
    if (fread(&tokens, sizeof tokens, 1, f) != 1 || tokens > MOE_TRACE_MAX_TOKENS)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "text %d is damaged", index);
    for (int32_t plane = 0; plane < t->num_planes; plane++) {
        size_t elements = plane_elements(t, (int32_t)tokens), piece = plane_elements(t, READ_TOKENS);
        for (size_t have = 0; have < elements; have += piece) {
            size_t more = elements - have < piece ? elements - have : piece;
            uint16_t *routes = moe_realloc(text->routes[plane], have + more, sizeof *routes);
            if (!routes) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a trace");
            text->routes[plane] = routes;
            if (fread(routes + have, sizeof *routes, more, f) != more)
                return moe_fail(err, MOE_INVALID_ARGUMENT, "text %d is cut off", index);
            for (size_t i = have; i < have + more; i++)
                if (routes[i] >= t->num_experts)
                    return moe_fail(err, MOE_INVALID_ARGUMENT, "text %d: expert %d of %d", index, routes[i], t->num_experts);
        }
    }
    text->num_tokens = (int32_t)tokens;
    return MOE_OK;
}

static moe_status read_open(FILE *f, moe_trace *t, moe_error *err) {
    header h;
    if (fread(&h, sizeof h, 1, f) != 1 || !header_sound(&h))
        return moe_fail(err, MOE_INVALID_ARGUMENT, "this is no routing trace");
    *t = (moe_trace){.num_layers = (int32_t)h.layers,
                     .num_experts = (int32_t)h.experts,
                     .top_k = (int32_t)h.top_k,
                     .num_planes = (int32_t)h.planes,
                     .expert_bytes = (int64_t)h.expert_bytes};
    t->texts = moe_calloc(h.texts ? h.texts : 1, sizeof *t->texts);
    if (!t->texts) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a trace");
    t->num_texts = (int32_t)h.texts;
    for (int32_t i = 0; i < t->num_texts; i++) {
        moe_status status = read_text(f, t, i, err);
        if (status != MOE_OK) return status;
    }
    return fgetc(f) == EOF ? MOE_OK : moe_fail(err, MOE_INVALID_ARGUMENT, "there is something behind its end");
}

moe_status moe_trace_read(const char *file, moe_trace *out, moe_error *err) {
    *out = (moe_trace){0};
    FILE *f = fopen(file, "rb");
    if (!f) return moe_fail(err, MOE_NOT_FOUND, "cannot read %s: %s", file, strerror(errno));
    moe_status status = read_open(f, out, err);
    fclose(f);
    if (status == MOE_OK) return MOE_OK;
    moe_trace_free(out);
    return moe_fail_prefix(err, status, "%s", file);
}
