#include "tests/support/temp_dir.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/support/test.h"

#define PATH_BYTES 1024

static void join(char path[PATH_BYTES], const char *dir, const char *name) {
    assert_true(snprintf(path, PATH_BYTES, "%s/%s", dir, name) < PATH_BYTES);
}

moe_test_dir moe_test_dir_new(void) {
    moe_test_dir dir;
    const char *base = getenv("TMPDIR");
    snprintf(dir.path, sizeof dir.path, "%s/moesaic-test-XXXXXX", base ? base : "/tmp");
    assert_non_null(mkdtemp(dir.path));
    return dir;
}

void moe_test_dir_free(moe_test_dir *dir) {
    DIR *entries = opendir(dir->path);
    assert_non_null(entries);
    for (struct dirent *e; (e = readdir(entries));)
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0) moe_test_remove_file(dir, e->d_name);
    closedir(entries);
    assert_int_equal(rmdir(dir->path), 0);
}

void moe_test_write_file(const moe_test_dir *dir, const char *name, const void *data, size_t size) {
    char path[PATH_BYTES];
    join(path, dir->path, name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    if (size > 0) assert_int_equal(fwrite(data, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
}

void *moe_test_read_file(const char *path, size_t *size) {
    struct stat st;
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    assert_int_equal(fstat(fileno(file), &st), 0);
    *size = (size_t)st.st_size;
    void *data = malloc(*size ? *size : 1);
    assert_non_null(data);
    assert_int_equal(fread(data, 1, *size, file), *size);
    fclose(file);
    return data;
}

void moe_test_copy_file(const moe_test_dir *dir, const char *name, const char *from_path) {
    size_t size;
    void *data = moe_test_read_file(from_path, &size);
    moe_test_write_file(dir, name, data, size);
    free(data);
}

void moe_test_copy_files(const moe_test_dir *dir, const char *from_dir) {
    DIR *entries = opendir(from_dir);
    assert_non_null(entries);
    for (struct dirent *e; (e = readdir(entries));) {
        char path[PATH_BYTES];
        struct stat st;
        join(path, from_dir, e->d_name);
        if (stat(path, &st) == 0 && S_ISREG(st.st_mode)) moe_test_copy_file(dir, e->d_name, path);
    }
    closedir(entries);
}

void moe_test_truncate_file(const moe_test_dir *dir, const char *name, size_t size) {
    char path[PATH_BYTES];
    join(path, dir->path, name);
    assert_int_equal(truncate(path, (off_t)size), 0);
}

void moe_test_remove_file(const moe_test_dir *dir, const char *name) {
    char path[PATH_BYTES];
    join(path, dir->path, name);
    assert_int_equal(unlink(path), 0);
}
