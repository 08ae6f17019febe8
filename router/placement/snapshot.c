/* The newest map on disk, so that a router can serve again while the store is away: one line with the cluster's uuid, then the
 * map's text. The file is replaced in one step. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/log.h"
#include "common/store.h"
#include "router/placement/controller_internal.h"

#define PATH_BYTES 4096
#define FILE_NAME "placement.json"

static bool path_of(const moe_controller *c, const char *suffix, char path[PATH_BYTES]) {
    int length = c->config.state_dir ? snprintf(path, PATH_BYTES, "%s/" FILE_NAME "%s", c->config.state_dir, suffix) : -1;
    return length > 0 && length < PATH_BYTES;
}

static bool write_all(int fd, const moe_buf *text) {
    size_t at = 0;
    while (at < text->size) {
        ssize_t wrote = write(fd, text->data + at, text->size - at);
        if (wrote < 0 && errno != EINTR) return false;
        if (wrote > 0) at += (size_t)wrote;
    }
    return fsync(fd) == 0;
}

void moe_controller_save_map(moe_controller *c) {
    char path[PATH_BYTES], fresh[PATH_BYTES], suffix[128];
    snprintf(suffix, sizeof suffix, ".new-%.100s", c->config.id); /* routers may share the folder */
    if (!path_of(c, "", path) || !path_of(c, suffix, fresh)) return;
    moe_buf map = {0}, text = {0};
    moe_error err = {0};
    bool ok = moe_placement_to_json(c->map, &map, &err) == MOE_OK;
    moe_buf_printf(&text, "%s\n%s", c->cluster_uuid, moe_buf_text(&map));
    int fd = ok && !text.failed ? open(fresh, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1;
    ok = fd >= 0 && write_all(fd, &text);
    if (fd >= 0) ok = close(fd) == 0 && ok;
    ok = ok && rename(fresh, path) == 0;
    if (!ok) moe_warn("the placement map could not be saved as %s: %s", path, strerror(errno));
    moe_buf_free(&map);
    moe_buf_free(&text);
}

static bool read_all(const char *path, moe_buf *text) {
    char chunk[65536];
    FILE *file = fopen(path, "re");
    if (!file) return false;
    size_t n;
    while ((n = fread(chunk, 1, sizeof chunk, file)) > 0 && text->size <= (size_t)MOE_STORE_MAX_VALUE_BYTES) {
        moe_buf_append(text, chunk, n);
    }
    bool ok = !ferror(file) && !text->failed;
    fclose(file);
    return ok;
}

void moe_controller_load_map(moe_controller *c) {
    char path[PATH_BYTES];
    moe_buf text = {0};
    if (!path_of(c, "", path) || !read_all(path, &text)) {
        moe_buf_free(&text);
        return;
    }
    size_t length = strlen(c->cluster_uuid);
    moe_placement *map = NULL;
    moe_error err = {0};
    bool ours = text.size > length && memcmp(text.data, c->cluster_uuid, length) == 0 && text.data[length] == '\n';
    if (!ours) {
        moe_info("%s is of another cluster and is ignored", path);
    } else if (moe_placement_from_json(text.data + length + 1, text.size - length - 1, &map, &err)) {
        moe_warn("%s is damaged and is ignored: %s", path, err.message);
    } else if (moe_controller_check_map(c, map, &err)) {
        moe_warn("%s is ignored: %s", path, err.message);
        moe_placement_unref(&map);
    }
    if (map) moe_controller_adopt(c, map, moe_text_digest(text.data + length + 1, text.size - length - 1));
    moe_buf_free(&text);
}
