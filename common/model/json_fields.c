#include "common/model/json_fields.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/alloc.h"

moe_status moe_json_read_text(const char *text, size_t size, const char *name, json_t **out, moe_error *err) {
    json_error_t json_error;
    json_t *root = json_loadb(text, size, JSON_REJECT_DUPLICATES, &json_error);
    if (!root && json_error_code(&json_error) == json_error_out_of_memory)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%s: out of memory for %zu bytes of JSON", name, size);
    if (!root)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: bad JSON at byte %d: %s", name, json_error.position, json_error.text);
    if (!json_is_object(root)) {
        json_decref(root);
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: the JSON is not an object", name);
    }
    *out = root;
    return MOE_OK;
}

static moe_status read_all(int fd, size_t size, char *text, const char *path, moe_error *err) {
    size_t at = 0;
    while (at < size) {
        ssize_t n = read(fd, text + at, size - at);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0)
            return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: cannot read byte %zu of %zu: %s", path, at, size,
                            n < 0 ? strerror(errno) : "the file ends");
        at += (size_t)n;
    }
    return MOE_OK;
}

static moe_status read_descriptor(int fd, const char *path, size_t max_bytes, json_t **out, moe_error *err) {
    struct stat st;
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: not a regular file", path);
    if ((uint64_t)st.st_size > max_bytes)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: %lld bytes, at most %zu are read", path, (long long)st.st_size,
                        max_bytes);
    size_t size = (size_t)st.st_size;
    char *text = moe_calloc(size, 1);
    if (!text) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%s: out of memory for %zu bytes", path, size);
    moe_status status = read_all(fd, size, text, path, err);
    if (status == MOE_OK) status = moe_json_read_text(text, size, path, out, err);
    moe_free(text);
    return status;
}

moe_status moe_json_read_file(const char *path, size_t max_bytes, json_t **out, moe_error *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return moe_fail(err, errno == ENOENT || errno == ENOTDIR ? MOE_NOT_FOUND : MOE_INVALID_ARGUMENT, "%s: %s", path,
                        strerror(errno));
    moe_status status = read_descriptor(fd, path, max_bytes, out, err);
    close(fd);
    return status;
}

void moe_fields_fail(moe_fields *f, moe_status code, const char *format, ...) {
    if (f->status != MOE_OK) return;
    char text[MOE_ERROR_MESSAGE_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    f->status = moe_fail(f->err, code, "%s: %s", f->name, text);
}

const json_t *moe_fields_get(const moe_fields *f, const char *key) {
    const json_t *value = json_object_get(f->object, key);
    return json_is_null(value) ? NULL : value;
}

int64_t moe_fields_integer(moe_fields *f, const char *key, int64_t low, int64_t high, int64_t fallback) {
    const json_t *value = moe_fields_get(f, key);
    if (!value) return fallback;
    if (!json_is_integer(value)) {
        moe_fields_fail(f, MOE_INVALID_ARGUMENT, "%s is not an integer", key);
        return fallback;
    }
    int64_t number = json_integer_value(value);
    if (number >= low && number <= high) return number;
    moe_fields_fail(f, MOE_INVALID_ARGUMENT, "%s is %lld, outside [%lld, %lld]", key, (long long)number, (long long)low,
                    (long long)high);
    return fallback;
}

int64_t moe_fields_required(moe_fields *f, const char *key, int64_t low, int64_t high) {
    if (!moe_fields_get(f, key)) moe_fields_fail(f, MOE_INVALID_ARGUMENT, "%s is missing", key);
    return moe_fields_integer(f, key, low, high, low);
}

double moe_fields_number(moe_fields *f, const char *key, double low, double high, double fallback) {
    const json_t *value = moe_fields_get(f, key);
    if (!value) return fallback;
    if (!json_is_number(value)) {
        moe_fields_fail(f, MOE_INVALID_ARGUMENT, "%s is not a number", key);
        return fallback;
    }
    double number = json_number_value(value);
    if (number >= low && number <= high) return number;
    moe_fields_fail(f, MOE_INVALID_ARGUMENT, "%s is %g, outside [%g, %g]", key, number, low, high);
    return fallback;
}

bool moe_fields_bool(moe_fields *f, const char *key, bool fallback) {
    const json_t *value = moe_fields_get(f, key);
    if (!value) return fallback;
    if (!json_is_boolean(value)) moe_fields_fail(f, MOE_INVALID_ARGUMENT, "%s is neither true nor false", key);
    return json_is_true(value);
}

const char *moe_fields_text(moe_fields *f, const char *key, const char *fallback) {
    const json_t *value = moe_fields_get(f, key);
    if (!value) return fallback;
    if (json_is_string(value)) return json_string_value(value);
    moe_fields_fail(f, MOE_INVALID_ARGUMENT, "%s is not a string", key);
    return fallback;
}
