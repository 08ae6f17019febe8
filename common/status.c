#include "common/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

moe_status moe_fail(moe_error *err, moe_status code, const char *format, ...) {
    if (err) {
        va_list args;
        va_start(args, format);
        err->code = code;
        vsnprintf(err->message, sizeof err->message, format, args);
        va_end(args);
    }
    return code;
}

moe_status moe_fail_prefix(moe_error *err, moe_status code, const char *format, ...) {
    if (err) {
        char prefix[MOE_ERROR_MESSAGE_BYTES];
        char whole[2 * MOE_ERROR_MESSAGE_BYTES + 3];
        va_list args;
        va_start(args, format);
        vsnprintf(prefix, sizeof prefix, format, args);
        va_end(args);
        snprintf(whole, sizeof whole, "%s: %s", prefix, err->message);
        err->code = code;
        memcpy(err->message, whole, sizeof err->message - 1);
        err->message[sizeof err->message - 1] = '\0';
    }
    return code;
}

const char *moe_status_name(moe_status status) {
    static const char *const names[MOE_STATUS_COUNT] = {
        "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
        "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
        "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"};
    return (unsigned)status < MOE_STATUS_COUNT ? names[status] : "UNKNOWN";
}

void moe_assert_failed(const char *expression, const char *file, int line) {
    fprintf(stderr, "moesaic: bug: %s:%d: assertion failed: %s\n", file, line, expression);
    abort();
}
