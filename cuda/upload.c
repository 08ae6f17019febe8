#include "cuda/upload.h"

#include "common/elements.h"
#include "cuda/random.h"

#define CONVERT_FLOATS 1024 /* converted at a time */

moe_status moe_cuda_upload_open(const moe_cuda_device *device, moe_cuda_upload *out, moe_error *err) {
    *out = (moe_cuda_upload){.device = device};
    if (pthread_mutex_init(&out->lock, NULL) != 0) return moe_fail(err, MOE_INTERNAL, "no mutex for loading");
    moe_status status = moe_cuda_check(cudaStreamCreateWithFlags(&out->stream, cudaStreamNonBlocking), "creating a stream", err);
    for (int i = 0; i < 2 && status == MOE_OK; i++) {
        status = moe_cuda_pinned_alloc(MOE_CUDA_UPLOAD_BYTES, "staging memory for loading", &out->staging[i], err);
        if (status == MOE_OK)
            status = moe_cuda_check(cudaEventCreateWithFlags(&out->copied[i], cudaEventDisableTiming), "creating an event", err);
    }
    return status;
}

void moe_cuda_upload_close(moe_cuda_upload *upload) {
    if (upload->stream) cudaStreamDestroy(upload->stream);
    for (int i = 0; i < 2; i++) {
        moe_cuda_pinned_free(upload->staging[i]);
        if (upload->copied[i]) cudaEventDestroy(upload->copied[i]);
    }
    if (upload->device) pthread_mutex_destroy(&upload->lock);
    *upload = (moe_cuda_upload){0};
}

/* The next staging piece, once its last copy has left it. */
static moe_status take_staging(moe_cuda_upload *upload, void **out, moe_error *err) {
    upload->turn = 1 - upload->turn;
    *out = upload->staging[upload->turn];
    return moe_cuda_check(cudaEventSynchronize(upload->copied[upload->turn]), "copying weights to the GPU", err);
}

static moe_status sent(moe_cuda_upload *upload, cudaError_t code, moe_error *err) {
    if (code == cudaSuccess) code = cudaEventRecord(upload->copied[upload->turn], upload->stream);
    return moe_cuda_check(code, "copying weights to the GPU", err);
}

moe_status moe_cuda_upload_bytes(moe_cuda_upload *upload, void *to, const void *from, size_t bytes, moe_error *err) {
    moe_status status = MOE_OK;
    for (size_t at = 0, part; status == MOE_OK && at < bytes; at += part) {
        void *staging;
        part = bytes - at < MOE_CUDA_UPLOAD_BYTES ? bytes - at : MOE_CUDA_UPLOAD_BYTES;
        status = take_staging(upload, &staging, err);
        if (status != MOE_OK) return status;
        memcpy(staging, (const uint8_t *)from + at, part);
        status = sent(upload, cudaMemcpyAsync((uint8_t *)to + at, staging, part, cudaMemcpyHostToDevice, upload->stream), err);
    }
    return status;
}

/* out[0 … count) of `dtype` = elements of the tensor's flat data, rounded to nearest even. */
static void convert(const moe_tensor *t, int64_t first, int64_t count, moe_dtype dtype, uint8_t *out) {
    float wide[CONVERT_FLOATS];
    if (t->dtype == dtype) {
        moe_tensor_read(t, first, count, out);
        return;
    }
    for (int64_t at = 0, part; at < count; at += part) {
        part = count - at < CONVERT_FLOATS ? count - at : CONVERT_FLOATS;
        moe_tensor_read_f32(t, first + at, part, wide);
        moe_elements_narrow(wide, dtype, (size_t)part, out + (size_t)at * moe_dtype_bytes(dtype));
    }
}

/* Rows [first, first + count) of the plane from staging, where they lie together, to their places: whole runs in one copy. */
static cudaError_t copy_rows(moe_cuda_upload *upload, const moe_cuda_plane *p, int64_t first, int64_t count,
                             const void *staging) {
    size_t row_bytes = (size_t)p->stride * moe_dtype_bytes(p->dtype), run_bytes = row_bytes * (size_t)p->run;
    size_t pitch = row_bytes * (size_t)p->run_stride, whole = (size_t)(count / p->run), rest = (size_t)(count % p->run);
    uint8_t *to = (uint8_t *)p->to + (size_t)(first / p->run) * pitch;
    cudaError_t code = cudaSuccess;
    if (p->run == p->run_stride)
        return cudaMemcpyAsync(to, staging, row_bytes * (size_t)count, cudaMemcpyHostToDevice, upload->stream);
    if (whole) code = cudaMemcpy2DAsync(to, pitch, staging, run_bytes, run_bytes, whole, cudaMemcpyHostToDevice, upload->stream);
    if (code == cudaSuccess && rest)
        code = cudaMemcpyAsync(to + whole * pitch, (const uint8_t *)staging + whole * run_bytes, rest * row_bytes,
                               cudaMemcpyHostToDevice, upload->stream);
    return code;
}

/* A row that no staging piece holds goes in parts. */
static moe_status upload_long_row(moe_cuda_upload *upload, const moe_cuda_plane *p, int64_t row, moe_error *err) {
    size_t size = moe_dtype_bytes(p->dtype);
    int64_t width = p->col_hi - p->col_lo, most = (int64_t)(MOE_CUDA_UPLOAD_BYTES / size);
    uint8_t *to = (uint8_t *)p->to + (size_t)((row / p->run * p->run_stride + row % p->run) * p->stride) * size;
    moe_status status = MOE_OK;
    for (int64_t at = 0, part; status == MOE_OK && at < p->stride; at += part) {
        void *staging;
        part = p->stride - at < most ? p->stride - at : most;
        status = take_staging(upload, &staging, err);
        if (status != MOE_OK) return status;
        int64_t real = width - at < part ? width - at : part;
        memset(staging, 0, (size_t)part * size);
        if (real > 0) convert(p->tensor, (p->row_lo + row) * p->tensor->cols + p->col_lo + at, real, p->dtype, staging);
        status = sent(
            upload, cudaMemcpyAsync(to + (size_t)at * size, staging, (size_t)part * size, cudaMemcpyHostToDevice, upload->stream),
            err);
    }
    return status;
}

/* Generated weights never are on the host. */
static moe_status generate(moe_cuda_upload *upload, const moe_cuda_plane *p, moe_error *err) {
    moe_cuda_random args = {.generator = p->tensor->generated,
                            .stored = p->tensor->dtype,
                            .dtype = p->dtype,
                            .cols = p->tensor->cols,
                            .row_lo = p->row_lo,
                            .rows = p->row_hi - p->row_lo,
                            .col_lo = p->col_lo,
                            .width = p->col_hi - p->col_lo,
                            .stride = p->stride,
                            .run = p->run,
                            .run_stride = p->run_stride,
                            .to = p->to};
    return moe_cuda_check(moe_cuda_random_fill(&args, upload->stream), "generating weights", err);
}

moe_status moe_cuda_upload_plane(moe_cuda_upload *upload, const moe_cuda_plane *p, moe_error *err) {
    if (!p->tensor->data) return generate(upload, p, err);
    size_t size = moe_dtype_bytes(p->dtype), row_bytes = (size_t)p->stride * size;
    int64_t rows = p->row_hi - p->row_lo, width = p->col_hi - p->col_lo;
    int64_t most = (int64_t)(MOE_CUDA_UPLOAD_BYTES / row_bytes) / p->run * p->run; /* whole runs in a piece */
    moe_status status = MOE_OK;
    if (most == 0) {
        for (int64_t row = 0; status == MOE_OK && row < rows; row++) status = upload_long_row(upload, p, row, err);
        return status;
    }
    for (int64_t row = 0, count; status == MOE_OK && row < rows; row += count) {
        void *staging;
        count = rows - row < most ? rows - row : most;
        status = take_staging(upload, &staging, err);
        if (status != MOE_OK) return status;
        for (int64_t i = 0; i < count; i++) {
            uint8_t *out = (uint8_t *)staging + (size_t)i * row_bytes;
            convert(p->tensor, (p->row_lo + row + i) * p->tensor->cols + p->col_lo, width, p->dtype, out);
            memset(out + (size_t)width * size, 0, row_bytes - (size_t)width * size);
        }
        status = sent(upload, copy_rows(upload, p, row, count, staging), err);
    }
    return status;
}

void moe_cuda_plane_pack(const moe_cuda_plane *p) {
    size_t size = moe_dtype_bytes(p->dtype), row_bytes = (size_t)p->stride * size;
    int64_t width = p->col_hi - p->col_lo;
    for (int64_t row = 0; row < p->row_hi - p->row_lo; row++) {
        uint8_t *to = (uint8_t *)p->to + (size_t)(row / p->run * p->run_stride + row % p->run) * row_bytes;
        convert(p->tensor, (p->row_lo + row) * p->tensor->cols + p->col_lo, width, p->dtype, to);
        memset(to + (size_t)width * size, 0, row_bytes - (size_t)width * size);
    }
}

moe_status moe_cuda_upload_finish(moe_cuda_upload *upload, moe_error *err) {
    return moe_cuda_check(cudaStreamSynchronize(upload->stream), "copying weights to the GPU", err);
}
