/* Unix sockets' files: what listeners of several transports share. */
#pragma once
#include <sys/un.h>

#include "common/status.h"

/* May a listener be made at `path`, replacing what a dead one left there? ALREADY_EXISTS: a process listens there, or the file is
 * no socket. OK where there is nothing; bind says what else is wrong. */
moe_status moe_socket_file_check(const char *path, moe_error *err);

/* INVALID_ARGUMENT: `path` does not fit sun_path. */
moe_status moe_socket_address(const char *path, struct sockaddr_un *out, moe_error *err);
