#include "common/redis/redis_acl.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/buf.h"
#include "common/digest.h"
#include "common/random.h"

#define MAX_PATH_BYTES 4096
#define PASSWORD_BYTES 65 /* 256 bits in hexadecimal, and NUL */

/* A router leads: it writes anything under the prefix. A worker renews its own kinds of leases and reads whose cluster it is. */
static const struct {
    const char *role, *rules;
} users[] = {
    {"router", "~moe:* -@all +get +mget +set +del +sadd +srem +smembers +watch +unwatch +multi +exec +role +wait"},
    {"worker", "~moe:*:worker:* ~moe:*:device:* ~moe:*:keys %R~moe:*:meta "
               "-@all +get +set +del +sadd +srem +watch +unwatch +multi +exec +role"},
    {"operator", "%R~moe:* -@all +get +mget +smembers +role"},
};

static moe_status write_file(const char *dir, const char *name, bool replace, const char *text, size_t size, moe_error *err) {
    char path[MAX_PATH_BYTES];
    int length = snprintf(path, sizeof path, "%s/%s", dir, name);
    if (length >= (int)sizeof path) return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: the path is too long", dir);
    if (replace) unlink(path);
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    ssize_t put = fd >= 0 ? write(fd, text, size) : -1;
    int reason = fd >= 0 && put >= 0 ? ENOSPC : errno;
    if (fd >= 0 && close(fd) != 0) put = -1;
    if (put == (ssize_t)size) return MOE_OK;
    return moe_fail(err, reason == EEXIST ? MOE_ALREADY_EXISTS : MOE_UNAVAILABLE, "cannot write %s: %s", path, strerror(reason));
}

static void make_password(char password[PASSWORD_BYTES]) {
    for (int i = 0; i < 4; i++) snprintf(password + i * 16, 17, "%016" PRIx64, moe_random_identity());
}

static moe_status add_user(const char *role, const char *rules, const char *password, moe_buf *acl, moe_error *err) {
    uint8_t digest[MOE_SHA256_BYTES];
    moe_sha256 *sha = moe_sha256_new();
    if (!sha) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    moe_sha256_update(sha, password, strlen(password));
    moe_sha256_finish(&sha, digest);
    moe_buf_printf(acl, "user %s on #", role);
    for (int i = 0; i < MOE_SHA256_BYTES; i++) moe_buf_printf(acl, "%02x", digest[i]);
    moe_buf_printf(acl, " resetchannels %s\n", rules);
    return MOE_OK;
}

moe_status moe_redis_acl_write(const char *dir, bool local, moe_error *err) {
    moe_buf acl = {0};
    moe_status status = MOE_OK;
    /* Nobody can log in as a user that is off, but Redis 7 replays its append-only file as the default user, and drops every
     * transaction in it that this user may not make. */
    moe_buf_printf(&acl, "user default %s ~* &* +@all\n", local ? "on nopass" : "off resetpass");
    for (size_t i = 0; i < sizeof users / sizeof *users && status == MOE_OK; i++) {
        char password[PASSWORD_BYTES], name[64];
        make_password(password);
        snprintf(name, sizeof name, "redis-%s.password", users[i].role);
        status = write_file(dir, name, local, password, strlen(password), err);
        if (status == MOE_OK) status = add_user(users[i].role, users[i].rules, password, &acl, err);
        explicit_bzero(password, sizeof password);
    }
    if (status == MOE_OK && acl.failed) status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    if (status == MOE_OK) status = write_file(dir, MOE_REDIS_ACL_FILE, local, acl.data, acl.size, err);
    moe_buf_free(&acl);
    return status;
}
