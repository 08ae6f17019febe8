/* `moesaic train-pregate`: texts pass through the model, what its MoE layers were given is kept, pre-gates are trained on that,
 * written and measured. */
#include <inttypes.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/evaluate.h"
#include "cli/node_options.h"
#include "cli/pre_gate_report.h"
#include "cli/progress_line.h"
#include "common/alloc.h"
#include "common/log.h"
#include "common/model/pre_gates.h"
#include "training/pre_gate.h"

#define HELD_OUT_EVERY 20      /* of the texts, one is held out */
#define HELD_OUT_BYTES_PART 10 /* of the room for samples, one part is theirs */

typedef struct session {
    const moe_options *options;
    moe_router_node_config node;
    const moe_model_config *config;
    json_t *train_texts, *held_out_texts, *report_texts;
    moe_samples *train, *held_out;
    float *gates;   /* [num_moe_layers, E, H] */
    float *given;   /* [num_moe_layers - 1, E, H]: the pre-gates that the model came with; NULL: none */
    float *trained; /* likewise */
    moe_pre_gate_fit *fits;
} session;

/* ---- texts ---- */

static moe_status read_texts(session *s, moe_error *err) {
    json_t *all = NULL;
    moe_status status =
        moe_texts_read(moe_option_text(s->options, "data"), (int32_t)moe_option_int(s->options, "limit"), &all, err);
    s->train_texts = json_array();
    s->held_out_texts = json_array();
    for (size_t i = 0; i < json_array_size(all); i++)
        json_array_append(i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 ? s->held_out_texts : s->train_texts, json_array_get(all, i));
    json_decref(all);
    if (status == MOE_OK && json_array_size(s->held_out_texts) == 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: %d texts at least are needed", moe_option_text(s->options, "data"),
                        HELD_OUT_EVERY);
    const char *valid = moe_option_text(s->options, "valid");
    if (status == MOE_OK && valid) return moe_texts_read(valid, 0, &s->report_texts, err);
    s->report_texts = json_incref(s->held_out_texts);
    return status;
}

/* ---- samples ---- */

typedef struct capture {
    moe_samples *samples;
    moe_status status;
    moe_error error;
} capture;

static void on_layer(void *ctx, const moe_layer_view *view) {
    capture *c = ctx;
    if (c->status == MOE_OK && view->layer == 0) c->status = moe_samples_begin(c->samples, view->num_rows, &c->error);
    if (c->status == MOE_OK) moe_samples_put(c->samples, view->layer, view->activations, view->dtype);
}

static moe_status capture_texts(const session *s, const json_t *texts, const char *what, int64_t max_bytes, moe_samples **out,
                                moe_error *err) {
    char output[PATH_MAX];
    snprintf(output, sizeof output, "%s", moe_option_text(s->options, "output"));
    moe_samples_config samples = {.dir = dirname(output),
                                  .num_layers = s->config->num_moe_layers,
                                  .hidden = s->config->hidden,
                                  .max_bytes = max_bytes,
                                  .seed = (uint64_t)moe_option_int(s->options, "seed")};
    moe_status status = moe_samples_new(&samples, out, err);
    if (status != MOE_OK) return status;
    capture c = {.samples = *out};
    moe_router_node_config node = s->node;
    node.gating = MOE_GATING_GATE;
    node.micro_batches = 1;
    node.on_layer = on_layer;
    node.on_layer_ctx = &c;
    moe_evaluation evaluation = {.texts = texts, .what = what};
    status = moe_evaluate(&node, &evaluation, NULL, err);
    return status == MOE_OK && c.status != MOE_OK ? moe_fail(err, c.status, "%s", c.error.message) : status;
}

static moe_status capture_all(session *s, moe_error *err) {
    int64_t bytes = moe_option_int(s->options, "sample-memory"), held_out = bytes / HELD_OUT_BYTES_PART;
    moe_status status = capture_texts(s, s->train_texts, "capturing", bytes - held_out, &s->train, err);
    if (status == MOE_OK) status = capture_texts(s, s->held_out_texts, "capturing held-out texts", held_out, &s->held_out, err);
    return status;
}

/* ---- training ---- */

static float *read_matrices(const moe_model *m, bool pre_gates, int32_t layers) {
    size_t size = (size_t)m->config.num_experts * (size_t)m->config.hidden;
    float *out = moe_alloc_aligned((size_t)layers * size, sizeof *out);
    for (int32_t i = 0; out && i < layers; i++) {
        const moe_layer_weights *layer = &m->layers[m->config.moe_layers[i]];
        moe_tensor_read_f32(pre_gates ? &layer->pre_gate : &layer->gate, 0, (int64_t)size, out + (size_t)i * size);
    }
    return out;
}

static moe_status allocate(session *s, const moe_model *m, moe_error *err) {
    int32_t layers = m->config.num_moe_layers;
    if (layers < 2)
        return moe_fail(err, MOE_FAILED_PRECONDITION, "%s: pre-gates need two MoE layers at least; this model has %d", m->dir,
                        layers);
    size_t size = (size_t)m->config.num_experts * (size_t)m->config.hidden;
    s->config = &m->config;
    s->gates = read_matrices(m, false, layers);
    s->given = m->has_pre_gates ? read_matrices(m, true, layers - 1) : NULL;
    s->trained = moe_alloc_aligned((size_t)(layers - 1) * size, sizeof *s->trained);
    s->fits = moe_calloc((size_t)layers - 1, sizeof *s->fits);
    if (!s->gates || (m->has_pre_gates && !s->given) || !s->trained || !s->fits)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    return MOE_OK;
}

static void show_progress(void *ctx, int64_t done, int64_t total) {
    (void)ctx;
    moe_progress_line("training", "minibatches", done, total);
}

static moe_status train(session *s, moe_error *err) {
    moe_pre_gate_config config = {.num_layers = s->config->num_moe_layers,
                                  .num_experts = s->config->num_experts,
                                  .hidden = s->config->hidden,
                                  .gates = s->gates,
                                  .train = s->train,
                                  .held_out = s->held_out,
                                  .epochs = (int32_t)moe_option_int(s->options, "epochs"),
                                  .threads = moe_threads_option(s->options),
                                  .lr = (float)moe_option_float(s->options, "lr"),
                                  .seed = (uint64_t)moe_option_int(s->options, "seed"),
                                  .progress = show_progress};
    moe_status status = moe_pre_gates_train(&config, s->trained, s->fits, err);
    return status == MOE_OK ? moe_pre_gates_write(moe_option_text(s->options, "output"), s->config, s->trained, err) : status;
}

/* ---- the command ---- */

static void print_fits(const session *s, moe_buf *out) {
    moe_buf_printf(out, "trained on %" PRId64 " of %" PRId64 " tokens, %" PRId64 " held out\n", moe_samples_count(s->train),
                   moe_samples_seen(s->train), moe_samples_count(s->held_out));
    for (int32_t i = 0; i + 1 < s->config->num_moe_layers; i++)
        moe_buf_printf(out, "layer %-6d held-out KL %.4f, untrained %.4f, after %d epochs\n", i + 1, s->fits[i].kl_after,
                       s->fits[i].kl_before, s->fits[i].epochs);
}

static moe_status report(const session *s, moe_error *err) {
    size_t size = (size_t)s->config->num_experts * (size_t)s->config->hidden;
    moe_pre_gate_set sets[3] = {{"next-gate", MOE_PRE_GATES_NEXT_GATE, s->gates + size}};
    int32_t count = 1;
    if (s->given) sets[count++] = (moe_pre_gate_set){"given", s->node.source.pre_gates, s->given};
    sets[count++] = (moe_pre_gate_set){"trained", moe_option_text(s->options, "output"), s->trained};
    moe_buf table = {0};
    print_fits(s, &table);
    moe_status status = moe_pre_gate_report(&s->node, s->config, s->report_texts, sets, count, &table, err);
    if (status == MOE_OK) fputs(moe_buf_text(&table), stdout);
    moe_buf_free(&table);
    return status;
}

static moe_status run(session *s, moe_error *err) {
    moe_model *model = NULL;
    moe_status status = moe_engine_options(s->options, &s->node, err);
    if (status == MOE_OK) status = read_texts(s, err);
    if (status == MOE_OK) status = moe_model_source_open(&s->node.source, &model, err);
    if (status == MOE_OK) status = allocate(s, model, err);
    if (status == MOE_OK) status = capture_all(s, err);
    if (status == MOE_OK) status = train(s, err);
    if (status == MOE_OK) status = report(s, err);
    moe_model_close(&model);
    return status;
}

static void session_free(session *s) {
    json_decref(s->train_texts);
    json_decref(s->held_out_texts);
    json_decref(s->report_texts);
    moe_samples_free(&s->train);
    moe_samples_free(&s->held_out);
    void *const owned[] = {s->gates, s->given, s->trained, s->fits};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) moe_free(owned[i]);
}

int moe_command_train_pregate(const moe_options *o) {
    session s = {.options = o, .node = {.embedded = true, .id = "train-pregate"}};
    moe_error err;
    if (!moe_option_given(o, "log-level")) moe_log_init(MOE_LOG_WARN, "train-pregate");
    if (!moe_option_text(o, "data") || !moe_option_text(o, "output")) {
        fprintf(stderr, "moesaic: train-pregate needs --data FILE and -o FILE\n");
        return 2;
    }
    moe_status status = run(&s, &err);
    session_free(&s);
    return status == MOE_OK ? 0 : moe_command_failed(&err);
}
