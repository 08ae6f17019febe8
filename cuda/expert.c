#include "cuda/expert.h"

#include "common/alloc.h"
#include "cuda/expert_kernels.h"

#define ROW_GROUP 8 /* rows of gate, then of up; padding is in the last group */
#define ADVICE "hold fewer experts here (more workers, --device-memory), or leave less to the KV cache (--kv-cache-memory)"

typedef struct moe_cuda_slab {
    struct moe_cuda_slab *next;
    uint8_t *memory;
    size_t slot_bytes;
    int32_t num_slots, num_free;
    int32_t free_slots[]; /* [num_slots], the first num_free are valid */
} moe_cuda_slab;

static size_t aligned(size_t bytes) { return (bytes + MOE_CUDA_ALIGNMENT - 1) / MOE_CUDA_ALIGNMENT * MOE_CUDA_ALIGNMENT; }

/* ---- layout ---- */

moe_cuda_network_shape moe_cuda_network_shape_of(const moe_ffn_weights *w, int32_t block_lo, int32_t block_hi,
                                                 moe_dtype profile) {
    moe_cuda_network_shape s = {.hidden = (int32_t)w->up.cols, .intermediate = (int32_t)w->up.rows, .gated = moe_ffn_gated(w)};
    bool same = w->up.dtype == w->down.dtype && (!s.gated || w->gate.dtype == w->up.dtype);
    s.block_lo = block_lo;
    s.block_hi = block_hi;
    s.width = moe_ffn_block_start(s.intermediate, block_hi) - moe_ffn_block_start(s.intermediate, block_lo);
    s.padded = (s.width + ROW_GROUP - 1) / ROW_GROUP * ROW_GROUP;
    s.dtype = moe_cuda_weight_dtype(profile, same ? w->up.dtype : MOE_F32);
    return s;
}

/* Of `rows` units of the intermediate width: their rows of up and, where there are any, of gate. */
static size_t gate_up_bytes(const moe_cuda_network_shape *s, int32_t rows) {
    return (s->gated ? 2 : 1) * (size_t)rows * (size_t)s->hidden * moe_dtype_bytes(s->dtype);
}

static size_t down_offset(const moe_cuda_network_shape *s) { return aligned(gate_up_bytes(s, s->padded)); }

static size_t tail_offset(const moe_cuda_network_shape *s) {
    return down_offset(s) + aligned((size_t)s->hidden * (size_t)s->padded * moe_dtype_bytes(s->dtype));
}

size_t moe_cuda_network_bytes(const moe_cuda_network_shape *s) { return tail_offset(s) + MOE_CUDA_SLOT_TAIL_BYTES; }

moe_cuda_network moe_cuda_network_at(const moe_cuda_network_shape *shape, void *memory) {
    uint8_t *at = memory;
    moe_cuda_network n = {.shape = *shape, .gate_up = at};
    if (at) n.down = at + down_offset(shape);
    if (at) n.tail = at + tail_offset(shape);
    return n;
}

/* What the tensor-core kernels of compute capability 9.0 want to know of the matrices; the others, and other shapes, do without.
 */
static moe_status upload_maps(moe_cuda_upload *upload, const moe_cuda_network *n, moe_error *err) {
    _Static_assert(sizeof(moe_cuda_expert_maps) <= MOE_CUDA_SLOT_TAIL_BYTES, "the slot's tail holds the maps");
    const moe_cuda_network_shape *s = &n->shape;
    _Alignas(64) moe_cuda_expert_maps maps;
    if (upload->device->arch != 90 || s->dtype != MOE_BF16 || !moe_cuda_expert_supported(s->hidden, s->width, 0)) return MOE_OK;
    cudaError_t code = moe_cuda_expert_maps_make(n->gate_up, n->down, s->hidden, s->width, s->gated, &maps);
    if (code != cudaSuccess) return moe_cuda_check(code, "describing an expert's matrices to the GPU", err);
    return moe_cuda_upload_bytes(upload, n->tail, &maps, sizeof maps, err);
}

/* The matrices on their way into the network's places. */
typedef struct network_planes {
    moe_cuda_plane gate, up, down; /* gate: where the network is gated */
} network_planes;

static network_planes planes_of(const moe_cuda_network *n, const moe_ffn_weights *w) {
    const moe_cuda_network_shape *s = &n->shape;
    int64_t lo = moe_ffn_block_start(s->intermediate, s->block_lo), hi = moe_ffn_block_start(s->intermediate, s->block_hi);
    network_planes p = {.gate = {.tensor = &w->gate,
                                 .row_lo = lo,
                                 .row_hi = hi,
                                 .col_hi = s->hidden,
                                 .dtype = s->dtype,
                                 .stride = s->hidden,
                                 .run = ROW_GROUP,
                                 .run_stride = 2 * ROW_GROUP,
                                 .to = n->gate_up}};
    p.up = p.gate;
    p.up.tensor = &w->up;
    if (s->gated)
        p.up.to = (uint8_t *)n->gate_up + gate_up_bytes(s, ROW_GROUP) / 2;
    else
        p.up.run_stride = ROW_GROUP;
    p.down = (moe_cuda_plane){.tensor = &w->down,
                              .row_hi = s->hidden,
                              .col_lo = lo,
                              .col_hi = hi,
                              .dtype = s->dtype,
                              .stride = s->padded,
                              .run = 1,
                              .run_stride = 1,
                              .to = n->down};
    return p;
}

/* The padding rows are in the last group of up and, where there is one, of gate. */
static uint8_t *last_groups(const moe_cuda_network *n, size_t *bytes) {
    *bytes = gate_up_bytes(&n->shape, ROW_GROUP);
    return (uint8_t *)n->gate_up + (size_t)(n->shape.padded / ROW_GROUP - 1) * *bytes;
}

moe_status moe_cuda_network_upload(moe_cuda_upload *upload, const moe_cuda_network *n, const moe_ffn_weights *w, moe_error *err) {
    const network_planes p = planes_of(n, w);
    moe_status status = MOE_OK;
    if (n->shape.padded != n->shape.width) {
        size_t bytes;
        uint8_t *last = last_groups(n, &bytes);
        status = moe_cuda_check(cudaMemsetAsync(last, 0, bytes, upload->stream), "clearing an expert's slot", err);
    }
    if (status == MOE_OK && n->shape.gated) status = moe_cuda_upload_plane(upload, &p.gate, err);
    if (status == MOE_OK) status = moe_cuda_upload_plane(upload, &p.up, err);
    if (status == MOE_OK) status = moe_cuda_upload_plane(upload, &p.down, err);
    if (status == MOE_OK) status = upload_maps(upload, n, err);
    return status;
}

moe_image_layout moe_cuda_network_layout(const moe_cuda_network_shape *s) {
    int64_t element = (int64_t)moe_dtype_bytes(s->dtype), row = s->hidden * element;
    moe_image_matrix inner = {.rows = s->width,
                              .cols = s->hidden,
                              .dtype = s->dtype,
                              .row_bytes = row,
                              .run = ROW_GROUP,
                              .run_bytes = (s->gated ? 2 : 1) * ROW_GROUP * row};
    moe_image_layout layout = {.up = inner};
    if (s->gated) layout.gate = inner;
    if (s->gated) layout.up.offset = ROW_GROUP * row;
    layout.down = (moe_image_matrix){.offset = (int64_t)down_offset(s),
                                     .rows = s->hidden,
                                     .cols = s->width,
                                     .dtype = s->dtype,
                                     .row_bytes = s->padded * element,
                                     .run = 1,
                                     .run_bytes = s->padded * element};
    return layout;
}

size_t moe_cuda_network_image_bytes(const moe_cuda_network_shape *s) { return tail_offset(s); }

void moe_cuda_network_pack(const moe_cuda_network *n, const moe_ffn_weights *w) {
    const network_planes p = planes_of(n, w);
    if (n->shape.padded != n->shape.width) {
        size_t bytes;
        uint8_t *last = last_groups(n, &bytes);
        memset(last, 0, bytes);
    }
    if (n->shape.gated) moe_cuda_plane_pack(&p.gate);
    moe_cuda_plane_pack(&p.up);
    moe_cuda_plane_pack(&p.down);
}

moe_status moe_cuda_network_prepare(moe_cuda_upload *upload, const moe_cuda_network *n, moe_error *err) {
    return upload_maps(upload, n, err);
}

/* ---- slots ---- */

moe_status moe_cuda_slots_open(const moe_cuda_device *device, moe_cuda_slots *out, moe_error *err) {
    *out = (moe_cuda_slots){.device = device};
    if (pthread_mutex_init(&out->lock, NULL) != 0) return moe_fail(err, MOE_INTERNAL, "no mutex for expert slots");
    return MOE_OK;
}

void moe_cuda_slots_close(moe_cuda_slots *slots) {
    while (slots->slabs) {
        moe_cuda_slab *slab = slots->slabs;
        slots->slabs = slab->next;
        moe_cuda_device_free(slab->memory);
        moe_free(slab);
    }
    if (slots->device) pthread_mutex_destroy(&slots->lock);
}

/* A slab for slots of this size; fewer slots where the device has no room for the wanted number. */
static moe_status new_slab(moe_cuda_slots *slots, size_t slot_bytes, moe_cuda_slab **out, moe_error *err) {
    size_t wanted = MOE_CUDA_MIN_SLAB_BYTES;
    moe_status status;
    for (const moe_cuda_slab *s = slots->slabs; s && wanted < MOE_CUDA_SLAB_BYTES; s = s->next)
        if (s->slot_bytes == slot_bytes) wanted *= 2;
    size_t count = wanted / slot_bytes ? wanted / slot_bytes : 1;
    moe_cuda_slab *slab = moe_calloc(1, sizeof *slab + count * sizeof(int32_t));
    void *memory;
    if (!slab) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for an expert's slot");
    while ((status = moe_cuda_device_alloc(slots->device, count * slot_bytes, "a slab of expert slots", ADVICE, &memory, err)) ==
               MOE_RESOURCE_EXHAUSTED &&
           count > 1)
        count /= 2;
    if (status != MOE_OK) {
        moe_free(slab);
        return status;
    }
    slab->memory = memory;
    slab->slot_bytes = slot_bytes;
    slab->num_slots = slab->num_free = (int32_t)count;
    for (int32_t i = 0; i < slab->num_slots; i++) slab->free_slots[i] = slab->num_slots - 1 - i; /* the first is taken first */
    slab->next = slots->slabs;
    slots->slabs = slab;
    slots->free_bytes += (int64_t)(count * slot_bytes);
    *out = slab;
    return MOE_OK;
}

static moe_status take_slot(moe_cuda_slots *slots, size_t bytes, moe_cuda_slab **slab, void **memory, moe_error *err) {
    moe_status status = MOE_OK;
    pthread_mutex_lock(&slots->lock);
    for (*slab = slots->slabs; *slab && ((*slab)->slot_bytes != bytes || (*slab)->num_free == 0);) *slab = (*slab)->next;
    if (!*slab) status = new_slab(slots, bytes, slab, err);
    if (status == MOE_OK) {
        *memory = (*slab)->memory + (size_t)(*slab)->free_slots[--(*slab)->num_free] * bytes;
        slots->free_bytes -= (int64_t)bytes;
    }
    pthread_mutex_unlock(&slots->lock);
    return status;
}

/* An empty slab goes back to the device, so that its memory can serve another size or the KV cache. */
static void give_slot_back(moe_cuda_slots *slots, moe_cuda_slab *slab, const void *memory) {
    moe_cuda_slab **at = &slots->slabs;
    pthread_mutex_lock(&slots->lock);
    slab->free_slots[slab->num_free++] = (int32_t)((size_t)((const uint8_t *)memory - slab->memory) / slab->slot_bytes);
    slots->free_bytes += (int64_t)slab->slot_bytes;
    if (slab->num_free == slab->num_slots) {
        while (*at != slab) at = &(*at)->next;
        *at = slab->next;
        slots->free_bytes -= (int64_t)((size_t)slab->num_slots * slab->slot_bytes);
        moe_cuda_device_free(slab->memory);
        moe_free(slab);
    }
    pthread_mutex_unlock(&slots->lock);
}

moe_status moe_cuda_expert_load(moe_cuda_slots *slots, moe_cuda_upload *upload, moe_dtype profile, const moe_ffn_weights *weights,
                                int32_t block_lo, int32_t block_hi, moe_expert **out, moe_error *err) {
    MOE_ASSERT(moe_ffn_slice_legal(block_lo, block_hi));
    moe_cuda_network_shape shape = moe_cuda_network_shape_of(weights, block_lo, block_hi, profile);
    moe_expert *expert = moe_calloc(1, sizeof *expert);
    void *memory = NULL;
    *out = NULL;
    if (!expert) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for an expert");
    moe_status status = take_slot(slots, moe_cuda_network_bytes(&shape), &expert->slab, &memory, err);
    if (status != MOE_OK) {
        moe_free(expert);
        return status;
    }
    expert->network = moe_cuda_network_at(&shape, memory);
    pthread_mutex_lock(&upload->lock);
    status = moe_cuda_network_upload(upload, &expert->network, weights, err);
    moe_status finished = moe_cuda_upload_finish(upload, status == MOE_OK ? err : NULL);
    pthread_mutex_unlock(&upload->lock);
    if (status == MOE_OK) status = finished;
    if (status == MOE_OK)
        *out = expert;
    else
        moe_cuda_expert_free(slots, expert);
    return status;
}

void moe_cuda_expert_free(moe_cuda_slots *slots, moe_expert *expert) {
    if (!expert) return;
    give_slot_back(slots, expert->slab, expert->network.gate_up);
    moe_free(expert);
}
