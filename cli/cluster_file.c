#include "cli/cluster_file.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/alloc.h"

typedef struct text_field {
    const char *key;
    size_t offset, size;
} text_field;

#define FIELD(name) \
    { #name, offsetof(moe_cluster_file, name), sizeof((moe_cluster_file *)0)->name }
static const text_field fields[] = {FIELD(uuid), FIELD(run_dir), FIELD(model), FIELD(redis),
                                    FIELD(keys), FIELD(listen),  FIELD(url),   FIELD(router)};
enum { NUM_FIELDS = sizeof fields / sizeof *fields };

static json_t *to_json(const moe_cluster_file *file, const moe_children *children) {
    json_t *root = json_object(), *pids = json_object();
    for (int i = 0; i < NUM_FIELDS; i++)
        json_object_set_new(root, fields[i].key, json_string((const char *)file + fields[i].offset));
    for (int i = 0; i < children->count; i++)
        json_object_set_new(pids, children->items[i].name, json_integer(children->items[i].pid));
    json_object_set_new(pids, "serve", json_integer(getpid()));
    json_object_set_new(root, "pids", pids);
    return root;
}

moe_status moe_cluster_file_write(const moe_cluster_file *file, const moe_children *children, moe_error *err) {
    char path[PATH_MAX + sizeof MOE_CLUSTER_FILE + 8], temporary[sizeof path + 4];
    snprintf(path, sizeof path, "%s/%s", file->run_dir, MOE_CLUSTER_FILE);
    snprintf(temporary, sizeof temporary, "%s.new", path);
    json_t *root = to_json(file, children);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    bool written = root && fd >= 0 && json_dumpfd(root, fd, JSON_INDENT(2)) == 0;
    if (fd >= 0) written = close(fd) == 0 && written;
    json_decref(root);
    if (written && rename(temporary, path) == 0) return MOE_OK;
    return moe_fail(err, MOE_UNAVAILABLE, "cannot write %s: %s", path, strerror(errno));
}

moe_status moe_cluster_file_read(const char *dir, moe_cluster_file *out, pid_t *redis_pid, moe_error *err) {
    char path[PATH_MAX + sizeof MOE_CLUSTER_FILE + 2];
    json_error_t why;
    snprintf(path, sizeof path, "%s/%s", dir, MOE_CLUSTER_FILE);
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &why);
    if (!root)
        return moe_fail(err, MOE_NOT_FOUND, "%s: %s (is DIR the run folder that `moesaic serve` printed?)", path, why.text);
    *out = (moe_cluster_file){0};
    moe_status status = MOE_OK;
    for (int i = 0; i < NUM_FIELDS && status == MOE_OK; i++) {
        const char *text = json_string_value(json_object_get(root, fields[i].key));
        if (!text || strlen(text) >= fields[i].size)
            status = moe_fail(err, MOE_INVALID_ARGUMENT, "%s: \"%s\" is missing or too long", path, fields[i].key);
        else
            memcpy((char *)out + fields[i].offset, text, strlen(text) + 1);
    }
    if (redis_pid) *redis_pid = (pid_t)json_integer_value(json_object_get(json_object_get(root, "pids"), "redis"));
    json_decref(root);
    return status;
}

/* The pid of a living `serve` whose cluster file is in dir, or 0. */
static pid_t owner_of(const char *dir) {
    char path[PATH_MAX + sizeof MOE_CLUSTER_FILE + 2];
    snprintf(path, sizeof path, "%s/%s", dir, MOE_CLUSTER_FILE);
    json_t *root = json_load_file(path, 0, NULL);
    pid_t pid = (pid_t)json_integer_value(json_object_get(json_object_get(root, "pids"), "serve"));
    json_decref(root);
    return pid > 0 && pid != getpid() && kill(pid, 0) == 0 ? pid : 0;
}

moe_status moe_run_dir_make(const char *wanted, char *dir, moe_error *err) {
    char made[PATH_MAX];
    const char *base = getenv("XDG_RUNTIME_DIR");
    if (wanted) {
        if (mkdir(wanted, 0700) != 0 && errno != EEXIST)
            return moe_fail(err, MOE_UNAVAILABLE, "cannot make the run folder %s: %s", wanted, strerror(errno));
    } else {
        snprintf(made, sizeof made, "%s/moesaic-XXXXXX", base && *base ? base : "/tmp");
        if (!mkdtemp(made)) return moe_fail(err, MOE_UNAVAILABLE, "cannot make a run folder like %s: %s", made, strerror(errno));
        wanted = made;
    }
    struct stat st;
    if (!realpath(wanted, dir) || stat(dir, &st) != 0)
        return moe_fail(err, MOE_UNAVAILABLE, "cannot use the run folder %s: %s", wanted, strerror(errno));
    if (st.st_uid != geteuid() || (st.st_mode & 077) != 0)
        return moe_fail(err, MOE_PERMISSION_DENIED,
                        "the run folder %s holds unauthenticated sockets: it must belong to you and have mode 0700", dir);
    pid_t owner = owner_of(dir);
    if (owner) return moe_fail(err, MOE_ALREADY_EXISTS, "the run folder %s is in use by a cluster (pid %d)", dir, (int)owner);
    return MOE_OK;
}

static int remove_entry(const char *path, const struct stat *st, int kind, struct FTW *at) {
    (void)st, (void)kind, (void)at;
    remove(path);
    return 0;
}

void moe_run_dir_remove(const char *dir) { nftw(dir, remove_entry, 8, FTW_DEPTH | FTW_PHYS | FTW_MOUNT); }
