#include "cli/secret_option.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

moe_status moe_secret_option(const moe_options *options, const char *name, char text[MOE_SECRET_BYTES], const char **out,
                             moe_error *err) {
    char file_name[64];
    snprintf(file_name, sizeof file_name, "%s-file", name);
    const char *value = moe_option_text(options, name), *path = moe_option_text(options, file_name);
    *out = value;
    if (!path) return MOE_OK;
    if (value) return moe_fail(err, MOE_INVALID_ARGUMENT, "--%s and --%s are both given", name, file_name);
    FILE *file = fopen(path, "re");
    if (!file) return moe_fail(err, MOE_NOT_FOUND, "--%s: cannot read %s: %s", file_name, path, strerror(errno));
    bool read = fgets(text, MOE_SECRET_BYTES, file) != NULL;
    fclose(file);
    size_t length = read ? strcspn(text, "\r\n") : 0;
    if (length == 0) return moe_fail(err, MOE_INVALID_ARGUMENT, "--%s: the first line of %s is empty", file_name, path);
    if (length == MOE_SECRET_BYTES - 1)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--%s: the first line of %s has more than %d bytes", file_name, path,
                        MOE_SECRET_BYTES - 2);
    text[length] = '\0';
    *out = text;
    return MOE_OK;
}
