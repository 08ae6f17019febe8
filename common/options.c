#include "common/options.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

#include "common/alloc.h"
#include "common/clock.h"

#define MOE_OPTION_NAME_BYTES 64
#define MOE_SUGGEST_MAX_DISTANCE 3 /* edits */

typedef struct option_value {
    char *text; /* owned; NULL: not given */
    char *flag; /* owned: "--name=text", for passing on */
    double number;
} option_value;

struct moe_options {
    const moe_option_table *table;
    int command;
    char *positional;     /* owned */
    option_value *values; /* [num_rows] */
};

/* ---- suggestions ---- */

static int min3(int a, int b, int c) { return a < b ? (a < c ? a : c) : (b < c ? b : c); }

/* Levenshtein distance of short names. */
static int edit_distance(const char *a, const char *b) {
    int row[MOE_OPTION_NAME_BYTES + 1];
    size_t la = strlen(a), lb = strlen(b);
    if (la > MOE_OPTION_NAME_BYTES || lb > MOE_OPTION_NAME_BYTES) return MOE_OPTION_NAME_BYTES;
    for (size_t j = 0; j <= lb; j++) row[j] = (int)j;
    for (size_t i = 1; i <= la; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= lb; j++) {
            int above = row[j];
            row[j] = min3(row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1]));
            diagonal = above;
        }
    }
    return row[lb];
}

/* A name that shares no letter with what was typed is no suggestion. */
static void consider(const char *wanted, const char *name, const char **best, int *distance) {
    int d = edit_distance(wanted, name);
    if (d < *distance && d < (int)strlen(wanted)) {
        *best = name;
        *distance = d;
    }
}

int moe_command_find(const moe_option_table *table, const char *name, moe_error *err) {
    const char *best = NULL;
    int distance = MOE_SUGGEST_MAX_DISTANCE + 1;
    for (int i = 0; i < table->num_commands; i++) {
        if (strcmp(table->commands[i].name, name) == 0) return i;
        consider(name, table->commands[i].name, &best, &distance);
    }
    moe_fail(err, MOE_INVALID_ARGUMENT, "unknown command '%s'%s%s%s; see %s --help", name, best ? "; did you mean '" : "",
             best ? best : "", best ? "'?" : "", table->program);
    return -1;
}

static bool takes(const moe_option_row *row, int command) { return row->commands >> command & 1; }

static int find_row(const moe_option_table *table, int command, const char *name) {
    for (int i = 0; i < table->num_rows; i++)
        if (takes(&table->rows[i], command) && strcmp(table->rows[i].name, name) == 0) return i;
    return -1;
}

static moe_status unknown_option(const moe_options *o, const char *name, moe_error *err) {
    const char *best = NULL;
    int distance = MOE_SUGGEST_MAX_DISTANCE + 1;
    for (int i = 0; i < o->table->num_rows; i++)
        if (takes(&o->table->rows[i], o->command)) consider(name, o->table->rows[i].name, &best, &distance);
    return moe_fail(err, MOE_INVALID_ARGUMENT, "unknown option '--%s'%s%s%s; see %s %s --help", name,
                    best ? "; did you mean '--" : "", best ? best : "", best ? "'?" : "", o->table->program,
                    o->table->commands[o->command].name);
}

/* ---- values ---- */

/* A number with one of `units` behind it; false when it is not one. */
typedef struct unit {
    const char *name;
    double factor;
} unit;

static bool parse_number(const char *text, const unit *units, double *out) {
    char *end;
    errno = 0;
    *out = strtod(text, &end);
    if (end == text || errno == ERANGE || !isfinite(*out) || isspace((unsigned char)text[0])) return false;
    for (; units->name; units++) {
        if (strcasecmp(end, units->name) != 0) continue;
        *out *= units->factor;
        return true;
    }
    return false;
}

static const unit plain_units[] = {{"", 1}, {NULL, 0}};
static const unit byte_units[] = {{"", 1},
                                  {"B", 1},
                                  {"K", 1024.0},
                                  {"KiB", 1024.0},
                                  {"KB", 1e3},
                                  {"M", 1048576.0},
                                  {"MiB", 1048576.0},
                                  {"MB", 1e6},
                                  {"G", 1073741824.0},
                                  {"GiB", 1073741824.0},
                                  {"GB", 1e9},
                                  {"T", 0x1p40},
                                  {"TiB", 0x1p40},
                                  {NULL, 0}};
static const unit time_units[] = {{"", 1}, {"s", 1}, {"ms", 1e-3}, {"us", 1e-6}, {"m", 60}, {"min", 60}, {"h", 3600}, {NULL, 0}};

bool moe_option_parse_bytes(const char *text, int64_t *out) {
    double value;
    if (!parse_number(text, byte_units, &value) || value != floor(value) || value < 0 || value > 0x1p52) return false;
    *out = (int64_t)value;
    return true;
}

static moe_status parse_numeric(const moe_option_row *row, const char *text, double *out, moe_error *err) {
    const unit *units = row->type == MOE_OPTION_BYTES ? byte_units : row->type == MOE_OPTION_DURATION ? time_units : plain_units;
    static const char *const kinds[] = {"", "a whole number", "a number", "a size such as 512MiB", "a time such as 300ms or 2s"};
    bool whole = row->type == MOE_OPTION_INT || row->type == MOE_OPTION_BYTES;
    if (!parse_number(text, units, out) || (whole && *out != floor(*out)))
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--%s: '%s' is not %s", row->name, text, kinds[row->type]);
    if (*out < row->min || *out > row->max)
        return moe_fail(err, MOE_OUT_OF_RANGE, "--%s: %s is outside %.12g to %.12g%s", row->name, text, row->min, row->max,
                        row->type == MOE_OPTION_DURATION ? " s"
                        : row->type == MOE_OPTION_BYTES  ? " bytes"
                                                         : "");
    return MOE_OK;
}

static bool parse_bool(const char *text, double *out) {
    static const char *const yes[] = {"true", "yes", "on", "1"}, *const no[] = {"false", "no", "off", "0"};
    for (int i = 0; i < 4; i++) {
        if (strcasecmp(text, yes[i]) == 0) return *out = 1, true;
        if (strcasecmp(text, no[i]) == 0) return *out = 0, true;
    }
    return false;
}

/* The index of `text` among "a|b|c", or -1. */
static int choice_index(const char *choices, const char *text) {
    size_t length = strlen(text);
    for (int i = 0; *choices; i++) {
        size_t n = strcspn(choices, "|");
        if (n == length && strncmp(choices, text, n) == 0) return i;
        choices += n + (choices[n] == '|');
    }
    return -1;
}

static moe_status check_value(const moe_option_row *row, const char *text, double *number, moe_error *err) {
    switch (row->type) {
        case MOE_OPTION_TEXT:
            return *text ? MOE_OK : moe_fail(err, MOE_INVALID_ARGUMENT, "--%s: the value is empty", row->name);
        case MOE_OPTION_BOOL:
            return parse_bool(text, number)
                       ? MOE_OK
                       : moe_fail(err, MOE_INVALID_ARGUMENT, "--%s: '%s' is not true or false", row->name, text);
        case MOE_OPTION_CHOICE:
            *number = choice_index(row->choices, text);
            return *number >= 0
                       ? MOE_OK
                       : moe_fail(err, MOE_INVALID_ARGUMENT, "--%s: '%s' is not one of %s", row->name, text, row->choices);
        default:
            return parse_numeric(row, text, number, err);
    }
}

static moe_status set_value(moe_options *o, int row_index, const char *text, moe_error *err) {
    const moe_option_row *row = &o->table->rows[row_index];
    option_value *v = &o->values[row_index];
    moe_status status = check_value(row, text, &v->number, err);
    if (status != MOE_OK) return status;
    moe_buf flag = {0};
    moe_buf_printf(&flag, "--%s=%s", row->name, text);
    moe_free(v->text);
    moe_free(v->flag);
    v->text = moe_strdup(text);
    v->flag = flag.data;
    return v->text && !flag.failed ? MOE_OK : moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
}

/* ---- sources ---- */

/* Flags of one letter. */
static const char *long_flag(const char *flag) { return strcmp(flag, "-o") == 0 ? "--output" : flag; }

/* One "--name[=value]" at argv[*at]; *at moves to the next argument. */
static moe_status take_flag(moe_options *o, int argc, char *const *argv, int *at, moe_error *err) {
    const char *text = long_flag(argv[(*at)++]) + 2, *equals = strchr(text, '=');
    char name[MOE_OPTION_NAME_BYTES];
    snprintf(name, sizeof name, "%.*s", (int)(equals ? equals - text : (ptrdiff_t)strlen(text)), text);
    int row = find_row(o->table, o->command, name);
    if (row < 0 && !equals && strncmp(name, "no-", 3) == 0) {
        row = find_row(o->table, o->command, name + 3);
        if (row >= 0 && o->table->rows[row].type == MOE_OPTION_BOOL) return set_value(o, row, "false", err);
        row = -1;
    }
    if (row < 0) return unknown_option(o, name, err);
    if (equals) return set_value(o, row, equals + 1, err);
    if (o->table->rows[row].type == MOE_OPTION_BOOL) return set_value(o, row, "true", err);
    if (*at == argc) return moe_fail(err, MOE_INVALID_ARGUMENT, "--%s needs a value", name);
    return set_value(o, row, argv[(*at)++], err);
}

static moe_status take_positional(moe_options *o, const char *text, moe_error *err) {
    const moe_command *c = &o->table->commands[o->command];
    if (!c->positional)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s %s takes no argument '%s'", o->table->program, c->name, text);
    if (o->positional)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s %s takes one %s; '%s' is another", o->table->program, c->name,
                        c->positional, text);
    o->positional = moe_strdup(text);
    return o->positional ? MOE_OK : moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
}

static moe_status from_flags(moe_options *o, int argc, char *const *argv, moe_error *err) {
    moe_status status = MOE_OK;
    bool only_positionals = false;
    for (int i = 0; i < argc && status == MOE_OK;) {
        if (!only_positionals && strcmp(argv[i], "--") == 0) {
            only_positionals = true;
            i++;
        } else if (!only_positionals && strncmp(long_flag(argv[i]), "--", 2) == 0) {
            status = take_flag(o, argc, argv, &i, err);
        } else if (!only_positionals && argv[i][0] == '-' && argv[i][1]) {
            status = moe_fail(err, MOE_INVALID_ARGUMENT, "unknown option '%s'; options begin with two dashes", argv[i]);
        } else {
            status = take_positional(o, argv[i++], err);
        }
    }
    return status;
}

static void environment_name(const char *option, char *name, size_t size) {
    snprintf(name, size, "MOESAIC_%s", option);
    for (char *p = name; *p; p++) *p = *p == '-' ? '_' : (char)toupper((unsigned char)*p);
}

static moe_status from_environment(moe_options *o, moe_error *err) {
    for (int i = 0; i < o->table->num_rows; i++) {
        char name[MOE_OPTION_NAME_BYTES + 16];
        environment_name(o->table->rows[i].name, name, sizeof name);
        const char *text = getenv(name);
        if (!takes(&o->table->rows[i], o->command) || o->values[i].text || !text || !*text) continue;
        moe_status status = set_value(o, i, text, err);
        if (status != MOE_OK) return moe_fail_prefix(err, status, "environment variable %s", name);
    }
    return MOE_OK;
}

/* A name of another command is passed over, so that one file serves all processes of a cluster. */
static bool known_to_any(const moe_option_table *table, const char *name) {
    for (int i = 0; i < table->num_rows; i++)
        if (strcmp(table->rows[i].name, name) == 0) return true;
    return false;
}

static moe_status file_entry(moe_options *o, const char *name, const char *text, moe_error *err) {
    int row = find_row(o->table, o->command, name);
    if (row < 0) return known_to_any(o->table, name) ? MOE_OK : unknown_option(o, name, err);
    return o->values[row].text ? MOE_OK : set_value(o, row, text, err);
}

static moe_status read_entries(moe_options *o, yaml_parser_t *parser, moe_error *err) {
    moe_status status = MOE_OK;
    char name[MOE_OPTION_NAME_BYTES] = "";
    for (bool done = false; !done && status == MOE_OK;) {
        yaml_event_t event;
        if (!yaml_parser_parse(parser, &event))
            return moe_fail(err, MOE_INVALID_ARGUMENT, "line %zu: %s", parser->problem_mark.line + 1, parser->problem);
        done = event.type == YAML_STREAM_END_EVENT;
        const char *text = event.type == YAML_SCALAR_EVENT ? (const char *)event.data.scalar.value : NULL;
        if (event.type == YAML_SEQUENCE_START_EVENT || (event.type == YAML_MAPPING_START_EVENT && name[0]) ||
            event.type == YAML_ALIAS_EVENT)
            status =
                moe_fail(err, MOE_INVALID_ARGUMENT, "line %zu: only 'name: value' lines are allowed", event.start_mark.line + 1);
        else if (text && !name[0])
            snprintf(name, sizeof name, "%s", text);
        else if (text) {
            status = file_entry(o, name, text, err);
            name[0] = '\0';
        }
        yaml_event_delete(&event);
    }
    return status;
}

static moe_status from_file(moe_options *o, moe_error *err) {
    int row = find_row(o->table, o->command, "config");
    const char *path = row >= 0 ? o->values[row].text : NULL;
    if (!path) return MOE_OK;
    FILE *file = fopen(path, "r");
    yaml_parser_t parser;
    if (!file) return moe_fail(err, MOE_NOT_FOUND, "--config: cannot read %s: %s", path, strerror(errno));
    moe_status status;
    if (yaml_parser_initialize(&parser)) {
        yaml_parser_set_input_file(&parser, file);
        status = read_entries(o, &parser, err);
        yaml_parser_delete(&parser);
    } else {
        status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    }
    fclose(file);
    return status == MOE_OK ? MOE_OK : moe_fail_prefix(err, status, "%s", path);
}

static moe_status from_defaults(moe_options *o, moe_error *err) {
    for (int i = 0; i < o->table->num_rows; i++) {
        const moe_option_row *row = &o->table->rows[i];
        if (o->values[i].text || !row->fallback || !takes(row, o->command)) continue;
        moe_status status = check_value(row, row->fallback, &o->values[i].number, err);
        if (status != MOE_OK) return status;
    }
    const moe_command *c = &o->table->commands[o->command];
    if (c->positional && c->positional[0] != '[' && !o->positional)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s %s needs %s; see %s %s --help", o->table->program, c->name, c->positional,
                        o->table->program, c->name);
    return MOE_OK;
}

moe_status moe_options_parse(const moe_option_table *table, int command, int argc, char *const *argv, moe_options **out,
                             moe_error *err) {
    moe_options *o = *out = moe_calloc(1, sizeof *o);
    if (o) o->values = moe_calloc((size_t)table->num_rows, sizeof *o->values);
    if (!o || !o->values) {
        moe_options_free(out);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    }
    o->table = table;
    o->command = command;
    moe_status status = from_flags(o, argc, argv, err);
    if (status == MOE_OK) status = from_environment(o, err);
    if (status == MOE_OK) status = from_file(o, err);
    if (status == MOE_OK) status = from_defaults(o, err);
    if (status != MOE_OK) moe_options_free(out);
    return status;
}

void moe_options_free(moe_options **options) {
    moe_options *o = *options;
    *options = NULL;
    if (!o) return;
    for (int i = 0; o->values && i < o->table->num_rows; i++) {
        moe_free(o->values[i].text);
        moe_free(o->values[i].flag);
    }
    moe_free(o->values);
    moe_free(o->positional);
    moe_free(o);
}

/* ---- access ---- */

static int row_of(const moe_options *o, const char *name) {
    int row = find_row(o->table, o->command, name);
    MOE_ASSERT(row >= 0);
    return row;
}

const char *moe_option_text(const moe_options *o, const char *name) {
    int row = row_of(o, name);
    return o->values[row].text ? o->values[row].text : o->table->rows[row].fallback;
}

double moe_option_float(const moe_options *o, const char *name) { return o->values[row_of(o, name)].number; }
int64_t moe_option_int(const moe_options *o, const char *name) { return (int64_t)moe_option_float(o, name); }
int64_t moe_option_ns(const moe_options *o, const char *name) {
    return llround(moe_option_float(o, name) * (double)MOE_NS_PER_S);
}
bool moe_option_bool(const moe_options *o, const char *name) { return moe_option_float(o, name) != 0; }
int moe_option_choice(const moe_options *o, const char *name) { return (int)moe_option_float(o, name); }
bool moe_option_exists(const moe_options *o, const char *name) { return find_row(o->table, o->command, name) >= 0; }
bool moe_option_given(const moe_options *o, const char *name) { return o->values[row_of(o, name)].text != NULL; }
const char *moe_options_positional(const moe_options *o) { return o->positional; }

static bool named(const char *const *names, const char *name) {
    for (; *names; names++)
        if (strcmp(*names, name) == 0) return true;
    return false;
}

int moe_options_pass_on(const moe_options *o, int command, const char *const *except, const char **args, int room) {
    int count = 0;
    for (int i = 0; i < o->table->num_rows && count < room; i++) {
        const moe_option_row *row = &o->table->rows[i];
        if (takes(row, command) && o->values[i].flag && !named(except, row->name)) args[count++] = o->values[i].flag;
    }
    return count;
}
