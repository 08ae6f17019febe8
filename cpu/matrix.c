#include "cpu/matrix.h"

#include "common/alloc.h"

static int64_t panel_count(const moe_cpu_matrix *m) { return ((int64_t)m->n + m->panel - 1) / m->panel; }

int64_t moe_cpu_matrix_bytes(const moe_cpu_matrix *m) {
    return m->n ? panel_count(m) * m->panel * m->k * (int64_t)moe_dtype_bytes(m->dtype) : 0;
}

void moe_cpu_matrix_free(moe_cpu_matrix *matrix) {
    moe_free(matrix->data);
    *matrix = (moe_cpu_matrix){0};
}

/* Output `n` of the matrix: columns [col, col + k) of the tensor's `row`. */
static void pack_row(const moe_cpu_matrix *m, int64_t n, const moe_tensor *t, int64_t row, int64_t col) {
    enum { CHUNK = 256 };
    _Alignas(float) uint8_t chunk[CHUNK * sizeof(float)];
    size_t size = moe_dtype_bytes(m->dtype), stride = (size_t)m->panel * size;
    uint8_t *to = (uint8_t *)m->data + (size_t)(n / m->panel * m->panel * m->k + n % m->panel) * size;
    for (int64_t k = 0; k < m->k; k += CHUNK) {
        int64_t count = m->k - k < CHUNK ? m->k - k : CHUNK, first = row * t->cols + col + k;
        if (m->dtype == t->dtype)
            moe_tensor_read(t, first, count, chunk);
        else
            moe_tensor_read_f32(t, first, count, (float *)(void *)chunk);
        for (int64_t i = 0; i < count; i++, to += stride) memcpy(to, chunk + (size_t)i * size, size);
    }
}

moe_cpu_matrix moe_cpu_matrix_shape(const moe_cpu_kernels *kernels, const moe_tensor *parts, int num_parts, int64_t col_lo,
                                    int64_t col_hi) {
    moe_cpu_matrix m = {.panel = kernels->panel, .k = (int32_t)(col_hi - col_lo), .dtype = MOE_DTYPE_COUNT};
    for (int i = 0; i < num_parts; i++) {
        if (!moe_tensor_present(&parts[i])) continue;
        m.n += (int32_t)parts[i].rows;
        m.dtype = m.dtype == MOE_DTYPE_COUNT || m.dtype == parts[i].dtype ? parts[i].dtype : MOE_F32;
    }
    if (kernels->widen_weights) m.dtype = MOE_F32;
    return m;
}

/* The last panel's missing outputs are zero. */
void moe_cpu_matrix_fill(const moe_cpu_matrix *m, const moe_tensor *parts, int num_parts, int64_t col_lo) {
    int64_t n = 0, panel_bytes = (int64_t)m->panel * m->k * (int64_t)moe_dtype_bytes(m->dtype);
    if (m->n % m->panel) memset((uint8_t *)m->data + (panel_count(m) - 1) * panel_bytes, 0, (size_t)panel_bytes);
    for (int i = 0; i < num_parts; i++)
        for (int64_t row = 0; moe_tensor_present(&parts[i]) && row < parts[i].rows; row++)
            pack_row(m, n++, &parts[i], row, col_lo);
}

moe_status moe_cpu_matrix_pack(const moe_cpu_kernels *kernels, const moe_tensor *parts, int num_parts, int64_t col_lo,
                               int64_t col_hi, moe_cpu_matrix *out, moe_error *err) {
    *out = moe_cpu_matrix_shape(kernels, parts, num_parts, col_lo, col_hi);
    if (out->n == 0) return MOE_OK;
    out->data = moe_alloc_aligned((size_t)panel_count(out) * (size_t)out->panel * moe_dtype_bytes(out->dtype), (size_t)out->k);
    if (!out->data) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for packed weights [%d, %d]", out->n, out->k);
    moe_cpu_matrix_fill(out, parts, num_parts, col_lo);
    return MOE_OK;
}

moe_status moe_cpu_matrix_pack_one(const moe_cpu_kernels *kernels, const moe_tensor *tensor, moe_cpu_matrix *out,
                                   moe_error *err) {
    return moe_cpu_matrix_pack(kernels, tensor, 1, 0, tensor->cols, out, err);
}

moe_status moe_cpu_vector_read(const moe_tensor *parts, int num_parts, float **out, moe_error *err) {
    int64_t count = 0, at = 0;
    *out = NULL;
    for (int i = 0; i < num_parts; i++)
        if (moe_tensor_present(&parts[i])) count += parts[i].rows * parts[i].cols;
    if (count == 0) return MOE_OK;
    *out = moe_alloc_aligned((size_t)count, sizeof(float));
    if (!*out) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a vector of %lld floats", (long long)count);
    for (int i = 0; i < num_parts; i++) {
        if (!moe_tensor_present(&parts[i])) continue;
        moe_tensor_read_f32(&parts[i], 0, parts[i].rows * parts[i].cols, *out + at);
        at += parts[i].rows * parts[i].cols;
    }
    return MOE_OK;
}
