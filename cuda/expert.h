/* Feed-forward networks in device memory: experts in slots of slabs, and the base layers' dense and shared networks. */
#pragma once
#include "cuda/upload.h"

#define MOE_CUDA_SLAB_BYTES ((size_t)256 << 20)    /* of a slab at most, unless one slot is larger */
#define MOE_CUDA_MIN_SLAB_BYTES ((size_t)16 << 20) /* of the first slab of a size; the next are twice as large each */
#define MOE_CUDA_SLOT_TAIL_BYTES 256               /* of a slot, behind `down`: moe_cuda_expert_maps */

/* The shape of a network or of the blocks [block_lo, block_hi) of its intermediate width. */
typedef struct moe_cuda_network_shape {
    int32_t hidden, intermediate; /* intermediate: of the whole network */
    int32_t block_lo, block_hi;
    int32_t width, padded; /* of the slice; padded: rounded up to 8 */
    moe_dtype dtype;       /* of all matrices on the device */
    bool gated;            /* moe_ffn_gated */
} moe_cuda_network_shape;

/* A network in device memory and, but for its tail, its image in host memory. Each part begins at the next 256-byte boundary; padding
 * is zero.
 *
 * gate_up: of a gated network [2 · padded, hidden], rows 16j … 16j+7 are gate rows 8j … 8j+7, rows 16j+8 … 16j+15 the up rows. Of a
 * network without a gate matrix it is up alone, [padded, hidden], its rows in order.
 *
 * down: [hidden, padded]. tail: moe_cuda_expert_maps. */
typedef struct moe_cuda_network {
    moe_cuda_network_shape shape;
    void *gate_up; /* NULL: absent */
    void *down, *tail;
} moe_cuda_network;

struct moe_expert {
    moe_cuda_network network;
    struct moe_cuda_slab *slab; /* of an expert of its own */
    moe_slots *slots;           /* whose slot it is; NULL: none's */
};

/* Slots by size, each size in slabs of its own. */
typedef struct moe_cuda_slots {
    const moe_cuda_device *device;
    struct moe_cuda_slab *slabs;
    int64_t free_bytes; /* in slots that hold nothing */
    pthread_mutex_t lock;
} moe_cuda_slots;

moe_status moe_cuda_slots_open(const moe_cuda_device *device, moe_cuda_slots *out, moe_error *err);
void moe_cuda_slots_close(moe_cuda_slots *slots); /* every expert has been freed */

moe_cuda_network_shape moe_cuda_network_shape_of(const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi,
                                                 moe_dtype profile);
static inline bool moe_cuda_network_shape_equal(const moe_cuda_network_shape *a, const moe_cuda_network_shape *b) {
    return a->hidden == b->hidden && a->intermediate == b->intermediate && a->block_lo == b->block_lo &&
           a->block_hi == b->block_hi && a->dtype == b->dtype && a->gated == b->gated;
}
size_t moe_cuda_network_bytes(const moe_cuda_network_shape *shape);

/* The network's places in memory of that many bytes. */
moe_cuda_network moe_cuda_network_at(const moe_cuda_network_shape *shape, void *memory);
/* What a host image holds of it: all but the tail, which is the slot's own. */
size_t moe_cuda_network_image_bytes(const moe_cuda_network_shape *shape);
/* Where the matrices are in an image. */
moe_image_layout moe_cuda_network_layout(const moe_cuda_network_shape *shape);
/* Packs into a network whose places are in host memory. */
void moe_cuda_network_pack(const moe_cuda_network *network, const moe_ffn_weights *weights);
/* Enqueues the copies; the upload's lock is held. */
moe_status moe_cuda_network_upload(moe_cuda_upload *upload, const moe_cuda_network *network, const moe_ffn_weights *weights,
                                   moe_error *err);

/* Enqueues what such a slot needs beside an image, once; the upload's lock is held. */
moe_status moe_cuda_network_prepare(moe_cuda_upload *upload, const moe_cuda_network *network, moe_error *err);

/* As expert_load and expert_free of backend.h. */
moe_status moe_cuda_expert_load(moe_cuda_slots *slots, moe_cuda_upload *upload, moe_dtype profile, const moe_ffn_weights *weights,
                                int32_t block_lo, int32_t block_hi, moe_expert **out, moe_error *err);
void moe_cuda_expert_free(moe_cuda_slots *slots, moe_expert *expert);
