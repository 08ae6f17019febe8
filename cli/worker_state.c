#include "cli/worker_state.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/log.h"
#include "common/random.h"

static bool path_of(const char *dir, const char *id, const char *suffix, char path[PATH_MAX]) {
    return !strchr(id, '/') && snprintf(path, PATH_MAX, "%s/worker-%s.state%s", dir, id, suffix) < PATH_MAX;
}

moe_worker_memory moe_worker_state_read(const char *dir, const char *id, const char *cluster_uuid) {
    char path[PATH_MAX], uuid[MOE_UUID_BYTES] = "";
    moe_worker_memory state = {0, 0};
    FILE *file = path_of(dir, id, "", path) ? fopen(path, "re") : NULL;
    if (!file) return state;
    int fields = fscanf(file, "%36s %20" SCNu64 " %20" SCNu64, uuid, &state.epoch, &state.fence);
    bool whole = fields == 3 && fgetc(file) == '\n';
    fclose(file);
    if (whole && strcmp(uuid, cluster_uuid) == 0) return state;
    moe_warn("%s is %s and is ignored", path, whole ? "of another cluster" : "damaged");
    return (moe_worker_memory){0, 0};
}

moe_status moe_worker_state_write(const char *dir, const char *id, const char *cluster_uuid, moe_worker_memory state,
                                  moe_error *err) {
    char path[PATH_MAX], fresh[PATH_MAX], text[128];
    if (!path_of(dir, id, "", path) || !path_of(dir, id, ".new", fresh))
        return moe_fail(err, MOE_INVALID_ARGUMENT, "no file in %s can be named after the worker %s", dir, id);
    int size = snprintf(text, sizeof text, "%s %" PRIu64 " %" PRIu64 "\n", cluster_uuid, state.epoch, state.fence);
    int fd = open(fresh, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    bool ok = fd >= 0 && write(fd, text, (size_t)size) == size && fsync(fd) == 0;
    int reason = errno;
    if (fd >= 0 && close(fd) != 0) ok = false;
    if (ok && rename(fresh, path) != 0) {
        reason = errno;
        ok = false;
    }
    return ok ? MOE_OK : moe_fail(err, MOE_UNAVAILABLE, "cannot write %s: %s", path, strerror(reason));
}
