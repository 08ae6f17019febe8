#include "router/generation.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "common/alloc.h"

typedef struct event {
    struct event *next;
    moe_generation *generation;
    int64_t bytes;
    moe_output output; /* its pointers lead into this allocation */
} event;

/* Two owners: the front (until it saw the end, or its queue is closed) and the engine (until its last event); the second to let
 * go frees it. */
struct moe_generation {
    moe_generation_queue *queue; /* counted */
    void *user;
    uint64_t id;
    bool cancelled; /* front's thread only */
    /* Under the queue's mutex. */
    bool ended;       /* the end is queued, or was: later events are dropped */
    bool engine_done; /* the engine's last event came */
    bool front_done;  /* the front saw the end */
    int64_t queued_bytes;
    event lost_end; /* the end of a generation of which something was lost: needs no memory when there is none */
    moe_generation *previous_live, *next_live; /* front's thread only */
};

struct moe_generation_queue {
    moe_generation_queue_config config;
    _Atomic int32_t references;
    pthread_mutex_t mutex; /* guards head, tail, closed */
    event *head, **tail;
    bool closed;
    moe_generation *live; /* front's thread only */
};

static void unref_queue(moe_generation_queue *queue) {
    if (atomic_fetch_sub(&queue->references, 1) != 1) return;
    pthread_mutex_destroy(&queue->mutex);
    moe_free(queue);
}

moe_status moe_generation_queue_new(const moe_generation_queue_config *config, moe_generation_queue **out, moe_error *err) {
    moe_generation_queue *queue = moe_calloc(1, sizeof *queue);
    *out = queue;
    if (!queue) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a generation queue");
    queue->config = *config;
    queue->tail = &queue->head;
    atomic_init(&queue->references, 1);
    pthread_mutex_init(&queue->mutex, NULL);
    return MOE_OK;
}

static void unlink_live(moe_generation *generation) {
    if (generation->previous_live)
        generation->previous_live->next_live = generation->next_live;
    else
        generation->queue->live = generation->next_live;
    if (generation->next_live) generation->next_live->previous_live = generation->previous_live;
    generation->previous_live = generation->next_live = NULL;
}

static void free_generation(moe_generation *generation) {
    moe_generation_queue *queue = generation->queue;
    moe_free(generation);
    unref_queue(queue);
}

static bool is_lost_end(const event *e) { return e == &e->generation->lost_end; }

/* Front's thread, or any when the queue is closed: done with the event, and with the generation if it is the end. */
static void finish_event(event *e) {
    moe_generation *generation = e->generation;
    bool end = e->output.finish != MOE_FINISH_NONE, unowned = false;
    if (!is_lost_end(e)) moe_free(e);
    if (!end) return;
    pthread_mutex_lock(&generation->queue->mutex);
    generation->front_done = true;
    unowned = generation->engine_done;
    pthread_mutex_unlock(&generation->queue->mutex);
    if (unowned) free_generation(generation);
}

/* ---- engine's thread ---- */

static void *place(char **at, const void *data, size_t count, size_t size) {
    if (!data || !count) return NULL;
    void *copy = *at;
    memcpy(copy, data, count * size);
    *at += (count * size + 15) / 16 * 16;
    return copy;
}

static size_t padded(const void *data, size_t count, size_t size) { return data ? (count * size + 15) / 16 * 16 : 0; }

/* The event and all it points to in one allocation; NULL when out of memory. Counts are the engine's own: no overflow. */
static event *copy_output(moe_generation *generation, const moe_output *o) {
    size_t tokens = (size_t)o->num_tokens, prompt = (size_t)o->num_prompt_logprobs;
    size_t message_bytes = o->message ? strlen(o->message) + 1 : 0, stop_bytes = o->stop_reason ? strlen(o->stop_reason) + 1 : 0;
    size_t bytes = (sizeof(event) + 15) / 16 * 16;
    bytes += padded(o->prompt_logprobs, prompt, sizeof *o->prompt_logprobs) + padded(o->logprobs, tokens, sizeof *o->logprobs);
    bytes += padded(o->token_ids, tokens, sizeof *o->token_ids) + padded(o->text, o->text_bytes, 1);
    bytes += padded(o->message, message_bytes, 1) + padded(o->stop_reason, stop_bytes, 1);
    event *e = moe_calloc(1, bytes);
    if (!e) return NULL;
    char *at = (char *)e + (sizeof(event) + 15) / 16 * 16;
    e->generation = generation;
    e->bytes = (int64_t)bytes;
    e->output = *o;
    e->output.prompt_logprobs = place(&at, o->prompt_logprobs, prompt, sizeof *o->prompt_logprobs);
    e->output.logprobs = place(&at, o->logprobs, tokens, sizeof *o->logprobs);
    e->output.token_ids = place(&at, o->token_ids, tokens, sizeof *o->token_ids);
    e->output.text = place(&at, o->text, o->text_bytes, 1);
    if (!e->output.text) e->output.text = "";
    e->output.message = place(&at, o->message, message_bytes, 1);
    e->output.stop_reason = place(&at, o->stop_reason, stop_bytes, 1);
    return e;
}

static event *make_lost_end(moe_generation *generation, const moe_output *output) {
    generation->lost_end = (event){.generation = generation,
                                   .output = {.text = "",
                                              .finish = MOE_FINISH_ERROR,
                                              .status = MOE_RESOURCE_EXHAUSTED,
                                              .message = "the reply outgrew the memory there is for it",
                                              .stop_token_id = -1,
                                              .prompt_tokens = output->prompt_tokens,
                                              .completion_tokens = output->completion_tokens}};
    return &generation->lost_end;
}

/* Under the mutex. */
static void enqueue(moe_generation *generation, event *e) {
    moe_generation_queue *queue = generation->queue;
    bool was_empty = !queue->head;
    generation->queued_bytes += e->bytes;
    generation->ended = e->output.finish != MOE_FINISH_NONE;
    *queue->tail = e;
    queue->tail = &e->next;
    if (was_empty) queue->config.wake(queue->config.wake_ctx);
}

static void on_engine_output(void *ctx, const moe_output *output) {
    moe_generation *generation = ctx;
    moe_generation_queue *queue = generation->queue;
    bool last = output->finish != MOE_FINISH_NONE;
    event *e = copy_output(generation, output);
    pthread_mutex_lock(&queue->mutex);
    bool taken = false, fits = e && generation->queued_bytes <= MOE_GENERATION_MAX_QUEUED_BYTES - e->bytes;
    generation->engine_done = last;
    if (!queue->closed && !generation->ended) {
        enqueue(generation, fits ? e : make_lost_end(generation, output));
        taken = fits;
    }
    /* With an end still queued it is finish_event that frees. */
    bool unowned = last && (generation->front_done || (queue->closed && !generation->ended));
    pthread_mutex_unlock(&queue->mutex);
    if (!taken) moe_free(e);
    if (unowned) free_generation(generation);
}

/* ---- front's thread ---- */

void moe_generation_queue_dispatch(moe_generation_queue *queue) {
    pthread_mutex_lock(&queue->mutex);
    event *e = queue->head;
    queue->head = NULL;
    queue->tail = &queue->head;
    for (event *at = e; at; at = at->next) at->generation->queued_bytes -= at->bytes;
    pthread_mutex_unlock(&queue->mutex);
    for (event *next; e; e = next) {
        next = e->next;
        moe_generation *generation = e->generation;
        bool end = e->output.finish != MOE_FINISH_NONE;
        if (!generation->cancelled) {
            if (end) unlink_live(generation);
            if (is_lost_end(e)) queue->config.inference->ops->cancel(queue->config.inference->ctx, generation->id);
            queue->config.on_output(generation->user, &e->output);
        }
        finish_event(e);
    }
}

moe_status moe_generation_start(moe_generation_queue *queue, const moe_request *request, void *user, moe_generation **out,
                                moe_error *err) {
    *out = NULL;
    moe_generation *generation = moe_calloc(1, sizeof *generation);
    if (!generation) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a generation");
    const moe_inference *inference = queue->config.inference;
    generation->queue = queue;
    generation->user = user;
    atomic_fetch_add(&queue->references, 1);
    moe_status status = inference->ops->submit(inference->ctx, request, on_engine_output, generation, &generation->id, err);
    if (status != MOE_OK) {
        free_generation(generation);
        return status;
    }
    generation->next_live = queue->live;
    if (queue->live) queue->live->previous_live = generation;
    queue->live = generation;
    *out = generation;
    return MOE_OK;
}

void moe_generation_cancel(moe_generation **generation) {
    moe_generation *g = *generation;
    *generation = NULL;
    if (!g) return;
    const moe_inference *inference = g->queue->config.inference;
    unlink_live(g);
    g->cancelled = true;
    inference->ops->cancel(inference->ctx, g->id);
}

void moe_generation_queue_free(moe_generation_queue **queue) {
    moe_generation_queue *q = *queue;
    *queue = NULL;
    if (!q) return;
    while (q->live) {
        moe_generation *g = q->live;
        moe_generation_cancel(&g);
    }
    pthread_mutex_lock(&q->mutex);
    q->closed = true;
    event *e = q->head;
    q->head = NULL;
    pthread_mutex_unlock(&q->mutex);
    for (event *next; e; e = next) {
        next = e->next;
        finish_event(e);
    }
    unref_queue(q);
}
