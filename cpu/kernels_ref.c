/* The oracle's kernels: plain scalar C with libm, one obvious loop an op, in the orders that kernels.h documents. */
#include <math.h>

#include "cpu/kernels.h"
#include "cpu/single.h"

static float lane_sum(float lane[MOE_CPU_LANES]) {
    for (int half = MOE_CPU_LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

static float element(const void *elements, moe_dtype dtype, int64_t index) {
    float value;
    moe_tensor_read_f32(&(moe_tensor){.data = elements, .dtype = dtype}, index, 1, &value);
    return value;
}

static void linear(const moe_cpu_linear *a) {
    for (int32_t r = 0; r < a->rows; r++)
        for (int32_t n = a->n_lo; n < a->n_hi; n++) {
            const float *w = (const float *)a->w->data + (int64_t)n * a->w->k, *x = a->x + r * a->x_stride;
            float sums[MOE_FFN_BLOCKS];
            for (int32_t b = 0; b < a->num_blocks; b++) {
                sums[b] = 0;
                for (int32_t k = a->k_bounds[b]; k < a->k_bounds[b + 1]; k++) sums[b] = fmaf(w[k], x[k], sums[b]);
            }
            for (int32_t step = 1; step < a->num_blocks; step *= 2)
                for (int32_t b = 0; b < a->num_blocks; b += 2 * step) sums[b] += sums[b + step];
            a->y[r * a->y_stride + n] = a->bias ? sums[0] + a->bias[n] : sums[0];
        }
}

static void linear_rows(const moe_cpu_linear *a) {
    for (int32_t r = 0; r < a->rows; r++)
        for (int32_t n = a->n_lo; n < a->n_hi; n++) {
            const uint8_t *w = (const uint8_t *)a->w->data + n / a->w->run * a->w->run_bytes + n % a->w->run * a->w->row_bytes;
            const float *x = a->x + r * a->x_stride;
            float sums[MOE_FFN_BLOCKS];
            for (int32_t b = 0; b < a->num_blocks; b++) {
                float lane[MOE_CPU_LANES] = {0};
                int32_t lo = a->k_bounds[b];
                for (int32_t k = lo; k < a->k_bounds[b + 1]; k++) {
                    float *sum = &lane[(k - lo) % MOE_CPU_LANES];
                    *sum = fmaf(element(w, a->w->dtype, k), x[k], *sum);
                }
                sums[b] = lane_sum(lane);
            }
            for (int32_t step = 1; step < a->num_blocks; step *= 2)
                for (int32_t b = 0; b < a->num_blocks; b += 2 * step) sums[b] += sums[b + step];
            a->y[r * a->y_stride + n] = sums[0];
        }
}

static void rms_norm(const float *x, const float *weight, float eps, int32_t width, float *y) {
    float squares[MOE_CPU_LANES] = {0};
    for (int32_t i = 0; i < width; i++) squares[i % MOE_CPU_LANES] = fmaf(x[i], x[i], squares[i % MOE_CPU_LANES]);
    float scale = 1.0f / sqrtf(lane_sum(squares) / (float)width + eps);
    for (int32_t i = 0; i < width; i++) y[i] = x[i] * scale * weight[i];
}

static void rotate(float *x, const float *cosine, const float *sine, int32_t heads, int32_t head_dim) {
    int32_t half = head_dim / 2;
    for (int32_t head = 0; head < heads; head++)
        for (int32_t i = 0; i < half; i++) {
            float *a = x + head * head_dim + i, *b = a + half, first = *a, second = *b;
            *a = first * cosine[i] - second * sine[i];
            *b = second * cosine[i] + first * sine[i];
        }
}

/* weights[j] = exp(weights[j] - max) for j in [lo, hi); returns their lane sum, lanes by absolute position. */
static float exp_and_sum(float *weights, int32_t lo, int32_t hi) {
    float lane[MOE_CPU_LANES] = {0}, max = -INFINITY;
    for (int32_t j = lo; j < hi; j++) max = weights[j] > max ? weights[j] : max;
    for (int32_t j = lo; j < hi; j++) {
        weights[j] = expf(weights[j] - max);
        lane[j % MOE_CPU_LANES] += weights[j];
    }
    return lane_sum(lane);
}

static void attend_query(const moe_cpu_attention *a, const float *q, int32_t position, float *y) {
    const moe_cpu_kv_layer *kv = a->kv;
    int32_t hi = position + 1, lo = a->window && hi > a->window ? hi - a->window : 0;
    float *weights = a->scratch;
    for (int32_t j = lo; j < hi; j++) {
        const uint8_t *keys = kv->keys + a->blocks[j / MOE_KV_BLOCK_TOKENS] * kv->key_block_bytes;
        int64_t key = (int64_t)a->kv_head * kv->head_dim * MOE_KV_BLOCK_TOKENS + j % MOE_KV_BLOCK_TOKENS;
        float dot = 0;
        for (int32_t i = 0; i < kv->head_dim; i++) dot = fmaf(element(keys, kv->dtype, key + i * MOE_KV_BLOCK_TOKENS), q[i], dot);
        weights[j] = dot * a->scale;
    }
    float total = exp_and_sum(weights, lo, hi);
    for (int32_t i = 0; i < kv->head_dim; i++) {
        float sum = 0;
        for (int32_t j = lo; j < hi; j++) {
            const uint8_t *values = kv->values + a->blocks[j / MOE_KV_BLOCK_TOKENS] * kv->value_block_bytes;
            int64_t row = (int64_t)a->kv_head * MOE_KV_BLOCK_TOKENS + j % MOE_KV_BLOCK_TOKENS;
            sum = fmaf(element(values, kv->dtype, row * kv->padded_dim + i), weights[j], sum);
        }
        y[i] = sum / total;
    }
}

static void attend(const moe_cpu_attention *a) {
    for (int32_t row = 0; row < a->rows; row++)
        for (int32_t i = 0; i < a->heads_per_kv; i++) {
            int64_t at = (int64_t)(a->kv_head * a->heads_per_kv + i) * a->kv->head_dim;
            attend_query(a, a->q + row * a->q_stride + at, a->positions[row], a->y + row * a->y_stride + at);
        }
}

static void silu_mul(float *gate, const float *up, int32_t count) {
    for (int32_t i = 0; i < count; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

static void softmax(const float *logits, int32_t count, float *probabilities) {
    for (int32_t i = 0; i < count; i++) probabilities[i] = logits[i];
    float total = exp_and_sum(probabilities, 0, count);
    for (int32_t i = 0; i < count; i++) probabilities[i] /= total;
}

static void combine(const moe_cpu_combine *a) {
    for (int32_t h = 0; h < a->hidden; h++) {
        float sum = 0;
        for (int32_t j = 0; j < a->count; j++)
            sum = fmaf(a->weights[j], element(a->outputs, a->dtype, (int64_t)j * a->hidden + h), sum);
        if (a->shared) sum += a->shared_scale * a->shared[h];
        a->y[h] += sum;
    }
}

static void accumulate(float weight, const float *x, int32_t count, float *y) {
    for (int32_t i = 0; i < count; i++) y[i] = fmaf(weight, x[i], y[i]);
}

static void relu(float *x, int32_t count) {
    for (int32_t i = 0; i < count; i++)
        if (x[i] < 0) x[i] = 0;
}

static void clamp(float *x, float limit, int32_t count) {
    for (int32_t i = 0; i < count; i++) x[i] = x[i] > limit ? limit : x[i] < -limit ? -limit : x[i];
}

const moe_cpu_kernels moe_cpu_kernels_ref = {
    .isa = "ref",
    .panel = 1,
    .widen_weights = true,
    .linear = linear,
    .linear_rows = linear_rows,
    .rms_norm = rms_norm,
    .rotate = rotate,
    .attend = attend,
    .silu_mul = silu_mul,
    .relu = relu,
    .sigmoid = sigmoid,
    .softmax = softmax,
    .combine = combine,
    .accumulate = accumulate,
    .clamp = clamp,
};
MOE_CPU_SINGLE_OPS(ref)
