#include "cli/children.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cli/signals.h"
#include "common/alloc.h"
#include "common/log.h"

#define MOE_CHILD_POLL_NS (10 * MOE_NS_PER_MS)

/* In the child, between fork and exec: only async-signal-safe calls. */
static void become(char *const *argv, pid_t parent) {
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setpgid(0, 0); /* a terminal's Ctrl-C reaches the supervisor alone, which stops the children in order */
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() == parent) execv(argv[0], argv);
    _exit(127);
}

static moe_status spawn(moe_child *child, moe_error *err) {
    pid_t parent = getpid();
    pid_t pid = fork();
    if (pid == 0) become(child->argv, parent);
    if (pid < 0) return moe_fail(err, MOE_UNAVAILABLE, "cannot start %s: %s", child->name, strerror(errno));
    child->pid = pid;
    child->started_ns = moe_now_ns(moe_clock_real());
    return MOE_OK;
}

static char **copy_argv(const char *const *argv) {
    int count = 0;
    while (argv[count]) count++;
    char **copy = moe_calloc((size_t)count + 1, sizeof *copy);
    for (int i = 0; copy && i < count; i++) {
        copy[i] = moe_strdup(argv[i]);
        if (copy[i]) continue;
        while (i > 0) moe_free(copy[--i]);
        moe_free(copy);
        return NULL;
    }
    return copy;
}

static void child_clear(moe_child *child) {
    for (int i = 0; child->argv && child->argv[i]; i++) moe_free(child->argv[i]);
    moe_free(child->argv);
    moe_free((char *)child->name);
    *child = (moe_child){0};
}

moe_status moe_children_start(moe_children *children, const char *name, const char *const *argv, bool restart, moe_error *err) {
    if (children->count == MOE_MAX_CHILDREN)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "one machine runs at most %d processes of a cluster", MOE_MAX_CHILDREN);
    moe_child *child = &children->items[children->count];
    *child = (moe_child){
        .name = moe_strdup(name), .argv = copy_argv(argv), .restart = restart, .backoff_ns = MOE_CHILD_BACKOFF_FIRST_NS};
    moe_status status = child->name && child->argv ? spawn(child, err) : moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    if (status == MOE_OK)
        children->count++;
    else
        child_clear(child);
    return status;
}

void moe_child_describe_exit(const moe_child *child, char *text, size_t size) {
    if (WIFSIGNALED(child->exit_status))
        snprintf(text, size, "signal %d (%s)", WTERMSIG(child->exit_status), strsignal(WTERMSIG(child->exit_status)));
    else
        snprintf(text, size, "exit status %d", WEXITSTATUS(child->exit_status));
}

static void child_died(moe_child *child, int64_t now_ns) {
    char why[64];
    moe_child_describe_exit(child, why, sizeof why);
    child->pid = 0;
    if (!child->restart) return;
    if (now_ns - child->started_ns >= MOE_CHILD_STABLE_NS) child->backoff_ns = MOE_CHILD_BACKOFF_FIRST_NS;
    child->restart_at_ns = now_ns + child->backoff_ns;
    moe_warn("%s ended with %s; it starts again in %lld ms", child->name, why, (long long)(child->backoff_ns / MOE_NS_PER_MS));
    child->backoff_ns = 2 * child->backoff_ns < MOE_CHILD_BACKOFF_MAX_NS ? 2 * child->backoff_ns : MOE_CHILD_BACKOFF_MAX_NS;
}

const moe_child *moe_children_tick(moe_children *children, int64_t now_ns, bool *changed) {
    const moe_child *gone = NULL;
    for (int i = 0; i < children->count; i++) {
        moe_child *child = &children->items[i];
        if (child->pid && waitpid(child->pid, &child->exit_status, WNOHANG) == child->pid) {
            child_died(child, now_ns);
            *changed = true;
            if (!child->restart) gone = child;
        }
        if (child->pid || !child->restart || now_ns < child->restart_at_ns) continue;
        moe_error err;
        if (spawn(child, &err) == MOE_OK)
            *changed = true;
        else
            child->restart_at_ns = now_ns + child->backoff_ns;
    }
    return gone;
}

static void stop_one(moe_child *child, int64_t deadline_ns) {
    if (!child->pid) return;
    kill(child->pid, SIGTERM);
    while (waitpid(child->pid, &child->exit_status, WNOHANG) == 0) {
        if (moe_now_ns(moe_clock_real()) >= deadline_ns) {
            moe_warn("%s does not stop; it is killed", child->name);
            kill(child->pid, SIGKILL);
            waitpid(child->pid, &child->exit_status, 0);
            break;
        }
        if (moe_signals_wait(MOE_CHILD_POLL_NS)) kill(child->pid, SIGTERM);
    }
    child->pid = 0;
}

void moe_children_stop(moe_children *children, int64_t deadline_ns) {
    for (int i = children->count - 1; i >= 0; i--) {
        stop_one(&children->items[i], deadline_ns);
        child_clear(&children->items[i]);
    }
    children->count = 0;
}
