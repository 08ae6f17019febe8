/* tokenize_lines DIR: for the comparison with other tokenizers. Each line of standard input is a JSON object with a "text" or
 * "ids"; each line of standard output an array of ids, or a string. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>

#include "common/alloc.h"
#include "router/tokenizer/tokenizer.h"

static void fail(const moe_error *err) {
    fprintf(stderr, "tokenize_lines: %s\n", err->message);
    exit(1);
}

static json_t *encode(const moe_tokenizer *tokenizer, const json_t *text, bool add_special) {
    moe_token_ids ids;
    moe_error err;
    if (moe_tokenizer_encode(tokenizer, json_string_value(text), json_string_length(text), add_special, &ids, &err) != MOE_OK)
        fail(&err);
    json_t *array = json_array();
    for (int32_t i = 0; i < ids.count; i++) json_array_append_new(array, json_integer(ids.ids[i]));
    moe_free(ids.ids);
    return array;
}

static json_t *decode(const moe_tokenizer *tokenizer, const json_t *ids, bool skip_special) {
    moe_detokenizer d;
    moe_buf text = {0};
    moe_detokenizer_init(&d, tokenizer, skip_special);
    for (size_t i = 0; i < json_array_size(ids); i++)
        moe_detokenizer_feed(&d, (int32_t)json_integer_value(json_array_get(ids, i)), &text);
    moe_detokenizer_finish(&d, &text);
    json_t *string = json_stringn(moe_buf_text(&text), text.size);
    moe_buf_free(&text);
    return string;
}

int main(int argc, char **argv) {
    moe_tokenizer *tokenizer;
    moe_error err = {0};
    if (argc != 2) return fprintf(stderr, "usage: tokenize_lines DIR <LINES\n"), 2;
    if (moe_tokenizer_load(argv[1], &tokenizer, &err) != MOE_OK) fail(&err);
    char *line = NULL;
    size_t capacity = 0;
    for (ssize_t size; (size = getline(&line, &capacity, stdin)) > 0;) {
        json_t *request = json_loadb(line, (size_t)size, JSON_ALLOW_NUL, NULL);
        bool special = json_is_true(json_object_get(request, "special"));
        const json_t *text = json_object_get(request, "text"), *ids = json_object_get(request, "ids");
        json_t *answer = text ? encode(tokenizer, text, special) : decode(tokenizer, ids, !special);
        json_dumpf(answer, stdout, JSON_ENCODE_ANY | JSON_COMPACT);
        putchar('\n');
        json_decref(answer);
        json_decref(request);
    }
    free(line);
    moe_tokenizer_free(&tokenizer);
    return 0;
}
