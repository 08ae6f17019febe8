/* Status codes and errors as values.
 *
 * Every operation that can fail for a reason outside the program returns a `moe_status` and fills an optional
 * `moe_error` with what was wrong, where, and what to do. The numbers are gRPC's, so that they cross the wire as is. */
#pragma once
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum moe_status {
    MOE_OK = 0,
    MOE_CANCELLED = 1,
    MOE_UNKNOWN = 2,
    MOE_INVALID_ARGUMENT = 3,
    MOE_DEADLINE_EXCEEDED = 4,
    MOE_NOT_FOUND = 5,
    MOE_ALREADY_EXISTS = 6,
    MOE_PERMISSION_DENIED = 7,
    MOE_RESOURCE_EXHAUSTED = 8,
    MOE_FAILED_PRECONDITION = 9,
    MOE_ABORTED = 10,
    MOE_OUT_OF_RANGE = 11,
    MOE_UNIMPLEMENTED = 12,
    MOE_INTERNAL = 13,
    MOE_UNAVAILABLE = 14,
    MOE_DATA_LOSS = 15,
    MOE_UNAUTHENTICATED = 16,
    MOE_STATUS_COUNT = 17
} moe_status;

#define MOE_ERROR_MESSAGE_BYTES 512

typedef struct moe_error {
    moe_status code;
    char message[MOE_ERROR_MESSAGE_BYTES]; /* NUL-terminated, cut to fit */
} moe_error;

/* Fills *err (NULL is allowed) and returns `code`, so that a function can end with `return moe_fail(err, …)`. */
moe_status moe_fail(moe_error *err, moe_status code, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Puts "format: " before the message already in *err and returns its code; for adding where something went wrong. */
moe_status moe_fail_prefix(moe_error *err, moe_status code, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* gRPC's upper-case name of a status ("UNAVAILABLE"); "UNKNOWN" for a number outside the enum. */
const char *moe_status_name(moe_status status);

/* Our own bugs, never a peer's or a file's: checked in release builds too, aborts with file, line and expression. */
#define MOE_ASSERT(expr) ((expr) ? (void)0 : moe_assert_failed(#expr, __FILE__, __LINE__))
_Noreturn void moe_assert_failed(const char *expression, const char *file, int line);
