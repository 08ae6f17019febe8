#include "cli/signals.h"

#include <pthread.h>
#include <signal.h>
#include <time.h>

#include "common/clock.h"

static sigset_t termination_signals(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    return set;
}

void moe_signals_block(void) {
    sigset_t set = termination_signals();
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
}

bool moe_signals_wait(int64_t timeout_ns) {
    sigset_t set = termination_signals();
    struct timespec timeout = {timeout_ns / MOE_NS_PER_S, timeout_ns % MOE_NS_PER_S};
    return sigtimedwait(&set, NULL, &timeout) > 0;
}
