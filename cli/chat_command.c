/* `moesaic chat`: lines from standard input, streamed answers on standard output. */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "cli/chat_client.h"
#include "cli/commands.h"
#include "cli/secret_option.h"
#include "common/clock.h"

#define SILENCE_NS (300 * MOE_NS_PER_S) /* a long prompt on a slow machine says nothing for minutes */
#define MAX_LINE_BYTES ((size_t)1 << 20)

typedef enum line_result { LINE_READ, LINE_END, LINE_INTERRUPTED, LINE_TOO_LONG } line_result;

typedef struct session {
    moe_chat_client *client;
    moe_buf input;    /* read and not yet taken */
    bool input_ended; /* nothing more will come */
    int interrupts;   /* signalfd of SIGINT; -1 where there is no terminal */
    bool terminal;
    bool failed; /* a question went unanswered */
} session;

/* ---- input ---- */

static void take_interrupts(const session *s) {
    struct signalfd_siginfo info;
    while (s->interrupts >= 0 && read(s->interrupts, &info, sizeof info) == (ssize_t)sizeof info) continue;
}

/* Moves the first line of the input into `line`. */
static bool take_line(session *s, moe_buf *line) {
    const char *end = s->input.size ? memchr(s->input.data, '\n', s->input.size) : NULL;
    if (!end && !(s->input_ended && s->input.size > 0)) return false;
    size_t size = end ? (size_t)(end - s->input.data) : s->input.size, used = size + (end != NULL);
    moe_buf_clear(line);
    moe_buf_append(line, s->input.data, size);
    memmove(s->input.data, s->input.data + used, s->input.size - used + 1);
    s->input.size -= used;
    return true;
}

static line_result read_line(session *s, moe_buf *line) {
    char block[4096];
    while (!take_line(s, line)) {
        if (s->input_ended) return LINE_END;
        struct pollfd fds[2] = {{STDIN_FILENO, POLLIN, 0}, {s->interrupts, POLLIN, 0}};
        if (poll(fds, 2, -1) < 0 && errno != EINTR) return LINE_END;
        if (fds[1].revents) {
            take_interrupts(s);
            return LINE_INTERRUPTED;
        }
        if (!fds[0].revents) continue;
        ssize_t got = read(STDIN_FILENO, block, sizeof block);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0)
            s->input_ended = true;
        else
            moe_buf_append(&s->input, block, (size_t)got);
        if (s->input.failed || s->input.size > MAX_LINE_BYTES) return LINE_TOO_LONG;
    }
    return LINE_READ;
}

/* ---- answers ---- */

static void print_piece(void *ctx, const char *text) {
    (void)ctx;
    moe_buf clean = {0};
    moe_chat_printable(text, &clean);
    fwrite(moe_buf_text(&clean), 1, clean.size, stdout);
    fflush(stdout);
    moe_buf_free(&clean);
}

static void ask(session *s, const char *text) {
    char finish[32];
    moe_error err = {0};
    moe_status status = moe_chat_client_ask(s->client, text, print_piece, NULL, finish, &err);
    take_interrupts(s);
    puts(status == MOE_CANCELLED                             ? " [stopped]"
         : status == MOE_OK && strcmp(finish, "length") == 0 ? " [cut at --max-tokens]"
                                                             : "");
    if (status != MOE_OK && status != MOE_CANCELLED) {
        fprintf(stderr, "moesaic: %s\n", err.message);
        s->failed = true;
    }
    fflush(stdout);
}

/* False to leave. */
static bool obey(session *s, const char *text) {
    if (strcmp(text, "/exit") == 0 || strcmp(text, "/quit") == 0) return false;
    if (strcmp(text, "/reset") == 0) {
        moe_chat_client_reset(s->client);
        fputs("The conversation begins anew.\n", stderr);
    } else if (*text == '/') {
        fputs("/reset forgets the conversation, /exit (or Ctrl-D) leaves; Ctrl-C stops an answer\n", stderr);
    } else if (*text) {
        ask(s, text);
    }
    return true;
}

static void converse(session *s) {
    moe_buf line = {0};
    for (bool going = true; going;) {
        if (s->terminal) fputs("> ", stderr);
        line_result result = read_line(s, &line);
        if (result == LINE_TOO_LONG) {
            fprintf(stderr, "moesaic: a line is longer than %zu bytes\n", MAX_LINE_BYTES);
            s->failed = true;
        }
        if (result == LINE_INTERRUPTED) fputs("\n(/exit or Ctrl-D leaves)\n", stderr);
        if (result == LINE_READ) going = obey(s, moe_buf_text(&line));
        if (result == LINE_END || result == LINE_TOO_LONG) going = false;
    }
    if (s->terminal) fputs("\n", stderr);
    moe_buf_free(&line);
}

/* Ctrl-C becomes something to wait for beside input and answers. */
static int open_interrupts(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    if (pthread_sigmask(SIG_BLOCK, &set, NULL) != 0) return -1;
    return signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
}

int moe_command_chat(const moe_options *options) {
    session s = {.terminal = isatty(STDIN_FILENO) == 1};
    s.interrupts = s.terminal ? open_interrupts() : -1;
    moe_error err;
    moe_chat_client_config config = {.url = moe_option_text(options, "url"),
                                     .ca_file = moe_option_text(options, "ssl-ca-certs"),
                                     .system = moe_option_text(options, "system"),
                                     .has_temperature = moe_option_given(options, "temperature"),
                                     .has_seed = moe_option_given(options, "seed"),
                                     .temperature = moe_option_float(options, "temperature"),
                                     .seed = moe_option_int(options, "seed"),
                                     .max_tokens = moe_option_int(options, "max-tokens"),
                                     .silence_ns = SILENCE_NS,
                                     .cancel_fd = s.interrupts};
    char key[MOE_SECRET_BYTES];
    if (moe_secret_option(options, "client-key", key, &config.key, &err) == MOE_OK &&
        moe_chat_client_open(&config, &s.client, &err) == MOE_OK) {
        if (s.terminal) fprintf(stderr, "%s at %s; /exit leaves\n", moe_chat_client_model(s.client), config.url);
        converse(&s);
    } else {
        fprintf(stderr, "moesaic: %s\n", err.message);
        s.failed = true;
    }
    moe_chat_client_close(&s.client);
    moe_buf_free(&s.input);
    if (s.interrupts >= 0) close(s.interrupts);
    return s.failed;
}
