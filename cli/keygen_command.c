/* `moesaic keygen DIR`. */
#include <stdio.h>

#include "cli/commands.h"
#include "common/redis/redis_acl.h"
#include "common/zmq/zmq_transport.h"

int moe_command_keygen(const moe_options *options) {
    moe_error err;
    const char *dir = moe_options_positional(options);
    if (moe_curve_keys_write(dir, &err) != MOE_OK || moe_redis_acl_write(dir, false, &err) != MOE_OK) {
        fprintf(stderr, "moesaic: %s\n", err.message);
        return 1;
    }
    printf(
        "%s: router.key, worker.key and operator.key are secret and stay with their role; the .pub files go everywhere.\n"
        "Start routers and workers with --keys %s, or a copy of it that holds their own .key and all .pub files.\n"
        "For Redis: start it with --aclfile %s/redis.acl; each role has a user of its name, whose password is in\n"
        "redis-ROLE.password (--redis-username ROLE --redis-password-file FILE).\n",
        dir, dir, dir);
    return 0;
}
