#include "common/socket_file.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

moe_status moe_socket_address(const char *path, struct sockaddr_un *out, moe_error *err) {
    *out = (struct sockaddr_un){.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof out->sun_path) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%.64s…: a unix socket's path has less than %zu bytes; use a shorter folder",
                        path, sizeof out->sun_path);
    }
    memcpy(out->sun_path, path, strlen(path) + 1);
    return MOE_OK;
}

/* Of whatever type its socket is. */
static bool somebody_accepts(const struct sockaddr_un *address) {
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return true;
    bool accepts = connect(fd, (const struct sockaddr *)address, sizeof *address) == 0 || errno == EAGAIN ||
                   errno == EINPROGRESS || errno == EPROTOTYPE;
    close(fd);
    return accepts;
}

moe_status moe_socket_file_check(const char *path, moe_error *err) {
    struct stat file;
    struct sockaddr_un address;
    if (lstat(path, &file) != 0) return MOE_OK;
    if (!S_ISSOCK(file.st_mode)) {
        return moe_fail(err, MOE_ALREADY_EXISTS, "%s exists and is not a socket; remove it or listen elsewhere", path);
    }
    moe_status status = moe_socket_address(path, &address, err);
    if (status != MOE_OK) return status;
    if (somebody_accepts(&address)) return moe_fail(err, MOE_ALREADY_EXISTS, "another process listens at %s", path);
    return MOE_OK;
}
