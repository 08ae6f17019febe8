#include "router/engine/sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/random.h"

typedef struct candidate {
    float logit;
    float weight; /* exp((logit - max) / temperature) */
    int32_t id;
} candidate;

struct moe_sampler {
    int32_t vocab;
    float *logits;         /* [vocab]: after bias and penalties */
    candidate *candidates; /* [vocab] */
    float *weights;        /* [vocab]: of the tokens that may be drawn; 0 elsewhere */
    int32_t *counts;       /* [vocab]: occurrences in the output; all zero between calls */
    bool *seen;            /* [vocab]: occurs in prompt or output; all false between calls */
};

moe_status moe_sampler_new(int32_t vocab, moe_sampler **out, moe_error *err) {
    moe_sampler *s = *out = moe_calloc(1, sizeof *s);
    size_t n = (size_t)vocab;
    if (s) {
        s->vocab = vocab;
        s->logits = moe_calloc(n, sizeof *s->logits);
        s->candidates = moe_calloc(n, sizeof *s->candidates);
        s->weights = moe_calloc(n, sizeof *s->weights);
        s->counts = moe_calloc(n, sizeof *s->counts);
        s->seen = moe_calloc(n, sizeof *s->seen);
    }
    if (s && s->logits && s->candidates && s->weights && s->counts && s->seen) return MOE_OK;
    moe_sampler_free(out);
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for sampling over %d tokens", vocab);
}

void moe_sampler_free(moe_sampler **sampler) {
    moe_sampler *s = *sampler;
    *sampler = NULL;
    if (!s) return;
    moe_free(s->logits);
    moe_free(s->candidates);
    moe_free(s->weights);
    moe_free(s->counts);
    moe_free(s->seen);
    moe_free(s);
}

static void ban(moe_sampler *s, const int32_t *ids, int32_t count) {
    for (int32_t i = 0; i < count; i++)
        if (ids[i] >= 0 && ids[i] < s->vocab) s->logits[ids[i]] = -INFINITY;
}

static bool has_penalties(const moe_sampling_params *p) {
    return p->repetition_penalty != 1.0f || p->presence_penalty != 0.0f || p->frequency_penalty != 0.0f;
}

static void apply_penalties(moe_sampler *s, const moe_sample_input *in) {
    const moe_sampling_params *p = in->params;
    bool repetition = p->repetition_penalty != 1.0f;
    if (!has_penalties(p)) return;
    for (int32_t i = 0; i < in->num_tokens; i++) {
        int32_t id = in->tokens[i];
        if (i >= in->num_prompt) s->counts[id]++;
        if (!repetition || s->seen[id]) continue;
        s->seen[id] = true;
        s->logits[id] = s->logits[id] > 0 ? s->logits[id] / p->repetition_penalty : s->logits[id] * p->repetition_penalty;
    }
    for (int32_t i = 0; i < in->num_tokens; i++) {
        int32_t id = in->tokens[i];
        if (s->counts[id]) s->logits[id] -= p->presence_penalty + p->frequency_penalty * (float)s->counts[id];
        s->counts[id] = 0;
        s->seen[id] = false;
    }
}

/* Maxima kept side by side, so that the compiler can use vectors: done for every token of every request. */
#define SCAN_LANES 16

/* *max: the greatest logit. False where one is NaN or +infinity. */
static bool scan_logits(const float *logits, int32_t count, float *max) {
    float greatest[SCAN_LANES];
    int32_t good[SCAN_LANES] = {0}, num_good = 0, i = 0;
    for (int l = 0; l < SCAN_LANES; l++) greatest[l] = -INFINITY;
    for (; i + SCAN_LANES <= count; i += SCAN_LANES) {
        for (int l = 0; l < SCAN_LANES; l++) greatest[l] = logits[i + l] > greatest[l] ? logits[i + l] : greatest[l];
        for (int l = 0; l < SCAN_LANES; l++) good[l] += logits[i + l] < INFINITY;
    }
    for (; i < count; i++) {
        greatest[0] = logits[i] > greatest[0] ? logits[i] : greatest[0];
        num_good += logits[i] < INFINITY;
    }
    *max = -INFINITY;
    for (int l = 0; l < SCAN_LANES; l++) {
        if (greatest[l] > *max) *max = greatest[l];
        num_good += good[l];
    }
    return num_good == count;
}

static moe_status check_logits(const float *logits, int32_t count, float *max, moe_error *err) {
    if (!scan_logits(logits, count, max)) {
        int32_t i = 0;
        while (i < count && logits[i] < INFINITY) i++;
        return moe_fail(err, MOE_INTERNAL, "the logit of token %d is not finite", i);
    }
    return *max > -INFINITY ? MOE_OK : moe_fail(err, MOE_INTERNAL, "no token has a finite logit");
}

/* The first of the greatest, which are `max`. */
static int32_t first_of(const float *logits, int32_t count, float max) {
    int32_t i = 0;
    while (i + 1 < count && logits[i] != max) i++;
    return i;
}

static int32_t argmax(const float *logits, int32_t count) {
    float max;
    scan_logits(logits, count, &max);
    return first_of(logits, count, max);
}

/* Likeliest first, equal ones by ascending id: a total order, so that results do not depend on how it is found. */
static bool comes_before(const candidate *a, const candidate *b) {
    return a->logit != b->logit ? a->logit > b->logit : a->id < b->id;
}

static int by_logit(const void *a, const void *b) { return comes_before(a, b) ? -1 : comes_before(b, a); }

static void swap(candidate *a, candidate *b) {
    candidate kept = *a;
    *a = *b;
    *b = kept;
}

/* Puts c[lo … hi) around a pivot: those that come before it, the pivot, the others. Returns where the pivot is. */
static int32_t partition(candidate *c, int32_t lo, int32_t hi) {
    int32_t middle = lo + (hi - lo) / 2, last = hi - 1, at = lo;
    if (comes_before(&c[middle], &c[lo])) swap(&c[middle], &c[lo]);
    if (comes_before(&c[last], &c[lo])) swap(&c[last], &c[lo]);
    if (comes_before(&c[middle], &c[last])) swap(&c[middle], &c[last]); /* the median of three is last */
    for (int32_t i = lo; i < last; i++)
        if (comes_before(&c[i], &c[last])) swap(&c[i], &c[at++]);
    swap(&c[at], &c[last]);
    return at;
}

/* The least number of the order's first whose sum reaches `need` > 0 (or all, where rounding keeps it from that): of their
 * weights, or of 1 each. Moves them to the front, in no order. Quickselect: linear on average. */
static int32_t select_first(candidate *c, int32_t count, double need, bool weighted) {
    int32_t lo = 0, hi = count;
    double reached = 0; /* by c[0 … lo), always below need */
    while (hi - lo > 1) {
        int32_t pivot = partition(c, lo, hi);
        double before = reached;
        for (int32_t i = lo; i < pivot && weighted; i++) before += c[i].weight;
        if (!weighted) before += pivot - lo;
        double with = before + (weighted ? c[pivot].weight : 1);
        if (before < need && with >= need) return pivot + 1;
        if (before >= need) {
            hi = pivot;
        } else {
            lo = pivot + 1;
            reached = with;
        }
    }
    return hi;
}

/* The tokens that are not ruled out, by ascending id, or the top_k likeliest of them: few in their order, so that the sums over
 * them do not depend on where they come from, many in none. */
static int32_t gather_candidates(moe_sampler *s, const moe_sample_input *in) {
    int32_t count = 0, top_k = in->params->top_k;
    if (!in->logits) {
        for (; count < in->num_top && count < top_k; count++)
            s->candidates[count] = (candidate){.logit = in->top_logits[count], .id = in->top_ids[count]};
        return count;
    }
    for (int32_t i = 0; i < s->vocab; i++)
        if (s->logits[i] != -INFINITY) s->candidates[count++] = (candidate){.logit = s->logits[i], .id = i};
    if (top_k > 0 && top_k < count) count = select_first(s->candidates, count, top_k, false);
    if (top_k > 0 && top_k <= MOE_MAX_TOP_LOGITS) qsort(s->candidates, (size_t)count, sizeof *s->candidates, by_logit);
    return count;
}

/* Fills in the weights; returns their sum. */
static double weigh(moe_sampler *s, int32_t count, float max, float temperature) {
    double sum = 0;
    for (int32_t i = 0; i < count; i++) {
        s->candidates[i].weight = expf((s->candidates[i].logit - max) / temperature);
        sum += s->candidates[i].weight;
    }
    return sum;
}

/* Leaves out what is below `least`; returns how many are left. */
static int32_t drop_below(candidate *c, int32_t count, float least) {
    int32_t kept = 0;
    for (int32_t i = 0; i < count; i++)
        if (c[i].weight >= least) c[kept++] = c[i];
    return kept;
}

/* Uniform in [0, 1) from the request's seed and the number of the output token. */
static double uniform(uint64_t seed, int32_t output_index) {
    uint64_t bits = moe_mix64(moe_mix64(seed) ^ (uint64_t)output_index);
    return (double)(bits >> 11) * 0x1.0p-53;
}

static int by_id(const void *a, const void *b) {
    const candidate *x = a, *y = b;
    return (x->id > y->id) - (x->id < y->id);
}

/* As `draw`, without passing over the whole vocabulary: the additions are the same but for zeros. */
static int32_t draw_of_few(candidate *c, int32_t count, double u) {
    qsort(c, (size_t)count, sizeof *c, by_id);
    double sum = 0;
    for (int32_t i = 0; i < count; i++) sum += c[i].weight;
    double left = u * sum;
    int32_t drawn = -1;
    for (int32_t i = 0; i < count; i++) {
        if (c[i].weight == 0) continue;
        drawn = c[i].id;
        if (left < c[i].weight) break;
        left -= c[i].weight;
    }
    return drawn;
}

/* Walks the candidates by ascending id, whatever order selecting left them in. */
static int32_t draw(moe_sampler *s, int32_t count, double u) {
    if (count <= MOE_MAX_TOP_LOGITS) return draw_of_few(s->candidates, count, u);
    memset(s->weights, 0, (size_t)s->vocab * sizeof *s->weights);
    for (int32_t i = 0; i < count; i++) s->weights[s->candidates[i].id] = s->candidates[i].weight;
    double sum = 0;
    for (int32_t id = 0; id < s->vocab; id++) sum += s->weights[id];
    double left = u * sum;
    int32_t drawn = -1;
    for (int32_t id = 0; id < s->vocab; id++) {
        if (s->weights[id] == 0) continue;
        drawn = id;
        if (left < s->weights[id]) break;
        left -= s->weights[id];
    }
    return drawn;
}

static int32_t sample(moe_sampler *s, const moe_sample_input *in, float max) {
    const moe_sampling_params *p = in->params;
    int32_t count = gather_candidates(s, in);
    double sum = weigh(s, count, max, p->temperature);
    if (p->top_p < 1.0f) count = select_first(s->candidates, count, (double)p->top_p * sum, true);
    if (p->min_p > 0.0f) count = drop_below(s->candidates, count, p->min_p); /* the likeliest weighs 1 */
    return draw(s, count, uniform(p->seed, in->num_tokens - in->num_prompt));
}

static bool below_min_tokens(const moe_sample_input *in) { return in->num_tokens - in->num_prompt < in->params->min_tokens; }

/* False where adjust_logits would only copy. */
static bool is_adjusted(const moe_sample_input *in) {
    const moe_sampling_params *p = in->params;
    return in->num_logit_bias > 0 || below_min_tokens(in) || has_penalties(p);
}

int32_t moe_sampler_num_top(const moe_sample_input *in) {
    const moe_sampling_params *p = in->params;
    if (is_adjusted(in) || p->logprobs >= 0) return 0;
    if (p->temperature == 0.0f) return 1;
    return p->top_k <= MOE_MAX_TOP_LOGITS ? p->top_k : 0;
}

static moe_status sample_of_top(moe_sampler *s, const moe_sample_input *in, int32_t *token, moe_error *err) {
    if (in->num_top < 1 || in->top_ids[0] < 0) return moe_fail(err, MOE_INTERNAL, "a logit is not finite");
    *token = in->params->temperature == 0.0f ? in->top_ids[0] : sample(s, in, in->top_logits[0]);
    return MOE_OK;
}

/* s->logits = the raw logits with everything applied that comes before the temperature. */
static moe_status adjust_logits(moe_sampler *s, const moe_sample_input *in, moe_error *err) {
    const moe_sampling_params *p = in->params;
    memcpy(s->logits, in->logits, (size_t)s->vocab * sizeof *s->logits);
    for (int32_t i = 0; i < in->num_logit_bias; i++) {
        int32_t id = in->logit_bias[i].token_id;
        if (id < 0 || id >= s->vocab) return moe_fail(err, MOE_INVALID_ARGUMENT, "logit_bias: the model has no token %d", id);
        s->logits[id] += in->logit_bias[i].bias;
    }
    if (below_min_tokens(in)) {
        ban(s, in->eos_ids, in->num_eos);
        ban(s, p->stop_token_ids, p->num_stop_token_ids);
    }
    apply_penalties(s, in);
    return MOE_OK;
}

/* The token, from the raw logits, whose greatest is `max`. */
static moe_status choose(moe_sampler *s, const moe_sample_input *in, float max, int32_t *token, moe_error *err) {
    if (in->params->temperature == 0.0f && !is_adjusted(in)) {
        *token = first_of(in->logits, s->vocab, max);
        return MOE_OK;
    }
    moe_status status = adjust_logits(s, in, err);
    if (status != MOE_OK) return status;
    int32_t best = argmax(s->logits, s->vocab);
    if (!isfinite(s->logits[best]))
        return moe_fail(err, MOE_INTERNAL, "no token is left after logit_bias, min_tokens and the penalties");
    *token = in->params->temperature == 0.0f ? best : sample(s, in, s->logits[best]);
    return MOE_OK;
}

moe_status moe_sampler_sample(moe_sampler *s, const moe_sample_input *in, int32_t *token, moe_token_logprobs *logprobs,
                              moe_error *err) {
    float max;
    if (!in->logits) return sample_of_top(s, in, token, err);
    moe_status status = check_logits(in->logits, s->vocab, &max, err);
    if (status == MOE_OK) status = choose(s, in, max, token, err);
    if (status != MOE_OK || in->params->logprobs < 0) return status;
    return moe_sampler_logprobs(s, in->logits, *token, in->params->logprobs, logprobs, err);
}

moe_status moe_sampler_logprobs(moe_sampler *s, const float *logits, int32_t target, int32_t num_top, moe_token_logprobs *out,
                                moe_error *err) {
    float max;
    moe_status status = check_logits(logits, s->vocab, &max, err);
    if (status != MOE_OK) return status;
    double sum = 0;
    int32_t rank = 1;
    for (int32_t i = 0; i < s->vocab; i++) {
        sum += exp((double)logits[i] - max);
        rank += logits[i] > logits[target] || (logits[i] == logits[target] && i < target);
        s->candidates[i] = (candidate){.logit = logits[i], .id = i};
    }
    double log_sum = max + log(sum);
    out->chosen = (moe_logprob){target, (float)(logits[target] - log_sum), rank};
    out->num_top = num_top < s->vocab ? num_top : s->vocab;
    if (out->num_top == 0) return MOE_OK;
    select_first(s->candidates, s->vocab, out->num_top, false);
    qsort(s->candidates, (size_t)out->num_top, sizeof *s->candidates, by_logit);
    for (int32_t i = 0; i < out->num_top; i++)
        out->top[i] = (moe_logprob){s->candidates[i].id, (float)(s->candidates[i].logit - log_sum), i + 1};
    return MOE_OK;
}
