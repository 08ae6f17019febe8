/* moe_backend over a kernel table: what `cpu-ref` and `cpu` share. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/alloc.h"
#include "cpu/base.h"
#include "cpu/cpu.h"
#include "cpu/host_experts.h"
#include "cpu/isa.h"
#include "cpu/layer_ffn.h"
#include "cpu/local.h"
#include "cpu/single.h"
#include "cpu/slots.h"

#define MAX_THREADS 1024
#define PROFILE_BYTES 48
#define BRIEF_WORK (INT64_C(1) << 26) /* multiply-adds that a job may take on its submitter's thread: some 1 to 5 ms */

typedef struct cpu_backend {
    moe_backend public; /* first: a moe_backend * is a cpu_backend * */
    moe_backend_ops ops;
    const moe_cpu_kernels *kernels;
    moe_cpu_runner *runner;
    moe_cpu_scratch_list scratch;
    bool threaded; /* jobs and copies have threads of their own */
    bool background; /* as in moe_cpu_config */
    char profile[PROFILE_BYTES];
} cpu_backend;

static cpu_backend *cpu_of(moe_backend *backend) { return (cpu_backend *)backend; }

static void close_backend(moe_backend *backend) {
    cpu_backend *cpu = cpu_of(backend);
    moe_cpu_runner_close(&cpu->runner);
    moe_cpu_scratch_list_free(&cpu->scratch);
    moe_free(cpu);
}

static const char *profile(const moe_backend *backend) { return ((const cpu_backend *)backend)->profile; }

/* MemAvailable counts page cache that can be had back; free pages alone would not. */
static bool read_available(int64_t *bytes) {
    FILE *file = fopen("/proc/meminfo", "r");
    char line[128];
    long long kib = -1;
    if (!file) return false;
    while (kib < 0 && fgets(line, sizeof line, file))
        if (sscanf(line, "MemAvailable: %lld kB", &kib) != 1) kib = -1;
    fclose(file);
    *bytes = kib * 1024;
    return kib >= 0;
}

static moe_status memory_info(moe_backend *backend, moe_memory_info *out, moe_error *err) {
    int64_t page_bytes = sysconf(_SC_PAGESIZE), pages = sysconf(_SC_PHYS_PAGES), free_pages = sysconf(_SC_AVPHYS_PAGES);
    (void)backend;
    if (page_bytes <= 0 || pages <= 0 || free_pages < 0)
        return moe_fail(err, MOE_INTERNAL, "the system does not tell its memory size");
    out->total_bytes = pages * page_bytes;
    if (!read_available(&out->free_bytes)) out->free_bytes = free_pages * page_bytes;
    return MOE_OK;
}

static void *host_alloc(moe_backend *backend, size_t bytes) {
    (void)backend;
    return moe_alloc_aligned(bytes, 1);
}

static void host_free(moe_backend *backend, void *memory) {
    (void)backend;
    moe_free(memory);
}

static int64_t kv_block_bytes(const moe_backend *backend, const moe_model_config *config) {
    return moe_cpu_kv_block_bytes(config, backend->dtype);
}

static moe_status base_load(moe_backend *b, const moe_model *model, void (*progress)(void *ctx, double fraction), void *ctx,
                            moe_base **out, moe_error *err) {
    return moe_cpu_base_load(cpu_of(b)->kernels, model, progress, ctx, out, err);
}

static void base_free(moe_backend *b, moe_base *base) {
    (void)b;
    moe_cpu_base_free(base);
}

static moe_status kv_create(moe_backend *b, moe_base *base, int32_t num_blocks, moe_kv **out, moe_error *err) {
    return moe_cpu_kv_create(&base->model->config, b->dtype, num_blocks, out, err);
}

static void kv_free(moe_backend *b, moe_kv *kv) {
    (void)b;
    moe_cpu_kv_free(kv);
}

static moe_status rows_create(moe_backend *b, moe_base *base, int32_t max_rows, moe_rows **out, moe_error *err) {
    (void)b;
    return moe_cpu_rows_create(&base->model->config, max_rows, out, err);
}

static void rows_free(moe_backend *b, moe_rows *rows) {
    (void)b;
    moe_cpu_rows_free(rows);
}

static moe_status segment_work(const moe_cpu_run *run, void *backend, const void *base, const void *request, moe_error *err) {
    const cpu_backend *cpu = backend;
    return moe_cpu_segment_run(cpu->kernels, cpu->public.dtype, run, base, request, err);
}

static void segment_submit(moe_backend *b, moe_base *base, const moe_segment *segment, moe_job *job) {
    bool brief = moe_cpu_segment_multiply_adds(base, segment) <= BRIEF_WORK;
    moe_cpu_runner_submit(cpu_of(b)->runner, segment_work, b, base, segment, brief, job);
}

static moe_status expert_load(moe_backend *b, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi,
                              moe_expert **out, moe_error *err) {
    moe_expert *expert = moe_calloc(1, sizeof *expert);
    *out = NULL;
    if (!expert) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for an expert");
    moe_status status = moe_cpu_ffn_load(cpu_of(b)->kernels, weights, block_lo, block_hi, &expert->ffn, err);
    if (status == MOE_OK)
        *out = expert;
    else
        moe_free(expert);
    return status;
}

static void expert_free(moe_backend *b, moe_expert *expert) {
    (void)b;
    if (expert) moe_cpu_ffn_free(&expert->ffn);
    moe_free(expert);
}

static int64_t expert_bytes(const moe_expert *expert) { return moe_cpu_ffn_bytes(&expert->ffn); }

static moe_status ffn_work(const moe_cpu_run *run, void *backend, const void *base, const void *request, moe_error *err) {
    cpu_backend *cpu = backend;
    (void)base;
    return moe_cpu_ffn_batch(cpu->kernels, cpu->public.dtype, &cpu->scratch, run, request, err);
}

static void ffn_submit(moe_backend *b, const moe_ffn_batch *batch, moe_job *job) {
    bool brief = !cpu_of(b)->background && moe_cpu_ffn_multiply_adds(batch) <= BRIEF_WORK;
    moe_cpu_runner_submit(cpu_of(b)->runner, ffn_work, b, NULL, batch, brief, job);
}

static moe_status layer_ffn_work(const moe_cpu_run *run, void *backend, const void *base, const void *request, moe_error *err) {
    cpu_backend *cpu = backend;
    return moe_cpu_layer_ffn(cpu->kernels, &cpu->scratch, run, &((const moe_base *)base)->model->config, request, err);
}

static void layer_ffn_submit(moe_backend *b, moe_base *base, const moe_layer_ffn *ffn, moe_job *job) {
    bool brief = !cpu_of(b)->background && moe_cpu_layer_ffn_multiply_adds(&base->model->config, ffn) <= BRIEF_WORK;
    moe_cpu_runner_submit(cpu_of(b)->runner, layer_ffn_work, b, base, ffn, brief, job);
}

static moe_expert_size expert_size(const moe_backend *b, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi) {
    moe_cpu_ffn ffn = moe_cpu_ffn_shape(((const cpu_backend *)b)->kernels, weights, block_lo, block_hi);
    return (moe_expert_size){moe_cpu_ffn_bytes(&ffn), moe_cpu_ffn_bytes(&ffn)};
}

static void expert_pack(const moe_backend *b, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi, void *image) {
    moe_cpu_ffn ffn = moe_cpu_ffn_shape(((const cpu_backend *)b)->kernels, weights, block_lo, block_hi);
    moe_cpu_ffn_place(&ffn, image);
    moe_cpu_ffn_fill(&ffn, weights);
}

static moe_status slots_create(moe_backend *b, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi, int32_t count,
                               moe_slots **out, moe_error *err) {
    const cpu_backend *cpu = cpu_of(b);
    return moe_cpu_slots_create(cpu->kernels, cpu->threaded, weights, block_lo, block_hi, count, out, err);
}

static void slots_free(moe_backend *b, moe_slots *slots) {
    (void)b;
    moe_cpu_slots_free(slots);
}

static void slot_fill_submit(moe_backend *b, const moe_slot_fill *fill, moe_job *job) {
    (void)b;
    moe_cpu_slot_fill(fill, job);
}

static moe_status host_experts_create(moe_backend *b, const moe_ffn_weights *weights, int32_t block_lo, int32_t block_hi,
                                      const moe_image_layout *layout, int32_t count, moe_host_experts **out, moe_error *err) {
    return moe_cpu_host_experts_create(cpu_of(b)->kernels, weights, block_lo, block_hi, layout, count, out, err);
}

static void host_experts_free(moe_backend *b, moe_host_experts *experts) {
    (void)b;
    moe_cpu_host_experts_free(experts);
}

static moe_status local_create(moe_backend *b, moe_base *base, moe_expert *const *experts, moe_local **out, moe_error *err) {
    (void)b;
    return moe_cpu_local_create(base, experts, out, err);
}

static void local_free(moe_backend *b, moe_local *local) {
    (void)b;
    moe_cpu_local_free(local);
}

static moe_status local_work(const moe_cpu_run *run, void *backend, const void *local, const void *request, moe_error *err) {
    cpu_backend *cpu = backend;
    const moe_cpu_local_run with = {cpu->kernels, cpu->public.dtype, &cpu->scratch, local};
    return moe_cpu_local_step(&with, run, request, err);
}

static void local_submit(moe_backend *b, moe_base *base, moe_local *local, const moe_local_step *step, moe_job *job) {
    bool brief = moe_cpu_local_multiply_adds(local, step) <= BRIEF_WORK;
    (void)base;
    moe_cpu_runner_submit(cpu_of(b)->runner, local_work, b, local, step, brief, job);
}

static const moe_backend_ops common_ops = {
    .close = close_backend,
    .profile = profile,
    .memory_info = memory_info,
    .host_alloc = host_alloc,
    .host_free = host_free,
    .base_load = base_load,
    .base_free = base_free,
    .kv_create = kv_create,
    .kv_free = kv_free,
    .kv_block_bytes = kv_block_bytes,
    .rows_create = rows_create,
    .rows_free = rows_free,
    .segment_submit = segment_submit,
    .expert_load = expert_load,
    .expert_free = expert_free,
    .expert_bytes = expert_bytes,
    .ffn_submit = ffn_submit,
    .layer_ffn_submit = layer_ffn_submit,
    .expert_size = expert_size,
    .expert_pack = expert_pack,
    .slots_create = slots_create,
    .slots_free = slots_free,
    .slot = moe_cpu_slot,
    .slot_fill_submit = slot_fill_submit,
    .host_experts_create = host_experts_create,
    .host_experts_free = host_experts_free,
    .host_expert = moe_cpu_host_expert,
    .local_create = local_create,
    .local_free = local_free,
    .local_submit = local_submit,
};

static moe_status open_backend(const char *name, const moe_cpu_config *config, const moe_cpu_kernels *kernels,
                               const moe_ops *single, moe_backend **out, moe_error *err) {
    if (config->threads < 0 || config->threads > MAX_THREADS)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%d compute threads; give 0 to %d", config->threads, MAX_THREADS);
    if (config->dtype != MOE_F32 && config->dtype != MOE_BF16)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "the CPU backends compute in float32 or bfloat16, not %s",
                        moe_dtype_name(config->dtype));
    cpu_backend *cpu = moe_calloc(1, sizeof *cpu);
    if (!cpu) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a backend");
    cpu->ops = common_ops;
    cpu->ops.name = name;
    cpu->ops.single = single;
    cpu->public.ops = &cpu->ops;
    cpu->public.dtype = config->dtype;
    cpu->kernels = kernels;
    cpu->threaded = config->threads > 0;
    cpu->background = config->background;
    snprintf(cpu->profile, sizeof cpu->profile, "%s/%s/%s", name, kernels->isa, moe_dtype_name(config->dtype));
    moe_status status = moe_cpu_runner_open(config->threads, &cpu->runner, err);
    if (status != MOE_OK) {
        moe_free(cpu);
        return status;
    }
    moe_cpu_scratch_list_init(&cpu->scratch);
    *out = &cpu->public;
    return MOE_OK;
}

moe_status moe_cpu_ref_open(const moe_cpu_config *config, moe_backend **out, moe_error *err) {
    *out = NULL;
    return open_backend("cpu-ref", config, &moe_cpu_kernels_ref, &moe_cpu_single_ref, out, err);
}

moe_status moe_cpu_open(const moe_cpu_config *config, moe_backend **out, moe_error *err) {
    const char *isa = config->isa ? config->isa : getenv("MOESAIC_CPU_ISA");
    const moe_cpu_isa *row;
    *out = NULL;
    moe_status status = moe_cpu_isa_find(isa && isa[0] ? isa : "auto", &row, err);
    return status == MOE_OK ? open_backend("cpu", config, row->kernels, row->single, out, err) : status;
}
