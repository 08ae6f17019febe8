#include "cli/commands.h"

#include <stdio.h>
#include <string.h>

#include "cli/option_table.h"
#include "common/log.h"

#define MOE_COMMAND_NAME_BYTES 64

typedef int (*command_function)(const moe_options *options);

static const command_function functions[MOE_COMMAND_COUNT] = {
    [MOE_COMMAND_SERVE] = moe_command_serve,   [MOE_COMMAND_ROUTER] = moe_command_router,
    [MOE_COMMAND_WORKER] = moe_command_worker, [MOE_COMMAND_CHAT] = moe_command_chat,
    [MOE_COMMAND_STATUS] = moe_command_status, [MOE_COMMAND_EVAL] = moe_command_eval,
    [MOE_COMMAND_KEYGEN] = moe_command_keygen, [MOE_COMMAND_DIGEST] = moe_command_digest,
    [MOE_COMMAND_BENCH] = moe_command_bench,
    [MOE_COMMAND_PLACEMENT] = moe_command_placement, [MOE_COMMAND_MOVE] = moe_command_move,
    [MOE_COMMAND_REPLICATE] = moe_command_replicate, [MOE_COMMAND_DRAIN] = moe_command_drain,
    [MOE_COMMAND_UNDRAIN] = moe_command_undrain, [MOE_COMMAND_REBALANCE] = moe_command_rebalance,
    [MOE_COMMAND_HEALTH] = moe_command_health,
    [MOE_COMMAND_TRAIN_PREGATE] = moe_command_train_pregate,
    [MOE_COMMAND_TRACE] = moe_command_trace,
    [MOE_COMMAND_TRACE_REPLAY] = moe_command_trace_replay,
};

static int print(void (*render)(const moe_option_table *, moe_buf *)) {
    moe_buf text = {0};
    render(moe_option_table_get(), &text);
    fputs(moe_buf_text(&text), stdout);
    moe_buf_free(&text);
    return 0;
}

static int print_help(int command) {
    moe_buf text = {0};
    moe_options_help(moe_option_table_get(), command, &text);
    fputs(moe_buf_text(&text), stdout);
    moe_buf_free(&text);
    return 0;
}

static bool asks_help(int argc, char **argv) {
    for (int i = 0; i < argc && strcmp(argv[i], "--") != 0; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) return true;
    return false;
}

static int run(int command, int argc, char **argv) {
    moe_options *options;
    moe_error err;
    if (asks_help(argc, argv)) return print_help(command);
    if (moe_options_parse(moe_option_table_get(), command, argc, argv, &options, &err) != MOE_OK) {
        fprintf(stderr, "moesaic: %s\n", err.message);
        return 2;
    }
    moe_log_init((moe_log_level)moe_option_choice(options, "log-level"), moe_option_table_get()->commands[command].name);
    int status = functions[command](options);
    moe_options_free(&options);
    return status;
}

/* How many words of argv name the command: "trace replay" has two. */
static int command_words(int argc, char **argv) {
    const moe_option_table *table = moe_option_table_get();
    for (int i = 0; i < table->num_commands && argc > 1; i++) {
        const char *name = table->commands[i].name, *space = strchr(name, ' ');
        if (space && strncmp(name, argv[0], (size_t)(space - name)) == 0 && argv[0][space - name] == '\0' &&
            strcmp(space + 1, argv[1]) == 0)
            return 2;
    }
    return 1;
}

int moe_run_command(int argc, char **argv) {
    moe_error err;
    if (argc < 1 || strcmp(argv[0], "--help") == 0 || strcmp(argv[0], "-h") == 0) return print(moe_options_overview);
    if (strcmp(argv[0], "--version") == 0) return printf("moesaic %s\n", MOESAIC_VERSION) < 0;
    if (strcmp(argv[0], "--options-markdown") == 0) return print(moe_options_markdown);
    int words = command_words(argc, argv);
    char name[MOE_COMMAND_NAME_BYTES];
    snprintf(name, sizeof name, "%s%s%s", argv[0], words > 1 ? " " : "", words > 1 ? argv[1] : "");
    int command = moe_command_find(moe_option_table_get(), name, &err);
    if (command >= 0) return run(command, argc - words, argv + words);
    fprintf(stderr, "moesaic: %s\n", err.message);
    return 2;
}
