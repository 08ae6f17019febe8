/* What every moe_store must do, run over the memory store and over a real redis-server that the test starts for itself. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "common/alloc.h"
#include "common/clock.h"
#include "common/memory/memory_store.h"
#include "common/redis/redis_acl.h"
#include "common/redis/redis_store.h"
#include "tests/support/test.h"

#define TIMEOUT_MS 500 /* long enough for 3 MiB on a loaded machine */
#define MAX_WAIT_NS (10 * MOE_NS_PER_S)

typedef struct fixture {
    bool redis;
    moe_store *a, *b; /* two clients of the same data */
    /* memory */
    moe_clock clock;
    moe_memory_hub *hub;
    /* redis */
    char dir[64], socket[96], password_file[96];
    bool password;
    const char *username; /* NULL: the default user */
    pid_t server;
} fixture;

static void nap(void) { nanosleep(&(struct timespec){.tv_nsec = 5 * MOE_NS_PER_MS}, NULL); }

static void start_server(fixture *f) {
    f->server = fork();
    assert_true(f->server >= 0);
    if (f->server == 0) {
        int null = open("/dev/null", O_RDWR);
        dup2(null, 1);
        dup2(null, 2);
        execlp("redis-server", "redis-server", "--port", "0", "--unixsocket", f->socket, "--save", "", "--appendonly", "no",
               "--dir", f->dir, "--user", "moe", "on", ">secret", "~moe:*", "+@all", f->password ? "--requirepass" : NULL,
               "secret", NULL);
        _exit(127);
    }
}

static void stop_server(fixture *f) {
    if (f->server <= 0) return;
    kill(f->server, SIGCONT);
    kill(f->server, SIGKILL);
    waitpid(f->server, NULL, 0);
    f->server = 0;
}

static moe_store *open_redis(fixture *f) {
    char address[128];
    snprintf(address, sizeof address, "unix:%s", f->socket);
    moe_redis_config config = {.address = address,
                               .cluster = "te*st?",
                               .username = f->username,
                               .password_file = f->password ? f->password_file : NULL,
                               .timeout_ms = TIMEOUT_MS};
    moe_store *store = NULL;
    moe_error err;
    assert_int_equal(moe_redis_open(&config, &store, &err), MOE_OK);
    return store;
}

static moe_status get(moe_store *s, const char *key, char *value, bool *found) {
    moe_buf buf = {0};
    moe_error err;
    moe_status status = s->ops->get(s, key, &buf, found, &err);
    if (!status) snprintf(value, 64, "%s", moe_buf_text(&buf));
    moe_buf_free(&buf);
    return status;
}

static void wait_until(moe_store *s, moe_status wanted) {
    char value[64];
    bool found;
    int64_t deadline = moe_now_ns(moe_clock_real()) + MAX_WAIT_NS;
    while (get(s, "none", value, &found) != wanted) {
        assert_true(moe_now_ns(moe_clock_real()) < deadline);
        nap();
    }
}

static int setup_memory(void **state) {
    fixture *f = calloc(1, sizeof *f);
    moe_error err;
    f->clock = moe_clock_fake(1);
    assert_int_equal(moe_memory_hub_new(&f->clock, &f->hub, &err), MOE_OK);
    assert_int_equal(moe_memory_open(f->hub, &f->a, &err), MOE_OK);
    assert_int_equal(moe_memory_open(f->hub, &f->b, &err), MOE_OK);
    *state = f;
    return 0;
}

static int setup_redis_with(void **state, bool password) {
    fixture *f = calloc(1, sizeof *f);
    f->redis = true;
    f->password = password;
    snprintf(f->dir, sizeof f->dir, "/tmp/moe-store-XXXXXX");
    assert_non_null(mkdtemp(f->dir));
    snprintf(f->socket, sizeof f->socket, "%s/s", f->dir);
    snprintf(f->password_file, sizeof f->password_file, "%s/password", f->dir);
    FILE *file = fopen(f->password_file, "w");
    assert_true(file && fputs("secret\n", file) >= 0 && fclose(file) == 0);
    start_server(f);
    f->a = open_redis(f);
    f->b = open_redis(f);
    wait_until(f->a, MOE_OK);
    wait_until(f->b, MOE_OK);
    *state = f;
    return 0;
}

static int setup_redis(void **state) { return setup_redis_with(state, false); }
static int setup_redis_password(void **state) { return setup_redis_with(state, true); }

static int teardown(void **state) {
    fixture *f = *state;
    f->a->ops->close(f->a);
    f->b->ops->close(f->b);
    moe_memory_hub_free(&f->hub);
    stop_server(f);
    if (f->redis) {
        unlink(f->socket);
        unlink(f->password_file);
        rmdir(f->dir);
    }
    free(f);
    return 0;
}

static void go_down(fixture *f) {
    if (f->redis) {
        stop_server(f);
    } else {
        moe_memory_hub_set_down(f->hub, true);
    }
}

static void come_back_empty(fixture *f) {
    if (f->redis) {
        start_server(f);
    } else {
        moe_memory_hub_wipe(f->hub);
        moe_memory_hub_set_down(f->hub, false);
    }
    wait_until(f->a, MOE_OK);
    wait_until(f->b, MOE_OK);
}

static void assert_value(moe_store *s, const char *key, const char *expected) {
    char value[64];
    bool found;
    assert_int_equal(get(s, key, value, &found), MOE_OK);
    assert_int_equal(found, expected != NULL);
    if (expected) assert_string_equal(value, expected);
}

static moe_status cas1(moe_store *s, const char *key, const char *expected, const char *value) {
    moe_store_write write = {.key = key, .value = value, .size = value ? strlen(value) : 0};
    moe_error err;
    return s->ops->compare_and_set(s, key, expected, expected ? strlen(expected) : 0, &write, 1, &err);
}

static moe_status put(moe_store *s, const char *key, const char *value, int64_t ttl_ms) {
    moe_error err;
    return s->ops->put_lease(s, key, value, strlen(value), ttl_ms, &err);
}

static moe_status take(moe_store *s, const char *key, const char *value, int64_t ttl_ms) {
    moe_error err;
    return s->ops->take_lease(s, key, value, strlen(value), ttl_ms, &err);
}

static void test_compare_and_set(void **state) {
    fixture *f = *state;
    moe_error err;
    assert_value(f->a, "meta", NULL);
    assert_int_equal(cas1(f->a, "meta", "x", "1"), MOE_ABORTED);
    assert_value(f->a, "meta", NULL);
    assert_int_equal(cas1(f->a, "meta", NULL, "1"), MOE_OK);
    assert_int_equal(cas1(f->b, "meta", NULL, "2"), MOE_ABORTED);
    assert_int_equal(cas1(f->b, "meta", "12", "2"), MOE_ABORTED);
    assert_value(f->b, "meta", "1");
    moe_store_write writes[] = {{"meta", "2", 1}, {"map:1", "m", 1}, {"old", NULL, 0}};
    assert_int_equal(f->b->ops->compare_and_set(f->b, "meta", "1", 1, writes, 3, &err), MOE_OK);
    assert_value(f->a, "meta", "2");
    assert_value(f->a, "map:1", "m");
    writes[2].key = "map:1";
    assert_int_equal(f->a->ops->compare_and_set(f->a, "meta", "1", 1, writes, 3, &err), MOE_ABORTED);
    assert_value(f->a, "map:1", "m");
    assert_int_equal(cas1(f->a, "map:1", "m", NULL), MOE_OK);
    assert_value(f->b, "map:1", NULL);
    assert_int_equal(cas1(f->a, "empty", NULL, ""), MOE_OK);
    assert_int_equal(cas1(f->a, "empty", NULL, "x"), MOE_ABORTED);
    assert_int_equal(cas1(f->a, "empty", "", "x"), MOE_OK);
}

/* The guard is another key than those written. */
static void test_guard(void **state) {
    fixture *f = *state;
    moe_error err;
    moe_store_write write = {"map:7", "seven", 5};
    assert_int_equal(f->a->ops->compare_and_set(f->a, "meta", "1", 1, &write, 1, &err), MOE_ABORTED);
    assert_int_equal(cas1(f->a, "meta", NULL, "1"), MOE_OK);
    assert_int_equal(f->a->ops->compare_and_set(f->a, "meta", "1", 1, &write, 1, &err), MOE_OK);
    assert_value(f->b, "map:7", "seven");
    assert_value(f->b, "meta", "1");
}

static void wait_gone(fixture *f, const char *key, int64_t ttl_ms) {
    if (!f->redis) f->clock.fake_now_ns += ttl_ms * MOE_NS_PER_MS;
    char value[64];
    bool found = true;
    int64_t deadline = moe_now_ns(moe_clock_real()) + MAX_WAIT_NS;
    while (get(f->a, key, value, &found) == MOE_OK && found) {
        assert_true(moe_now_ns(moe_clock_real()) < deadline);
        nap();
    }
    assert_false(found);
}

static void test_leases(void **state) {
    fixture *f = *state;
    assert_int_equal(put(f->a, "worker:w0", "one", 60000), MOE_OK);
    assert_int_equal(put(f->b, "worker:w0", "two", 60000), MOE_OK);
    assert_value(f->a, "worker:w0", "two");
    assert_int_equal(put(f->a, "worker:w0", "x", 0), MOE_INVALID_ARGUMENT);

    assert_int_equal(take(f->a, "leader", "a", 60000), MOE_OK);
    assert_int_equal(take(f->b, "leader", "b", 60000), MOE_ABORTED);
    assert_int_equal(take(f->a, "leader", "a", 100), MOE_OK);
    wait_gone(f, "leader", 100);
    assert_int_equal(take(f->b, "leader", "b", 60000), MOE_OK);
    assert_int_equal(take(f->a, "leader", "a", 60000), MOE_ABORTED);
    assert_value(f->a, "leader", "b");

    moe_error err;
    assert_int_equal(f->a->ops->remove(f->a, "leader", &err), MOE_OK);
    assert_int_equal(f->a->ops->remove(f->a, "leader", &err), MOE_OK);
    assert_int_equal(take(f->a, "leader", "a", 60000), MOE_OK);
}

typedef struct seen {
    int count;
    char text[4096];
} seen;

static void note(void *ctx, const char *key, const char *value, size_t size) {
    seen *s = ctx;
    s->count++;
    size_t used = strlen(s->text);
    snprintf(s->text + used, sizeof s->text - used, "[%s=%.*s]", key, (int)size, value);
}

static seen list(moe_store *s, const char *prefix) {
    seen found = {0};
    moe_error err;
    assert_int_equal(s->ops->list(s, prefix, note, &found, &err), MOE_OK);
    return found;
}

/* Glob characters in a prefix are plain text, and an expired key is not listed. */
static void test_list(void **state) {
    fixture *f = *state;
    assert_int_equal(list(f->a, "worker:").count, 0);
    assert_int_equal(put(f->a, "worker:w0", "zero", 60000), MOE_OK);
    assert_int_equal(put(f->a, "worker:w[1]*", "one", 60000), MOE_OK);
    assert_int_equal(put(f->a, "worker:w1", "short", 100), MOE_OK);
    assert_int_equal(put(f->a, "router:w0", "r", 60000), MOE_OK);
    assert_int_equal(cas1(f->a, "map:1", NULL, "m"), MOE_OK);
    assert_int_equal(list(f->b, "worker:w[1]*").count, 1);
    assert_non_null(strstr(list(f->b, "worker:").text, "[worker:w[1]*=one]"));
    assert_string_equal(list(f->b, "map:").text, "[map:1=m]");
    wait_gone(f, "worker:w1", 100);
    assert_int_equal(list(f->b, "worker:").count, 2);
    assert_int_equal(list(f->b, "worker:").count, 2);
    assert_int_equal(put(f->a, "worker:w1", "again", 60000), MOE_OK);
    assert_int_equal(list(f->b, "worker:").count, 3);
    assert_int_equal(list(f->b, "").count, 5);
    moe_error err;
    assert_int_equal(f->a->ops->remove(f->a, "worker:w1", &err), MOE_OK);
    assert_int_equal(list(f->b, "worker:").count, 2);
    for (int i = 0; i < 300; i++) {
        char key[32];
        snprintf(key, sizeof key, "many:%d", i);
        assert_int_equal(put(f->a, key, "v", 60000), MOE_OK);
    }
    assert_int_equal(list(f->b, "many:").count, 300);
}

static void test_sizes(void **state) {
    fixture *f = *state;
    moe_error err;
    char key[MOE_STORE_MAX_KEY_BYTES + 2];
    memset(key, 'k', sizeof key);
    key[sizeof key - 1] = '\0';
    assert_int_equal(put(f->a, key, "v", 60000), MOE_INVALID_ARGUMENT);
    assert_int_equal(put(f->a, "", "v", 60000), MOE_INVALID_ARGUMENT);
    moe_store_write write = {"big", key, (size_t)MOE_STORE_MAX_VALUE_BYTES + 1};
    assert_int_equal(f->a->ops->compare_and_set(f->a, "big", NULL, 0, &write, 1, &err), MOE_INVALID_ARGUMENT);

    size_t size = 3 << 20; /* far above a socket's buffer; holds every byte value */
    char *value = malloc(size);
    for (size_t i = 0; i < size; i++) value[i] = (char)(i * 7 >> 3);
    write = (moe_store_write){"big", value, size};
    assert_int_equal(f->a->ops->compare_and_set(f->a, "big", NULL, 0, &write, 1, &err), MOE_OK);
    moe_buf buf = {0};
    bool found;
    assert_int_equal(f->b->ops->get(f->b, "big", &buf, &found, &err), MOE_OK);
    assert_true(found && buf.size == size && memcmp(buf.data, value, size) == 0);
    moe_buf_free(&buf);
    free(value);
}

static void test_down_and_back_empty(void **state) {
    fixture *f = *state;
    assert_int_equal(cas1(f->a, "meta", NULL, "1"), MOE_OK);
    assert_int_equal(put(f->a, "worker:w0", "w", 60000), MOE_OK);
    go_down(f);
    moe_error err;
    seen found = {0};
    assert_int_equal(cas1(f->a, "meta", "1", "2"), MOE_UNAVAILABLE);
    assert_int_equal(put(f->b, "worker:w0", "w", 60000), MOE_UNAVAILABLE);
    assert_int_equal(take(f->b, "leader", "b", 60000), MOE_UNAVAILABLE);
    assert_int_equal(f->a->ops->list(f->a, "worker:", note, &found, &err), MOE_UNAVAILABLE);
    assert_int_equal(f->a->ops->remove(f->a, "worker:w0", &err), MOE_UNAVAILABLE);
    come_back_empty(f);
    assert_value(f->a, "meta", NULL);
    assert_int_equal(list(f->b, "").count, 0);
    assert_int_equal(cas1(f->a, "meta", NULL, "3"), MOE_OK);
}

/* Many clients add one to the same number; nothing is lost. */
static void test_contention(void **state) {
    fixture *f = *state;
    assert_int_equal(cas1(f->a, "n", NULL, "0"), MOE_OK);
    int done = 0, aborted = 0;
    for (int i = 0; i < 200; i++) {
        char value[2][64], next[64];
        bool found;
        moe_store *clients[2] = {f->a, f->b};
        for (int c = 0; c < 2; c++) assert_int_equal(get(clients[c], "n", value[c], &found), MOE_OK);
        for (int c = 0; c < 2; c++) {
            snprintf(next, sizeof next, "%d", atoi(value[c]) + 1);
            moe_status status = cas1(clients[c], "n", value[c], next);
            assert_true(status == MOE_OK || status == MOE_ABORTED);
            done += status == MOE_OK;
            aborted += status == MOE_ABORTED;
        }
    }
    assert_int_equal(done, 200);
    assert_int_equal(aborted, 200);
    assert_value(f->a, "n", "200");
}

/* ---- Redis only ---- */

static void test_redis_hung(void **state) {
    fixture *f = *state;
    assert_int_equal(put(f->a, "k", "v", 60000), MOE_OK);
    kill(f->server, SIGSTOP);
    int64_t start = moe_now_ns(moe_clock_real());
    assert_int_equal(put(f->a, "k", "w", 60000), MOE_UNAVAILABLE);
    int64_t waited = moe_now_ns(moe_clock_real()) - start;
    assert_true(waited >= TIMEOUT_MS / 2 * MOE_NS_PER_MS && waited < 20 * TIMEOUT_MS * MOE_NS_PER_MS);
    start = moe_now_ns(moe_clock_real());
    assert_int_equal(put(f->a, "k", "w", 60000), MOE_UNAVAILABLE); /* the back-off has not passed */
    assert_true(moe_now_ns(moe_clock_real()) - start < TIMEOUT_MS / 2 * MOE_NS_PER_MS);
    kill(f->server, SIGCONT);
    wait_until(f->a, MOE_OK);
    wait_until(f->b, MOE_OK);
    assert_int_equal(put(f->a, "k", "x", 60000), MOE_OK);
    assert_value(f->b, "k", "x");
}

static void test_redis_password(void **state) {
    fixture *f = *state;
    assert_int_equal(put(f->a, "k", "v", 60000), MOE_OK);
    f->password = false;
    moe_store *stranger = open_redis(f);
    f->password = true;
    assert_int_equal(put(stranger, "k", "v", 60000), MOE_UNAUTHENTICATED);
    stranger->ops->close(stranger);
    stop_server(f);
    come_back_empty(f); /* both clients authenticate again */
    assert_int_equal(put(f->a, "k", "v", 60000), MOE_OK);
    FILE *file = fopen(f->password_file, "w");
    assert_true(file && fputs("wrong\n", file) >= 0 && fclose(file) == 0);
    moe_store *wrong = open_redis(f);
    assert_int_equal(put(wrong, "k", "v", 60000), MOE_UNAUTHENTICATED);
    wrong->ops->close(wrong);
}

/* An ACL user whose keys begin with "moe:" may do all that a store does. */
static void test_redis_user(void **state) {
    fixture *f = *state;
    f->username = "moe";
    moe_store *user = open_redis(f);
    assert_int_equal(put(user, "k", "v", 60000), MOE_OK);
    assert_int_equal(take(user, "leader", "v", 60000), MOE_OK);
    assert_int_equal(cas1(user, "meta", NULL, "v"), MOE_OK);
    assert_int_equal(list(user, "").count, 3);
    user->ops->close(user);
    f->username = "nobody";
    user = open_redis(f);
    assert_int_equal(put(user, "k", "v", 60000), MOE_UNAUTHENTICATED);
    user->ops->close(user);
}

/* A refusal closes the connection, and the next attempt waits for a moment. */
static void expect_denied(moe_store *s, const char *key) {
    moe_status status;
    while ((status = put(s, key, "forged", 60000)) == MOE_UNAVAILABLE) nap();
    assert_int_equal(status, MOE_PERMISSION_DENIED);
}

static void start_with_roles(fixture *f, const char *acl) {
    unlink(f->socket);
    f->server = fork();
    if (f->server == 0) {
        int null = open("/dev/null", O_RDWR);
        dup2(null, 1);
        dup2(null, 2);
        execlp("redis-server", "redis-server", "--port", "0", "--unixsocket", f->socket, "--save", "", "--appendonly", "yes", "--appendfsync", "always", "--dir",
               f->dir, "--aclfile", acl, NULL);
        _exit(127);
    }
}

/* What a transaction wrote is in the append-only file, too, which Redis replays as the default user. */
static void expect_kept_over_a_restart(fixture *f, moe_store *router, const char *acl) {
    const moe_store_write writes[] = {{"meta", "m2", 2}, {"map:2", "two", 3}};
    moe_error err;
    assert_int_equal(router->ops->compare_and_set(router, "meta", "m", 1, writes, 2, &err), MOE_OK);
    stop_server(f);
    start_with_roles(f, acl);
    wait_until(router, MOE_OK);
    assert_value(router, "meta", "m2");
    assert_value(router, "map:2", "two");
}

/* A server with the ACL file that keygen writes: each role can do what it must, and no more. */
static void test_redis_roles(void **state) {
    fixture *f = *state;
    char acl[160];
    moe_error err;
    stop_server(f);
    assert_int_equal(moe_redis_acl_write(f->dir, false, &err), MOE_OK);
    assert_int_equal(moe_redis_acl_write(f->dir, false, &err), MOE_ALREADY_EXISTS);
    assert_int_equal(moe_redis_acl_write(f->dir, true, &err), MOE_OK);
    snprintf(acl, sizeof acl, "%s/redis-worker.password", f->dir);
    unlink(acl);
    snprintf(acl, sizeof acl, "%s/redis-router.password", f->dir);
    unlink(acl);
    snprintf(acl, sizeof acl, "%s/redis-operator.password", f->dir);
    unlink(acl);
    snprintf(acl, sizeof acl, "%s/redis.acl", f->dir);
    unlink(acl);
    assert_int_equal(moe_redis_acl_write(f->dir, false, &err), MOE_OK);
    start_with_roles(f, acl);
    wait_until(f->a, MOE_UNAUTHENTICATED); /* the default user is off */
    moe_store *stores[3];
    static const char *const roles[] = {"router", "worker", "operator"};
    f->password = true;
    for (int i = 0; i < 3; i++) {
        snprintf(f->password_file, sizeof f->password_file, "%s/redis-%s.password", f->dir, roles[i]);
        f->username = roles[i];
        stores[i] = open_redis(f);
    }
    assert_int_equal(cas1(stores[0], "meta", NULL, "m"), MOE_OK);
    assert_int_equal(take(stores[0], "leader", "r0", 60000), MOE_OK);
    assert_int_equal(put(stores[1], "worker:w0", "lease", 60000), MOE_OK);
    assert_int_equal(take(stores[1], "worker:w0", "lease", 60000), MOE_OK);
    assert_int_equal(take(stores[1], "device:GPU-0", "w0", 60000), MOE_OK);
    assert_int_equal(stores[1]->ops->remove(stores[1], "device:GPU-0", &err), MOE_OK);
    assert_value(stores[1], "meta", "m");
    assert_int_equal(list(stores[0], "").count, 3);
    assert_int_equal(list(stores[2], "").count, 3);
    expect_denied(stores[1], "meta");
    expect_denied(stores[1], "leader");
    expect_denied(stores[2], "worker:w1");
    wait_until(stores[0], MOE_OK);
    assert_value(stores[0], "meta", "m");
    assert_value(stores[0], "leader", "r0");
    while (stores[1]->ops->remove(stores[1], "worker:w0", &err) == MOE_UNAVAILABLE) nap();
    assert_int_equal(list(stores[0], "").count, 2);
    expect_kept_over_a_restart(f, stores[0], acl);
    for (int i = 0; i < 3; i++) stores[i]->ops->close(stores[i]);
    static const char *const files[] = {"redis.acl", "redis-router.password", "redis-worker.password", "redis-operator.password"};
    for (int i = 0; i < 4; i++) {
        snprintf(acl, sizeof acl, "%s/%s", f->dir, files[i]);
        assert_int_equal(unlink(acl), 0);
    }
    stop_server(f);
    static const char *const kept[] = {"appendonly.aof.manifest", "appendonly.aof.1.base.rdb", "appendonly.aof.1.incr.aof", ""};
    for (int i = 0; i < 4; i++) {
        snprintf(acl, sizeof acl, "%s/appendonlydir/%s", f->dir, kept[i]);
        assert_int_equal(remove(acl), 0);
    }
    snprintf(f->password_file, sizeof f->password_file, "%s/password", f->dir); /* what teardown removes */
    f->password = false;
}

/* Servers on loopback ports: two Redis of which one follows the other, and a sentinel. */
static pid_t start_on_port(const fixture *f, int port, const char *const *more) {
    char text[16];
    const char *argv[24] = {"redis-server"};
    int n = 1;
    snprintf(text, sizeof text, "%d", port);
    while (*more) argv[n++] = *more++;
    const char *common[] = {"--port", text, "--bind", "127.0.0.1", "--dir", f->dir};
    for (size_t i = 0; i < sizeof common / sizeof *common; i++) argv[n++] = common[i];
    pid_t pid = fork();
    if (pid == 0) {
        int null = open("/dev/null", O_RDWR);
        dup2(null, 1);
        dup2(null, 2);
        execvp("redis-server", (char *const *)argv);
        _exit(127);
    }
    return pid;
}

static int free_port(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, size), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&address, &size), 0);
    close(fd);
    return ntohs(address.sin_port);
}

static void write_sentinel_file(const char *path, int master_port) {
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fprintf(file, "sentinel monitor main 127.0.0.1 %d 1\n", master_port);
    assert_int_equal(fclose(file), 0);
}

/* The sentinel knows who the master is; when it names another, the store follows; a replica is not taken for a master. */
static void test_redis_sentinel(void **state) {
    fixture *f = *state;
    int ports[3];
    char path[160], address[128];
    pid_t pids[3];
    for (int i = 0; i < 3; i++) ports[i] = free_port();
    snprintf(path, sizeof path, "%s/sentinel.conf", f->dir);
    const char *const plain[] = {"--save", "", NULL}, *const sentinel[] = {path, "--sentinel", NULL};
    for (int i = 0; i < 2; i++) pids[i] = start_on_port(f, ports[i], plain);
    write_sentinel_file(path, ports[0]);
    pids[2] = start_on_port(f, ports[2], sentinel);
    snprintf(address, sizeof address, "sentinel://127.0.0.1:1,127.0.0.1:%d/main", ports[2]);
    moe_redis_config config = {.address = address, .cluster = "c", .timeout_ms = TIMEOUT_MS};
    moe_store *store, *direct[2];
    moe_error err;
    assert_int_equal(moe_redis_open(&config, &store, &err), MOE_OK);
    for (int i = 0; i < 2; i++) {
        char fixed[64];
        snprintf(fixed, sizeof fixed, "127.0.0.1:%d", ports[i]);
        config.address = fixed;
        assert_int_equal(moe_redis_open(&config, &direct[i], &err), MOE_OK);
        wait_until(direct[i], MOE_OK);
    }
    wait_until(store, MOE_OK);
    assert_int_equal(put(store, "k", "first", 60000), MOE_OK);
    assert_value(direct[0], "k", "first");
    /* The master dies and a sentinel that knows the other one takes over. */
    for (int i = 0; i < 3; i += 2) {
        kill(pids[i], SIGKILL);
        waitpid(pids[i], NULL, 0);
    }
    wait_until(store, MOE_UNAVAILABLE);
    write_sentinel_file(path, ports[1]);
    pids[2] = start_on_port(f, ports[2], sentinel);
    wait_until(store, MOE_OK);
    assert_int_equal(put(store, "k", "second", 60000), MOE_OK);
    assert_value(direct[1], "k", "second");
    config.address = address;
    snprintf(address, sizeof address, "sentinel://127.0.0.1:%d/other", ports[2]); /* it knows no such master */
    moe_store *unknown;
    assert_int_equal(moe_redis_open(&config, &unknown, &err), MOE_OK);
    assert_int_equal(put(unknown, "k", "v", 60000), MOE_UNAVAILABLE);
    unknown->ops->close(unknown);
    store->ops->close(store);
    for (int i = 0; i < 2; i++) direct[i]->ops->close(direct[i]);
    for (int i = 1; i < 3; i++) {
        kill(pids[i], SIGKILL);
        waitpid(pids[i], NULL, 0);
    }
    unlink(path);
}

/* A primary with a replica: what was set under `meta` is on both when the call returns; a replica that hangs delays it by the bound and
 * no more; other writes do not wait. */
/* Whether the primary counts the replica, which is a little later than the replica has its data. */
static bool counted(int primary, int replica) {
    char command[64], line[64], port[16];
    bool found = false;
    snprintf(command, sizeof command, "redis-cli -p %d ROLE", primary);
    snprintf(port, sizeof port, "%d\n", replica);
    FILE *out = popen(command, "r");
    assert_non_null(out);
    while (fgets(line, sizeof line, out)) found |= strcmp(line, port) == 0;
    pclose(out);
    return found;
}

static void test_redis_replica(void **state) {
    fixture *f = *state;
    enum { ROUNDS = 50 };
    int ports[2] = {free_port(), free_port()};
    char port[16], address[2][64], before[16] = "", value[16];
    moe_store *stores[2];
    moe_error err;
    bool found = false;
    snprintf(port, sizeof port, "%d", ports[0]);
    const char *const plain[] = {"--save", "", NULL}, *const follows[] = {"--save", "", "--replicaof", "127.0.0.1", port, NULL};
    pid_t pids[2] = {start_on_port(f, ports[0], plain), start_on_port(f, ports[1], follows)};
    for (int i = 0; i < 2; i++) {
        snprintf(address[i], sizeof address[i], "127.0.0.1:%d", ports[i]);
        moe_redis_config config = {.address = address[i], .cluster = "c", .timeout_ms = 4 * MOE_REDIS_WAIT_MS};
        assert_int_equal(moe_redis_open(&config, &stores[i], &err), MOE_OK);
        wait_until(stores[i], MOE_OK);
    }
    for (int64_t deadline = moe_now_ns(moe_clock_real()) + MAX_WAIT_NS; !found && moe_now_ns(moe_clock_real()) < deadline; nap())
        found = counted(ports[0], ports[1]);
    assert_true(found);
    assert_int_equal(put(stores[0], "k", "v", 60000), MOE_OK); /* comes by the stream, which starts later still */
    found = false;
    for (int64_t deadline = moe_now_ns(moe_clock_real()) + MAX_WAIT_NS; !found && moe_now_ns(moe_clock_real()) < deadline; nap())
        if (get(stores[1], "k", value, &found) != MOE_OK) found = false;
    assert_true(found);
    for (int i = 0; i < ROUNDS; i++) {
        snprintf(value, sizeof value, "%d", i);
        assert_int_equal(cas1(stores[0], "meta", i ? before : NULL, value), MOE_OK);
        assert_value(stores[1], "meta", value);
        memcpy(before, value, sizeof before);
    }
    kill(pids[1], SIGSTOP);
    int64_t began = moe_now_ns(moe_clock_real());
    assert_int_equal(cas1(stores[0], "meta", before, "hung"), MOE_OK);
    int64_t took = moe_now_ns(moe_clock_real()) - began;
    assert_true(took >= MOE_REDIS_WAIT_MS * MOE_NS_PER_MS && took < 4 * MOE_REDIS_WAIT_MS * MOE_NS_PER_MS);
    assert_value(stores[0], "meta", "hung");
    began = moe_now_ns(moe_clock_real());
    assert_int_equal(cas1(stores[0], "other", NULL, "v"), MOE_OK);
    assert_true(moe_now_ns(moe_clock_real()) - began < MOE_REDIS_WAIT_MS * MOE_NS_PER_MS);
    for (int i = 0; i < 2; i++) {
        kill(pids[i], SIGCONT);
        kill(pids[i], SIGKILL);
        waitpid(pids[i], NULL, 0);
        stores[i]->ops->close(stores[i]);
    }
}

static void test_redis_wrong_type(void **state) {
    fixture *f = *state;
    char value[64];
    bool found;
    assert_int_equal(put(f->a, "k", "v", 60000), MOE_OK);
    assert_int_equal(get(f->a, "keys", value, &found), MOE_FAILED_PRECONDITION); /* the index is a set, not a string */
    wait_until(f->a, MOE_OK);
    assert_value(f->a, "k", "v");
}

static void test_redis_bad_configuration(void **state) {
    (void)state;
    const char *const addresses[] = {"", "unix:", "unix:relative", "host", "host:", ":1", "host:0", "host:65536", "host:1x",
                                     "sentinel://", "sentinel://host:1", "sentinel:///main", "sentinel://host/main", "sentinel://host:1,x/main"};
    moe_error err;
    moe_store *store = NULL;
    for (size_t i = 0; i < sizeof addresses / sizeof *addresses; i++) {
        moe_redis_config config = {.address = addresses[i], .cluster = "c", .timeout_ms = 100};
        assert_int_equal(moe_redis_open(&config, &store, &err), MOE_INVALID_ARGUMENT);
    }
    moe_redis_config config = {.address = "host:1", .cluster = "a}b", .timeout_ms = 100};
    assert_int_equal(moe_redis_open(&config, &store, &err), MOE_INVALID_ARGUMENT);
    assert_null(store);
}

/* A server that answers anything with the same hostile bytes. */
static void serve_bytes(const char *path, const char *bytes, int connections) {
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4)) _exit(1);
    for (int i = 0; i < connections; i++) {
        int fd = accept(listener, NULL, NULL);
        char buf[4096];
        if (read(fd, buf, sizeof buf) < 0 || write(fd, bytes, strlen(bytes)) < 0) _exit(1);
        while (read(fd, buf, sizeof buf) > 0) continue;
        close(fd);
    }
    _exit(0);
}

static void test_redis_hostile_replies(void **state) {
    fixture *f = *state;
    static const char *const replies[] = {"*2147483647\r\n",
                                          "*65537\r\n$1\r\na\r\n",
                                          "$99999999999999999999\r\n",
                                          "$2000000000\r\nabc",
                                          ":7\r\n",
                                          "*1\r\n*1\r\n*1\r\n:1\r\n",
                                          "-ERR no\r\n",
                                          "$-5\r\n",
                                          "nonsense\r\n",
                                          "+OK\r\n",
                                          "*1\r\n:5\r\n"};
    for (size_t i = 0; i < sizeof replies / sizeof *replies; i++) {
        char path[96], address[128];
        snprintf(path, sizeof path, "%s/h%zu", f->dir, i);
        snprintf(address, sizeof address, "unix:%s", path);
        pid_t child = fork();
        if (child == 0) serve_bytes(path, replies[i], 1);
        int64_t deadline = moe_now_ns(moe_clock_real()) + MAX_WAIT_NS;
        while (access(path, F_OK) != 0 && moe_now_ns(moe_clock_real()) < deadline) nap();
        moe_redis_config config = {.address = address, .cluster = "c", .timeout_ms = TIMEOUT_MS};
        moe_store *store;
        moe_error err;
        assert_int_equal(moe_redis_open(&config, &store, &err), MOE_OK);
        char value[64];
        bool found;
        moe_status status;
        do { /* the socket's file is there a moment before it listens */
            status = get(store, "k", value, &found);
            nap();
        } while (waitpid(child, NULL, WNOHANG) == 0 && moe_now_ns(moe_clock_real()) < deadline);
        assert_int_not_equal(status, MOE_OK);
        store->ops->close(store);
        assert_true(moe_now_ns(moe_clock_real()) < deadline);
        unlink(path);
    }
}

#define BOTH(test) \
    cmocka_unit_test_setup_teardown(test, setup_memory, teardown), { #test "/redis", test, setup_redis, teardown, NULL }
#define REDIS(test) cmocka_unit_test_setup_teardown(test, setup_redis, teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        BOTH(test_compare_and_set),
        BOTH(test_guard),
        BOTH(test_leases),
        BOTH(test_list),
        BOTH(test_sizes),
        BOTH(test_down_and_back_empty),
        BOTH(test_contention),
        REDIS(test_redis_hung),
        cmocka_unit_test_setup_teardown(test_redis_password, setup_redis_password, teardown),
        cmocka_unit_test_setup_teardown(test_redis_user, setup_redis_password, teardown),
        REDIS(test_redis_roles),
        REDIS(test_redis_sentinel),
        REDIS(test_redis_replica),
        REDIS(test_redis_wrong_type),
        cmocka_unit_test(test_redis_bad_configuration),
        REDIS(test_redis_hostile_replies),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
