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

#define CHUNK 256 /* of K at a time: what is read of a panel's rows stays in the first-level cache */

/* Rows of a panel as they were read, [panel, CHUNK]. */
typedef union rows {
    uint16_t narrow[MOE_CPU_LANES * CHUNK];
    float wide[MOE_CPU_LANES * CHUNK];
} rows;

static void read_chunk(const moe_cpu_matrix *m, const moe_tensor *t, int64_t first, int64_t count, int32_t row, rows *out) {
    if (m->dtype != t->dtype)
        moe_tensor_read_f32(t, first, count, out->wide + row * CHUNK);
    else
        moe_tensor_read(t, first, count, m->dtype == MOE_F32 ? (void *)(out->wide + row * CHUNK) : out->narrow + row * CHUNK);
}

#define INTERLEAVE(name, type, field)                                                                                            \
    static inline void name(const rows *from, int64_t count, int32_t panel, type *to) {                                          \
        for (int64_t k = 0; k < count; k++)                                                                                      \
            for (int32_t i = 0; i < panel; i++) to[k * panel + i] = from->field[i * CHUNK + k];                                   \
    }
INTERLEAVE(interleave_narrow, uint16_t, narrow)
INTERLEAVE(interleave_wide, float, wide)

/* to [count, panel] = the transposed rows; the usual panel's width is a constant for the compiler. */
static void interleave(const moe_cpu_matrix *m, const rows *from, int64_t count, void *to) {
    bool usual = m->panel == MOE_CPU_LANES;
    if (m->dtype == MOE_F32)
        usual ? interleave_wide(from, count, MOE_CPU_LANES, to) : interleave_wide(from, count, m->panel, to);
    else
        usual ? interleave_narrow(from, count, MOE_CPU_LANES, to) : interleave_narrow(from, count, m->panel, to);
}

/* Outputs are the rows of the parts, one part after another; those that the last panel lacks are zero. */
void moe_cpu_matrix_fill(const moe_cpu_matrix *m, const moe_tensor *parts, int num_parts, int64_t col_lo) {
    const moe_tensor *of[MOE_CPU_LANES];
    int64_t at[MOE_CPU_LANES], row = 0, size = (int64_t)moe_dtype_bytes(m->dtype);
    uint8_t *to = m->data;
    rows chunk;
    int part = 0;
    MOE_ASSERT(m->panel <= MOE_CPU_LANES);
    for (int64_t n = 0; n < m->n; n += m->panel) {
        int32_t count = 0;
        while (count < m->panel && part < num_parts) {
            if (!moe_tensor_present(&parts[part]) || row == parts[part].rows) {
                part++;
                row = 0;
                continue;
            }
            of[count] = &parts[part];
            at[count++] = row++ * parts[part].cols + col_lo;
        }
        if (count < m->panel) memset(&chunk, 0, sizeof chunk);
        for (int64_t k = 0, width; k < m->k; k += width) {
            width = m->k - k < CHUNK ? m->k - k : CHUNK;
            for (int32_t i = 0; i < count; i++) read_chunk(m, of[i], at[i] + k, width, i, &chunk);
            interleave(m, &chunk, width, to);
            to += width * m->panel * size;
        }
    }
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
