#include "common/model/pre_gates.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/buf.h"
#include "common/model/family.h"
#include "common/model/safetensors.h"

#define MAX_KEY_BYTES 256
#define HEADER_ALIGNMENT 8 /* of the tensors' bytes, as the format asks */

/* Of the `moe_index`-th MoE layer. */
static void format_name(char name[MAX_KEY_BYTES], const moe_model_config *c, int32_t moe_index) {
    snprintf(name, MAX_KEY_BYTES, "model.layers.%" PRId32 ".%s", c->moe_layers[moe_index], c->family->pre_gate_key);
}

static moe_tensor *pre_gate_of(moe_model *m, int32_t moe_index) { return &m->layers[m->config.moe_layers[moe_index]].pre_gate; }

static moe_status use_file(moe_model *m, const char *file, moe_error *err) {
    const moe_model_config *c = &m->config;
    moe_status status = moe_safetensors_open_file(file, &m->pre_gates, err);
    if (status != MOE_OK) return status;
    for (int32_t i = 0; i + 1 < c->num_moe_layers; i++) {
        char name[MAX_KEY_BYTES];
        format_name(name, c, i);
        const moe_safetensor *t = moe_safetensors_find(m->pre_gates, name);
        if (!t) return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: tensor %s is missing", file, name);
        if (t->num_dims != 2 || t->dims[0] != c->num_experts || t->dims[1] != c->hidden)
            return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: tensor %s does not have this model's shape [%d, %d]", file, name,
                            c->num_experts, c->hidden);
        *pre_gate_of(m, i) = (moe_tensor){.data = t->data, .dtype = t->dtype, .rows = c->num_experts, .cols = c->hidden};
    }
    for (int64_t i = 0; i < moe_safetensors_count(m->pre_gates); i++)
        if (!moe_safetensors_at(m->pre_gates, i)->used)
            return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: tensor %.128s is no pre-gate of this model", file,
                            moe_safetensors_at(m->pre_gates, i)->name);
    return MOE_OK;
}

moe_status moe_model_use_pre_gates(moe_model *m, const char *file, moe_error *err) {
    MOE_ASSERT(!m->pre_gates);
    if (m->config.num_moe_layers < 2)
        return moe_fail(err, MOE_FAILED_PRECONDITION, "%s: pre-gates need two MoE layers at least; this model has %d", m->dir,
                        m->config.num_moe_layers);
    moe_status status = MOE_OK;
    if (strcmp(file, MOE_PRE_GATES_NEXT_GATE) != 0)
        status = use_file(m, file, err);
    else
        for (int32_t i = 0; i + 1 < m->config.num_moe_layers; i++)
            *pre_gate_of(m, i) = m->layers[m->config.moe_layers[i + 1]].gate;
    m->has_pre_gates = status == MOE_OK;
    return status;
}

static void describe(const moe_model_config *c, moe_buf *header) {
    size_t bytes = (size_t)c->num_experts * (size_t)c->hidden * sizeof(float);
    moe_buf_printf(header, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int32_t i = 0; i + 1 < c->num_moe_layers; i++) {
        char name[MAX_KEY_BYTES];
        format_name(name, c, i);
        moe_buf_printf(header, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[%d,%d],\"data_offsets\":[%zu,%zu]}", name, c->num_experts,
                       c->hidden, (size_t)i * bytes, (size_t)(i + 1) * bytes);
    }
    moe_buf_printf(header, "}");
    while (header->size % HEADER_ALIGNMENT) moe_buf_append_text(header, " ");
}

static moe_status write_file(FILE *f, const char *file, const moe_buf *header, const float *weights, size_t count,
                             moe_error *err) {
    uint64_t header_bytes = header->size;
    bool written = fwrite(&header_bytes, sizeof header_bytes, 1, f) == 1 && fwrite(header->data, header->size, 1, f) == 1 &&
                   fwrite(weights, sizeof *weights, count, f) == count && fflush(f) == 0 && fsync(fileno(f)) == 0;
    return written ? MOE_OK : moe_fail(err, MOE_DATA_LOSS, "cannot write %s: %s", file, strerror(errno));
}

moe_status moe_pre_gates_write(const char *file, const moe_model_config *c, const float *weights, moe_error *err) {
    moe_buf header = {0};
    char part[PATH_MAX];
    MOE_ASSERT(c->num_moe_layers > 1);
    if (snprintf(part, sizeof part, "%s.part", file) >= PATH_MAX)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%.128s…: the path is too long", file);
    FILE *f = fopen(part, "wb");
    if (!f) return moe_fail(err, MOE_PERMISSION_DENIED, "cannot write %s: %s", part, strerror(errno));
    describe(c, &header);
    size_t count = (size_t)(c->num_moe_layers - 1) * (size_t)c->num_experts * (size_t)c->hidden;
    moe_status status = header.failed ? moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%s: out of memory", file)
                                      : write_file(f, part, &header, weights, count, err);
    moe_buf_free(&header);
    bool closed = fclose(f) == 0;
    if (status == MOE_OK && (!closed || rename(part, file) != 0))
        status = moe_fail(err, MOE_DATA_LOSS, "cannot write %s: %s", file, strerror(errno));
    if (status != MOE_OK) unlink(part);
    return status;
}
