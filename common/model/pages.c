/* Which parts of a checkpoint are read and kept mapped. */
#include "common/model/model.h"
#include "common/model/safetensors.h"

typedef void (*visitor)(void *ctx, const moe_tensor *tensor);

static void add_bytes(void *ctx, const moe_tensor *t) {
    if (moe_tensor_present(t)) *(int64_t *)ctx += (int64_t)moe_tensor_bytes(t);
}

static void visit_ffn(const moe_ffn_weights *w, visitor visit, void *ctx) {
    visit(ctx, &w->gate);
    visit(ctx, &w->up);
    visit(ctx, &w->down);
}

/* Models that tests make by hand, and those of generated weights, have no checkpoint. */
void moe_model_tensor_will_need(const moe_model *m, const moe_tensor *t) {
    if (m->checkpoint && t->data) moe_safetensors_will_need(m->checkpoint, t->data, moe_tensor_bytes(t));
}

void moe_model_tensor_release(const moe_model *m, const moe_tensor *t) {
    if (m->checkpoint && t->data) moe_safetensors_release(m->checkpoint, t->data, moe_tensor_bytes(t));
}

static void will_need(void *model, const moe_tensor *t) { moe_model_tensor_will_need(model, t); }
static void release(void *model, const moe_tensor *t) { moe_model_tensor_release(model, t); }

static void visit_layer(const moe_layer_weights *w, visitor visit, void *ctx) {
    const moe_tensor *const tensors[] = {&w->input_norm, &w->q,         &w->k,      &w->v,        &w->o,
                                         &w->q_bias,     &w->k_bias,    &w->v_bias, &w->o_bias,   &w->q_norm,
                                         &w->k_norm,     &w->post_norm, &w->gate,   &w->pre_gate, &w->shared_gate};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) visit(ctx, tensors[i]);
    visit_ffn(&w->dense, visit, ctx);
    visit_ffn(&w->shared, visit, ctx);
}

void moe_model_expert_will_need(const moe_model *m, const moe_ffn_weights *w) { visit_ffn(w, will_need, (void *)m); }
void moe_model_expert_release(const moe_model *m, const moe_ffn_weights *w) { visit_ffn(w, release, (void *)m); }
void moe_model_layer_will_need(const moe_model *m, const moe_layer_weights *w) { visit_layer(w, will_need, (void *)m); }
void moe_model_layer_release(const moe_model *m, const moe_layer_weights *w) { visit_layer(w, release, (void *)m); }

int64_t moe_model_base_bytes(const moe_model *m) {
    int64_t bytes = 0;
    add_bytes(&bytes, &m->embed);
    add_bytes(&bytes, &m->final_norm);
    if (!m->config.tied_embeddings) add_bytes(&bytes, &m->lm_head);
    for (int32_t i = 0; i < m->config.num_layers; i++) visit_layer(&m->layers[i], add_bytes, &bytes);
    return bytes;
}
