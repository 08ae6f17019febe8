/* Runs a fuzz target over the files of its corpus, for builds without libFuzzer: FOLDER... or FILE... as arguments. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#define MAX_INPUT_BYTES (8 << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int replay_file(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return perror(path), -1;
    uint8_t *whole = malloc(MAX_INPUT_BYTES);
    size_t size = whole ? fread(whole, 1, MAX_INPUT_BYTES, file) : 0;
    uint8_t *exact = malloc(size ? size : 1); /* so that the sanitizer sees a read beyond the input */
    fclose(file);
    if (!whole || !exact) abort();
    for (size_t i = 0; i < size; i++) exact[i] = whole[i];
    LLVMFuzzerTestOneInput(exact, size);
    free(exact);
    free(whole);
    return 1;
}

/* The number of files replayed, or -1. */
static int replay(const char *path) {
    struct stat info;
    if (stat(path, &info) != 0) return perror(path), -1;
    if (!S_ISDIR(info.st_mode)) return replay_file(path);
    DIR *folder = opendir(path);
    if (!folder) return perror(path), -1;
    int count = 0;
    for (struct dirent *entry; count >= 0 && (entry = readdir(folder));) {
        char name[4096];
        if (entry->d_name[0] == '.') continue;
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        int one = replay_file(name);
        count = one < 0 ? -1 : count + one;
    }
    closedir(folder);
    return count;
}

int main(int argc, char **argv) {
    int count = 0;
    for (int i = 1; i < argc; i++) {
        int more = replay(argv[i]);
        if (more < 0) return 1;
        count += more;
    }
    printf("%d inputs replayed\n", count);
    return count > 0 ? 0 : 1;
}
