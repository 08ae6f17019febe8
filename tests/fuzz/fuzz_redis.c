/* Fuzz target of the Redis store: a server that answers whatever it is sent with the input, a piece for each command. The first
 * byte chooses the call (get, list, compare_and_set, take_lease); then pieces, each a length (u8) and its bytes. */
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/cursor.h"
#include "common/log.h"
#include "common/redis/redis_store.h"

#define STORE_TIMEOUT_MS 200
#define CLIENT_WAIT_MS 1000

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char folder[] = "/tmp/moesaic-fuzz-XXXXXX", path[64];
static int listener = -1;

static void check(bool holds) {
    if (!holds) abort();
}

static void remove_folder(void) {
    unlink(path);
    rmdir(folder);
}

static void prepare(void) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    moe_log_init(MOE_LOG_OFF, "fuzz");
    check(mkdtemp(folder) != NULL);
    snprintf(path, sizeof path, "%s/s", folder);
    memcpy(address.sun_path, path, strlen(path) + 1);
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    check(listener >= 0 && bind(listener, (struct sockaddr *)&address, sizeof address) == 0 && listen(listener, 4) == 0);
    atexit(remove_folder);
}

static bool readable(int fd) {
    struct pollfd wait = {.fd = fd, .events = POLLIN};
    return poll(&wait, 1, CLIENT_WAIT_MS) == 1;
}

/* One connection; ends with the input, which closes it. */
static void *serve(void *ctx) {
    moe_cursor c = *(moe_cursor *)ctx;
    char request[4096];
    int fd = readable(listener) ? accept(listener, NULL, NULL) : -1;
    while (fd >= 0 && c.left && readable(fd) && read(fd, request, sizeof request) > 0) {
        size_t length = ((const uint8_t *)moe_cursor_take(&c, 1))[0];
        if (length > c.left) length = c.left;
        if (send(fd, moe_cursor_take(&c, length), length, MSG_NOSIGNAL) < 0) break;
    }
    if (fd >= 0) close(fd);
    return NULL;
}

static void each(void *ctx, const char *key, const char *value, size_t size) {
    check(strlen(key) <= MOE_STORE_MAX_KEY_BYTES);
    for (size_t i = 0; i < size; i++) *(uint64_t *)ctx += (uint8_t)value[i]; /* all of it can be read */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (listener < 0) prepare();
    if (size < 2) return 0;
    char address[96];
    snprintf(address, sizeof address, "unix:%s", path);
    const moe_redis_config config = {.address = address, .cluster = "c", .timeout_ms = STORE_TIMEOUT_MS};
    moe_cursor replies = moe_cursor_of(data + 1, size - 1);
    pthread_t server;
    moe_store *store;
    moe_error err;
    check(moe_redis_open(&config, &store, &err) == MOE_OK);
    check(pthread_create(&server, NULL, serve, &replies) == 0);
    moe_buf value = {0};
    bool found;
    uint64_t sum = 0;
    const moe_store_write write = {.key = "map:1", .value = "x", .size = 1};
    switch (data[0] % 4) {
        case 0:
            store->ops->get(store, "meta", &value, &found, &err);
            break;
        case 1:
            store->ops->list(store, "worker:", each, &sum, &err);
            break;
        case 2:
            store->ops->compare_and_set(store, "meta", "m", 1, &write, 1, &err);
            break;
        default:
            store->ops->take_lease(store, "leader", "r0", 2, 1000, &err);
    }
    moe_buf_free(&value);
    store->ops->close(store);
    pthread_join(server, NULL);
    return 0;
}
