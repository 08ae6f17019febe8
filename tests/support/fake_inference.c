#include "tests/support/fake_inference.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tests/support/test.h"

#define AWAIT_S 10

static const fake_step default_steps[] = {{"Hello", 11}, {",", 12}, {" world", 13}};

static moe_status fake_submit(void *ctx, const moe_request *request, moe_on_output on_output, void *output_ctx, uint64_t *id,
                              moe_error *err) {
    fake_inference *fake = ctx;
    moe_status status = fake->submit_status;
    if (status != MOE_OK) return moe_fail(err, status, "the script refuses: %s", moe_status_name(status));
    pthread_mutex_lock(&fake->mutex);
    if (fake->refuse_from && fake->num_requests >= fake->refuse_from) {
        pthread_mutex_unlock(&fake->mutex);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "the queue is full");
    }
    assert_true(fake->num_requests < FAKE_MAX_REQUESTS);
    fake_request *copy = &fake->requests[fake->num_requests++];
    *copy = (fake_request){.id = (uint64_t)fake->num_requests,
                           .sampling = request->sampling,
                           .num_stop = request->num_stop,
                           .include_stop_in_output = request->include_stop_in_output,
                           .on_output = on_output,
                           .output_ctx = output_ctx};
    strncpy(copy->request_id, request->id, sizeof copy->request_id - 1);
    copy->prompt_tokens = request->prompt_tokens;
    assert_true(request->prompt_tokens <= FAKE_MAX_PROMPT_TOKENS);
    memcpy(copy->prompt, request->prompt, (size_t)request->prompt_tokens * sizeof *copy->prompt);
    for (int32_t i = 0; i < request->num_stop; i++) strncpy(copy->stop[i], request->stop[i], sizeof copy->stop[i] - 1);
    copy->num_logit_bias = request->num_logit_bias < 8 ? request->num_logit_bias : 8;
    for (int32_t i = 0; i < copy->num_logit_bias; i++) copy->logit_bias[i] = request->logit_bias[i];
    *id = copy->id;
    pthread_cond_broadcast(&fake->changed);
    pthread_mutex_unlock(&fake->mutex);
    return MOE_OK;
}

static void fake_cancel(void *ctx, uint64_t id) {
    fake_inference *fake = ctx;
    pthread_mutex_lock(&fake->mutex);
    fake_request *request = id ? &fake->requests[id - 1] : NULL;
    if (request && !request->ended && !request->cancelled) {
        request->cancelled = true;
        fake->num_cancelled++;
    }
    pthread_cond_broadcast(&fake->changed);
    pthread_mutex_unlock(&fake->mutex);
}

static void fake_view(void *ctx, moe_inference_view *out) {
    fake_inference *fake = ctx;
    pthread_mutex_lock(&fake->mutex);
    *out = fake->view;
    pthread_mutex_unlock(&fake->mutex);
}

/* Log-probabilities that a test can compute: of the i-th token -0.5·(i+1), alternatives 20, 21, … a quarter lower each. */
static void fill_logprobs(moe_token_logprobs *out, int32_t token_id, int32_t index, int32_t num_top) {
    *out = (moe_token_logprobs){.chosen = {token_id, -0.5f * (float)(index + 1), 1}, .num_top = num_top};
    for (int32_t t = 0; t < num_top; t++)
        out->top[t] = (moe_logprob){t == 0 ? token_id : 19 + t, -0.5f * (float)(index + 1) - 0.25f * (float)t, t + 1};
}

/* One event of a request, outside the mutex: steps, then the closing one. */
static void emit(fake_inference *fake, fake_request *request, int32_t index, bool cancelled) {
    const moe_sampling_params *sampling = &request->sampling;
    moe_token_logprobs logprobs, *prompt = NULL;
    bool last = cancelled || index == fake->num_steps * fake->repeat;
    int32_t completed = index < fake->num_steps * fake->repeat ? index + 1 : fake->num_steps * fake->repeat;
    moe_output output = {
        .text = "", .stop_token_id = -1, .prompt_tokens = request->prompt_tokens, .completion_tokens = completed};
    const fake_step *step = last ? NULL : &fake->steps[index % fake->num_steps];
    if (step) {
        output.text = step->text;
        output.text_bytes = strlen(step->text);
        output.token_ids = &step->token_id;
        output.num_tokens = step->token_id >= 0;
        fill_logprobs(&logprobs, step->token_id, index, sampling->logprobs);
        if (sampling->logprobs >= 0) output.logprobs = &logprobs;
    } else {
        output.finish = cancelled ? MOE_FINISH_ERROR : fake->finish;
        output.status = cancelled ? MOE_CANCELLED : fake->fail_status;
        output.message = cancelled ? "cancelled" : fake->fail_message;
        output.stop_reason = cancelled ? NULL : fake->stop_reason;
        output.stop_token_id = fake->stop_token_id;
    }
    if (index == 0 && sampling->prompt_logprobs >= 0) {
        prompt = calloc((size_t)request->prompt_tokens, sizeof *prompt);
        for (int32_t i = 1; i < request->prompt_tokens; i++)
            fill_logprobs(&prompt[i - 1], request->prompt[i], i, sampling->logprobs);
        output.prompt_logprobs = prompt;
        output.num_prompt_logprobs = request->prompt_tokens - 1;
    }
    request->on_output(request->output_ctx, &output);
    free(prompt);
}

/* The next request that may send, in turn; NULL: none. Under the mutex. */
static fake_request *next_request(fake_inference *fake, int32_t *turn) {
    for (int32_t i = 0; i < fake->num_requests; i++) {
        fake_request *request = &fake->requests[(*turn + i) % fake->num_requests];
        if (request->ended || (!request->cancelled && fake->permits == 0)) continue;
        *turn = (int32_t)(request - fake->requests) + 1;
        return request;
    }
    return NULL;
}

static void *run(void *arg) {
    fake_inference *fake = arg;
    int32_t turn = 0;
    pthread_mutex_lock(&fake->mutex);
    for (;;) {
        fake_request *request = next_request(fake, &turn);
        if (!request && fake->stopping) break;
        if (!request) {
            pthread_cond_wait(&fake->changed, &fake->mutex);
            continue;
        }
        bool cancelled = request->cancelled || fake->stopping;
        int32_t index = request->sent++;
        request->ended = cancelled || index == fake->num_steps * fake->repeat;
        if (!cancelled && fake->permits != INT64_MAX) fake->permits--;
        bool ended = request->ended;
        pthread_mutex_unlock(&fake->mutex);
        emit(fake, request, index, cancelled);
        pthread_mutex_lock(&fake->mutex);
        fake->num_ended += ended;
        pthread_cond_broadcast(&fake->changed);
    }
    pthread_mutex_unlock(&fake->mutex);
    return NULL;
}

static void load_model(fake_inference *fake, const char *model_dir) {
    moe_error err = {0};
    moe_tokenizer *tokenizer = NULL;
    moe_chat_template *chat_template = NULL;
    if (moe_tokenizer_load(model_dir, &tokenizer, &err) != MOE_OK) fail_msg("%s", err.message);
    if (moe_chat_template_load(model_dir, NULL, &chat_template, &err) != MOE_OK) fail_msg("%s", err.message);
    fake->inference.tokenizer = tokenizer;
    fake->inference.chat_template = chat_template;
    fake->inference.vocab = moe_tokenizer_vocab(tokenizer);
}

void fake_inference_start(fake_inference *fake, const char *model_dir) {
    static const moe_inference_ops ops = {fake_submit, fake_cancel, fake_view};
    *fake = (fake_inference){
        .inference =
            {.ops = &ops,
             .ctx = fake,
             .model = "demo",
             .max_model_len = 2048,
             .max_waiting = 100,
             .generation = {.do_sample = true, .temperature = 0.7f, .top_p = 0.9f, .top_k = 40, .repetition_penalty = 1.0f}},
        .steps = default_steps,
        .num_steps = 3,
        .repeat = 1,
        .finish = MOE_FINISH_STOP,
        .stop_token_id = -1,
        .view = {.has_map = true, .ready = true},
        .permits = INT64_MAX,
        .requests = calloc(FAKE_MAX_REQUESTS, sizeof(fake_request))};
    assert_non_null(fake->requests);
    load_model(fake, model_dir);
    pthread_mutex_init(&fake->mutex, NULL);
    pthread_cond_init(&fake->changed, NULL);
    assert_int_equal(pthread_create(&fake->thread, NULL, run, fake), 0);
}

void fake_inference_stop(fake_inference *fake) {
    pthread_mutex_lock(&fake->mutex);
    fake->stopping = true;
    for (int32_t i = 0; i < fake->num_requests; i++) fake->requests[i].cancelled = true;
    pthread_cond_broadcast(&fake->changed);
    pthread_mutex_unlock(&fake->mutex);
    pthread_join(fake->thread, NULL);
    pthread_cond_destroy(&fake->changed);
    pthread_mutex_destroy(&fake->mutex);
    moe_tokenizer *tokenizer = (moe_tokenizer *)fake->inference.tokenizer;
    moe_chat_template *chat_template = (moe_chat_template *)fake->inference.chat_template;
    moe_tokenizer_free(&tokenizer);
    moe_chat_template_free(&chat_template);
    free(fake->requests);
}

void fake_inference_permit(fake_inference *fake, int64_t events) {
    pthread_mutex_lock(&fake->mutex);
    fake->permits = events;
    pthread_cond_broadcast(&fake->changed);
    pthread_mutex_unlock(&fake->mutex);
}

void fake_inference_await(fake_inference *fake, const int32_t *counter, int32_t value) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += AWAIT_S;
    int failed = 0;
    pthread_mutex_lock(&fake->mutex);
    while (*counter < value && !failed) failed = pthread_cond_timedwait(&fake->changed, &fake->mutex, &until);
    int32_t reached = *counter;
    pthread_mutex_unlock(&fake->mutex);
    if (reached < value) fail_msg("waited %d s for %d, reached %d", AWAIT_S, value, reached);
}

void fake_inference_reset(fake_inference *fake) {
    pthread_mutex_lock(&fake->mutex);
    int32_t all = fake->num_requests;
    pthread_mutex_unlock(&fake->mutex);
    fake_inference_await(fake, &fake->num_ended, all);
    pthread_mutex_lock(&fake->mutex);
    fake->num_requests = fake->num_ended = fake->num_cancelled = 0;
    pthread_mutex_unlock(&fake->mutex);
}
