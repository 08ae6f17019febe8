#include "tests/support/checkpoint_writer.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "common/buf.h"
#include "tests/support/test.h"

static void append_prefix(moe_buf *out, const char *header) {
    uint64_t size = strlen(header);
    moe_buf_append(out, &size, sizeof size);
    moe_buf_append_text(out, header);
}

void moe_test_write_header(const moe_test_dir *dir, const char *file, const char *header, size_t data_bytes) {
    moe_buf out = {0};
    append_prefix(&out, header);
    for (size_t i = 0; i < data_bytes; i++) moe_buf_append(&out, "", 1);
    assert_false(out.failed);
    moe_test_write_file(dir, file, out.data, out.size);
    moe_buf_free(&out);
}

static size_t tensor_bytes(const moe_safetensor *t) {
    size_t bytes = moe_dtype_bytes(t->dtype);
    for (int i = 0; i < t->num_dims; i++) bytes *= (size_t)t->dims[i];
    return bytes;
}

void moe_test_write_tensors(const moe_test_dir *dir, const char *file, const moe_safetensor *tensors, int64_t count) {
    static const char *const names[MOE_DTYPE_COUNT] = {"F32", "BF16", "F16"};
    moe_buf header = {0}, out = {0};
    size_t at = 0;
    for (int64_t i = 0; i < count; i++) {
        const moe_safetensor *t = &tensors[i];
        moe_buf_printf(&header, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", i ? "," : "{", t->name, names[t->dtype]);
        for (int d = 0; d < t->num_dims; d++) moe_buf_printf(&header, "%s%" PRId64, d ? "," : "", t->dims[d]);
        moe_buf_printf(&header, "],\"data_offsets\":[%zu,%zu]}", at, at + tensor_bytes(t));
        at += tensor_bytes(t);
    }
    moe_buf_append_text(&header, count > 0 ? "}" : "{}");
    append_prefix(&out, moe_buf_text(&header));
    for (int64_t i = 0; i < count; i++) moe_buf_append(&out, tensors[i].data, tensor_bytes(&tensors[i]));
    assert_false(header.failed || out.failed);
    moe_test_write_file(dir, file, out.data, out.size);
    moe_buf_free(&header);
    moe_buf_free(&out);
}
