/* http_load PORT RATE SECONDS FILE: HTTP load from one thread that leaves the machine to the server. FILE has a POST body of
 * /v1/completions a line, a tab, and a text that a right answer contains; they are sent in turn. RATE above 0: open loop, so many
 * requests a second whatever becomes of them; below 0: closed loop, -RATE clients that each wait for their answer. After SECONDS no
 * request is begun; what is on its way is waited for. Prints one JSON object of counts and times. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONNECTIONS 8192
#define MAX_REQUESTS 1000000
#define MAX_CASES 256
#define MAX_ANSWER_BYTES (1 << 18)
#define MAX_EVENTS 256
#define PATIENCE_S 60.0 /* for the last answers */

typedef struct load_case {
    char *request; /* whole, with head */
    size_t size;
    char *expected;
} load_case;

typedef struct connection {
    int fd; /* -1: free */
    bool busy;
    const load_case *sent_case;
    size_t sent, received;
    double began_s;
    char *answer; /* [MAX_ANSWER_BYTES + 1] */
} connection;

typedef struct times {
    double *s;
    int count;
} times;

static load_case cases[MAX_CASES];
static int num_cases, port, epoll_fd, num_busy, num_begun, wrong, other, without_retry_after;
static connection connections[MAX_CONNECTIONS];
static times served, refused;
static double latest_s; /* how far behind its time a request was sent at worst */

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void fail(const char *what) {
    fprintf(stderr, "http_load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void read_cases(const char *path) {
    FILE *f = fopen(path, "r");
    char *line = NULL;
    size_t room = 0;
    if (!f) fail(path);
    while (num_cases < MAX_CASES && getline(&line, &room, f) > 0) {
        char *tab = strchr(line, '\t'), *end = strchr(line, '\n');
        if (!tab || !end) fail("a line without a tab");
        *tab = *end = '\0';
        load_case *c = &cases[num_cases++];
        int size = asprintf(&c->request,
                            "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                            "Content-Length: %zu\r\n\r\n%s", strlen(line), line);
        c->expected = strdup(tab + 1);
        if (size < 0 || !c->expected) fail("memory");
        c->size = (size_t)size;
    }
    free(line);
    fclose(f);
    if (!num_cases) fail("no requests");
}

static void drop(connection *c) {
    close(c->fd);
    c->fd = -1;
    if (c->busy) num_busy--;
    c->busy = false;
}

static void note(times *t, double s) { t->s[t->count++] = s; }

static void judge(const connection *c) {
    double took = now_s() - c->began_s;
    int status = atoi(c->answer + strlen("HTTP/1.1 "));
    if (status == 200) {
        wrong += strstr(c->answer, c->sent_case->expected) == NULL;
        note(&served, took);
    } else if (status == 429 || status == 503) {
        without_retry_after += strstr(c->answer, "Retry-After:") == NULL;
        note(&refused, took);
    } else {
        other++;
    }
}

/* Whether the answer, which has a Content-Length, is whole. */
static bool complete(const connection *c) {
    const char *body = strstr(c->answer, "\r\n\r\n"), *length = strcasestr(c->answer, "\r\nContent-Length:");
    if (!body || !length || length > body) return false;
    return c->received >= (size_t)(body + 4 - c->answer) + strtoul(length + strlen("\r\nContent-Length:"), NULL, 10);
}

static void take_bytes(connection *c) {
    ssize_t n;
    while ((n = recv(c->fd, c->answer + c->received, MAX_ANSWER_BYTES - c->received, 0)) > 0) c->received += (size_t)n;
    c->answer[c->received] = '\0';
    if (c->busy && complete(c)) {
        judge(c);
        c->busy = false;
        num_busy--;
        c->received = 0;
        return;
    }
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    other += c->busy; /* closed or broken before the answer was whole; an idle connection may be closed */
    drop(c);
}

static void send_bytes(connection *c) {
    while (c->busy && c->sent < c->sent_case->size) {
        ssize_t n = send(c->fd, c->sent_case->request + c->sent, c->sent_case->size - c->sent, MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (n < 0) {
            other++;
            drop(c);
            return;
        }
        c->sent += (size_t)n;
    }
}

static bool dial(connection *c) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) fail("socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (!c->answer && !(c->answer = malloc(MAX_ANSWER_BYTES + 1))) fail("memory");
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to) != 0 && errno != EINPROGRESS) {
        close(c->fd);
        c->fd = -1;
        return false;
    }
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event) != 0) fail("epoll_ctl");
    return true;
}

/* An idle connection where there is one, as a front keeps them. */
static void begin(void) {
    connection *free_slot = NULL, *c = NULL;
    for (int i = 0; i < MAX_CONNECTIONS && !c; i++) {
        if (connections[i].fd >= 0 && !connections[i].busy) c = &connections[i];
        if (connections[i].fd < 0 && !free_slot) free_slot = &connections[i];
    }
    num_begun++;
    if (!c && (!free_slot || !dial(free_slot))) {
        other++;
        return;
    }
    if (!c) c = free_slot;
    c->sent_case = &cases[(num_begun - 1) % num_cases];
    c->sent = c->received = 0;
    c->busy = true;
    c->began_s = now_s();
    num_busy++;
    send_bytes(c);
}

static void turn(double wait_s) {
    struct epoll_event events[MAX_EVENTS];
    int n = epoll_wait(epoll_fd, events, MAX_EVENTS, wait_s > 0 ? (int)(1000 * wait_s) + 1 : 0);
    for (int i = 0; i < n; i++) {
        connection *c = events[i].data.ptr;
        if (c->fd >= 0 && events[i].events & EPOLLOUT) send_bytes(c);
        if (c->fd >= 0 && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) take_bytes(c);
    }
}

static double run(double rate, double seconds) {
    double start = now_s();
    for (double now = start; now < start + seconds && num_begun < MAX_REQUESTS; now = now_s()) {
        double due = start + num_begun / rate;
        if (rate < 0 ? num_busy < -rate : now >= due) {
            if (rate > 0 && now - due > latest_s) latest_s = now - due;
            begin();
        }
        due = start + num_begun / rate;
        turn(rate < 0 ? (num_busy < -rate ? 0 : 0.01) : due - now_s());
    }
    double took = now_s() - start, until = now_s() + PATIENCE_S;
    while (num_busy && now_s() < until) turn(0.01);
    other += num_busy;
    return took;
}

static int by_time(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }

static double at(const times *t, double part) {
    if (!t->count) return 0;
    int i = (int)(part * t->count);
    return 1000 * t->s[i < t->count ? i : t->count - 1];
}

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: http_load PORT RATE SECONDS FILE\n");
        return 2;
    }
    port = atoi(argv[1]);
    read_cases(argv[4]);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    served.s = calloc(MAX_REQUESTS, sizeof *served.s);
    refused.s = calloc(MAX_REQUESTS, sizeof *refused.s);
    if (epoll_fd < 0 || !served.s || !refused.s) fail("start");
    for (int i = 0; i < MAX_CONNECTIONS; i++) connections[i].fd = -1;
    double took = run(atof(argv[2]), atof(argv[3]));
    qsort(served.s, (size_t)served.count, sizeof *served.s, by_time);
    qsort(refused.s, (size_t)refused.count, sizeof *refused.s, by_time);
    printf("{\"sent\": %d, \"seconds\": %.3f, \"served\": %d, \"refused\": %d, \"other\": %d, \"wrong\": %d, \"without_retry_after\": %d, "
           "\"served_p50_ms\": %.1f, \"served_p99_ms\": %.1f, \"refused_p50_ms\": %.2f, \"refused_p99_ms\": %.1f, \"refused_max_ms\": %.1f, "
           "\"behind_ms\": %.1f}\n",
           num_begun, took, served.count, refused.count, other, wrong, without_retry_after, at(&served, 0.5), at(&served, 0.99),
           at(&refused, 0.5), at(&refused, 0.99), at(&refused, 1), 1000 * latest_s);
    return 0;
}
