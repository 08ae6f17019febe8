/* One table of operations, run over every implementation: cpu-ref against double-precision mathematics written here, and each
 * instruction path of `cpu` and each profile of `cuda` against cpu-ref, within the bounds of the row, with guards around outputs,
 * NaN and infinity. Without a GPU the tests of `cuda` are skipped. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "common/random.h"
#include "cpu/cpu.h"
#include "tests/support/cuda_backends.h"
#include "tests/support/test.h"

#define GUARD 64 /* floats on each side of an output */
#define GUARD_VALUE 12345.678f
#define MAX_BACKENDS 4
#define TINY 1e-37 /* below it, rounding to subnormals is allowed */

typedef enum flavour { PLAIN, WITH_NAN, WITH_INFINITY, FLAVOURS } flavour;

/* Shape and inputs of one case; each op uses what it needs. */
typedef struct op_data {
    int32_t rows, n, k, heads, kv_heads, head_dim, first, window, lo, hi;
    bool norm_topk;
    moe_dtype dtype;
    float *x, *keys, *values;
    int32_t *ids;
    moe_tensor w, bias, up, down;
    int64_t out_count;
} op_data;

/* Error of output i must be at most bound × scale[i]. */
typedef struct op_row {
    const char *name;
    void (*fill)(op_data *d, moe_random *random, flavour f);
    void (*run)(const moe_ops *ops, const op_data *d, float *out);
    void (*truth)(const op_data *d, double *want, double *scale);
    double bound_ref, bound_cpu; /* cpu-ref to the truth; cpu to cpu-ref */
    double bound_cuda, bound_bf16; /* cuda to cpu-ref: float32; bfloat16, where inputs and results are rounded (2^-9 each) */
} op_row;

typedef struct op_case {
    const op_row *op;
    moe_dtype dtype;
    op_data shape;
} op_case;

static moe_backend *backends[MAX_BACKENDS]; /* [0]: cpu-ref */
static int num_backends;
static moe_backend *cuda[2]; /* float32, bfloat16; NULL where there is no GPU */

/* ---- data ---- */

static void *allocate(int64_t count, size_t size) {
    void *p = calloc((size_t)(count ? count : 1), size);
    assert_non_null(p);
    return p;
}

static float uniform(moe_random *r) { return (float)(2 * moe_random_unit(r) - 1); }

static float *floats(moe_random *r, int64_t count) {
    float *p = allocate(count, sizeof *p);
    for (int64_t i = 0; i < count; i++) p[i] = uniform(r);
    return p;
}

/* Any finite half below 1. */
static uint16_t random_f16(moe_random *r) {
    return (uint16_t)(moe_random_below(r, 2) << 15 | moe_random_below(r, 15) << 10 | moe_random_below(r, 1024));
}

/* One byte off any alignment: checkpoints promise none. */
static moe_tensor tensor(moe_random *r, moe_dtype dtype, int64_t rows, int64_t cols) {
    moe_tensor t = {.dtype = dtype, .rows = rows, .cols = cols};
    uint8_t *data = (uint8_t *)allocate((int64_t)moe_tensor_bytes(&t) + 1, 1) + 1;
    for (int64_t i = 0; i < rows * cols; i++) {
        float wide = uniform(r);
        uint16_t narrow = dtype == MOE_BF16 ? moe_f32_to_bf16(wide) : random_f16(r);
        if (dtype == MOE_F32)
            memcpy(data + 4 * i, &wide, sizeof wide);
        else
            memcpy(data + 2 * i, &narrow, sizeof narrow);
    }
    t.data = data;
    return t;
}

static double at(const moe_tensor *t, int64_t row, int64_t col) {
    float value;
    moe_tensor_read_f32(t, row * t->cols + col, 1, &value);
    return value;
}

static void free_data(op_data *d) {
    const moe_tensor *tensors[] = {&d->w, &d->bias, &d->up, &d->down};
    for (int i = 0; i < 4; i++)
        if (tensors[i]->data) free((uint8_t *)(uintptr_t)tensors[i]->data - 1);
    free(d->x);
    free(d->keys);
    free(d->values);
    free(d->ids);
}

/* Spoils one element of the middle row. */
static void spoil(float *x, int64_t rows, int64_t width, flavour f) {
    if (f != PLAIN) x[rows / 2 * width + width / 3] = f == WITH_NAN ? NAN : INFINITY;
}

/* ---- embed ---- */

static void embed_fill(op_data *d, moe_random *r, flavour f) {
    (void)f;
    d->ids = allocate(d->rows, sizeof *d->ids);
    for (int32_t i = 0; i < d->rows; i++) d->ids[i] = (int32_t)moe_random_below(r, (uint64_t)d->n);
    d->w = tensor(r, d->dtype, d->n, d->k);
    d->out_count = (int64_t)d->rows * d->k;
}

static void embed_run(const moe_ops *ops, const op_data *d, float *out) { ops->embed(&d->w, d->ids, d->rows, out); }

static void embed_truth(const op_data *d, double *want, double *scale) {
    for (int64_t i = 0; i < d->out_count; i++) {
        want[i] = at(&d->w, d->ids[i / d->k], i % d->k);
        scale[i] = fabs(want[i]);
    }
}

/* ---- rms_norm ---- */

static void norm_fill(op_data *d, moe_random *r, flavour f) {
    d->w = tensor(r, d->dtype, 1, d->k);
    d->out_count = (int64_t)d->rows * d->k;
    d->x = floats(r, d->out_count);
    spoil(d->x, d->rows, d->k, f);
}

static void norm_run(const moe_ops *ops, const op_data *d, float *out) { ops->rms_norm(d->x, &d->w, 1e-6f, d->rows, d->k, out); }

static void norm_truth(const op_data *d, double *want, double *scale) {
    for (int64_t row = 0; row < d->rows; row++) {
        double sum = 0;
        for (int64_t i = 0; i < d->k; i++) sum += (double)d->x[row * d->k + i] * d->x[row * d->k + i];
        for (int64_t i = 0; i < d->k; i++) {
            int64_t j = row * d->k + i;
            want[j] = d->x[j] / sqrt(sum / d->k + 1e-6) * at(&d->w, 0, i);
            scale[j] = fabs(want[j]);
        }
    }
}

/* ---- linear ---- first: with a bias */

static void linear_fill(op_data *d, moe_random *r, flavour f) {
    d->x = floats(r, (int64_t)d->rows * d->k);
    d->w = tensor(r, d->dtype, d->n, d->k);
    if (d->first) d->bias = tensor(r, d->dtype, 1, d->n);
    d->out_count = (int64_t)d->rows * d->n;
    spoil(d->x, d->rows, d->k, f);
}

static void linear_run(const moe_ops *ops, const op_data *d, float *out) {
    ops->linear(d->x, &d->w, d->bias.data ? &d->bias : NULL, d->rows, out);
}

static void linear_truth(const op_data *d, double *want, double *scale) {
    for (int64_t i = 0; i < d->out_count; i++) {
        int64_t row = i / d->n, n = i % d->n;
        want[i] = d->bias.data ? at(&d->bias, 0, n) : 0;
        scale[i] = fabs(want[i]);
        for (int64_t k = 0; k < d->k; k++) {
            double term = at(&d->w, n, k) * d->x[row * d->k + k];
            want[i] += term;
            scale[i] += fabs(term);
        }
    }
}

/* ---- rotary ---- positions first, first + 37, … */

#define THETA 10000.0f

static void rotary_fill(op_data *d, moe_random *r, flavour f) {
    d->out_count = (int64_t)d->rows * d->heads * d->head_dim;
    d->x = floats(r, d->out_count);
    d->ids = allocate(d->rows, sizeof *d->ids);
    for (int32_t i = 0; i < d->rows; i++) d->ids[i] = d->first + 37 * i;
    spoil(d->x, d->rows, (int64_t)d->heads * d->head_dim, f);
}

static void rotary_run(const moe_ops *ops, const op_data *d, float *out) {
    memcpy(out, d->x, (size_t)d->out_count * sizeof *out);
    ops->rotary(out, d->ids, THETA, d->rows, d->heads, d->head_dim);
}

/* The angle is computed in float32, as transformers does, so its error grows with the angle. */
static void rotary_truth(const op_data *d, double *want, double *scale) {
    int64_t half = d->head_dim / 2;
    for (int64_t head = 0; head < (int64_t)d->rows * d->heads; head++)
        for (int64_t i = 0; i < half; i++) {
            double angle = d->ids[head / d->heads] * pow(THETA, -2.0 * (double)i / d->head_dim);
            int64_t low = head * 2 * half + i, high = low + half;
            want[low] = d->x[low] * cos(angle) - d->x[high] * sin(angle);
            want[high] = d->x[high] * cos(angle) + d->x[low] * sin(angle);
            scale[low] = scale[high] = (fabs(d->x[low]) + fabs(d->x[high])) * (1 + angle);
        }
}

/* ---- attention ---- */

static void attention_fill(op_data *d, moe_random *r, flavour f) {
    int64_t positions = d->first + d->rows, kv_width = (int64_t)d->kv_heads * d->head_dim;
    d->out_count = (int64_t)d->rows * d->heads * d->head_dim;
    d->x = floats(r, d->out_count);
    d->keys = floats(r, positions * kv_width);
    d->values = floats(r, positions * kv_width);
    spoil(d->x, d->rows, (int64_t)d->heads * d->head_dim, f);
    /* a position that only the last row sees, and one that a window leaves behind */
    if (f != PLAIN) d->values[positions * kv_width - 1] = f == WITH_NAN ? NAN : INFINITY;
    if (f != PLAIN && d->window && positions > d->window) d->keys[0] = NAN;
}

static void attention_run(const moe_ops *ops, const op_data *d, float *out) {
    ops->attention(d->x, d->keys, d->values, d->first, d->rows, d->heads, d->kv_heads, d->head_dim, d->window, out);
}

static void attention_truth_one(const op_data *d, int64_t row, int64_t head, double *want, double *scale) {
    int64_t kv = head / (d->heads / d->kv_heads), p = d->first + row, lo = d->window && p + 1 > d->window ? p + 1 - d->window : 0;
    const float *q = d->x + (row * d->heads + head) * d->head_dim;
    double *weights = allocate(p + 1, sizeof *weights), max = -INFINITY, sum = 0;
    for (int64_t j = lo; j <= p; j++) {
        for (int64_t i = 0; i < d->head_dim; i++) weights[j] += (double)q[i] * d->keys[(j * d->kv_heads + kv) * d->head_dim + i];
        weights[j] /= sqrt(d->head_dim);
        max = fmax(max, weights[j]);
    }
    for (int64_t j = lo; j <= p; j++) sum += weights[j] = exp(weights[j] - max);
    for (int64_t i = 0; i < d->head_dim; i++) {
        want[i] = scale[i] = 0;
        for (int64_t j = lo; j <= p; j++) {
            double term = weights[j] / sum * d->values[(j * d->kv_heads + kv) * d->head_dim + i];
            want[i] += term;
            scale[i] += fabs(term);
        }
    }
    free(weights);
}

static void attention_truth(const op_data *d, double *want, double *scale) {
    for (int64_t i = 0; i < (int64_t)d->rows * d->heads; i++)
        attention_truth_one(d, i / d->heads, i % d->heads, want + i * d->head_dim, scale + i * d->head_dim);
}

/* ---- gate_topk ---- k of n experts; output: expert ids, then weights */

static void gate_fill(op_data *d, moe_random *r, flavour f) {
    d->x = floats(r, (int64_t)d->rows * d->n);
    for (int64_t i = 0; i < (int64_t)d->rows * d->n; i++) d->x[i] = rintf(d->x[i] * 16); /* many ties */
    d->out_count = 2 * (int64_t)d->rows * d->k;
    spoil(d->x, d->rows, d->n, f);
}

static void gate_run(const moe_ops *ops, const op_data *d, float *out) {
    int64_t count = d->out_count / 2;
    int32_t *experts = allocate(count, sizeof *experts);
    ops->gate_topk(d->x, d->rows, d->n, d->k, MOE_GATE_SOFTMAX_TOPK, d->norm_topk,
                   (moe_route){.experts = experts, .weights = out + count});
    for (int64_t i = 0; i < count; i++) out[i] = (float)experts[i];
    free(experts);
}

/* How many experts rank before expert e. */
static int rank_of(const float *logits, int32_t n, int32_t e) {
    int before = 0;
    for (int32_t i = 0; i < n; i++) {
        double a = isnan(logits[i]) ? -INFINITY : logits[i], b = isnan(logits[e]) ? -INFINITY : logits[e];
        before += a > b || (a == b && i < e);
    }
    return before;
}

static void gate_truth(const op_data *d, double *want, double *scale) {
    for (int64_t row = 0; row < d->rows; row++) {
        const float *logits = d->x + row * d->n;
        double *ids = want + row * d->k, *weights = ids + d->out_count / 2, sum = 0, chosen_sum = 0, max = -INFINITY;
        int32_t j = 0;
        for (int32_t e = 0; e < d->n; e++) max = fmax(max, logits[e]);
        for (int32_t e = 0; e < d->n; e++) sum += exp(logits[e] - max);
        for (int32_t e = 0; e < d->n; e++) {
            if (rank_of(logits, d->n, e) >= d->k) continue;
            ids[j] = e;
            chosen_sum += weights[j++] = exp(logits[e] - max) / sum;
        }
        assert_int_equal(j, d->k);
        for (j = 0; j < d->k; j++) {
            if (d->norm_topk) weights[j] /= chosen_sum;
            scale[row * d->k + j] = 0;
            scale[d->out_count / 2 + row * d->k + j] = weights[j];
        }
    }
}

/* ---- combine ---- k slots, hidden n; counts in ids, weights in keys, the residual in values */

static void combine_fill(op_data *d, moe_random *r, flavour f) {
    d->x = floats(r, (int64_t)d->rows * d->k * d->n);
    d->keys = floats(r, (int64_t)d->rows * d->k);
    d->values = floats(r, (int64_t)d->rows * d->n);
    d->ids = allocate(d->rows, sizeof *d->ids);
    for (int32_t i = 0; i < d->rows; i++) d->ids[i] = (i + d->k) % (d->k + 1);
    d->out_count = (int64_t)d->rows * d->n;
    spoil(d->x, d->rows, (int64_t)d->k * d->n, f);
}

static void combine_run(const moe_ops *ops, const op_data *d, float *out) {
    moe_combine c = {.outputs = d->x, .weights = d->keys, .counts = d->ids};
    memcpy(out, d->values, (size_t)d->out_count * sizeof *out);
    ops->combine(&c, d->rows, d->k, d->n, out);
}

static void combine_truth(const op_data *d, double *want, double *scale) {
    for (int64_t i = 0; i < d->out_count; i++) {
        int64_t row = i / d->n;
        want[i] = d->values[i];
        scale[i] = fabs(want[i]);
        for (int64_t j = 0; j < d->ids[row]; j++) {
            double term = (double)d->keys[row * d->k + j] * d->x[(row * d->k + j) * d->n + i % d->n];
            want[i] += term;
            scale[i] += fabs(term);
        }
    }
}

/* ---- ffn ---- hidden k, intermediate n, blocks [lo, hi) */

static void ffn_fill(op_data *d, moe_random *r, flavour f) {
    d->w = tensor(r, d->dtype, d->n, d->k);
    d->up = tensor(r, d->dtype, d->n, d->k);
    d->down = tensor(r, d->dtype, d->k, d->n);
    d->x = floats(r, (int64_t)d->rows * d->k);
    d->out_count = (int64_t)d->rows * d->k;
    spoil(d->x, d->rows, d->k, f);
}

static void ffn_run(const moe_ops *ops, const op_data *d, float *out) {
    moe_ffn_weights w = {.gate = d->w, .up = d->up, .down = d->down};
    ops->ffn(d->x, &w, d->rows, d->lo, d->hi, out);
}

static void relu_ffn_run(const moe_ops *ops, const op_data *d, float *out) {
    moe_ffn_weights w = {.up = d->up, .down = d->down};
    ops->ffn(d->x, &w, d->rows, d->lo, d->hi, out);
}

static void relu_ffn_truth(const op_data *d, double *want, double *scale) {
    for (int64_t i = 0; i < d->out_count; i++) want[i] = scale[i] = 0;
    for (int64_t row = 0; row < d->rows; row++)
        for (int64_t n = moe_ffn_block_start(d->n, d->lo); n < moe_ffn_block_start(d->n, d->hi); n++) {
            double up = 0, up_scale = 0;
            for (int64_t k = 0; k < d->k; k++) {
                double u = at(&d->up, n, k) * d->x[row * d->k + k];
                up += u;
                up_scale += fabs(u);
            }
            for (int64_t h = 0; h < d->k; h++) {
                want[row * d->k + h] += at(&d->down, h, n) * (up < 0 ? 0 : up);
                scale[row * d->k + h] += fabs(at(&d->down, h, n)) * up_scale;
            }
        }
}

static void ffn_truth(const op_data *d, double *want, double *scale) {
    for (int64_t i = 0; i < d->out_count; i++) want[i] = scale[i] = 0;
    for (int64_t row = 0; row < d->rows; row++)
        for (int64_t n = moe_ffn_block_start(d->n, d->lo); n < moe_ffn_block_start(d->n, d->hi); n++) {
            double gate = 0, up = 0, gate_scale = 1, up_scale = 1;
            for (int64_t k = 0; k < d->k; k++) {
                double x = d->x[row * d->k + k], g = at(&d->w, n, k) * x, u = at(&d->up, n, k) * x;
                gate += g;
                up += u;
                gate_scale += fabs(g);
                up_scale += fabs(u);
            }
            double activation = gate / (1 + exp(-gate)) * up;
            for (int64_t h = 0; h < d->k; h++) {
                want[row * d->k + h] += at(&d->down, h, n) * activation;
                scale[row * d->k + h] += fabs(at(&d->down, h, n)) * gate_scale * up_scale;
            }
        }
}

/* ---- the table ---- */

static const op_row embed = {"embed", embed_fill, embed_run, embed_truth, 0, 0, 0, 4e-3};
static const op_row rms_norm = {"rms_norm", norm_fill, norm_run, norm_truth, 1e-6, 2e-7, 1e-6, 4e-3};
static const op_row linear = {"linear", linear_fill, linear_run, linear_truth, 1e-6, 1e-7, 1e-6, 4e-3};
static const op_row rotary = {"rotary", rotary_fill, rotary_run, rotary_truth, 4e-7, 1e-7, 4e-7, 4e-3};
static const op_row attention = {"attention", attention_fill, attention_run, attention_truth, 2e-6, 1e-6, 2e-6, 3e-2};
static const op_row gate_topk = {"gate_topk", gate_fill, gate_run, gate_truth, 1e-6, 1e-6, 1e-6, 1e-6};
static const op_row combine = {"combine", combine_fill, combine_run, combine_truth, 4e-7, 1e-7, 4e-7, 4e-7};
static const op_row ffn = {"ffn", ffn_fill, ffn_run, ffn_truth, 1e-6, 3e-7, 1e-6, 1.2e-2};

static const op_row relu_ffn = {"ffn, two matrices", ffn_fill, relu_ffn_run, relu_ffn_truth, 1e-6, 3e-7, 1e-6, 1.2e-2};

static const op_case cases[] = {
    {&embed, MOE_F32, {.rows = 3, .n = 7, .k = 33}},
    {&embed, MOE_BF16, {.rows = 17, .n = 7, .k = 16}},
    {&embed, MOE_F16, {.rows = 1, .n = 2, .k = 1}},
    {&rms_norm, MOE_F32, {.rows = 1, .k = 1}},
    {&rms_norm, MOE_BF16, {.rows = 5, .k = 15}},
    {&rms_norm, MOE_F16, {.rows = 2, .k = 64}},
    {&rms_norm, MOE_BF16, {.rows = 17, .k = 259}},
    {&linear, MOE_F32, {.rows = 1, .n = 1, .k = 1}},
    {&linear, MOE_F32, {.rows = 1, .n = 130, .k = 64}},
    {&linear, MOE_F32, {.rows = 3, .n = 17, .k = 31, .first = 1}},
    {&linear, MOE_BF16, {.rows = 1, .n = 300, .k = 100, .first = 1}},
    {&linear, MOE_BF16, {.rows = 2, .n = 161, .k = 33}},
    {&linear, MOE_BF16, {.rows = 5, .n = 48, .k = 256, .first = 1}},
    {&linear, MOE_BF16, {.rows = 17, .n = 143, .k = 65}},
    {&linear, MOE_BF16, {.rows = 130, .n = 19, .k = 12}},
    {&linear, MOE_F16, {.rows = 1, .n = 129, .k = 77}},
    {&linear, MOE_F16, {.rows = 17, .n = 40, .k = 40, .first = 1}},
    {&rotary, MOE_F32, {.rows = 1, .heads = 1, .head_dim = 2}},
    {&rotary, MOE_F32, {.rows = 5, .heads = 3, .head_dim = 24, .first = 3}},
    {&rotary, MOE_F32, {.rows = 17, .heads = 2, .head_dim = 64, .first = 1000}},
    {&attention, MOE_F32, {.rows = 1, .heads = 1, .kv_heads = 1, .head_dim = 1}},
    {&attention, MOE_F32, {.rows = 1, .heads = 4, .kv_heads = 2, .head_dim = 24, .first = 40}},
    {&attention, MOE_F32, {.rows = 3, .heads = 4, .kv_heads = 4, .head_dim = 16, .first = 14}},
    {&attention, MOE_F32, {.rows = 17, .heads = 4, .kv_heads = 2, .head_dim = 64}},
    {&attention, MOE_F32, {.rows = 5, .heads = 12, .kv_heads = 1, .head_dim = 40, .first = 30}},
    {&attention, MOE_F32, {.rows = 17, .heads = 2, .kv_heads = 1, .head_dim = 20, .first = 30, .window = 7}},
    {&attention, MOE_F32, {.rows = 17, .heads = 2, .kv_heads = 2, .head_dim = 16, .first = 3, .window = 1}},
    {&attention, MOE_F32, {.rows = 2, .heads = 8, .kv_heads = 2, .head_dim = 33, .first = 300, .window = 100}},
    {&gate_topk, MOE_F32, {.rows = 1, .n = 1, .k = 1, .norm_topk = true}},
    {&gate_topk, MOE_F32, {.rows = 5, .n = 8, .k = 2, .norm_topk = true}},
    {&gate_topk, MOE_F32, {.rows = 17, .n = 60, .k = 4}},
    {&gate_topk, MOE_F32, {.rows = 3, .n = 128, .k = 8, .norm_topk = true}},
    {&gate_topk, MOE_F32, {.rows = 2, .n = MOE_MAX_EXPERTS, .k = MOE_MAX_TOP_K}},
    {&combine, MOE_F32, {.rows = 1, .n = 1, .k = 1}},
    {&combine, MOE_F32, {.rows = 5, .n = 67, .k = 4}},
    {&combine, MOE_F32, {.rows = 17, .n = 64, .k = 2}},
    {&ffn, MOE_F32, {.rows = 1, .n = 3, .k = 5, .hi = 8}},
    {&ffn, MOE_BF16, {.rows = 1, .n = 192, .k = 64, .hi = 8}},
    {&ffn, MOE_BF16, {.rows = 5, .n = 100, .k = 33, .lo = 4, .hi = 8}},
    {&ffn, MOE_BF16, {.rows = 17, .n = 48, .k = 64, .lo = 3, .hi = 4}},
    {&ffn, MOE_F16, {.rows = 3, .n = 80, .k = 48, .lo = 2, .hi = 4}},
    {&ffn, MOE_BF16, {.rows = 70, .n = 24, .k = 20, .hi = 8}},
    {&relu_ffn, MOE_F32, {.rows = 1, .n = 3, .k = 5, .hi = 8}},
    {&relu_ffn, MOE_BF16, {.rows = 1, .n = 192, .k = 64, .hi = 8}},
    {&relu_ffn, MOE_BF16, {.rows = 3, .n = 512, .k = 128, .lo = 3, .hi = 4}},
    {&relu_ffn, MOE_BF16, {.rows = 5, .n = 100, .k = 33, .lo = 4, .hi = 8}},
    {&relu_ffn, MOE_F16, {.rows = 3, .n = 80, .k = 48, .lo = 2, .hi = 4}},
    {&relu_ffn, MOE_BF16, {.rows = 70, .n = 24, .k = 20, .hi = 8}},
};

/* ---- running it ---- */

static float *run_guarded(const moe_ops *ops, const op_row *op, const op_data *d) {
    float *memory = allocate(d->out_count + 2 * GUARD, sizeof *memory);
    for (int64_t i = 0; i < d->out_count + 2 * GUARD; i++) memory[i] = GUARD_VALUE;
    op->run(ops, d, memory + GUARD);
    for (int64_t i = 0; i < GUARD; i++)
        if (memory[i] != GUARD_VALUE || memory[GUARD + d->out_count + i] != GUARD_VALUE)
            fail_msg("%s wrote outside its output, at guard %d", op->name, (int)i);
    memmove(memory, memory + GUARD, (size_t)d->out_count * sizeof *memory);
    return memory;
}

static bool close_enough(double got, double want, double allowed) {
    if (isnan(want)) return isnan(got);
    if (isinf(want)) return got == want;
    return isfinite(got) && fabs(got - want) <= allowed;
}

typedef struct held {
    double *want, *scale; /* the truth, then cpu-ref's results */
} held;

static void check(const op_case *c, flavour f, moe_backend *backend, double bound, const op_data *d, const held *h, float *got) {
    for (int64_t i = 0; i < d->out_count; i++) {
        double allowed = isfinite(h->scale[i]) ? bound * h->scale[i] + TINY : INFINITY;
        if (!close_enough(got[i], h->want[i], allowed))
            fail_msg("%s, case %d, flavour %d, %s: element %d is %.9g, not %.9g within %.3g", c->op->name, (int)(c - cases), f,
                     backend->ops->profile(backend), (int)i, got[i], h->want[i], allowed);
    }
}

static void run_on(const op_case *c, flavour f, moe_backend *backend, double bound, const op_data *d, const held *h) {
    float *got = run_guarded(backend->ops->single, c->op, d);
    check(c, f, backend, bound, d, h, got);
    free(got);
}

static void run_case(const op_case *c, flavour f, bool on_cuda) {
    op_data d = c->shape;
    moe_random random = {.state = (uint64_t)(c - cases) * FLAVOURS + f};
    d.dtype = c->dtype;
    c->op->fill(&d, &random, f);
    held h = {allocate(d.out_count, sizeof(double)), allocate(d.out_count, sizeof(double))};
    c->op->truth(&d, h.want, h.scale);
    float *ref = run_guarded(backends[0]->ops->single, c->op, &d);
    check(c, f, backends[0], c->op->bound_ref, &d, &h, ref);
    for (int64_t i = 0; i < d.out_count; i++) h.want[i] = ref[i]; /* the others are held against cpu-ref */
    for (int b = 1; b < num_backends && !on_cuda; b++) run_on(c, f, backends[b], c->op->bound_cpu, &d, &h);
    for (int b = 0; b < 2 && on_cuda; b++) run_on(c, f, cuda[b], b ? c->op->bound_bf16 : c->op->bound_cuda, &d, &h);
    free(ref);
    free(h.want);
    free(h.scale);
    free_data(&d);
}

static void run_cases(const op_row *op, bool on_cuda) {
    int count = 0;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int f = PLAIN; f < FLAVOURS && cases[i].op == op; f++, count++) run_case(&cases[i], (flavour)f, on_cuda);
    assert_true(count > 0);
}

static void run_op(void **state) { run_cases(*state, false); }

static void run_op_on_cuda(void **state) {
    if (!cuda[0] || !cuda[1]) skip();
    run_cases(*state, true);
}

static int open_backends(void **state) {
    static const char *const isas[] = {"scalar", "avx2", "avx512"};
    moe_error err;
    (void)state;
    if (moe_cpu_ref_open(&(moe_cpu_config){0}, &backends[num_backends++], &err) != MOE_OK) return -1;
    for (int i = 0; i < 3; i++) {
        moe_status status = moe_cpu_open(&(moe_cpu_config){.isa = isas[i]}, &backends[num_backends], &err);
        if (status == MOE_OK)
            num_backends++;
        else if (status != MOE_FAILED_PRECONDITION)
            return -1;
        else
            print_message("not tested: %s\n", err.message);
    }
    cuda[0] = moe_test_cuda_open(MOE_F32, false);
    cuda[1] = cuda[0] ? moe_test_cuda_open(MOE_BF16, false) : NULL;
    return num_backends < 2 ? -1 : 0;
}

static int close_backends(void **state) {
    (void)state;
    while (num_backends > 0) {
        num_backends--;
        backends[num_backends]->ops->close(backends[num_backends]);
    }
    for (int i = 0; i < 2; i++)
        if (cuda[i]) cuda[i]->ops->close(cuda[i]);
    return 0;
}

int main(void) {
    const op_row *const ops[] = {&embed, &rms_norm, &linear, &rotary, &attention, &gate_topk, &combine, &ffn, &relu_ffn};
    enum { OPS = sizeof ops / sizeof *ops };
    struct CMUnitTest tests[2 * OPS];
    char names[OPS][32];
    for (size_t i = 0; i < OPS; i++) {
        snprintf(names[i], sizeof names[i], "cuda, %s", ops[i]->name);
        tests[i] = (struct CMUnitTest){.name = ops[i]->name, .test_func = run_op, .initial_state = (void *)(uintptr_t)ops[i]};
        tests[OPS + i] = tests[i];
        tests[OPS + i].name = names[i];
        tests[OPS + i].test_func = run_op_on_cuda;
    }
    if (getenv("MOESAIC_TEST_FILTER")) cmocka_set_test_filter(getenv("MOESAIC_TEST_FILTER")); /* "cuda*": under compute-sanitizer */
    return cmocka_run_group_tests(tests, open_backends, close_backends);
}
