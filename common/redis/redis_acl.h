/* Redis users by role: least privilege, no scripting, this system's keys alone. */
#pragma once
#include "common/status.h"

#define MOE_REDIS_ACL_FILE "redis.acl"

/* Writes DIR/redis.acl for Redis 7 or later (its option `aclfile`) with the users router, worker and operator, and each one's fresh
 * password in DIR/redis-ROLE.password; all with mode 0600. `local`: a private Redis on a socket that only its owner can open, where
 * the owner's own tools stay usable: the default user is kept, and files of an earlier start are replaced. Else the default user is
 * off, and files that are there are ALREADY_EXISTS. UNAVAILABLE: they cannot be written. */
moe_status moe_redis_acl_write(const char *dir, bool local, moe_error *err);
