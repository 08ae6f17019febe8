/* Which parts of a checkpoint are read and kept mapped. */
#include "common/model/model.h"
#include "common/model/safetensors.h"

typedef void (*advise)(const moe_model *model, const moe_tensor *tensor);

/* Models that tests make by hand have no checkpoint. */
void moe_model_tensor_will_need(const moe_model *m, const moe_tensor *t) {
    if (m->checkpoint && moe_tensor_present(t)) moe_safetensors_will_need(m->checkpoint, t->data, moe_tensor_bytes(t));
}

void moe_model_tensor_release(const moe_model *m, const moe_tensor *t) {
    if (m->checkpoint && moe_tensor_present(t)) moe_safetensors_release(m->checkpoint, t->data, moe_tensor_bytes(t));
}

static void each_of_ffn(const moe_model *m, const moe_ffn_weights *w, advise visit) {
    visit(m, &w->gate);
    visit(m, &w->up);
    visit(m, &w->down);
}

static void each_of_layer(const moe_model *m, const moe_layer_weights *w, advise visit) {
    const moe_tensor *const tensors[] = {&w->input_norm, &w->q,         &w->k,      &w->v,        &w->o,
                                         &w->q_bias,     &w->k_bias,    &w->v_bias, &w->o_bias,   &w->q_norm,
                                         &w->k_norm,     &w->post_norm, &w->gate,   &w->pre_gate, &w->shared_gate};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) visit(m, tensors[i]);
    each_of_ffn(m, &w->dense, visit);
    each_of_ffn(m, &w->shared, visit);
}

void moe_model_expert_will_need(const moe_model *m, const moe_ffn_weights *w) { each_of_ffn(m, w, moe_model_tensor_will_need); }
void moe_model_expert_release(const moe_model *m, const moe_ffn_weights *w) { each_of_ffn(m, w, moe_model_tensor_release); }
void moe_model_layer_will_need(const moe_model *m, const moe_layer_weights *w) {
    each_of_layer(m, w, moe_model_tensor_will_need);
}
void moe_model_layer_release(const moe_model *m, const moe_layer_weights *w) { each_of_layer(m, w, moe_model_tensor_release); }
