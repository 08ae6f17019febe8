/* Key files: czmq's certificates (ZPL), one pair for each role. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/zmq/zmq_internal.h"

#define MAX_KEY_FILE_BYTES 4096
#define MAX_PATH_BYTES 4096

moe_status moe_curve_keypair(char public_key[MOE_CURVE_KEY_BYTES], char secret_key[MOE_CURVE_KEY_BYTES], moe_error *err) {
    if (zmq_curve_keypair(public_key, secret_key) == 0) return MOE_OK;
    return moe_fail(err, MOE_UNIMPLEMENTED, "cannot make CURVE keys: %s", zmq_strerror(zmq_errno()));
}

static moe_status key_path(const char *dir, moe_role role, const char *suffix, char path[MAX_PATH_BYTES], moe_error *err) {
    int length = snprintf(path, MAX_PATH_BYTES, "%s/%s%s", dir, moe_zmq_role_name(role), suffix);
    if (length < MAX_PATH_BYTES) return MOE_OK;
    return moe_fail(err, MOE_INVALID_ARGUMENT, "key folder: the path is longer than %d bytes", MAX_PATH_BYTES);
}

static moe_status file_error(moe_error *err, const char *what, const char *path) {
    int reason = errno;
    moe_status status = MOE_UNAVAILABLE;
    if (reason == ENOENT || reason == ENOTDIR) status = MOE_NOT_FOUND;
    if (reason == EACCES || reason == EPERM) status = MOE_PERMISSION_DENIED;
    if (reason == EEXIST) status = MOE_ALREADY_EXISTS;
    return moe_fail(err, status, "cannot %s %s: %s", what, path, strerror(reason));
}

/* ---- writing ---- */

static moe_status write_file(const char *path, mode_t mode, const char *text, moe_error *err) {
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    if (fd < 0) return file_error(err, "make", path);
    size_t size = strlen(text);
    ssize_t put = write(fd, text, size);
    int synced = put == (ssize_t)size ? fsync(fd) : -1;
    if (put >= 0 && put != (ssize_t)size) errno = ENOSPC;
    moe_status status = synced == 0 ? MOE_OK : file_error(err, "write", path);
    if (close(fd) != 0 && status == MOE_OK) status = file_error(err, "write", path);
    return status;
}

static moe_status write_role(const char *dir, moe_role role, moe_error *err) {
    char public_key[MOE_CURVE_KEY_BYTES], secret_key[MOE_CURVE_KEY_BYTES], path[MAX_PATH_BYTES], text[512];
    moe_status status = moe_curve_keypair(public_key, secret_key, err);
    if (status == MOE_OK) status = key_path(dir, role, ".key", path, err);
    if (status == MOE_OK) {
        snprintf(text, sizeof text, "metadata\n    role = \"%s\"\ncurve\n    public-key = \"%s\"\n    secret-key = \"%s\"\n",
                 moe_zmq_role_name(role), public_key, secret_key);
        status = write_file(path, 0600, text, err);
    }
    if (status == MOE_OK) status = key_path(dir, role, ".pub", path, err);
    if (status == MOE_OK) {
        snprintf(text, sizeof text, "metadata\n    role = \"%s\"\ncurve\n    public-key = \"%s\"\n", moe_zmq_role_name(role),
                 public_key);
        status = write_file(path, 0644, text, err);
    }
    explicit_bzero(secret_key, sizeof secret_key);
    explicit_bzero(text, sizeof text);
    return status;
}

static moe_status check_absent(const char *dir, moe_role role, const char *suffix, moe_error *err) {
    char path[MAX_PATH_BYTES];
    struct stat status;
    moe_status result = key_path(dir, role, suffix, path, err);
    if (result != MOE_OK || lstat(path, &status) != 0) return result;
    return moe_fail(err, MOE_ALREADY_EXISTS,
                    "%s exists already; nothing was written. Name another folder, or remove the old keys", path);
}

moe_status moe_curve_keys_write(const char *dir, moe_error *err) {
    if (mkdir(dir, 0700) != 0 && errno != EEXIST) return file_error(err, "make the folder", dir);
    moe_status status = MOE_OK;
    for (int role = MOE_ROLE_LOCAL + 1; status == MOE_OK && role < MOE_ROLE_COUNT; role++) {
        status = check_absent(dir, (moe_role)role, ".key", err);
        if (status == MOE_OK) status = check_absent(dir, (moe_role)role, ".pub", err);
    }
    for (int role = MOE_ROLE_LOCAL + 1; status == MOE_OK && role < MOE_ROLE_COUNT; role++) {
        status = write_role(dir, (moe_role)role, err);
    }
    return status;
}

/* ---- reading ---- */

/* The whole file as text; `secret`: only we may be able to read it. */
static moe_status read_file(const char *path, bool secret, char text[MAX_KEY_FILE_BYTES], moe_error *err) {
    struct stat file;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return file_error(err, "open", path);
    moe_status status = MOE_OK;
    ssize_t got = 0;
    if (fstat(fd, &file) != 0 || !S_ISREG(file.st_mode) || file.st_size >= MAX_KEY_FILE_BYTES) {
        status = moe_fail(err, MOE_INVALID_ARGUMENT, "%s is no key file: not a regular file of less than %d bytes", path,
                          MAX_KEY_FILE_BYTES);
    } else if (secret && (file.st_mode & 0077) != 0) {
        status = moe_fail(err, MOE_PERMISSION_DENIED,
                          "%s may be read by others (mode %03o): chmod 600 it, and make new keys if somebody had access", path,
                          (unsigned)file.st_mode & 0777);
    } else {
        got = read(fd, text, MAX_KEY_FILE_BYTES - 1);
        if (got < 0) status = file_error(err, "read", path);
    }
    close(fd);
    text[got > 0 ? got : 0] = '\0';
    return status;
}

/* Finds `name = "KEY"` in a certificate. */
static moe_status find_key(const char *path, const char *text, const char *name, char out[MOE_CURVE_KEY_BYTES], moe_error *err) {
    unsigned char binary[32];
    char pattern[64];
    snprintf(pattern, sizeof pattern, "%s = \"", name);
    const char *at = strstr(text, pattern);
    if (at) at += strlen(pattern);
    size_t length = at ? strcspn(at, "\"\n") : 0;
    if (length == MOE_CURVE_KEY_BYTES - 1 && at[length] == '"') {
        memcpy(out, at, length);
        out[length] = '\0';
        if (zmq_z85_decode(binary, out)) {
            explicit_bzero(binary, sizeof binary);
            return MOE_OK;
        }
    }
    return moe_fail(err, MOE_INVALID_ARGUMENT, "%s has no line %sKEY\" with a key of %d Z85 characters", path, pattern,
                    MOE_CURVE_KEY_BYTES - 1);
}

static moe_status read_own(const char *dir, moe_role role, moe_curve_keys *out, moe_error *err) {
    char path[MAX_PATH_BYTES], text[MAX_KEY_FILE_BYTES], derived[MOE_CURVE_KEY_BYTES];
    moe_status status = key_path(dir, role, ".key", path, err);
    if (status == MOE_OK) status = read_file(path, true, text, err);
    if (status == MOE_OK) status = find_key(path, text, "public-key", out->public_key, err);
    if (status == MOE_OK) status = find_key(path, text, "secret-key", out->secret_key, err);
    explicit_bzero(text, sizeof text);
    if (status != MOE_OK) return status;
    if (zmq_curve_public(derived, out->secret_key) != 0 || strcmp(derived, out->public_key) != 0) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: the public key does not belong to the secret key; run `moesaic keygen`",
                        path);
    }
    return MOE_OK;
}

static moe_status read_public(const char *dir, moe_role role, moe_curve_keys *out, moe_error *err) {
    char path[MAX_PATH_BYTES], text[MAX_KEY_FILE_BYTES];
    moe_status status = key_path(dir, role, ".pub", path, err);
    if (status == MOE_OK) status = read_file(path, false, text, err);
    if (status == MOE_NOT_FOUND) return MOE_OK; /* that role is not let in */
    return status == MOE_OK ? find_key(path, text, "public-key", out->role_keys[role], err) : status;
}

moe_status moe_curve_keys_read(const char *dir, moe_role role, moe_curve_keys *out, moe_error *err) {
    memset(out, 0, sizeof *out);
    if (role <= MOE_ROLE_LOCAL || role >= MOE_ROLE_COUNT) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "keys belong to a router, worker or operator");
    }
    moe_status status = read_own(dir, role, out, err);
    for (int other = MOE_ROLE_LOCAL + 1; status == MOE_OK && other < MOE_ROLE_COUNT; other++) {
        status = read_public(dir, (moe_role)other, out, err);
    }
    if (status != MOE_OK) explicit_bzero(out, sizeof *out);
    return status;
}
