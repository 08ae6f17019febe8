/* render_chat DIR: for the comparison with jinja2. Each line of standard input is a JSON object with the variables of a template
 * (messages, tools, …); each line of standard output the text that DIR's template makes of them, or {"error": …}. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>

#include "router/chat/chat_template.h"

static json_t *render(const moe_chat_template *chat_template, json_t *variables) {
    moe_buf text = {0};
    moe_error err = {0};
    moe_status status = moe_chat_template_render(chat_template, variables, &text, &err);
    json_t *answer = status == MOE_OK ? json_stringn(moe_buf_text(&text), text.size) : json_pack("{s:s}", "error", err.message);
    moe_buf_free(&text);
    return answer;
}

int main(int argc, char **argv) {
    moe_chat_template *chat_template;
    moe_error err = {0};
    if (argc != 2) return fprintf(stderr, "usage: render_chat DIR <LINES\n"), 2;
    if (moe_chat_template_load(argv[1], NULL, &chat_template, &err) != MOE_OK)
        return fprintf(stderr, "render_chat: %s\n", err.message), 1;
    char *line = NULL;
    size_t capacity = 0;
    for (ssize_t size; (size = getline(&line, &capacity, stdin)) > 0;) {
        json_t *variables = json_loadb(line, (size_t)size, JSON_ALLOW_NUL, NULL);
        if (!variables) return fprintf(stderr, "render_chat: a line is not JSON\n"), 1;
        json_t *answer = render(chat_template, variables);
        json_dumpf(answer, stdout, JSON_ENCODE_ANY | JSON_COMPACT);
        putchar('\n');
        json_decref(answer);
        json_decref(variables);
    }
    free(line);
    moe_chat_template_free(&chat_template);
    return 0;
}
