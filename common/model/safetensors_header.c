#include "common/model/safetensors_header.h"

#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/cursor.h"
#include "common/model/json_fields.h"

#define METADATA_KEY "__metadata__"

typedef struct parser {
    const char *path;
    const uint8_t *data; /* tensor bytes */
    size_t data_bytes;
    moe_error *err;
} parser;

void moe_safetensor_list_free(moe_safetensor_list *list) {
    for (int64_t i = 0; i < list->count; i++) moe_free((char *)list->items[i].name);
    moe_free(list->items);
    *list = (moe_safetensor_list){0};
}

static moe_safetensor *append(moe_safetensor_list *list, const char *name) {
    if (list->count == list->capacity) {
        int64_t capacity = list->capacity ? 2 * list->capacity : 64;
        moe_safetensor *items = moe_realloc(list->items, (size_t)capacity, sizeof *items);
        if (!items) return NULL;
        list->items = items;
        list->capacity = capacity;
    }
    char *copy = moe_strdup(name);
    if (!copy) return NULL;
    moe_safetensor *t = &list->items[list->count++];
    *t = (moe_safetensor){.name = copy};
    return t;
}

static moe_status parse_dtype(const parser *p, const char *text, moe_safetensor *t) {
    static const char *const names[MOE_DTYPE_COUNT] = {[MOE_F32] = "F32", [MOE_BF16] = "BF16", [MOE_F16] = "F16"};
    for (int i = 0; i < MOE_DTYPE_COUNT; i++) {
        if (strcmp(text, names[i]) != 0) continue;
        t->dtype = (moe_dtype)i;
        return MOE_OK;
    }
    return moe_fail(p->err, MOE_UNIMPLEMENTED, "%s: tensor %.128s: dtype \"%.32s\" is not supported; BF16, F16 and F32 are",
                    p->path, t->name, text);
}

/* dims and bytes from the shape, by checked products. */
static moe_status parse_shape(const parser *p, const json_t *shape, moe_safetensor *t) {
    if (!json_is_array(shape))
        return moe_fail(p->err, MOE_INVALID_ARGUMENT, "%s: tensor %.128s: the shape is not a list", p->path, t->name);
    if (json_array_size(shape) > MOE_SAFETENSORS_MAX_DIMS)
        return moe_fail(p->err, MOE_UNIMPLEMENTED, "%s: tensor %.128s: %zu dimensions, at most %d are supported", p->path,
                        t->name, json_array_size(shape), MOE_SAFETENSORS_MAX_DIMS);
    t->num_dims = (int)json_array_size(shape);
    t->bytes = moe_dtype_bytes(t->dtype);
    for (int i = 0; i < t->num_dims; i++) {
        const json_t *dim = json_array_get(shape, (size_t)i);
        if (!json_is_integer(dim) || json_integer_value(dim) < 0)
            return moe_fail(p->err, MOE_INVALID_ARGUMENT, "%s: tensor %.128s: dimension %d is not a natural number", p->path,
                            t->name, i);
        t->dims[i] = json_integer_value(dim);
        if (!moe_size_mul(t->bytes, (size_t)t->dims[i], &t->bytes))
            return moe_fail(p->err, MOE_INVALID_ARGUMENT, "%s: tensor %.128s: the shape overflows", p->path, t->name);
    }
    return MOE_OK;
}

static moe_status parse_offsets(const parser *p, const json_t *offsets, moe_safetensor *t) {
    const json_t *first = json_array_get(offsets, 0), *last = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(first) || !json_is_integer(last) || json_integer_value(first) < 0)
        return moe_fail(p->err, MOE_INVALID_ARGUMENT, "%s: tensor %.128s: data_offsets are not two natural numbers", p->path,
                        t->name);
    json_int_t begin = json_integer_value(first), end = json_integer_value(last);
    if (end < begin || (uint64_t)end > p->data_bytes)
        return moe_fail(p->err, MOE_INVALID_ARGUMENT, "%s: tensor %.128s: data_offsets [%lld, %lld) in %zu bytes of data",
                        p->path, t->name, (long long)begin, (long long)end, p->data_bytes);
    if ((uint64_t)(end - begin) != t->bytes)
        return moe_fail(p->err, MOE_INVALID_ARGUMENT, "%s: tensor %.128s: data_offsets hold %lld bytes, the shape %zu", p->path,
                        t->name, (long long)(end - begin), t->bytes);
    t->data = p->data + begin;
    return MOE_OK;
}

static moe_status parse_tensor(const parser *p, const char *name, json_t *entry, moe_safetensor_list *list) {
    const char *dtype;
    json_t *shape, *offsets;
    if (json_unpack(entry, "{s:s, s:o, s:o !}", "dtype", &dtype, "shape", &shape, "data_offsets", &offsets) != 0)
        return moe_fail(p->err, MOE_INVALID_ARGUMENT, "%s: tensor %.128s: the entry is not {dtype, shape, data_offsets}", p->path,
                        name);
    moe_safetensor *t = append(list, name);
    if (!t) return moe_fail(p->err, MOE_RESOURCE_EXHAUSTED, "%s: out of memory for the list of tensors", p->path);
    moe_status status = parse_dtype(p, dtype, t);
    if (status == MOE_OK) status = parse_shape(p, shape, t);
    if (status == MOE_OK) status = parse_offsets(p, offsets, t);
    return status;
}

static int compare_by_data(const void *a, const void *b) {
    const moe_safetensor *x = a, *y = b;
    if (x->data != y->data) return (uintptr_t)x->data < (uintptr_t)y->data ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

/* The format has no gaps: each tensor begins where the one before ends, the last ends with the file. */
static moe_status check_layout(const parser *p, moe_safetensor_list *list, int64_t before) {
    size_t at = 0, count = (size_t)(list->count - before);
    moe_safetensor *items = count > 0 ? list->items + before : NULL;
    if (items) qsort(items, count, sizeof *items, compare_by_data);
    for (size_t i = 0; i < count; i++) {
        size_t begin = (size_t)((const uint8_t *)items[i].data - p->data);
        if (begin < at)
            return moe_fail(p->err, MOE_INVALID_ARGUMENT, "%s: tensor %.128s overlaps tensor %.128s", p->path, items[i].name,
                            items[i - 1].name);
        if (begin > at)
            return moe_fail(p->err, MOE_INVALID_ARGUMENT, "%s: a hole of %zu bytes before tensor %.128s", p->path, begin - at,
                            items[i].name);
        at = begin + items[i].bytes;
    }
    if (at != p->data_bytes)
        return moe_fail(p->err, MOE_INVALID_ARGUMENT, "%s: %zu bytes after the last tensor", p->path, p->data_bytes - at);
    return MOE_OK;
}

static moe_status parse_entries(const parser *p, json_t *root, moe_safetensor_list *list) {
    int64_t before = list->count;
    const char *name;
    json_t *entry;
    json_object_foreach(root, name, entry) {
        if (strcmp(name, METADATA_KEY) == 0) {
            if (!json_is_object(entry))
                return moe_fail(p->err, MOE_INVALID_ARGUMENT, "%s: " METADATA_KEY " is not an object", p->path);
            continue;
        }
        moe_status status = parse_tensor(p, name, entry, list);
        if (status != MOE_OK) return status;
    }
    return check_layout(p, list, before);
}

moe_status moe_safetensors_parse(const void *file, size_t size, const char *path, moe_safetensor_list *list, moe_error *err) {
    moe_cursor cursor = moe_cursor_of(file, size);
    uint64_t header_bytes = moe_cursor_u64(&cursor);
    if (cursor.bad) return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: %zu bytes, too short for a safetensors file", path, size);
    if (header_bytes > MOE_SAFETENSORS_MAX_HEADER_BYTES)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: a header of %llu bytes, at most %llu are allowed", path,
                        (unsigned long long)header_bytes, (unsigned long long)MOE_SAFETENSORS_MAX_HEADER_BYTES);
    const char *header = moe_cursor_take(&cursor, (size_t)header_bytes);
    if (!header)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: a header of %llu bytes in a file of %zu", path,
                        (unsigned long long)header_bytes, size);
    json_t *root = NULL;
    moe_status status = moe_json_read_text(header, (size_t)header_bytes, path, &root, err);
    if (status != MOE_OK) return status;
    parser p = {.path = path, .data = cursor.at, .data_bytes = cursor.left, .err = err};
    status = parse_entries(&p, root, list);
    json_decref(root);
    return status;
}
