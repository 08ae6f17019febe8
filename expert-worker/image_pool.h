/* Host memory for experts' images, in slabs that grow: pinning memory takes long, call by call. */
#pragma once
#include <pthread.h>

#include "common/backend.h"

#define MOE_IMAGE_MIN_SLAB_BYTES ((int64_t)16 << 20) /* the first slab; each is as large as all before together, */
#define MOE_IMAGE_MAX_SLAB_BYTES ((int64_t)256 << 20) /* but for this limit, and one image at least */

typedef struct moe_image_pool {
    moe_backend *backend; /* borrowed */
    int64_t image_bytes;
    int32_t max_images;
    pthread_mutex_t lock; /* guards what follows */
    struct moe_image_slab *slabs; /* the newest first */
    int32_t taken, room; /* images: handed out; that the slabs have room for */
} moe_image_pool;

/* image_bytes is a multiple of MOE_ALIGNMENT_BYTES. */
void moe_image_pool_init(moe_image_pool *pool, moe_backend *backend, int64_t image_bytes, int32_t max_images);
void moe_image_pool_close(moe_image_pool *pool); /* frees all; nobody uses an image any more */

/* Memory for one image more, the pool's; NULL when out of memory. max_images times at most. Any thread; may allocate a slab. */
void *moe_image_pool_take(moe_image_pool *pool);
int64_t moe_image_pool_bytes(moe_image_pool *pool); /* of the slabs; any thread */
