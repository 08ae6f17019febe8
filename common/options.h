/* Command-line options from one typed table: parsing, validation, environment, configuration file, help and documentation.
 *
 * A value comes from, first found: the flag, the environment variable (MOESAIC_ and the name in upper case with _), the
 * configuration file (--config FILE, YAML, one "name: value" a line), the table's default. */
#pragma once
#include "common/buf.h"
#include "common/status.h"

typedef enum moe_option_type {
    MOE_OPTION_BOOL,     /* --name, --no-name, --name=true|false */
    MOE_OPTION_INT,      /* range [min, max] */
    MOE_OPTION_FLOAT,    /* range [min, max] */
    MOE_OPTION_BYTES,    /* "512MiB", "2G"; range in bytes */
    MOE_OPTION_DURATION, /* "300ms", "2s", "1m"; a bare number is seconds; range in seconds */
    MOE_OPTION_TEXT,
    MOE_OPTION_CHOICE /* one of `choices` */
} moe_option_type;

typedef struct moe_option_row {
    const char *name; /* without dashes: "max-num-seqs" */
    moe_option_type type;
    uint32_t commands;    /* bit set of 1 << index into the table's commands */
    const char *group;    /* heading in help and documentation */
    const char *fallback; /* default, as text; NULL: none */
    double min, max;
    const char *choices; /* "gate|hint|pre-gate" */
    const char *value;   /* placeholder in help: "N", "DIR" */
    const char *help;
} moe_option_row;

typedef struct moe_command {
    const char *name, *positional, *summary; /* positional: "MODEL", "[DIR]" (optional), or NULL */
} moe_command;

typedef struct moe_option_table {
    const char *program;
    const moe_command *commands;
    int num_commands;
    const moe_option_row *rows; /* rows of a group stand together */
    int num_rows;
} moe_option_table;

typedef struct moe_options moe_options;

/* The index of a command by name, or -1 with *err naming the most similar one. */
int moe_command_find(const moe_option_table *table, const char *name, moe_error *err);

/* Parses argv[0 … argc) (what follows the command). INVALID_ARGUMENT naming the option, the value and what is allowed, with a
 * suggestion for unknown names. Free with moe_options_free. */
moe_status moe_options_parse(const moe_option_table *table, int command, int argc, char *const *argv, moe_options **out,
                             moe_error *err);
void moe_options_free(moe_options **options); /* NULLs; idempotent */

/* Values by name; an option that the command does not take is our own bug. Borrowed from the options. */
const char *moe_option_text(const moe_options *options, const char *name); /* NULL: not given and no default */
int64_t moe_option_int(const moe_options *options, const char *name);      /* INT and BYTES */
double moe_option_float(const moe_options *options, const char *name);
int64_t moe_option_ns(const moe_options *options, const char *name); /* DURATION */
bool moe_option_bool(const moe_options *options, const char *name);
int moe_option_choice(const moe_options *options, const char *name); /* index among the choices */
bool moe_option_given(const moe_options *options, const char *name); /* by flag, environment or file */
bool moe_option_exists(const moe_options *options, const char *name); /* whether the command takes it; the others ask for what it takes */
/* A size as options of type BYTES take it ("512MiB"), 0 and above; false where it is none. */
bool moe_option_parse_bytes(const char *text, int64_t *out);
const char *moe_options_positional(const moe_options *options);      /* NULL where none was given */

/* Appends "--name=value" for every option that was given and that `command` takes too, but for those named in `except`
 * (NULL-terminated): what a parent process passes on. Texts are borrowed from the options. Returns how many, at most `room`. */
int moe_options_pass_on(const moe_options *options, int command, const char *const *except, const char **args, int room);

void moe_options_help(const moe_option_table *table, int command, moe_buf *out); /* of one command */
void moe_options_overview(const moe_option_table *table, moe_buf *out);          /* the commands */
void moe_options_markdown(const moe_option_table *table, moe_buf *out);          /* all options by group, as Markdown tables */
