#include "router/engine/sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/random.h"

typedef struct candidate {
    float logit;
    int32_t id;
} candidate;

struct moe_sampler {
    int32_t vocab;
    float *logits;         /* [vocab]: after bias and penalties */
    candidate *candidates; /* [vocab] */
    float *weights;        /* [vocab]: unnormalised probabilities of the candidates */
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

static void apply_penalties(moe_sampler *s, const moe_sample_input *in) {
    const moe_sampling_params *p = in->params;
    bool repetition = p->repetition_penalty != 1.0f, output = p->presence_penalty != 0.0f || p->frequency_penalty != 0.0f;
    if (!repetition && !output) return;
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

static int32_t argmax(const float *logits, int32_t count) {
    int32_t best = 0;
    for (int32_t i = 1; i < count; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

/* Likeliest first, equal ones by ascending id: a total order, so that results do not depend on the sort. */
static int by_logit(const void *a, const void *b) {
    const candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

/* Moves the `keep` first of the order to the front (quickselect); their order there is undefined. */
static void select_top(candidate *c, int32_t count, int32_t keep) {
    int32_t lo = 0, hi = count - 1;
    while (lo < hi) {
        candidate pivot = c[lo + (hi - lo) / 2];
        int32_t i = lo, j = hi;
        while (i <= j) {
            while (by_logit(&c[i], &pivot) < 0) i++;
            while (by_logit(&c[j], &pivot) > 0) j--;
            if (i > j) break;
            candidate kept = c[i];
            c[i++] = c[j];
            c[j--] = kept;
        }
        if (keep - 1 <= j)
            hi = j;
        else if (keep - 1 >= i)
            lo = i;
        else
            return;
    }
}

static int32_t gather_candidates(moe_sampler *s, int32_t top_k) {
    int32_t count = 0;
    for (int32_t i = 0; i < s->vocab; i++)
        if (s->logits[i] != -INFINITY) s->candidates[count++] = (candidate){s->logits[i], i};
    if (top_k > 0 && top_k < count) {
        select_top(s->candidates, count, top_k);
        count = top_k;
    }
    qsort(s->candidates, (size_t)count, sizeof *s->candidates, by_logit);
    return count;
}

/* weights = exp((logit - max) / temperature); returns their sum. */
static double weigh(moe_sampler *s, int32_t count, float temperature) {
    double sum = 0;
    for (int32_t i = 0; i < count; i++) {
        s->weights[i] = expf((s->candidates[i].logit - s->candidates[0].logit) / temperature);
        sum += s->weights[i];
    }
    return sum;
}

/* The least prefix whose probability reaches top_p, then without what is below min_p × the likeliest. Returns its length. */
static int32_t cut(const moe_sampler *s, int32_t count, const moe_sampling_params *p, double *sum) {
    if (p->top_p < 1.0f) {
        double reached = 0;
        int32_t kept = 0;
        while (kept < count && reached < (double)p->top_p * *sum) reached += s->weights[kept++];
        count = kept;
        *sum = reached;
    }
    if (p->min_p > 0.0f)
        while (count > 1 && s->weights[count - 1] < p->min_p * s->weights[0]) *sum -= s->weights[--count];
    return count;
}

/* Uniform in [0, 1) from the request's seed and the number of the output token. */
static double draw(uint64_t seed, int32_t output_index) {
    uint64_t bits = moe_mix64(moe_mix64(seed) ^ (uint64_t)output_index);
    return (double)(bits >> 11) * 0x1.0p-53;
}

static int32_t sample(moe_sampler *s, const moe_sample_input *in) {
    const moe_sampling_params *p = in->params;
    int32_t count = gather_candidates(s, p->top_k);
    double sum = weigh(s, count, p->temperature);
    count = cut(s, count, p, &sum);
    double left = draw(p->seed, in->num_tokens - in->num_prompt) * sum;
    int32_t i = 0;
    while (i + 1 < count && left >= s->weights[i]) left -= s->weights[i++];
    return s->candidates[i].id;
}

static moe_status check_logits(const float *logits, int32_t count, moe_error *err) {
    bool any = false;
    for (int32_t i = 0; i < count; i++) {
        if (isnan(logits[i]) || logits[i] == INFINITY)
            return moe_fail(err, MOE_INTERNAL, "the logit of token %d is not finite", i);
        any = any || logits[i] != -INFINITY;
    }
    return any ? MOE_OK : moe_fail(err, MOE_INTERNAL, "no token has a finite logit");
}

moe_status moe_sampler_sample(moe_sampler *s, const moe_sample_input *in, int32_t *token, moe_token_logprobs *logprobs,
                              moe_error *err) {
    const moe_sampling_params *p = in->params;
    moe_status status = check_logits(in->logits, s->vocab, err);
    if (status != MOE_OK) return status;
    memcpy(s->logits, in->logits, (size_t)s->vocab * sizeof *s->logits);
    for (int32_t i = 0; i < in->num_logit_bias; i++) s->logits[in->logit_bias[i].token_id] += in->logit_bias[i].bias;
    if (in->num_tokens - in->num_prompt < p->min_tokens) {
        ban(s, in->eos_ids, in->num_eos);
        ban(s, p->stop_token_ids, p->num_stop_token_ids);
    }
    apply_penalties(s, in);
    *token = p->temperature == 0.0f ? argmax(s->logits, s->vocab) : sample(s, in);
    if (p->logprobs >= 0) moe_sampler_logprobs(s, in->logits, *token, p->logprobs, logprobs);
    return MOE_OK;
}

void moe_sampler_logprobs(moe_sampler *s, const float *logits, int32_t target, int32_t num_top, moe_token_logprobs *out) {
    float max = logits[argmax(logits, s->vocab)];
    double sum = 0;
    int32_t rank = 1;
    for (int32_t i = 0; i < s->vocab; i++) {
        sum += exp((double)logits[i] - max);
        rank += logits[i] > logits[target] || (logits[i] == logits[target] && i < target);
        s->candidates[i] = (candidate){logits[i], i};
    }
    double log_sum = max + log(sum);
    out->chosen = (moe_logprob){target, (float)(logits[target] - log_sum), rank};
    out->num_top = num_top < s->vocab ? num_top : s->vocab;
    if (out->num_top == 0) return;
    select_top(s->candidates, s->vocab, out->num_top);
    qsort(s->candidates, (size_t)out->num_top, sizeof *s->candidates, by_logit);
    for (int32_t i = 0; i < out->num_top; i++)
        out->top[i] = (moe_logprob){s->candidates[i].id, (float)(s->candidates[i].logit - log_sum), i + 1};
}
