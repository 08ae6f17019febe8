#include "expert-worker/image_pool.h"

#include "common/alloc.h"
#include "common/status.h"

typedef struct moe_image_slab {
    struct moe_image_slab *next;
    uint8_t *memory;
    int32_t first; /* image */
} image_slab;

void moe_image_pool_init(moe_image_pool *p, moe_backend *backend, int64_t image_bytes, int32_t max_images) {
    MOE_ASSERT(image_bytes > 0 && image_bytes % MOE_ALIGNMENT_BYTES == 0);
    *p = (moe_image_pool){.backend = backend, .image_bytes = image_bytes, .max_images = max_images};
    pthread_mutex_init(&p->lock, NULL);
}

void moe_image_pool_close(moe_image_pool *p) {
    if (!p->backend) return;
    while (p->slabs) {
        image_slab *slab = p->slabs;
        p->slabs = slab->next;
        p->backend->ops->host_free(p->backend, slab->memory);
        moe_free(slab);
    }
    pthread_mutex_destroy(&p->lock);
    *p = (moe_image_pool){0};
}

static int32_t slab_images(const moe_image_pool *p) {
    int64_t bytes = p->room * p->image_bytes;
    if (bytes < MOE_IMAGE_MIN_SLAB_BYTES) bytes = MOE_IMAGE_MIN_SLAB_BYTES;
    if (bytes > MOE_IMAGE_MAX_SLAB_BYTES) bytes = MOE_IMAGE_MAX_SLAB_BYTES;
    int64_t images = bytes / p->image_bytes, left = p->max_images - p->room;
    if (images > left) images = left;
    return images > 1 ? (int32_t)images : 1;
}

/* A smaller one where there is no memory for what is wanted. */
static bool add_slab(moe_image_pool *p) {
    image_slab *slab = moe_calloc(1, sizeof *slab);
    int32_t images = slab_images(p);
    if (!slab) return false;
    while (!(slab->memory = p->backend->ops->host_alloc(p->backend, (size_t)(images * p->image_bytes))) && images > 1) images /= 2;
    if (!slab->memory) {
        moe_free(slab);
        return false;
    }
    slab->first = p->room;
    slab->next = p->slabs;
    p->slabs = slab;
    p->room += images;
    return true;
}

void *moe_image_pool_take(moe_image_pool *p) {
    void *image = NULL;
    pthread_mutex_lock(&p->lock);
    MOE_ASSERT(p->taken < p->max_images);
    if (p->taken < p->room || add_slab(p)) image = p->slabs->memory + (p->taken++ - p->slabs->first) * p->image_bytes;
    pthread_mutex_unlock(&p->lock);
    return image;
}

int64_t moe_image_pool_bytes(moe_image_pool *p) {
    pthread_mutex_lock(&p->lock);
    int64_t bytes = p->room * p->image_bytes;
    pthread_mutex_unlock(&p->lock);
    return bytes;
}
