/* Continuous batching: which sequences, and how many tokens of each, form the next micro-batch. Sequences that decode come first,
 * then chunks of prompts fill the rest. With several micro-batches in flight each takes its share of the running sequences, so
 * that one computes attention while another waits for experts. */
#include <stdio.h>

#include "common/metrics.h"
#include "router/engine/internal.h"

void scheduler_end(moe_engine *e, sequence *seq, moe_status status, const char *message) {
    (void)e;
    if (seq->ended != MOE_OK) return;
    seq->ended = status;
    snprintf(seq->message, sizeof seq->message, "%s", message);
}

static void count_queued(moe_engine *e, int32_t change) {
    pthread_mutex_lock(&e->lock);
    e->num_queued += change;
    pthread_mutex_unlock(&e->lock);
}

static void reap_list(moe_engine *e, sequence_list *list) {
    for (int32_t i = list->count - 1; i >= 0; i--) {
        sequence *seq = list->items[i];
        if (seq->ended == MOE_OK || seq->in_flight) continue;
        sequence_list_remove(list, seq);
        if (seq->state == SEQUENCE_WAITING) count_queued(e, -1);
        sequence_release_blocks(e, seq);
        sequence_close(e, seq, seq->ended, seq->message);
    }
}

void scheduler_reap(moe_engine *e) {
    reap_list(e, &e->running);
    reap_list(e, &e->waiting);
}

static bool take_blocks(moe_engine *e, sequence *seq, int32_t tokens) {
    int32_t want = moe_kv_blocks_for(tokens);
    while (seq->num_blocks < want) {
        int32_t block = moe_kv_blocks_take(&e->blocks);
        if (block < 0) return false;
        seq->blocks[seq->num_blocks++] = block;
    }
    return true;
}

/* Takes the blocks of the youngest running sequence that is in no micro-batch; it will be recomputed. */
static bool preempt_one(moe_engine *e, const sequence *keep) {
    for (int32_t i = e->running.count - 1; i >= 0; i--) {
        sequence *victim = e->running.items[i];
        if (victim == keep) return false; /* only younger ones make room */
        if (victim->in_flight || victim->ended != MOE_OK) continue;
        sequence_list_remove(&e->running, victim);
        sequence_release_blocks(e, victim);
        victim->num_computed = 0;
        victim->state = SEQUENCE_WAITING;
        sequence_list_push(&e->waiting, victim, true);
        count_queued(e, 1);
        moe_metric_add(MOE_METRIC_PREEMPTIONS, 1);
        return true;
    }
    return false;
}

/* Admits waiting sequences, in order, while there are KV blocks for all the tokens they have. */
static void admit(moe_engine *e) {
    while (e->waiting.count && e->running.count < e->config.max_num_seqs) {
        sequence *seq = e->waiting.items[0];
        if (seq->ended != MOE_OK) return; /* reaped before the next step */
        if (moe_kv_blocks_for(seq->num_tokens) > e->blocks.num_free) return;
        MOE_ASSERT(take_blocks(e, seq, seq->num_tokens));
        sequence_list_remove(&e->waiting, seq);
        seq->state = SEQUENCE_RUNNING;
        sequence_list_push(&e->running, seq, false);
        count_queued(e, -1);
    }
}

/* Rows of logits that a chunk [first, first + rows) needs: prompt positions asked for, and the last row where a token is sampled.
 */
static bool row_needs_logits(const sequence *seq, int32_t position, bool last_of_sequence) {
    if (seq->sampling.prompt_logprobs >= 0 && position + 1 < seq->num_prompt && position >= seq->num_prompt_logprobs) return true;
    return last_of_sequence && seq->sampling.max_tokens > 0;
}

static void add_rows(moe_engine *e, micro_batch *b, sequence *seq, int32_t rows) {
    batch_sequence *bs = &b->seqs[b->num_seqs];
    *bs = (batch_sequence){.seq = seq, .first_row = b->num_rows, .first_logit = b->num_logit_rows};
    while (bs->num_rows < rows) {
        int32_t position = seq->num_computed + bs->num_rows;
        if (row_needs_logits(seq, position, position + 1 == seq->num_tokens)) {
            if (b->num_logit_rows == e->max_logit_rows) break; /* the rest of the chunk comes in a later micro-batch */
            b->logit_rows[b->num_logit_rows++] = b->num_rows;
            bs->num_logits++;
        }
        b->token_ids[b->num_rows] = seq->tokens[position];
        b->positions[b->num_rows] = position;
        b->row_seq[b->num_rows] = b->num_seqs;
        b->num_rows++;
        bs->num_rows++;
    }
    if (bs->num_rows == 0) return;
    b->views[b->num_seqs] = (moe_kv_view){seq->blocks, seq->num_blocks};
    b->num_seqs++;
    seq->in_flight = b;
}

/* Adds sequences of one kind: decoding (one token left to compute) or prefilling. */
static void add_ready(moe_engine *e, micro_batch *b, bool decoding, int32_t share) {
    for (int32_t i = 0; i < e->running.count && b->num_seqs < share && b->num_rows < e->config.max_num_batched_tokens; i++) {
        sequence *seq = e->running.items[i];
        int32_t left = seq->num_tokens - seq->num_computed, room = e->config.max_num_batched_tokens - b->num_rows;
        if (seq->in_flight || seq->ended != MOE_OK || (left == 1) != decoding) continue;
        int32_t rows = left < room ? left : room;
        bool have = take_blocks(e, seq, seq->num_computed + rows);
        while (!have && preempt_one(e, seq)) have = take_blocks(e, seq, seq->num_computed + rows);
        if (have) add_rows(e, b, seq, rows);
    }
}

/* The most that any row's next token takes of the highest logits; 0: some row needs all. */
static int32_t num_top(const moe_engine *e, const micro_batch *b) {
    int32_t most = 1;
    for (int32_t i = 0; i < b->num_seqs; i++) {
        if (b->seqs[i].num_logits == 0) continue;
        int32_t wanted = sequence_num_top(e, b->seqs[i].seq);
        if (wanted == 0) return 0;
        if (wanted > most) most = wanted;
    }
    return most < e->model->vocab ? most : e->model->vocab;
}

bool scheduler_fill(moe_engine *e, micro_batch *b) {
    admit(e);
    b->num_seqs = b->num_rows = b->num_logit_rows = 0;
    int32_t share = (e->running.count + e->config.micro_batches - 1) / e->config.micro_batches;
    add_ready(e, b, true, share);
    add_ready(e, b, false, share);
    b->num_top = num_top(e, b);
    return b->num_rows > 0;
}
