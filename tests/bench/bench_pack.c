/* Packing of experts on the host, as loading does it: experts a second and GB/s of their images, beside what plain copies of memory
 * reach with as many threads. Shapes of real models, generated weights in bfloat16 (--load-format dummy) and weights in memory.
 *
 * usage: bench_pack [threads]; by default 1 and 2. Where CUDA was built in, the images that the GPU is fed from, too: packing touches
 * no device. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/clock.h"
#include "cpu/cpu.h"
#ifdef MOESAIC_HAS_CUDA
#include "cuda/fill.h"
#endif

#define MEASURE_NS (500 * MOE_NS_PER_MS)
#define MAX_THREADS 128

typedef struct shape {
    const char *name;
    int32_t hidden, intermediate;
} shape;

static const shape shapes[] = {{"qwen3-30b-a3b", 2048, 768}, {"mixtral-8x7b", 4096, 14336}};

typedef struct layout {
    const char *name;
    int64_t (*bytes)(const moe_ffn_weights *w);
    void (*pack)(const moe_ffn_weights *w, void *image); /* NULL: a plain copy of the weights in memory */
} layout;

static moe_backend *cpu;

static int64_t cpu_bytes(const moe_ffn_weights *w) { return cpu->ops->expert_size(cpu, w, 0, MOE_FFN_BLOCKS).image_bytes; }
static void cpu_pack(const moe_ffn_weights *w, void *image) { cpu->ops->expert_pack(cpu, w, 0, MOE_FFN_BLOCKS, image); }

#ifdef MOESAIC_HAS_CUDA
static int64_t cuda_bytes(const moe_ffn_weights *w) {
    return moe_cuda_expert_size(w, 0, MOE_FFN_BLOCKS, MOE_BF16).image_bytes;
}
static void cuda_pack(const moe_ffn_weights *w, void *image) { moe_cuda_expert_pack(w, 0, MOE_FFN_BLOCKS, MOE_BF16, image); }
#endif

static const layout layouts[] = {
    {"cpu", cpu_bytes, cpu_pack},
#ifdef MOESAIC_HAS_CUDA
    {"cuda", cuda_bytes, cuda_pack},
#endif
    {"copy", cpu_bytes, NULL},
};

typedef struct packer {
    const layout *layout;
    moe_ffn_weights weights;
    const uint8_t *stored;
    uint8_t *image;
    int64_t end_ns, packed;
} packer;

static void *pack_until(void *arg) {
    packer *p = arg;
    int64_t bytes = p->layout->bytes(&p->weights);
    do {
        if (p->layout->pack)
            p->layout->pack(&p->weights, p->image);
        else
            memcpy(p->image, p->stored, (size_t)bytes);
        p->packed++;
    } while (moe_now_ns(moe_clock_real()) < p->end_ns);
    return NULL;
}

static moe_tensor tensor(int64_t rows, int64_t cols, uint64_t seed, const uint8_t *stored) {
    return (moe_tensor){.data = stored, .dtype = MOE_BF16, .rows = rows, .cols = cols, .generated = {.seed = seed, .half_width = 0.03f}};
}

static uint8_t *memory(int64_t bytes, int fill) {
    uint8_t *out = moe_alloc_aligned((size_t)bytes, 1);
    MOE_ASSERT(out);
    memset(out, fill, (size_t)bytes);
    return out;
}

static void measure(const layout *into, const shape *s, bool generated, int threads) {
    packer packers[MAX_THREADS];
    pthread_t ids[MAX_THREADS];
    int64_t matrix = (int64_t)s->hidden * s->intermediate * 2, packed = 0, bytes = 0;
    for (int i = 0; i < threads; i++) {
        packer *p = &packers[i];
        uint8_t *stored = generated ? NULL : memory(3 * matrix, 0x3c);
        *p = (packer){.layout = into, .stored = stored};
        p->weights.gate = tensor(s->intermediate, s->hidden, (uint64_t)(3 * i + 1), stored);
        p->weights.up = tensor(s->intermediate, s->hidden, (uint64_t)(3 * i + 2), stored ? stored + matrix : NULL);
        p->weights.down = tensor(s->hidden, s->intermediate, (uint64_t)(3 * i + 3), stored ? stored + 2 * matrix : NULL);
        bytes = into->bytes(&p->weights);
        p->image = memory(bytes, 0);
    }
    int64_t start_ns = moe_now_ns(moe_clock_real());
    for (int i = 0; i < threads; i++) {
        packers[i].end_ns = start_ns + MEASURE_NS;
        MOE_ASSERT(pthread_create(&ids[i], NULL, pack_until, &packers[i]) == 0);
    }
    for (int i = 0; i < threads; i++) pthread_join(ids[i], NULL);
    double seconds = (double)(moe_now_ns(moe_clock_real()) - start_ns) / 1e9;
    for (int i = 0; i < threads; i++) {
        packed += packers[i].packed;
        moe_free(packers[i].image);
        moe_free((void *)packers[i].stored);
    }
    printf("%-6s %-14s %-10s %3d  %8.2f MB %9.2f experts/s %7.2f GB/s\n", into->name, s->name, generated ? "generated" : "in memory",
           threads, (double)bytes / 1e6, (double)packed / seconds, (double)(packed * bytes) / 1e9 / seconds);
}

int main(int argc, char **argv) {
    int wanted = argc > 1 ? atoi(argv[1]) : 0;
    if (argc > 2 || wanted < 0 || wanted > MAX_THREADS) {
        fprintf(stderr, "usage: bench_pack [threads]\n");
        return 2;
    }
    moe_error err;
    MOE_ASSERT(moe_cpu_open(&(moe_cpu_config){.threads = 1, .dtype = MOE_BF16}, &cpu, &err) == MOE_OK);
    for (size_t l = 0; l < sizeof layouts / sizeof *layouts; l++)
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
            for (int generated = layouts[l].pack != NULL; generated >= 0; generated--)
                for (int threads = wanted ? wanted : 1; threads <= (wanted ? wanted : 2); threads++)
                    measure(&layouts[l], &shapes[s], generated, threads);
    cpu->ops->close(cpu);
    return 0;
}
