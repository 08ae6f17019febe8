/* The queue between the engine's thread and a front's: order, copies, cancellation, bounds, and who frees what. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "router/generation.h"
#include "tests/support/test.h"

typedef struct bench {
    moe_inference inference;
    moe_generation_queue *queue;
    moe_on_output on_output[4]; /* as the engine got them */
    void *output_ctx[4];
    int submitted, cancelled, wakes;
    uint64_t last_cancelled;
    moe_status submit_status;
    /* what the front saw */
    char text[256];
    int events, ends;
    moe_status end_status;
    moe_generation *cancel_in_callback;
} bench;

static moe_status submit(void *ctx, const moe_request *request, moe_on_output on_output, void *output_ctx, uint64_t *id,
                         moe_error *err) {
    bench *b = ctx;
    (void)request;
    if (b->submit_status != MOE_OK) return moe_fail(err, b->submit_status, "refused");
    b->on_output[b->submitted] = on_output;
    b->output_ctx[b->submitted] = output_ctx;
    *id = (uint64_t)++b->submitted;
    return MOE_OK;
}

static void cancel(void *ctx, uint64_t id) {
    bench *b = ctx;
    b->cancelled++;
    b->last_cancelled = id;
}

static void on_output(void *user, const moe_output *output) {
    bench *b = user;
    b->events++;
    if (output->text_bytes < sizeof b->text - strlen(b->text)) strncat(b->text, output->text, output->text_bytes);
    if (output->finish != MOE_FINISH_NONE) {
        b->ends++;
        b->end_status = output->status;
        if (output->finish == MOE_FINISH_ERROR) assert_non_null(output->message);
    }
    if (b->cancel_in_callback) moe_generation_cancel(&b->cancel_in_callback);
}

static void wake(void *ctx) { ((bench *)ctx)->wakes++; }

static void emit(bench *b, int request, const char *text, moe_finish_reason finish) {
    moe_output output = {.text = text, .text_bytes = strlen(text), .finish = finish, .stop_token_id = -1};
    b->on_output[request](b->output_ctx[request], &output);
}

static int setup(void **state) {
    static const moe_inference_ops ops = {submit, cancel, NULL};
    bench *b = calloc(1, sizeof *b);
    b->inference = (moe_inference){.ops = &ops, .ctx = b};
    moe_generation_queue_config config = {.inference = &b->inference, .on_output = on_output, .wake = wake, .wake_ctx = b};
    assert_int_equal(moe_generation_queue_new(&config, &b->queue, NULL), MOE_OK);
    *state = b;
    return 0;
}

static int teardown(void **state) {
    bench *b = *state;
    moe_generation_queue_free(&b->queue);
    moe_generation_queue_free(&b->queue);
    free(b);
    return 0;
}

static moe_generation *begin(bench *b) {
    moe_generation *generation;
    moe_request request = {0};
    assert_int_equal(moe_generation_start(b->queue, &request, b, &generation, NULL), MOE_OK);
    return generation;
}

static void test_events_come_in_order_once(void **state) {
    bench *b = *state;
    begin(b);
    emit(b, 0, "one ", MOE_FINISH_NONE);
    emit(b, 0, "two ", MOE_FINISH_NONE);
    assert_int_equal(b->wakes, 1); /* one wake until the front looked */
    assert_int_equal(b->events, 0);
    moe_generation_queue_dispatch(b->queue);
    assert_string_equal(b->text, "one two ");
    emit(b, 0, "three", MOE_FINISH_STOP);
    assert_int_equal(b->wakes, 2);
    moe_generation_queue_dispatch(b->queue);
    moe_generation_queue_dispatch(b->queue);
    assert_string_equal(b->text, "one two three");
    assert_int_equal(b->ends, 1);
}

static void check_copy(void *user, const moe_output *o) {
    (void)user;
    assert_int_equal(o->num_tokens, 2);
    assert_int_equal(o->token_ids[1], 8);
    assert_int_equal(o->logprobs[1].top[1].token_id, 99);
    assert_int_equal(o->num_prompt_logprobs, 1);
    assert_true(o->prompt_logprobs[0].chosen.logprob == -2.0f);
    assert_memory_equal(o->text, "a\0b", 3);
    assert_string_equal(o->message, "why");
    assert_string_equal(o->stop_reason, "stop");
    assert_true(o->stop_token_id == 4 && o->prompt_tokens == 5 && o->completion_tokens == 6);
}

static void test_everything_is_copied(void **state) {
    bench *b = *state;
    moe_generation_queue_free(&b->queue);
    moe_generation_queue_config config = {.inference = &b->inference, .on_output = check_copy, .wake = wake, .wake_ctx = b};
    assert_int_equal(moe_generation_queue_new(&config, &b->queue, NULL), MOE_OK);
    begin(b);
    char text[] = "a\0b", message[] = "why", stop[] = "stop";
    int32_t ids[] = {7, 8};
    moe_token_logprobs logprobs[2] = {{.num_top = 0}, {.num_top = 2, .top = {{1, 0, 1}, {99, 0, 2}}}};
    moe_token_logprobs prompt[1] = {{.chosen = {3, -2.0f, 1}}};
    moe_output output = {.text = text,
                         .text_bytes = 3,
                         .token_ids = ids,
                         .num_tokens = 2,
                         .logprobs = logprobs,
                         .prompt_logprobs = prompt,
                         .num_prompt_logprobs = 1,
                         .finish = MOE_FINISH_STOP,
                         .message = message,
                         .stop_reason = stop,
                         .stop_token_id = 4,
                         .prompt_tokens = 5,
                         .completion_tokens = 6};
    b->on_output[0](b->output_ctx[0], &output);
    memset(text, 'x', sizeof text);
    memset(message, 'x', sizeof message - 1);
    memset(stop, 'x', sizeof stop - 1);
    memset(ids, 0, sizeof ids);
    memset(logprobs, 0, sizeof logprobs);
    memset(prompt, 0, sizeof prompt);
    moe_generation_queue_dispatch(b->queue);
}

static void test_cancelled_is_silent(void **state) {
    bench *b = *state;
    moe_generation *first = begin(b), *none = NULL;
    begin(b);
    emit(b, 0, "lost", MOE_FINISH_NONE);
    moe_generation_cancel(&first);
    moe_generation_cancel(&none);
    assert_null(first);
    assert_true(b->cancelled == 1 && b->last_cancelled == 1);
    emit(b, 0, "late", MOE_FINISH_NONE);
    emit(b, 1, "other", MOE_FINISH_NONE);
    emit(b, 0, "", MOE_FINISH_ERROR);
    moe_generation_queue_dispatch(b->queue);
    assert_string_equal(b->text, "other");
    assert_int_equal(b->ends, 0);
    emit(b, 1, "", MOE_FINISH_STOP);
    moe_generation_queue_dispatch(b->queue);
    assert_int_equal(b->ends, 1);
}

/* One event makes the front give up another generation whose events wait in the same batch. */
static void test_cancel_inside_a_callback(void **state) {
    bench *b = *state;
    begin(b);
    b->cancel_in_callback = begin(b);
    emit(b, 0, "a", MOE_FINISH_NONE);
    emit(b, 1, "b", MOE_FINISH_NONE);
    emit(b, 1, "c", MOE_FINISH_STOP);
    emit(b, 0, "d", MOE_FINISH_STOP);
    moe_generation_queue_dispatch(b->queue);
    assert_string_equal(b->text, "ad");
    assert_true(b->cancelled == 1 && b->last_cancelled == 2 && b->ends == 1);
}

static void test_refused_submission(void **state) {
    bench *b = *state;
    moe_generation *generation;
    moe_error err;
    moe_request request = {0};
    b->submit_status = MOE_RESOURCE_EXHAUSTED;
    assert_int_equal(moe_generation_start(b->queue, &request, b, &generation, &err), MOE_RESOURCE_EXHAUSTED);
    assert_null(generation);
    b->submit_status = MOE_OK;
    moe_alloc_fail_after(1);
    assert_int_equal(moe_generation_start(b->queue, &request, b, &generation, &err), MOE_RESOURCE_EXHAUSTED);
    assert_null(generation);
    assert_int_equal(b->submitted, 0);
}

static void test_event_lost_for_memory_ends_in_error(void **state) {
    bench *b = *state;
    begin(b);
    emit(b, 0, "a", MOE_FINISH_NONE);
    moe_alloc_fail_after(1);
    emit(b, 0, "b", MOE_FINISH_NONE);
    emit(b, 0, "c", MOE_FINISH_NONE);
    assert_int_equal(b->cancelled, 0);
    moe_generation_queue_dispatch(b->queue);
    assert_string_equal(b->text, "a");
    assert_true(b->ends == 1 && b->end_status == MOE_RESOURCE_EXHAUSTED && b->cancelled == 1);
    emit(b, 0, "d", MOE_FINISH_NONE); /* the engine does not know yet */
    emit(b, 0, "", MOE_FINISH_ERROR);
    moe_generation_queue_dispatch(b->queue);
    assert_int_equal(b->ends, 1);
}

/* The engine ends, or the front does, with the end of what was lost still queued. */
static void test_lost_end_meets_the_other_ends(void **state) {
    bench *b = *state;
    for (int i = 0; i < 3; i++) {
        begin(b);
        moe_alloc_fail_after(1);
        emit(b, i, "a", MOE_FINISH_NONE);
    }
    emit(b, 0, "", MOE_FINISH_STOP);
    moe_generation_queue_dispatch(b->queue);
    assert_true(b->ends == 3 && b->text[0] == 0);
    emit(b, 1, "", MOE_FINISH_ERROR);
    begin(b);
    moe_alloc_fail_after(1);
    emit(b, 3, "a", MOE_FINISH_NONE);
    moe_generation_queue_free(&b->queue);
    emit(b, 2, "", MOE_FINISH_ERROR);
    emit(b, 3, "", MOE_FINISH_ERROR);
    assert_int_equal(b->ends, 3);
}

static void test_bound_on_queued_bytes(void **state) {
    bench *b = *state;
    size_t size = 1 << 20;
    char *text = malloc(size + 1);
    memset(text, 'x', size);
    text[size] = '\0';
    begin(b);
    int64_t events = MOE_GENERATION_MAX_QUEUED_BYTES / (int64_t)size;
    for (int64_t i = 0; i < 2 * events; i++) emit(b, 0, text, MOE_FINISH_NONE);
    emit(b, 0, "", MOE_FINISH_STOP);
    free(text);
    moe_generation_queue_dispatch(b->queue);
    assert_true(b->events > events / 2 && b->events <= events + 1);
    assert_true(b->ends == 1 && b->end_status == MOE_RESOURCE_EXHAUSTED);
}

static void test_free_with_generations_live(void **state) {
    bench *b = *state;
    begin(b);
    begin(b);
    emit(b, 0, "a", MOE_FINISH_NONE);
    emit(b, 0, "b", MOE_FINISH_STOP);
    moe_generation_queue_free(&b->queue);
    assert_null(b->queue);
    assert_int_equal(b->cancelled, 2);
    int wakes = b->wakes;
    emit(b, 1, "late", MOE_FINISH_NONE); /* the engine does not know yet */
    emit(b, 1, "", MOE_FINISH_ERROR);
    assert_int_equal(b->wakes, wakes);
    assert_int_equal(b->events, 0);
}

#define EVENTS 2000

static void *engine_thread(void *arg) {
    bench *b = arg;
    for (int i = 0; i < EVENTS; i++) emit(b, i % 2, "", MOE_FINISH_NONE);
    emit(b, 0, "", MOE_FINISH_STOP);
    emit(b, 1, "", MOE_FINISH_STOP);
    return NULL;
}

static void test_two_threads(void **state) {
    bench *b = *state;
    pthread_t thread;
    begin(b);
    begin(b);
    assert_int_equal(pthread_create(&thread, NULL, engine_thread, b), 0);
    for (int64_t spins = 0; b->ends < 2 && spins < INT64_C(1000000000); spins++) moe_generation_queue_dispatch(b->queue);
    pthread_join(thread, NULL);
    assert_int_equal(b->events, EVENTS + 2);
}

int main(void) {
#define TEST(function) cmocka_unit_test_setup_teardown(function, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_events_come_in_order_once),
        TEST(test_everything_is_copied),
        TEST(test_cancelled_is_silent),
        TEST(test_cancel_inside_a_callback),
        TEST(test_refused_submission),
        TEST(test_event_lost_for_memory_ends_in_error),
        TEST(test_lost_end_meets_the_other_ends),
        TEST(test_bound_on_queued_bytes),
        TEST(test_free_with_generations_live),
        TEST(test_two_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
