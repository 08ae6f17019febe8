/* Options: sources and their order, values and ranges, suggestions, and that the table of Moesaic's own options is sound. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/option_table.h"
#include "common/alloc.h"
#include "common/clock.h"
#include "common/options.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test.h"

enum { RUN, STOP, NUM_COMMANDS };
#define R (1 << RUN)
#define S (1 << STOP)

static const moe_command commands[NUM_COMMANDS] = {{"run", "MODEL", "Runs"}, {"stop", NULL, "Stops"}};
static const moe_option_row rows[] = {
    {"count", MOE_OPTION_INT, R | S, "First", "3", 1, 10, NULL, "N", "how many"},
    {"ratio", MOE_OPTION_FLOAT, R, "First", "0.5", 0, 1, NULL, "X", "how much"},
    {"memory", MOE_OPTION_BYTES, R, "First", "1MiB", 1024, 1 << 30, NULL, "SIZE", "how large"},
    {"wait", MOE_OPTION_DURATION, R, "Second", "2s", 0, 60, NULL, "TIME", "how long"},
    {"verbose-log", MOE_OPTION_BOOL, R, "Second", "false", 0, 0, NULL, NULL, "say more"},
    {"colour", MOE_OPTION_CHOICE, R, "Second", "red", 0, 0, "red|green|blue", NULL, "which"},
    {"name", MOE_OPTION_TEXT, R, "Second", NULL, 0, 0, NULL, "NAME", "what it is called"},
    {"force", MOE_OPTION_BOOL, S, "Second", "true", 0, 0, NULL, NULL, "at once"},
    {"config", MOE_OPTION_TEXT, R | S, "Second", NULL, 0, 0, NULL, "FILE", "file"},
};
static const moe_option_table table = {"prog", commands, NUM_COMMANDS, rows, sizeof rows / sizeof *rows};

#define MAX_ARGS 16

/* The arguments, separated by blanks. */
static moe_status parse_words(const moe_option_table *t, int command, const char *words, moe_options **out, moe_error *err) {
    char copy[1024], *argv[MAX_ARGS], *rest = copy;
    int argc = 0;
    snprintf(copy, sizeof copy, "%s", words);
    for (char *word; (word = strsep(&rest, " ")) && argc < MAX_ARGS;)
        if (*word) argv[argc++] = strcmp(word, "''") == 0 ? word + 2 : word;
    return moe_options_parse(t, command, argc, argv, out, err);
}

static moe_options *parsed(int command, const char *words) {
    moe_options *options;
    moe_error err;
    if (parse_words(&table, command, words, &options, &err) != MOE_OK) fail_msg("%s: %s", words, err.message);
    return options;
}

/* The message holds every one of the parts (separated by '~'). */
static void refused(int command, const char *words, moe_status wanted, const char *parts) {
    moe_options *options;
    moe_error err = {0};
    char copy[512], *rest = copy;
    moe_status status = parse_words(&table, command, words, &options, &err);
    if (status != wanted) fail_msg("%s: %s %s", words, moe_status_name(status), err.message);
    assert_null(options);
    snprintf(copy, sizeof copy, "%s", parts);
    for (char *part; (part = strsep(&rest, "~"));)
        if (!strstr(err.message, part)) fail_msg("%s: '%s' lacks '%s'", words, err.message, part);
}

/* ---- values ---- */

static void test_defaults(void **state) {
    (void)state;
    moe_options *o = parsed(RUN, "dir");
    assert_string_equal(moe_options_positional(o), "dir");
    assert_int_equal(moe_option_int(o, "count"), 3);
    assert_true(moe_option_float(o, "ratio") == 0.5);
    assert_int_equal(moe_option_int(o, "memory"), 1 << 20);
    assert_int_equal(moe_option_ns(o, "wait"), 2 * MOE_NS_PER_S);
    assert_false(moe_option_bool(o, "verbose-log"));
    assert_int_equal(moe_option_choice(o, "colour"), 0);
    assert_null(moe_option_text(o, "name"));
    assert_string_equal(moe_option_text(o, "count"), "3");
    assert_false(moe_option_given(o, "count"));
    moe_options_free(&o);
    moe_options_free(&o);
    assert_null(o);
}

static void test_flags(void **state) {
    (void)state;
    moe_options *o = parsed(RUN, "--count 7 --ratio=0.25 --memory=2KiB m --wait 300ms --verbose-log --colour=blue --name=a=b");
    assert_int_equal(moe_option_int(o, "count"), 7);
    assert_true(moe_option_float(o, "ratio") == 0.25);
    assert_int_equal(moe_option_int(o, "memory"), 2048);
    assert_int_equal(moe_option_ns(o, "wait"), 300 * MOE_NS_PER_MS);
    assert_true(moe_option_bool(o, "verbose-log"));
    assert_int_equal(moe_option_choice(o, "colour"), 2);
    assert_string_equal(moe_option_text(o, "name"), "a=b");
    assert_true(moe_option_given(o, "name"));
    moe_options_free(&o);
    o = parsed(STOP, "--no-force");
    assert_false(moe_option_bool(o, "force"));
    moe_options_free(&o);
    o = parsed(STOP, "--force=off --force=on --count=1 --count=2");
    assert_true(moe_option_bool(o, "force"));
    assert_int_equal(moe_option_int(o, "count"), 2);
    moe_options_free(&o);
    o = parsed(RUN, "--name -x -- --odd");
    assert_string_equal(moe_options_positional(o), "--odd");
    assert_string_equal(moe_option_text(o, "name"), "-x");
    moe_options_free(&o);
}

static void test_units(void **state) {
    (void)state;
    static const struct {
        const char *words;
        int64_t bytes, ns;
    } cases[] = {{"--memory=4096 --wait=1", 4096, MOE_NS_PER_S},
                 {"--memory=1M --wait=1m", 1 << 20, 60 * MOE_NS_PER_S},
                 {"--memory=1GB --wait=2.5s", 1000000000, 2500000000},
                 {"--memory=0.5gib --wait=50us", 1 << 29, 50000},
                 {"--memory=10KB --wait=0.01h", 10000, 36 * MOE_NS_PER_S}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char words[128];
        snprintf(words, sizeof words, "m %s", cases[i].words);
        moe_options *o = parsed(RUN, words);
        assert_int_equal(moe_option_int(o, "memory"), cases[i].bytes);
        assert_int_equal(moe_option_ns(o, "wait"), cases[i].ns);
        moe_options_free(&o);
    }
}

static void test_bad_values(void **state) {
    (void)state;
    refused(RUN, "m --count=0", MOE_OUT_OF_RANGE, "--count~0~1 to 10");
    refused(RUN, "m --count=11", MOE_OUT_OF_RANGE, "--count~11~1 to 10");
    refused(RUN, "m --count=2.5", MOE_INVALID_ARGUMENT, "--count~'2.5'~whole number");
    refused(RUN, "m --count=two", MOE_INVALID_ARGUMENT, "--count~'two'");
    refused(RUN, "m --count=3x", MOE_INVALID_ARGUMENT, "--count~'3x'");
    refused(RUN, "m --count=", MOE_INVALID_ARGUMENT, "--count~''");
    refused(RUN, "m --count=nan", MOE_INVALID_ARGUMENT, "--count~'nan'");
    refused(RUN, "m --count=1e999", MOE_INVALID_ARGUMENT, "--count");
    refused(RUN, "m --ratio=1.5", MOE_OUT_OF_RANGE, "--ratio~1.5~0 to 1");
    refused(RUN, "m --ratio -1", MOE_OUT_OF_RANGE, "--ratio~-1");
    refused(RUN, "m --memory=12XB", MOE_INVALID_ARGUMENT, "--memory~'12XB'~512MiB");
    refused(RUN, "m --memory=1", MOE_OUT_OF_RANGE, "--memory~bytes");
    refused(RUN, "m --wait=2y", MOE_INVALID_ARGUMENT, "--wait~'2y'~300ms");
    refused(RUN, "m --wait=61s", MOE_OUT_OF_RANGE, "--wait~0 to 60 s");
    refused(RUN, "m --verbose-log=maybe", MOE_INVALID_ARGUMENT, "--verbose-log~'maybe'~true or false");
    refused(RUN, "m --colour=pink", MOE_INVALID_ARGUMENT, "--colour~'pink'~red|green|blue");
    refused(RUN, "m --colour=re", MOE_INVALID_ARGUMENT, "'re'");
    refused(RUN, "m --name=", MOE_INVALID_ARGUMENT, "--name~empty");
    refused(RUN, "m --name", MOE_INVALID_ARGUMENT, "--name needs a value");
}

static void test_unknown(void **state) {
    (void)state;
    moe_error err;
    refused(RUN, "m --cuont=2", MOE_INVALID_ARGUMENT, "unknown option '--cuont'~did you mean '--count'~prog run --help");
    refused(RUN, "m --verbose", MOE_INVALID_ARGUMENT, "unknown option '--verbose'");
    refused(RUN, "m --no-count", MOE_INVALID_ARGUMENT, "unknown option '--no-count'");
    refused(RUN, "m --no-verbose-log=1", MOE_INVALID_ARGUMENT, "unknown option");
    refused(STOP, "--colour=red", MOE_INVALID_ARGUMENT, "unknown option '--colour'");
    refused(STOP, "-f", MOE_INVALID_ARGUMENT, "'-f'~two dashes");
    refused(STOP, "thing", MOE_INVALID_ARGUMENT, "prog stop takes no argument 'thing'");
    refused(RUN, "", MOE_INVALID_ARGUMENT, "prog run needs MODEL");
    refused(RUN, "one two", MOE_INVALID_ARGUMENT, "MODEL~'two'");
    moe_options *options;
    assert_int_equal(parse_words(&table, RUN, "m --zz=1", &options, &err), MOE_INVALID_ARGUMENT);
    assert_null(strstr(err.message, "did you mean"));
    assert_int_equal(moe_command_find(&table, "stop", &err), STOP);
    assert_int_equal(moe_command_find(&table, "sotp", &err), -1);
    assert_non_null(strstr(err.message, "unknown command 'sotp'; did you mean 'stop'?"));
    assert_int_equal(moe_command_find(&table, "dance", &err), -1);
    assert_null(strstr(err.message, "did you mean"));
}

/* ---- sources ---- */

static void test_precedence(void **state) {
    (void)state;
    moe_test_dir dir = moe_test_dir_new();
    static const char text[] = "# options\ncount: 4\nratio: 0.75\nverbose-log: yes\nforce: false\n\"name\": 'from file'\n";
    char words[512];
    moe_test_write_file(&dir, "options.yaml", text, sizeof text - 1);
    snprintf(words, sizeof words, "m --config %s/options.yaml", dir.path);
    moe_options *o = parsed(RUN, words);
    assert_int_equal(moe_option_int(o, "count"), 4);
    assert_string_equal(moe_option_text(o, "name"), "from file");
    assert_true(moe_option_bool(o, "verbose-log"));
    assert_true(moe_option_given(o, "count"));
    assert_int_equal(moe_option_int(o, "memory"), 1 << 20);
    moe_options_free(&o);
    setenv("MOESAIC_COUNT", "5", 1);
    setenv("MOESAIC_VERBOSE_LOG", "false", 1);
    setenv("MOESAIC_FORCE", "false", 1); /* not an option of run */
    setenv("MOESAIC_NAME", "", 1);       /* empty is not set */
    o = parsed(RUN, words);
    assert_int_equal(moe_option_int(o, "count"), 5);
    assert_false(moe_option_bool(o, "verbose-log"));
    assert_string_equal(moe_option_text(o, "name"), "from file");
    moe_options_free(&o);
    strcat(words, " --count=6 --verbose-log");
    o = parsed(RUN, words);
    assert_int_equal(moe_option_int(o, "count"), 6);
    assert_true(moe_option_bool(o, "verbose-log"));
    assert_true(moe_option_float(o, "ratio") == 0.75);
    moe_options_free(&o);
    setenv("MOESAIC_COUNT", "99", 1);
    refused(RUN, "m", MOE_OUT_OF_RANGE, "MOESAIC_COUNT~--count~99~1 to 10");
    unsetenv("MOESAIC_COUNT");
    snprintf(words, sizeof words, "%s/options.yaml", dir.path);
    setenv("MOESAIC_CONFIG", words, 1);
    o = parsed(RUN, "m");
    assert_int_equal(moe_option_int(o, "count"), 4);
    moe_options_free(&o);
    unsetenv("MOESAIC_CONFIG");
    unsetenv("MOESAIC_VERBOSE_LOG");
    unsetenv("MOESAIC_FORCE");
    unsetenv("MOESAIC_NAME");
    moe_test_dir_free(&dir);
}

static void refused_file(const char *text, moe_status wanted, const char *parts) {
    moe_test_dir dir = moe_test_dir_new();
    char words[512];
    moe_test_write_file(&dir, "bad.yaml", text, strlen(text));
    snprintf(words, sizeof words, "m --config=%s/bad.yaml", dir.path);
    refused(RUN, words, wanted, parts);
    moe_test_dir_free(&dir);
}

static void test_bad_files(void **state) {
    (void)state;
    refused_file("count: 20\n", MOE_OUT_OF_RANGE, "bad.yaml~--count~20");
    refused_file("cuont: 2\n", MOE_INVALID_ARGUMENT, "bad.yaml~'--cuont'~'--count'");
    refused_file("count: [1]\n", MOE_INVALID_ARGUMENT, "bad.yaml~line 1");
    refused_file("ratio: 0.5\ncount:\n  deep: 1\n", MOE_INVALID_ARGUMENT, "bad.yaml~line 3");
    refused_file("count: 'x\n", MOE_INVALID_ARGUMENT, "bad.yaml~line");
    refused_file("- count\n", MOE_INVALID_ARGUMENT, "bad.yaml~line 1");
    refused(RUN, "m --config=/nonexistent/x.yaml", MOE_NOT_FOUND, "--config~/nonexistent/x.yaml");
}

/* Each allocation in turn fails. */
static void test_out_of_memory(void **state) {
    (void)state;
    moe_options *options = NULL;
    moe_error err;
    moe_status status = MOE_INTERNAL;
    int failures = 0;
    for (int64_t n = 1; status != MOE_OK && n < 100; n++) {
        moe_alloc_fail_after(n);
        status = parse_words(&table, RUN, "m --count=7 --name=x", &options, &err);
        moe_alloc_fail_after(0);
        failures += status == MOE_RESOURCE_EXHAUSTED;
        if (status != MOE_OK) assert_null(options);
    }
    assert_int_equal(status, MOE_OK);
    assert_true(failures >= 7);
    moe_options_free(&options);
}

static void test_pass_on(void **state) {
    (void)state;
    static const char *const except[] = {"config", NULL};
    const char *args[4];
    setenv("MOESAIC_COUNT", "9", 1);
    moe_options *o = parsed(RUN, "m --name=x --config=/dev/null");
    assert_int_equal(moe_options_pass_on(o, STOP, except, args, 4), 1);
    assert_string_equal(args[0], "--count=9");
    assert_int_equal(moe_options_pass_on(o, RUN, except, args, 1), 1);
    moe_options_free(&o);
    unsetenv("MOESAIC_COUNT");
}

/* ---- texts ---- */

static int occurrences(const char *text, const char *part) {
    int count = 0;
    for (; (text = strstr(text, part)); text += strlen(part)) count++;
    return count;
}

/* Help wraps long texts, so blanks and line breaks are one. */
static void squeeze(moe_buf *text) {
    size_t used = 0;
    for (size_t i = 0; i < text->size; i++) {
        char c = text->data[i] == '\n' ? ' ' : text->data[i];
        if (c != ' ' || (used > 0 && text->data[used - 1] != ' ')) text->data[used++] = c;
    }
    text->data[text->size = used] = '\0';
}

static void help_names(const moe_option_table *t, int command, const moe_option_row *row) {
    moe_buf help = {0}, entry = {0};
    moe_options_help(t, command, &help);
    squeeze(&help);
    bool takes = row->commands >> command & 1;
    moe_buf_printf(&entry, "--%s ", row->name);
    const char *placeholder = row->type == MOE_OPTION_CHOICE ? row->choices : row->value;
    if (placeholder) moe_buf_printf(&entry, "%s ", placeholder);
    moe_buf_append_text(&entry, row->help);
    if (row->fallback) moe_buf_printf(&entry, " (default %s)", row->fallback);
    if (occurrences(help.data, entry.data) != takes) fail_msg("help of %s: '%s'", t->commands[command].name, entry.data);
    moe_buf_free(&help);
    moe_buf_free(&entry);
}

static void test_help(void **state) {
    (void)state;
    const moe_option_table *tables[] = {&table, moe_option_table_get()};
    for (int i = 0; i < 2; i++)
        for (int command = 0; command < tables[i]->num_commands; command++)
            for (int row = 0; row < tables[i]->num_rows; row++) help_names(tables[i], command, &tables[i]->rows[row]);
    moe_buf text = {0};
    moe_options_help(&table, RUN, &text);
    assert_non_null(strstr(text.data, "usage: prog run MODEL [options]"));
    assert_non_null(strstr(text.data, "MOESAIC_"));
    assert_int_equal(occurrences(text.data, "\nFirst\n"), 1);
    assert_int_equal(occurrences(text.data, "\nSecond\n"), 1);
    moe_buf_clear(&text);
    moe_options_overview(&table, &text);
    assert_non_null(strstr(text.data, "run"));
    assert_non_null(strstr(text.data, "Stops"));
    moe_buf_free(&text);
}

static void test_markdown(void **state) {
    (void)state;
    moe_buf text = {0};
    const moe_option_table *real = moe_option_table_get();
    moe_options_markdown(&table, &text);
    assert_non_null(strstr(text.data, "| `--colour red\\|green\\|blue` | red | which | run |\n"));
    assert_non_null(strstr(text.data, "| `--count N` | 3 | how many | run, stop |\n"));
    assert_non_null(strstr(text.data, "**First**\n\n| option |"));
    moe_buf_clear(&text);
    moe_options_markdown(real, &text);
    for (int i = 0; i < real->num_rows; i++) {
        char cell[80];
        const moe_option_row *row = &real->rows[i];
        bool bare = row->type == MOE_OPTION_BOOL;
        snprintf(cell, sizeof cell, "| `--%s%s", row->name, bare ? "` |" : " ");
        if (occurrences(text.data, cell) != 1) fail_msg("%s", cell);
    }
    moe_buf_free(&text);
}

/* ---- Moesaic's own table ---- */

static void sound_row(const moe_option_table *t, int index) {
    const moe_option_row *row = &t->rows[index];
    assert_true(strlen(row->name) > 1 && strlen(row->name) < 40);
    assert_int_equal(strspn(row->name, "abcdefghijklmnopqrstuvwxyz-"), strlen(row->name));
    assert_true(row->commands != 0 && row->commands >> t->num_commands == 0);
    assert_true((row->type == MOE_OPTION_CHOICE) == (row->choices != NULL));
    assert_true((row->type == MOE_OPTION_BOOL || row->type == MOE_OPTION_CHOICE) == (row->value == NULL));
    bool ranged = row->type == MOE_OPTION_INT || row->type == MOE_OPTION_FLOAT || row->type == MOE_OPTION_BYTES ||
                  row->type == MOE_OPTION_DURATION;
    assert_true(ranged == (row->max > row->min));
    assert_true(strlen(row->help) > 3 && row->help[strlen(row->help) - 1] != '.');
    for (int other = 0; other < index; other++) {
        bool same_group = strcmp(t->rows[other].group, row->group) == 0;
        if (strcmp(t->rows[other].name, row->name) == 0) fail_msg("--%s has two rows", row->name);
        if (same_group && strcmp(t->rows[index - 1].group, row->group) != 0) fail_msg("group %s is split", row->group);
    }
}

static void test_own_table(void **state) {
    (void)state;
    const moe_option_table *t = moe_option_table_get();
    assert_int_equal(t->num_commands, MOE_COMMAND_COUNT);
    for (int i = 0; i < t->num_rows; i++) sound_row(t, i);
    for (int command = 0; command < t->num_commands; command++) {
        moe_options *options;
        moe_error err;
        if (parse_words(t, command, t->commands[command].positional ? "x" : "", &options, &err) != MOE_OK)
            fail_msg("%s: %s", t->commands[command].name, err.message);
        moe_options_free(&options);
    }
}

static void test_fixed_names(void **state) {
    (void)state;
    moe_options *o;
    moe_error err;
    assert_int_equal(
        parse_words(moe_option_table_get(), MOE_COMMAND_SERVE,
                    "models/demo --workers 3 --port 0 --replicas 2 --gating pre-gate --backend cpu-ref --combine partial "
                    "--transport zmq --max-num-seqs=8",
                    &o, &err),
        MOE_OK);
    assert_string_equal(moe_options_positional(o), "models/demo");
    assert_int_equal(moe_option_int(o, "workers"), 3);
    assert_string_equal(moe_option_text(o, "gating"), "pre-gate");
    assert_string_equal(moe_option_text(o, "combine"), "partial");
    moe_options_free(&o);
    assert_int_equal(parse_words(moe_option_table_get(), MOE_COMMAND_SERVE, "m --wrokers=2", &o, &err), MOE_INVALID_ARGUMENT);
    assert_non_null(strstr(err.message, "--workers"));
    assert_int_equal(parse_words(moe_option_table_get(), MOE_COMMAND_SERVE, "m --port=65536", &o, &err), MOE_OUT_OF_RANGE);
    assert_int_equal(moe_command_find(moe_option_table_get(), "sevre", &err), -1);
    assert_non_null(strstr(err.message, "'serve'"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),    cmocka_unit_test(test_flags),    cmocka_unit_test(test_units),
        cmocka_unit_test(test_bad_values),  cmocka_unit_test(test_unknown),  cmocka_unit_test(test_precedence),
        cmocka_unit_test(test_bad_files),   cmocka_unit_test(test_pass_on),  cmocka_unit_test(test_out_of_memory),
        cmocka_unit_test(test_help),        cmocka_unit_test(test_markdown), cmocka_unit_test(test_own_table),
        cmocka_unit_test(test_fixed_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
