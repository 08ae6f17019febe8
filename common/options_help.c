/* Help texts and documentation from the option table. */
#include <ctype.h>
#include <string.h>

#include "common/options.h"

#define HELP_COLUMN 34 /* where the explanations begin */
#define HELP_WIDTH 110

static const char *placeholder(const moe_option_row *row) { return row->type == MOE_OPTION_CHOICE ? row->choices : row->value; }

/* Words of `text` from HELP_COLUMN on, wrapped at HELP_WIDTH; the line already has `column` characters. */
static void wrap(moe_buf *out, size_t column, const char *text) {
    if (column + 2 > HELP_COLUMN) {
        moe_buf_append_text(out, "\n");
        column = 0;
    }
    moe_buf_printf(out, "%*s", (int)(HELP_COLUMN - column), "");
    column = HELP_COLUMN;
    while (*text) {
        size_t word = strcspn(text, " ");
        if (column > HELP_COLUMN && column + 1 + word > HELP_WIDTH) {
            moe_buf_printf(out, "\n%*s", HELP_COLUMN, "");
            column = HELP_COLUMN;
        } else if (column > HELP_COLUMN) {
            moe_buf_append_text(out, " ");
            column++;
        }
        moe_buf_append(out, text, word);
        column += word;
        text += word + (text[word] == ' ');
    }
    moe_buf_append_text(out, "\n");
}

static void help_row(const moe_option_row *row, moe_buf *out) {
    moe_buf flag = {0}, text = {0};
    const char *value = placeholder(row);
    moe_buf_printf(&flag, "  --%s%s%s", row->name, value ? " " : "", value ? value : "");
    moe_buf_append_text(&text, row->help);
    if (row->fallback) moe_buf_printf(&text, " (default %s)", row->fallback);
    moe_buf_append_text(out, moe_buf_text(&flag));
    wrap(out, flag.size, moe_buf_text(&text));
    moe_buf_free(&flag);
    moe_buf_free(&text);
}

void moe_options_help(const moe_option_table *table, int command, moe_buf *out) {
    const moe_command *c = &table->commands[command];
    const char *group = NULL;
    moe_buf_printf(out, "%s\n\nusage: %s %s%s%s [options]\n", c->summary, table->program, c->name, c->positional ? " " : "",
                   c->positional ? c->positional : "");
    for (int i = 0; i < table->num_rows; i++) {
        const moe_option_row *row = &table->rows[i];
        if (!(row->commands >> command & 1)) continue;
        if (!group || strcmp(group, row->group) != 0) moe_buf_printf(out, "\n%s\n", group = row->group);
        help_row(row, out);
    }
    moe_buf_append_text(
        out,
        "\nEach option can also be set by the environment variable MOESAIC_NAME (upper case, _ for -) or in a --config file.\n");
}

void moe_options_overview(const moe_option_table *table, moe_buf *out) {
    moe_buf_printf(out, "usage: %s COMMAND [options]\n\ncommands\n", table->program);
    for (int i = 0; i < table->num_commands; i++)
        moe_buf_printf(out, "  %-10s %s\n", table->commands[i].name, table->commands[i].summary);
    moe_buf_printf(out, "\n%s COMMAND --help tells a command's options; %s --version the version.\n", table->program,
                   table->program);
}

static void markdown_row(const moe_option_table *table, const moe_option_row *row, moe_buf *out) {
    const char *value = placeholder(row);
    moe_buf_printf(out, "| `--%s", row->name);
    for (const char *p = value ? value : ""; *p; p++) {
        if (p == value) moe_buf_append_text(out, " ");
        moe_buf_append(out, *p == '|' ? "\\|" : p, *p == '|' ? 2 : 1);
    }
    moe_buf_printf(out, "` | %s | %s |", row->fallback ? row->fallback : "", row->help);
    for (int c = 0, first = 1; c < table->num_commands; c++) {
        if (!(row->commands >> c & 1)) continue;
        moe_buf_printf(out, "%s%s", first ? " " : ", ", table->commands[c].name);
        first = 0;
    }
    moe_buf_append_text(out, " |\n");
}

void moe_options_markdown(const moe_option_table *table, moe_buf *out) {
    const char *group = NULL;
    for (int i = 0; i < table->num_rows; i++) {
        const moe_option_row *row = &table->rows[i];
        if (!group || strcmp(group, row->group) != 0)
            moe_buf_printf(out, "%s**%s**\n\n| option | default | what it does | commands |\n| --- | --- | --- | --- |\n",
                           group ? "\n" : "", row->group);
        group = row->group;
        markdown_row(table, row, out);
    }
}
