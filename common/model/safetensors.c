#include "common/model/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/alloc.h"
#include "common/model/json_fields.h"
#include "common/model/safetensors_header.h"

#define SINGLE_FILE "model.safetensors"
#define INDEX_FILE "model.safetensors.index.json"
#define READ_PIECE_BYTES ((uintptr_t)128 << 10)
/* Linux maps cached neighbours of a touched page, in aligned windows of this size; a multiple of every page size. */
#define FAULT_AROUND_BYTES ((uintptr_t)64 << 10)

typedef struct shard_map {
    void *address;
    size_t bytes;
} shard_map;

struct moe_safetensors {
    moe_safetensor_list tensors; /* sorted by name */
    shard_map *maps;             /* [num_maps] */
    size_t num_maps;
};

static moe_status make_path(const char *dir, const char *file, char path[PATH_MAX], moe_error *err) {
    if (snprintf(path, PATH_MAX, "%s/%s", dir, file) < PATH_MAX) return MOE_OK;
    return moe_fail(err, MOE_INVALID_ARGUMENT, "%.128s…: the path is too long", dir);
}

static moe_status map_descriptor(int fd, const char *path, shard_map *map, moe_error *err) {
    struct stat st;
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: not a regular file", path);
    if (st.st_size == 0) return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: the file is empty", path);
    void *address = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (address == MAP_FAILED) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%s: cannot map: %s", path, strerror(errno));
    *map = (shard_map){.address = address, .bytes = (size_t)st.st_size};
    (void)madvise(address, map->bytes, MADV_RANDOM); /* no read-ahead: see moe_safetensors_will_need */
    return MOE_OK;
}

/* The part of [data, data + bytes) that lies in the map, widened to whole multiples of `unit`; false where there is none. */
static bool map_range(const shard_map *map, const void *data, size_t bytes, uintptr_t unit, uintptr_t *begin, uintptr_t *end) {
    uintptr_t first = (uintptr_t)map->address, last = first + map->bytes, at = (uintptr_t)data;
    if (at < first || at >= last || bytes == 0) return false;
    *begin = at / unit * unit;
    *end = bytes < last - at ? (at + bytes + unit - 1) / unit * unit : last;
    if (*begin < first) *begin = first;
    if (*end > last) *end = last;
    return true;
}

/* Piece by piece: Linux reads no more for one call than the device's read-ahead, which is 128 KiB at least by default. */
static void read_range(const shard_map *map, const void *data, size_t bytes) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin, end;
    if (!map_range(map, data, bytes, page, &begin, &end)) return;
    for (uintptr_t at = begin; at < end; at += READ_PIECE_BYTES)
        (void)madvise((void *)at, end - at < READ_PIECE_BYTES ? end - at : READ_PIECE_BYTES, MADV_WILLNEED);
}

static void release_range(const shard_map *map, const void *data, size_t bytes) {
    uintptr_t begin, end;
    if (map_range(map, data, bytes, FAULT_AROUND_BYTES, &begin, &end)) (void)madvise((void *)begin, end - begin, MADV_DONTNEED);
}

/* The length of the header is not checked yet: it is only read ahead. */
static void read_header(const shard_map *map) {
    uint64_t length = 0;
    memcpy(&length, map->address, map->bytes < sizeof length ? map->bytes : sizeof length);
    read_range(map, map->address, length < MOE_SAFETENSORS_MAX_HEADER_BYTES ? (size_t)length + sizeof length : 0);
}

/* Maps one file into the next free slot and appends its tensors. */
static moe_status open_path(moe_safetensors *c, const char *path, moe_error *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return moe_fail(err, errno == ENOENT ? MOE_NOT_FOUND : MOE_INVALID_ARGUMENT, "%s: %s", path, strerror(errno));
    moe_status status = map_descriptor(fd, path, &c->maps[c->num_maps], err);
    close(fd);
    if (status != MOE_OK) return status;
    shard_map *map = &c->maps[c->num_maps++];
    read_header(map);
    status = moe_safetensors_parse(map->address, map->bytes, path, &c->tensors, err);
    release_range(map, map->address, MOE_SAFETENSORS_MAX_HEADER_BYTES);
    return status;
}

static moe_status open_shard(moe_safetensors *c, const char *dir, const char *file, moe_error *err) {
    char path[PATH_MAX];
    moe_status status = make_path(dir, file, path, err);
    return status == MOE_OK ? open_path(c, path, err) : status;
}

static moe_status open_single(moe_safetensors *c, const char *path, moe_error *err) {
    c->maps = moe_calloc(1, sizeof *c->maps);
    if (!c->maps) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%s: out of memory", path);
    return open_path(c, path, err);
}

/* A shard is a plain file name in the checkpoint's folder: an index must not reach files elsewhere. */
static moe_status check_shard_name(const char *path, const char *tensor, const char *shard, moe_error *err) {
    if (!shard) return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: tensor %.128s: the shard is not a name", path, tensor);
    if (shard[0] == '\0' || strchr(shard, '/') || strcmp(shard, ".") == 0 || strcmp(shard, "..") == 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: tensor %.128s: \"%.128s\" is not a file name", path, tensor, shard);
    return MOE_OK;
}

/* The tensors of the shard opened last must be those that the index gives to it. */
static moe_status check_shard(const moe_safetensors *c, int64_t first, const char *path, const json_t *weight_map,
                              const char *shard, moe_error *err) {
    for (int64_t i = first; i < c->tensors.count; i++) {
        const char *name = c->tensors.items[i].name, *wanted = json_string_value(json_object_get(weight_map, name));
        if (!wanted)
            return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: tensor %.128s of shard %.64s is not in the index", path, name, shard);
        if (strcmp(wanted, shard) != 0)
            return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: tensor %.128s is in shard %.64s, the index says %.64s", path, name,
                            shard, wanted);
    }
    return MOE_OK;
}

/* Collects the distinct shard names (as keys of `shards`) after checking each. */
static moe_status list_shards(json_t *weight_map, const char *path, json_t *shards, moe_error *err) {
    const char *tensor;
    json_t *value;
    json_object_foreach(weight_map, tensor, value) {
        const char *shard = json_string_value(value);
        moe_status status = check_shard_name(path, tensor, shard, err);
        if (status != MOE_OK) return status;
        if (json_object_set_new(shards, shard, json_true()) != 0)
            return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%s: out of memory", path);
    }
    if (json_object_size(shards) > MOE_SAFETENSORS_MAX_SHARDS)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: %zu shards, at most %d are read", path, json_object_size(shards),
                        MOE_SAFETENSORS_MAX_SHARDS);
    return MOE_OK;
}

static moe_status open_shards(moe_safetensors *c, const char *dir, const char *path, json_t *weight_map, json_t *shards,
                              moe_error *err) {
    const char *shard;
    json_t *unused;
    c->maps = moe_calloc(json_object_size(shards), sizeof *c->maps);
    if (!c->maps) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%s: out of memory", path);
    json_object_foreach(shards, shard, unused) {
        int64_t first = c->tensors.count;
        moe_status status = open_shard(c, dir, shard, err);
        if (status == MOE_OK) status = check_shard(c, first, path, weight_map, shard, err);
        if (status != MOE_OK) return status;
    }
    return MOE_OK;
}

/* Each tensor of the index must have been found (check_shard has seen to it that none is in two shards). */
static moe_status check_complete(moe_safetensors *c, const char *path, json_t *weight_map, moe_error *err) {
    const char *tensor;
    json_t *value;
    if ((int64_t)json_object_size(weight_map) == c->tensors.count) return MOE_OK;
    json_object_foreach(weight_map, tensor, value) {
        if (!moe_safetensors_find(c, tensor))
            return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: tensor %.128s is not in its shard %.64s", path, tensor,
                            json_string_value(value));
    }
    MOE_ASSERT(false);
}

static int compare_by_name(const void *a, const void *b) {
    return strcmp(((const moe_safetensor *)a)->name, ((const moe_safetensor *)b)->name);
}

static void sort_by_name(moe_safetensors *c) {
    if (c->tensors.count > 0) qsort(c->tensors.items, (size_t)c->tensors.count, sizeof *c->tensors.items, compare_by_name);
}

static moe_status open_index(moe_safetensors *c, const char *dir, moe_error *err) {
    char path[PATH_MAX];
    json_t *root = NULL, *shards = json_object();
    moe_status status = make_path(dir, INDEX_FILE, path, err);
    if (status == MOE_OK && !shards) status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%s: out of memory", path);
    if (status == MOE_OK) status = moe_json_read_file(path, MOE_SAFETENSORS_MAX_INDEX_BYTES, &root, err);
    if (status == MOE_NOT_FOUND) status = moe_fail(err, status, "%s: neither " SINGLE_FILE " nor " INDEX_FILE " is here", dir);
    json_t *weight_map = json_object_get(root, "weight_map");
    if (status == MOE_OK && !json_is_object(weight_map))
        status = moe_fail(err, MOE_INVALID_ARGUMENT, "%s: weight_map is missing or not an object", path);
    if (status == MOE_OK) status = list_shards(weight_map, path, shards, err);
    if (status == MOE_OK) status = open_shards(c, dir, path, weight_map, shards, err);
    if (status == MOE_OK) {
        sort_by_name(c);
        status = check_complete(c, path, weight_map, err);
    }
    json_decref(root);
    json_decref(shards);
    return status;
}

static moe_status finish_open(moe_safetensors *c, moe_status status, moe_safetensors **out) {
    if (status != MOE_OK) {
        moe_safetensors_close(&c);
        return status;
    }
    sort_by_name(c);
    *out = c;
    return MOE_OK;
}

moe_status moe_safetensors_open(const char *dir, moe_safetensors **out, moe_error *err) {
    char path[PATH_MAX];
    moe_status status = make_path(dir, SINGLE_FILE, path, err);
    if (status != MOE_OK) return status;
    moe_safetensors *c = moe_calloc(1, sizeof *c);
    if (!c) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%s: out of memory", dir);
    return finish_open(c, access(path, F_OK) == 0 ? open_single(c, path, err) : open_index(c, dir, err), out);
}

moe_status moe_safetensors_open_file(const char *path, moe_safetensors **out, moe_error *err) {
    moe_safetensors *c = moe_calloc(1, sizeof *c);
    if (!c) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%s: out of memory", path);
    return finish_open(c, open_single(c, path, err), out);
}

void moe_safetensors_close(moe_safetensors **checkpoint) {
    moe_safetensors *c = *checkpoint;
    if (!c) return;
    for (size_t i = 0; i < c->num_maps; i++) munmap(c->maps[i].address, c->maps[i].bytes);
    moe_safetensor_list_free(&c->tensors);
    moe_free(c->maps);
    moe_free(c);
    *checkpoint = NULL;
}

moe_safetensor *moe_safetensors_find(moe_safetensors *c, const char *name) {
    moe_safetensor key = {.name = name};
    if (c->tensors.count == 0) return NULL;
    moe_safetensor *t = bsearch(&key, c->tensors.items, (size_t)c->tensors.count, sizeof key, compare_by_name);
    if (t) t->used = true;
    return t;
}

int64_t moe_safetensors_count(const moe_safetensors *c) { return c->tensors.count; }

const moe_safetensor *moe_safetensors_at(const moe_safetensors *c, int64_t index) { return &c->tensors.items[index]; }

void moe_safetensors_will_need(const moe_safetensors *c, const void *data, size_t bytes) {
    for (size_t i = 0; i < c->num_maps; i++) read_range(&c->maps[i], data, bytes);
}

void moe_safetensors_release(const moe_safetensors *c, const void *data, size_t bytes) {
    for (size_t i = 0; i < c->num_maps; i++) release_range(&c->maps[i], data, bytes);
}
