/* A temporary folder of files for one test. Every function fails the test (CMocka) when the system refuses. */
#pragma once
#include <stddef.h>

typedef struct moe_test_dir {
    char path[256];
} moe_test_dir;

moe_test_dir moe_test_dir_new(void);       /* under $TMPDIR, else /tmp */
void moe_test_dir_free(moe_test_dir *dir); /* removes the files in it and the folder; it holds no folders */

void moe_test_write_file(const moe_test_dir *dir, const char *name, const void *data, size_t size);
void moe_test_copy_file(const moe_test_dir *dir, const char *name, const char *from_path);
void moe_test_copy_files(const moe_test_dir *dir, const char *from_dir); /* all regular files */
void moe_test_truncate_file(const moe_test_dir *dir, const char *name, size_t size);
void moe_test_remove_file(const moe_test_dir *dir, const char *name);

/* The whole file; the caller frees it with free(). */
void *moe_test_read_file(const char *path, size_t *size);
