#include "cli/evaluate.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "cli/cluster_status.h"
#include "cli/progress_line.h"
#include "cli/signals.h"
#include "common/alloc.h"

#define MOE_EVAL_IN_FLIGHT 64 /* texts at once; more only wait in the engine */
#define MOE_EVAL_MAX_DOMAINS 256
#define READY_POLL_NS (10 * MOE_NS_PER_MS)

typedef struct domain_sum {
    char *name;
    double loss;
    int64_t tokens;
} domain_sum;

typedef struct evaluation {
    const moe_inference *inference;
    const moe_evaluation *wanted;
    int32_t total;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t changed;
    int32_t in_flight, done;
    domain_sum domains[MOE_EVAL_MAX_DOMAINS];
    int32_t num_domains;
    moe_status status;
    moe_error error;
} evaluation;

typedef struct scored_text {
    evaluation *evaluation;
    domain_sum *domain;
} scored_text;

static void on_output(void *ctx, const moe_output *output) {
    scored_text *text = ctx;
    evaluation *ev = text->evaluation;
    pthread_mutex_lock(&ev->lock);
    for (int32_t i = 0; i < output->num_prompt_logprobs; i++) {
        text->domain->loss -= output->prompt_logprobs[i].chosen.logprob;
        text->domain->tokens++;
    }
    if (output->finish == MOE_FINISH_ERROR && ev->status == MOE_OK)
        ev->status = moe_fail(&ev->error, output->status, "%s", output->message);
    bool last = output->finish != MOE_FINISH_NONE;
    if (last) {
        ev->in_flight--;
        ev->done++;
        pthread_cond_signal(&ev->changed);
    }
    pthread_mutex_unlock(&ev->lock);
    if (last) moe_free(text);
}

static bool is_ids(const json_t *ids) {
    for (size_t i = 0; i < json_array_size(ids); i++) {
        const json_t *id = json_array_get(ids, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) > INT32_MAX) return false;
    }
    return json_is_array(ids);
}

static bool is_text(const json_t *entry) {
    return json_is_string(json_object_get(entry, "text")) != is_ids(json_object_get(entry, "token_ids"));
}

moe_status moe_texts_read(const char *file, int32_t limit, json_t **out, moe_error *err) {
    FILE *f = fopen(file, "r");
    if (!f) return moe_fail(err, MOE_NOT_FOUND, "cannot read %s: %s", file, strerror(errno));
    *out = json_array();
    moe_status status = MOE_OK;
    json_error_t why;
    for (int32_t n = 0; status == MOE_OK && (limit == 0 || n < limit); n++) {
        json_t *line = json_loadf(f, JSON_DISABLE_EOF_CHECK, &why);
        if (!line && feof(f)) break;
        if (!line || !is_text(line))
            status = moe_fail(err, MOE_INVALID_ARGUMENT, "%s, text %d: %s", file, n + 1,
                              line ? "it needs a \"text\" or else \"token_ids\", an array of them" : why.text);
        else
            json_array_append(*out, line);
        json_decref(line);
    }
    fclose(f);
    if (status == MOE_OK) return MOE_OK;
    json_decref(*out);
    *out = NULL;
    return status;
}

static domain_sum *domain_of(evaluation *ev, const char *name) {
    for (int32_t i = 0; i < ev->num_domains; i++)
        if (strcmp(ev->domains[i].name, name) == 0) return &ev->domains[i];
    if (ev->num_domains == MOE_EVAL_MAX_DOMAINS) return NULL;
    domain_sum *d = &ev->domains[ev->num_domains];
    d->name = moe_strdup(name);
    if (!d->name) return NULL;
    ev->num_domains++;
    return d;
}

/* The end-of-text token: the last of the model's eos ids that is called so, else its first eos id. */
static int32_t end_of_text(const moe_inference *inference) {
    int32_t id = moe_tokenizer_id_of(inference->tokenizer, "<|endoftext|>");
    return id >= 0 ? id : inference->generation.num_eos ? inference->generation.eos_ids[0] : -1;
}

/* Waits until fewer than `below` texts are in flight. With the lock held. */
static void await(evaluation *ev, int32_t below) {
    while (ev->in_flight >= below) {
        pthread_cond_wait(&ev->changed, &ev->lock);
        moe_progress_line(ev->wanted->what, "texts", ev->done, ev->total);
    }
}

static moe_status submit(evaluation *ev, const moe_token_ids *ids, domain_sum *domain, moe_error *err) {
    scored_text *text = moe_calloc(1, sizeof *text);
    if (!text) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    *text = (scored_text){ev, domain};
    moe_request request = {.id = "eval", .prompt = ids->ids, .prompt_tokens = ids->count};
    moe_inference_default_sampling(ev->inference, &request.sampling);
    request.sampling.temperature = 0;
    request.sampling.max_tokens = 0;
    request.sampling.prompt_logprobs = ev->wanted->scored ? 0 : -1;
    request.sampling.logprobs = -1;
    ev->in_flight++;
    pthread_mutex_unlock(&ev->lock);
    moe_status status = ev->inference->ops->submit(ev->inference->ctx, &request, on_output, text, NULL, err);
    pthread_mutex_lock(&ev->lock);
    if (status == MOE_OK) return MOE_OK;
    ev->in_flight--;
    moe_free(text);
    return status;
}

/* A text's tokens and the end-of-text token; token ids as they are. */
static moe_status tokens_of(const evaluation *ev, const json_t *entry, moe_token_ids *out, moe_error *err) {
    const json_t *text = json_object_get(entry, "text"), *ids = json_object_get(entry, "token_ids");
    *out = (moe_token_ids){0};
    if (text) {
        moe_status status = moe_tokenizer_encode(ev->inference->tokenizer, json_string_value(text), json_string_length(text),
                                                 false, out, err);
        if (status != MOE_OK) return status;
    }
    int32_t *longer = moe_realloc(out->ids, (size_t)out->count + json_array_size(ids) + 1, sizeof *longer);
    if (!longer) {
        moe_free(out->ids);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    }
    out->ids = longer;
    for (size_t i = 0; i < json_array_size(ids); i++)
        out->ids[out->count++] = (int32_t)json_integer_value(json_array_get(ids, i));
    if (text && end_of_text(ev->inference) >= 0) out->ids[out->count++] = end_of_text(ev->inference);
    return MOE_OK;
}

static moe_status score(evaluation *ev, const json_t *entry, moe_error *err) {
    const char *name = json_string_value(json_object_get(entry, "domain"));
    domain_sum *domain = domain_of(ev, name ? name : "");
    moe_token_ids ids;
    if (!domain) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory, or more than %d domains", MOE_EVAL_MAX_DOMAINS);
    moe_status status = tokens_of(ev, entry, &ids, err);
    if (status != MOE_OK) return status;
    if (ids.count > MOE_EVAL_MAX_TOKENS) ids.count = MOE_EVAL_MAX_TOKENS;
    if (ids.count > ev->inference->max_model_len) ids.count = ev->inference->max_model_len;
    if (ids.count >= MOE_EVAL_MIN_TOKENS)
        status = submit(ev, &ids, domain, err);
    else
        ev->done++;
    moe_free(ids.ids);
    return status;
}

static json_t *result(const evaluation *ev) {
    json_t *root = json_object(), *by_domain = json_object();
    double loss = 0;
    int64_t tokens = 0;
    for (int32_t i = 0; i < ev->num_domains; i++) {
        const domain_sum *d = &ev->domains[i];
        if (d->tokens == 0) continue;
        loss += d->loss;
        tokens += d->tokens;
        json_object_set_new(by_domain, d->name,
                            json_pack("{s:f, s:I}", "loss", d->loss / (double)d->tokens, "tokens", (json_int_t)d->tokens));
    }
    double mean = tokens ? loss / (double)tokens : 0;
    json_object_set_new(root, "loss", json_real(mean));
    json_object_set_new(root, "perplexity", json_real(exp(mean)));
    json_object_set_new(root, "tokens", json_integer(tokens));
    json_object_set_new(root, "texts", json_integer(ev->total));
    json_object_set_new(root, "by_domain", by_domain);
    return root;
}

static moe_status pass_texts(evaluation *ev, moe_error *err) {
    moe_status status = MOE_OK;
    pthread_mutex_lock(&ev->lock);
    for (int32_t i = 0; i < ev->total && status == MOE_OK && ev->status == MOE_OK; i++) {
        await(ev, MOE_EVAL_IN_FLIGHT);
        status = score(ev, json_array_get(ev->wanted->texts, (size_t)i), err);
    }
    await(ev, 1);
    pthread_mutex_unlock(&ev->lock);
    return status == MOE_OK && ev->status != MOE_OK ? moe_fail(err, ev->status, "%s", ev->error.message) : status;
}

static moe_status evaluate(const moe_inference *inference, const moe_evaluation *wanted, json_t **out, moe_error *err) {
    evaluation ev = {.inference = inference, .wanted = wanted, .total = (int32_t)json_array_size(wanted->texts)};
    pthread_mutex_init(&ev.lock, NULL);
    pthread_cond_init(&ev.changed, NULL);
    moe_status status = pass_texts(&ev, err);
    if (status == MOE_OK && out) *out = result(&ev);
    for (int32_t i = 0; i < ev.num_domains; i++) moe_free(ev.domains[i].name);
    pthread_cond_destroy(&ev.changed);
    pthread_mutex_destroy(&ev.lock);
    return status;
}

/* What it took: memory, and under a budget what tokens had to do without. */
static void add_costs(json_t *root, moe_router_node *node, moe_expert_budget budget) {
    int64_t weight_bytes, device_bytes;
    moe_router_node_expert_memory(node, &weight_bytes, &device_bytes);
    json_object_set_new(root, "experts",
                        json_pack("{s:I, s:I}", "bytes", (json_int_t)weight_bytes, "device_bytes", (json_int_t)device_bytes));
    if (!moe_expert_budget_given(budget)) return;
    moe_expert_budget_status status;
    moe_cluster_budget_status(budget, &moe_router_node_model(node)->config, &status);
    json_object_set_new(root, "expert_budget", moe_expert_budget_status_json(&status));
}

static moe_status await_ready(moe_router_node *node, moe_error *err) {
    while (!moe_router_node_ready(node))
        if (moe_signals_wait(READY_POLL_NS)) return moe_fail(err, MOE_CANCELLED, "interrupted");
    return MOE_OK;
}

static bool any_needs_tokenizer(const json_t *texts) {
    for (size_t i = 0; i < json_array_size(texts); i++)
        if (json_object_get(json_array_get(texts, i), "text")) return true;
    return false;
}

moe_status moe_evaluate(const moe_router_node_config *wanted_node, const moe_evaluation *wanted, json_t **out, moe_error *err) {
    moe_router_node_config config = *wanted_node;
    moe_router_node *node;
    config.skip_tokenizer = !any_needs_tokenizer(wanted->texts);
    moe_status status = moe_router_node_open(&config, &node, err);
    if (status != MOE_OK) return status;
    status = await_ready(node, err);
    if (status == MOE_OK) status = evaluate(moe_router_node_inference(node), wanted, out, err);
    if (status == MOE_OK && out) add_costs(*out, node, config.tiers.budget);
    moe_router_node_close(&node);
    return status;
}
