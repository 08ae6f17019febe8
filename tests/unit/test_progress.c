/* Progress in a log and on a terminal: standard error is a file, then a pseudo-terminal. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/log.h"
#include "common/progress.h"
#include "tests/support/test.h"

static void work(moe_clock *clock, int64_t step_ns) {
    moe_progress p = {0};
    moe_progress_end(&p); /* nothing runs: nothing is said */
    moe_progress_begin(&p, "worker w7 loads", "experts", clock);
    for (int64_t done = 1; done <= 4; done++) {
        clock->fake_now_ns += step_ns;
        moe_progress_update(&p, done, 4, done * 1000000);
    }
    moe_progress_end(&p);
    moe_progress_end(&p);
}

/* Runs the work with standard error at `fd`, which is then closed. */
static void run_on(int fd, int64_t step_ns) {
    moe_clock clock = moe_clock_fake(5 * MOE_NS_PER_S);
    int kept = dup(STDERR_FILENO);
    assert_true(fd >= 0 && kept >= 0 && dup2(fd, STDERR_FILENO) == STDERR_FILENO);
    work(&clock, step_ns);
    assert_true(dup2(kept, STDERR_FILENO) == STDERR_FILENO);
    close(kept);
    close(fd);
}

static int occurrences(const char *text, const char *word) {
    int count = 0;
    for (; (text = strstr(text, word)); text += strlen(word)) count++;
    return count;
}

static void log_lines_every_two_seconds(void **state) {
    (void)state;
    char text[4096] = "";
    FILE *file = tmpfile();
    assert_non_null(file);
    run_on(dup(fileno(file)), MOE_NS_PER_S);
    rewind(file);
    assert_true(fread(text, 1, sizeof text - 1, file) > 0);
    fclose(file);
    assert_int_equal(occurrences(text, "\n"), 3);
    assert_non_null(strstr(text, "INFO test: worker w7 loads: 2 of 4 experts, 1 MB/s\n"));
    assert_non_null(strstr(text, "INFO test: worker w7 loads: 4 of 4 experts, 1 MB/s\n"));
    assert_non_null(strstr(text, "INFO test: worker w7 loads: 4 experts, 4.0 MB in 4.00 s (1 MB/s)\n"));
    assert_null(strchr(text, '\r'));
}

static void a_line_rewritten_on_a_terminal(void **state) {
    (void)state;
    char text[4096] = "";
    int terminal = posix_openpt(O_RDWR | O_NOCTTY);
    assert_true(terminal >= 0 && grantpt(terminal) == 0 && unlockpt(terminal) == 0);
    run_on(open(ptsname(terminal), O_RDWR | O_NOCTTY), MOE_PROGRESS_REWRITE_NS / 2);
    size_t size = 0; /* it comes in pieces, and ends with an error since the other side is closed */
    for (ssize_t got; size < sizeof text - 1 && (got = read(terminal, text + size, sizeof text - 1 - size)) > 0;)
        size += (size_t)got;
    close(terminal);
    assert_true(size > 0);
    assert_int_equal(occurrences(text, "\r\033[Kworker w7 loads: "), 2);
    assert_non_null(strstr(text, "\r\033[Kworker w7 loads: 2 of 4 experts, 20 MB/s"));
    assert_int_equal(occurrences(text, "\n"), 1);
    assert_non_null(strstr(text, "INFO test: worker w7 loads: 4 experts, 4.0 MB in 0.20 s (20 MB/s)\r\n"));
}

static void silent_below_info(void **state) {
    (void)state;
    FILE *file = tmpfile();
    assert_non_null(file);
    moe_log_init(MOE_LOG_WARN, "test");
    run_on(dup(fileno(file)), MOE_NS_PER_S);
    moe_log_init(MOE_LOG_INFO, "test");
    assert_int_equal(lseek(fileno(file), 0, SEEK_END), 0);
    fclose(file);
}

int main(void) {
    moe_log_init(MOE_LOG_INFO, "test");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(log_lines_every_two_seconds),
        cmocka_unit_test(a_line_rewritten_on_a_terminal),
        cmocka_unit_test(silent_below_info),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
