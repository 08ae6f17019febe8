/* One request as a sequence of tokens: its blocks, its sampling, its events. */
#include <string.h>

#include "common/alloc.h"
#include "common/metrics.h"
#include "router/engine/internal.h"

static bool copy_logit_bias(sequence *seq, const moe_request *r) {
    seq->num_logit_bias = r->num_logit_bias;
    seq->logit_bias = moe_calloc((size_t)r->num_logit_bias, sizeof *seq->logit_bias);
    if (seq->logit_bias && r->num_logit_bias)
        memcpy(seq->logit_bias, r->logit_bias, (size_t)r->num_logit_bias * sizeof *seq->logit_bias);
    return seq->logit_bias != NULL;
}

static bool allocate(sequence *seq, const moe_request *r) {
    int32_t capacity = r->prompt_tokens + seq->sampling.max_tokens;
    bool prompt_logprobs = r->sampling.prompt_logprobs >= 0 && r->prompt_tokens > 1;
    seq->name = moe_strdup(r->id ? r->id : "");
    seq->tokens = moe_calloc((size_t)capacity, sizeof *seq->tokens);
    seq->blocks = moe_calloc((size_t)moe_kv_blocks_for(capacity), sizeof *seq->blocks);
    if (prompt_logprobs) seq->prompt_logprobs = moe_calloc((size_t)r->prompt_tokens - 1, sizeof *seq->prompt_logprobs);
    return seq->name && seq->tokens && seq->blocks && (!prompt_logprobs || seq->prompt_logprobs) && copy_logit_bias(seq, r);
}

static moe_status open_output(const moe_engine *e, sequence *seq, const moe_request *r, moe_error *err) {
    moe_output_config output = {.tokenizer = e->config.tokenizer,
                                .sampling = &seq->sampling,
                                .eos_ids = e->config.model->generation.eos_ids,
                                .num_eos = e->config.model->generation.num_eos,
                                .stop = r->stop,
                                .num_stop = r->num_stop,
                                .include_stop_in_output = r->include_stop_in_output};
    return moe_output_processor_new(&output, &seq->output, err);
}

moe_status sequence_new(moe_engine *e, const moe_request *r, sequence **out, moe_error *err) {
    sequence *seq = moe_calloc(1, sizeof *seq);
    if (!seq) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a request");
    seq->sampling = r->sampling;
    int32_t room = e->config.max_model_len - r->prompt_tokens;
    if (seq->sampling.max_tokens > room) seq->sampling.max_tokens = room;
    moe_status status = open_output(e, seq, r, err);
    if (status == MOE_OK && !allocate(seq, r))
        status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a request of %d tokens", r->prompt_tokens);
    if (status != MOE_OK) {
        sequence_free(&seq);
        return status;
    }
    memcpy(seq->tokens, r->prompt, (size_t)r->prompt_tokens * sizeof *seq->tokens);
    seq->num_prompt = seq->num_tokens = r->prompt_tokens;
    if (e->dummy_routing) seq->routing_key = moe_dummy_routing_sequence(r->prompt, r->prompt_tokens);
    seq->submitted_ns = seq->last_token_ns = engine_now(e);
    *out = seq;
    return MOE_OK;
}

void sequence_free(sequence **seq_ptr) {
    sequence *seq = *seq_ptr;
    *seq_ptr = NULL;
    if (!seq) return;
    moe_output_processor_free(&seq->output);
    moe_free(seq->name);
    moe_free(seq->tokens);
    moe_free(seq->blocks);
    moe_free(seq->prompt_logprobs);
    moe_free(seq->logit_bias);
    moe_free(seq);
}

void sequence_release_blocks(moe_engine *e, sequence *seq) {
    for (int32_t i = 0; i < seq->num_blocks; i++) moe_kv_blocks_give(&e->blocks, seq->blocks[i]);
    seq->num_blocks = 0;
}

static void count_outcome(const moe_engine *e, const sequence *seq, moe_metric outcome) {
    moe_metric_add(outcome, 1);
    moe_metric_observe_ns(MOE_METRIC_REQUEST_SECONDS, engine_now(e) - seq->submitted_ns);
}

void sequence_close(moe_engine *e, sequence *seq, moe_status status, const char *message) {
    moe_output output = {.text = "",
                         .finish = MOE_FINISH_ERROR,
                         .status = status,
                         .message = message,
                         .stop_token_id = -1,
                         .prompt_tokens = seq->num_prompt,
                         .completion_tokens = seq->num_tokens - seq->num_prompt};
    count_outcome(e, seq, status == MOE_CANCELLED ? MOE_METRIC_REQUESTS_CANCELLED : MOE_METRIC_REQUESTS_FAILED);
    seq->on_output(seq->ctx, &output);
    sequence_free(&seq);
}

/* The first rows of logits belong to prompt positions, in order; returns how many, or -1 where the sequence ended with an
 * error. */
static int32_t record_prompt_logprobs(moe_engine *e, sequence *seq, const logit_rows *computed, bool sampled_row) {
    if (!seq->prompt_logprobs) return 0;
    int32_t rows = computed->count - (sampled_row ? 1 : 0);
    for (int32_t i = 0; i < rows; i++) {
        int32_t target = seq->tokens[seq->num_prompt_logprobs + 1];
        moe_token_logprobs *out = &seq->prompt_logprobs[seq->num_prompt_logprobs++];
        moe_error err;
        if (moe_sampler_logprobs(e->sampler, computed->logits + (int64_t)i * e->model->vocab, target,
                                 seq->sampling.prompt_logprobs, out, &err) != MOE_OK) {
            scheduler_end(e, seq, err.code, err.message);
            return -1;
        }
    }
    return rows;
}

static void emit(moe_engine *e, sequence *seq, moe_output *output) {
    bool first = seq->num_tokens - seq->num_prompt <= 1;
    output->prompt_tokens = seq->num_prompt;
    output->completion_tokens = seq->num_tokens - seq->num_prompt;
    if (!output->message) output->message = "";
    if (first) {
        output->prompt_logprobs = seq->prompt_logprobs;
        output->num_prompt_logprobs = seq->num_prompt_logprobs;
    }
    if (output->finish != MOE_FINISH_NONE)
        count_outcome(e, seq, output->finish == MOE_FINISH_ERROR ? MOE_METRIC_REQUESTS_FAILED : MOE_METRIC_REQUESTS_OK);
    seq->on_output(seq->ctx, output);
}

static void observe_token(const moe_engine *e, sequence *seq) {
    int64_t now = engine_now(e);
    bool first = seq->num_tokens == seq->num_prompt + 1;
    moe_metric_observe_ns(first ? MOE_METRIC_TIME_TO_FIRST_TOKEN : MOE_METRIC_INTER_TOKEN, now - seq->last_token_ns);
    seq->last_token_ns = now;
    moe_metric_add(MOE_METRIC_GENERATED_TOKENS, 1);
}

static moe_sample_input sample_input(const moe_engine *e, const sequence *seq) {
    return (moe_sample_input){.params = &seq->sampling,
                              .logit_bias = seq->logit_bias,
                              .num_logit_bias = seq->num_logit_bias,
                              .tokens = seq->tokens,
                              .num_prompt = seq->num_prompt,
                              .num_tokens = seq->num_tokens,
                              .eos_ids = e->config.model->generation.eos_ids,
                              .num_eos = e->config.model->generation.num_eos};
}

int32_t sequence_num_top(const moe_engine *e, const sequence *seq) {
    moe_sample_input input = sample_input(e, seq);
    return seq->prompt_logprobs ? 0 : moe_sampler_num_top(&input);
}

/* Samples one token from row `row` and emits its event; true when it was the last. */
static bool sample(moe_engine *e, sequence *seq, const logit_rows *computed, int32_t row) {
    moe_sample_input input = sample_input(e, seq);
    if (computed->num_top == 0) input.logits = computed->logits + (int64_t)row * e->model->vocab;
    input.num_top = computed->num_top;
    input.top_ids = computed->top_ids + (int64_t)row * computed->num_top;
    input.top_logits = computed->top_logits + (int64_t)row * computed->num_top;
    moe_token_logprobs logprobs;
    moe_error err;
    int32_t token;
    if (moe_sampler_sample(e->sampler, &input, &token, &logprobs, &err) != MOE_OK) {
        scheduler_end(e, seq, err.code, err.message);
        return false; /* reaped */
    }
    seq->tokens[seq->num_tokens++] = token;
    observe_token(e, seq);
    moe_output output;
    moe_output_processor_feed(seq->output, token, &output);
    if (seq->sampling.logprobs >= 0) output.logprobs = &logprobs;
    emit(e, seq, &output);
    return output.finish != MOE_FINISH_NONE;
}

bool sequence_advance(moe_engine *e, sequence *seq, int32_t num_rows, const logit_rows *computed) {
    if (seq->num_computed < seq->num_prompt) {
        int32_t left = seq->num_prompt - seq->num_computed;
        moe_metric_add(MOE_METRIC_PROMPT_TOKENS, num_rows < left ? num_rows : left);
    }
    seq->num_computed += num_rows;
    bool complete = seq->num_computed == seq->num_tokens, samples = complete && seq->sampling.max_tokens > 0;
    int32_t used = record_prompt_logprobs(e, seq, computed, samples);
    if (used < 0) return false; /* reaped */
    if (samples) return sample(e, seq, computed, used);
    if (!complete) return false;
    moe_output output = {.text = "", .finish = MOE_FINISH_LENGTH, .stop_token_id = -1};
    emit(e, seq, &output);
    return true;
}

void sequence_list_push(sequence_list *list, sequence *seq, bool front) {
    MOE_ASSERT(list->count < list->capacity);
    if (front) memmove(list->items + 1, list->items, (size_t)list->count * sizeof *list->items);
    list->items[front ? 0 : list->count] = seq;
    list->count++;
}

void sequence_list_remove(sequence_list *list, const sequence *seq) {
    int32_t i = 0;
    while (i < list->count && list->items[i] != seq) i++;
    MOE_ASSERT(i < list->count);
    list->count--;
    memmove(list->items + i, list->items + i + 1, (size_t)(list->count - i) * sizeof *list->items);
}
