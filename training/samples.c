#include "training/samples.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/alloc.h"
#include "common/elements.h"
#include "common/random.h"

#define GROWTH_BYTES (INT64_C(16) << 20) /* by which the file grows */

struct moe_samples {
    moe_samples_config config;
    int64_t token_bytes, capacity; /* capacity in tokens */
    int fd;
    int64_t file_bytes;
    uint8_t *map; /* [capacity, num_layers, hidden] bf16; the first file_bytes are there */
    int64_t seen, count;
    moe_random random;
    int64_t *slots; /* [max_rows] of the rows under way; -1: not kept */
    int32_t rows, max_rows;
};

static moe_status open_file(moe_samples *s, moe_error *err) {
    s->fd = open(s->config.dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (s->fd < 0)
        return moe_fail(err, MOE_PERMISSION_DENIED, "cannot make a file for samples in %s: %s", s->config.dir, strerror(errno));
    void *map = mmap(NULL, (size_t)(s->capacity * s->token_bytes), PROT_READ | PROT_WRITE, MAP_SHARED, s->fd, 0);
    if (map == MAP_FAILED)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "cannot map %" PRId64 " bytes for samples: %s", s->capacity * s->token_bytes,
                        strerror(errno));
    s->map = map;
    return MOE_OK;
}

moe_status moe_samples_new(const moe_samples_config *config, moe_samples **out, moe_error *err) {
    *out = NULL;
    int64_t token_bytes = (int64_t)config->num_layers * (int64_t)moe_row_bytes(MOE_BF16, config->hidden);
    if (config->max_bytes < token_bytes)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%" PRId64 " bytes for samples: one token takes %" PRId64, config->max_bytes,
                        token_bytes);
    moe_samples *s = moe_calloc(1, sizeof *s);
    if (!s) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    *s = (moe_samples){.config = *config,
                       .token_bytes = token_bytes,
                       .capacity = config->max_bytes / token_bytes,
                       .random = {.state = config->seed},
                       .fd = -1};
    moe_status status = open_file(s, err);
    if (status == MOE_OK)
        *out = s;
    else
        moe_samples_free(&s);
    return status;
}

void moe_samples_free(moe_samples **samples) {
    moe_samples *s = *samples;
    if (!s) return;
    if (s->map) munmap(s->map, (size_t)(s->capacity * s->token_bytes));
    if (s->fd >= 0) close(s->fd);
    moe_free(s->slots);
    moe_free(s);
    *samples = NULL;
}

/* Room is asked for before it is written: a write to a map of a full disk would kill the process. */
static moe_status grow(moe_samples *s, int64_t tokens, moe_error *err) {
    int64_t most = s->capacity * s->token_bytes, want = (tokens < s->capacity ? tokens : s->capacity) * s->token_bytes;
    if (want <= s->file_bytes) return MOE_OK;
    want = (want + GROWTH_BYTES - 1) / GROWTH_BYTES * GROWTH_BYTES;
    if (want > most) want = most;
    int failed = posix_fallocate(s->fd, 0, want);
    if (failed)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "no room for %" PRId64 " bytes of samples in %s: %s", want, s->config.dir,
                        strerror(failed));
    s->file_bytes = want;
    return MOE_OK;
}

static int64_t choose_slot(moe_samples *s) {
    int64_t token = s->seen++;
    if (token < s->capacity) {
        s->count++;
        return token;
    }
    int64_t slot = (int64_t)moe_random_below(&s->random, (uint64_t)s->seen);
    return slot < s->capacity ? slot : -1;
}

moe_status moe_samples_begin(moe_samples *s, int32_t rows, moe_error *err) {
    if (rows > s->max_rows) {
        int64_t *slots = moe_realloc(s->slots, (size_t)rows, sizeof *slots);
        if (!slots) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
        s->slots = slots;
        s->max_rows = rows;
    }
    moe_status status = grow(s, s->seen + rows, err);
    s->rows = status == MOE_OK ? rows : 0;
    for (int32_t i = 0; i < s->rows; i++) s->slots[i] = choose_slot(s);
    return status;
}

static uint8_t *place(const moe_samples *s, int64_t slot, int32_t layer) {
    return s->map + slot * s->token_bytes + (int64_t)layer * (int64_t)moe_row_bytes(MOE_BF16, s->config.hidden);
}

/* Two rows of one begin may have the same slot; the later one stays, in every layer. */
void moe_samples_put(moe_samples *s, int32_t layer, const void *x, moe_dtype dtype) {
    size_t width = (size_t)s->config.hidden, row_bytes = moe_row_bytes(dtype, s->config.hidden);
    for (int32_t i = 0; i < s->rows; i++) {
        const uint8_t *row = (const uint8_t *)x + (size_t)i * row_bytes;
        if (s->slots[i] < 0) continue;
        if (dtype == MOE_BF16)
            memcpy(place(s, s->slots[i], layer), row, row_bytes);
        else
            moe_elements_narrow((const float *)(const void *)row, MOE_BF16, width, place(s, s->slots[i], layer));
    }
}

int64_t moe_samples_count(const moe_samples *s) { return s->count; }
int64_t moe_samples_seen(const moe_samples *s) { return s->seen; }

void moe_samples_read(const moe_samples *s, int64_t row, int32_t layer, float *out) {
    moe_elements_widen(place(s, row, layer), MOE_BF16, (size_t)s->config.hidden, out);
}
