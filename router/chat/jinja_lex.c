/* Follows jinja2/lexer.py 3.1 with trim_blocks and lstrip_blocks: white space around tags is settled here, so that the parser
 * sees final text. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "router/chat/jinja_ast.h"

#define MAX_BRACKETS (2 * MOE_JINJA_MAX_NESTING)

typedef struct lexer {
    jinja_arena *arena;
    const char *source;
    size_t size, at;
    size_t counted; /* bytes whose newlines `line` already counts */
    int line;
    bool line_starting; /* the last match ended in a newline (or nothing was matched yet) */
    jinja_token *tokens;
    size_t count, capacity;
    char brackets[MAX_BRACKETS]; /* closing brackets awaited */
    size_t open;
    bool failed;
    moe_error *err;
} lexer;

static int line_at(lexer *lx, size_t at) {
    for (; lx->counted < at && lx->counted < lx->size; lx->counted++) lx->line += lx->source[lx->counted] == '\n';
    return lx->line;
}

static bool lex_fail(lexer *lx, const char *what) {
    if (!lx->failed) moe_fail(lx->err, MOE_INVALID_ARGUMENT, "line %d: %s", line_at(lx, lx->at), what);
    lx->failed = true;
    return false;
}

static bool no_memory(lexer *lx) {
    if (!lx->failed) moe_fail(lx->err, MOE_RESOURCE_EXHAUSTED, "out of memory for the chat template");
    lx->failed = true;
    return false;
}

static jinja_token *emit(lexer *lx, jinja_token_kind kind, size_t start) {
    if (lx->count == lx->capacity) {
        size_t capacity = lx->capacity ? lx->capacity * 2 : 64;
        jinja_token *grown = moe_jinja_arena_alloc(lx->arena, capacity, sizeof *grown);
        if (!grown) {
            no_memory(lx);
            return NULL;
        }
        if (lx->count) memcpy(grown, lx->tokens, lx->count * sizeof *grown);
        lx->tokens = grown;
        lx->capacity = capacity;
    }
    jinja_token *token = &lx->tokens[lx->count++];
    *token = (jinja_token){.kind = kind, .line = line_at(lx, start)};
    return token;
}

static char peek(const lexer *lx, size_t ahead) { return ahead < lx->size - lx->at ? lx->source[lx->at + ahead] : '\0'; }

static size_t skip_space(const lexer *lx, size_t at) {
    while (at < lx->size) {
        size_t next = at;
        if (!moe_jinja_is_space(moe_jinja_utf8_next(lx->source, lx->size, &next))) break;
        at = next;
    }
    return at;
}

/* ---- text between tags ---- */

/* Emits source[from, to) as text, trimmed as the tag that follows asks: `sign` is its '-', '+' or 0; `block`: lstrip applies. */
static void emit_data(lexer *lx, size_t from, size_t to, char sign, bool block) {
    jinja_text text = {lx->source + from, to - from};
    if (sign == '-') {
        text = moe_jinja_strip(text, NULL, false, true);
    } else if (sign != '+' && block) {
        size_t start = text.size;
        while (start > 0 && text.data[start - 1] != '\n') start--;
        jinja_text indent = {text.data + start, text.size - start};
        if ((start > 0 || lx->line_starting) && moe_jinja_strip(indent, NULL, true, false).size == 0) text.size = start;
    }
    if (text.size == 0) return;
    jinja_token *token = emit(lx, JINJA_TOKEN_DATA, from);
    if (token) token->text = text;
}

/* Length of a closing tag `[-+]?` + close at `at`, with the white space or newline it swallows; 0 when there is none. */
static size_t closing(const lexer *lx, size_t at, const char *close, bool plus, bool trim) {
    size_t start = at;
    char sign = at < lx->size ? lx->source[at] : '\0';
    if (sign == '-' || (sign == '+' && plus)) at++;
    if (lx->size - at < 2 || memcmp(lx->source + at, close, 2) != 0) return 0;
    at += 2;
    if (sign == '-') return skip_space(lx, at) - start;
    if (sign != '+' && trim && at < lx->size && lx->source[at] == '\n') at++;
    return at - start;
}

static void advance(lexer *lx, size_t to) {
    lx->line_starting = to > lx->at && lx->source[to - 1] == '\n';
    lx->at = to;
}

static bool lex_comment(lexer *lx, size_t body) {
    for (size_t i = body; i + 1 < lx->size; i++) {
        size_t length = closing(lx, i, "#}", true, true);
        if (length) {
            advance(lx, i + length);
            return true;
        }
    }
    return lex_fail(lx, "missing end of comment tag");
}

/* Where the body of a raw block starts when a tag at `at` ("{%" and its sign are before it) is `raw`; 0 otherwise. */
static size_t raw_begin(const lexer *lx, size_t at) {
    at = skip_space(lx, at);
    if (lx->size - at < 3 || memcmp(lx->source + at, "raw", 3) != 0) return 0;
    at = skip_space(lx, at + 3);
    size_t length = closing(lx, at, "%}", false, false);
    return length ? at + length : 0;
}

static bool lex_raw(lexer *lx, size_t body) {
    advance(lx, body);
    for (size_t i = body; i + 1 < lx->size; i++) {
        if (lx->source[i] != '{' || lx->source[i + 1] != '%') continue;
        size_t at = i + 2;
        char sign = at < lx->size && (lx->source[at] == '-' || lx->source[at] == '+') ? lx->source[at++] : '\0';
        at = skip_space(lx, at);
        if (lx->size - at < 6 || memcmp(lx->source + at, "endraw", 6) != 0) continue;
        at = skip_space(lx, at + 6);
        size_t length = closing(lx, at, "%}", true, true);
        if (!length) continue;
        emit_data(lx, body, i, sign, true);
        advance(lx, at + length);
        return true;
    }
    return lex_fail(lx, "missing end of raw directive");
}

/* ---- inside of tags ---- */

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* Reads up to `most` digits of the base at *at; false when there are fewer than `least`. */
static bool code_digits(const char *s, size_t size, size_t *at, int base, int least, int most, uint32_t *out) {
    int digits = 0;
    for (*out = 0; digits < most && *at < size; digits++, (*at)++) {
        int digit = hex_digit(s[*at]);
        if (digit < 0 || digit >= base) break;
        *out = *out * (uint32_t)base + (uint32_t)digit;
    }
    return digits >= least;
}

/* One escape of a Python string literal after its backslash, at *at. False for one that is malformed or not built. */
static bool unescape(const char *s, size_t size, size_t *at, char *out, size_t *used) {
    static const char from[] = "abfnrtv\\'\"", to[] = "\a\b\f\n\r\t\v\\'\"";
    char c = s[(*at)++];
    const char *simple = memchr(from, c, sizeof from - 1);
    uint32_t code = 0;
    bool good = true;
    if (simple) {
        out[(*used)++] = to[simple - from];
        return true;
    }
    if (c == '\n') return true;
    if (c == 'x') {
        good = code_digits(s, size, at, 16, 2, 2, &code);
    } else if (c == 'u') {
        good = code_digits(s, size, at, 16, 4, 4, &code);
    } else if (c == 'U') {
        good = code_digits(s, size, at, 16, 8, 8, &code);
    } else if (c >= '0' && c <= '7') {
        (*at)--;
        code_digits(s, size, at, 8, 1, 3, &code);
    } else if (c == 'N') {
        return false;
    } else {
        out[(*used)++] = '\\';
        out[(*used)++] = c;
        return true;
    }
    if (!good || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return false;
    *used += moe_jinja_utf8_put(out + *used, code);
    return true;
}

static bool lex_string(lexer *lx) {
    char quote = peek(lx, 0);
    size_t start = lx->at + 1, end = start;
    while (end < lx->size && lx->source[end] != quote) end += lx->source[end] == '\\' ? 2 : 1;
    if (end >= lx->size) return lex_fail(lx, "a string has no end");
    char *out = moe_jinja_arena_alloc(lx->arena, end - start + 4, 1); /* an escape is never shorter than its character */
    if (!out) return no_memory(lx);
    size_t used = 0;
    for (size_t at = start; at < end;) {
        if (lx->source[at] != '\\') {
            out[used++] = lx->source[at++];
        } else {
            at++;
            if (!unescape(lx->source, end, &at, out, &used))
                return lex_fail(lx, "a string has an escape that is malformed or not built");
        }
    }
    jinja_token *token = emit(lx, JINJA_TOKEN_STRING, lx->at);
    if (token) token->text = (jinja_text){out, used};
    advance(lx, end + 1);
    return !lx->failed;
}

static bool is_digit(char c) { return c >= '0' && c <= '9'; }
static bool is_word(char c) { return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }

/* Copies digits at lx->at + *length, dropping single underscores between them. */
static void take_digits(const lexer *lx, size_t *length, char *out, size_t *used, size_t capacity) {
    while (is_digit(peek(lx, *length)) || (peek(lx, *length) == '_' && is_digit(peek(lx, *length + 1)))) {
        if (peek(lx, *length) != '_' && *used < capacity) out[(*used)++] = peek(lx, *length);
        (*length)++;
    }
}

static bool lex_radix(lexer *lx, int base) {
    size_t start = lx->at + 2, at = start;
    uint64_t value = 0;
    for (int digit; at < lx->size; at++) {
        if (lx->source[at] == '_') continue;
        if ((digit = hex_digit(lx->source[at])) < 0 || digit >= base) break;
        if (value > (uint64_t)INT64_MAX / 16) return lex_fail(lx, "a number does not fit 64 bits");
        value = value * (uint64_t)base + (uint64_t)digit;
    }
    if (at == start) return lex_fail(lx, "a number has no digits");
    jinja_token *token = emit(lx, JINJA_TOKEN_INT, lx->at);
    if (token) token->integer = (int64_t)value;
    advance(lx, at);
    return !lx->failed;
}

static bool lex_number(lexer *lx) {
    char digits[400];
    size_t length = 0, used = 0, capacity = sizeof digits - 1;
    char radix = (char)(peek(lx, 0) == '0' ? peek(lx, 1) | 0x20 : 0);
    if (radix == 'x' || radix == 'o' || radix == 'b') return lex_radix(lx, radix == 'x' ? 16 : radix == 'o' ? 8 : 2);
    take_digits(lx, &length, digits, &used, capacity);
    bool real = false;
    if (peek(lx, length) == '.' && is_digit(peek(lx, length + 1)) && !(lx->at > 0 && lx->source[lx->at - 1] == '.')) {
        real = true;
        if (used < capacity) digits[used++] = '.';
        length++;
        take_digits(lx, &length, digits, &used, capacity);
    }
    size_t sign = (size_t)(peek(lx, length + 1) == '+' || peek(lx, length + 1) == '-');
    if ((peek(lx, length) | 0x20) == 'e' && is_digit(peek(lx, length + 1 + sign))) {
        real = true;
        for (size_t i = 0; i < 1 + sign; i++)
            if (used < capacity) digits[used++] = peek(lx, length + i);
        length += 1 + sign;
        take_digits(lx, &length, digits, &used, capacity);
    }
    if (used >= capacity) return lex_fail(lx, "a number is too long");
    digits[used] = '\0';
    jinja_token *token = emit(lx, real ? JINJA_TOKEN_FLOAT : JINJA_TOKEN_INT, lx->at);
    if (!token) return false;
    errno = 0;
    token->number = strtod(digits, NULL);
    if (!real) token->integer = strtoll(digits, NULL, 10);
    if (!real && errno == ERANGE) return lex_fail(lx, "a number does not fit 64 bits");
    advance(lx, lx->at + length);
    return true;
}

static bool balance(lexer *lx, int op) {
    char close = (char)(op == '(' ? ')' : op == '[' ? ']' : op == '{' ? '}' : 0);
    if (close) {
        if (lx->open == MAX_BRACKETS) return lex_fail(lx, "brackets are nested too deep");
        lx->brackets[lx->open++] = close;
    } else if (op == ')' || op == ']' || op == '}') {
        if (lx->open == 0 || lx->brackets[--lx->open] != op) return lex_fail(lx, "a closing bracket has no opening one");
    }
    return true;
}

static bool lex_operator(lexer *lx) {
    static const char two[][3] = {"//", "**", "==", "!=", ">=", "<="};
    int op = (unsigned char)peek(lx, 0);
    size_t length = 1;
    for (size_t i = 0; i < sizeof two / sizeof *two; i++)
        if (op == two[i][0] && peek(lx, 1) == two[i][1]) {
            op = JINJA_OP2(two[i][0], two[i][1]);
            length = 2;
        }
    if (length == 1 && (op == 0 || !strchr("+-/*%~[](){}><=.:|,;", op))) return lex_fail(lx, "unexpected character in a tag");
    if (length == 1 && !balance(lx, op)) return false;
    jinja_token *token = emit(lx, JINJA_TOKEN_OPERATOR, lx->at);
    if (token) token->op = op;
    advance(lx, lx->at + length);
    return !lx->failed;
}

/* From after "{{" or "{%" to the end of the tag. */
static bool lex_tag(lexer *lx, bool block) {
    while (!lx->failed) {
        size_t length = lx->open ? 0 : closing(lx, lx->at, block ? "%}" : "}}", block, block);
        size_t space = skip_space(lx, lx->at);
        char c = peek(lx, 0);
        if (length) {
            emit(lx, block ? JINJA_TOKEN_BLOCK_END : JINJA_TOKEN_VARIABLE_END, lx->at);
            advance(lx, lx->at + length);
            return !lx->failed;
        }
        if (lx->at >= lx->size) return lex_fail(lx, "the template ends inside of a tag");
        if (space > lx->at) {
            advance(lx, space);
        } else if (is_digit(c)) {
            lex_number(lx);
        } else if (is_word(c)) {
            size_t end = lx->at;
            while (end < lx->size && is_word(lx->source[end])) end++;
            jinja_token *token = emit(lx, JINJA_TOKEN_NAME, lx->at);
            if (token) token->text = (jinja_text){lx->source + lx->at, end - lx->at};
            advance(lx, end);
        } else if (c == '\'' || c == '"') {
            lex_string(lx);
        } else {
            lex_operator(lx);
        }
    }
    return false;
}

/* Text up to the next tag, and the tag. */
static bool lex_next(lexer *lx) {
    size_t from = lx->at, at = from;
    while (at + 1 < lx->size && !(lx->source[at] == '{' && strchr("{%#", lx->source[at + 1]))) at++;
    if (at + 1 >= lx->size) {
        emit_data(lx, from, lx->size, '+', false);
        lx->at = lx->size;
        return !lx->failed;
    }
    char kind = lx->source[at + 1];
    size_t body = at + 2;
    char sign = body < lx->size && (lx->source[body] == '-' || lx->source[body] == '+') ? lx->source[body++] : '\0';
    emit_data(lx, from, at, sign, kind != '{');
    lx->at = at;
    if (kind == '#') return lex_comment(lx, body);
    size_t raw = kind == '%' ? raw_begin(lx, body) : 0;
    if (raw) return lex_raw(lx, raw);
    emit(lx, kind == '%' ? JINJA_TOKEN_BLOCK_BEGIN : JINJA_TOKEN_VARIABLE_BEGIN, at);
    advance(lx, body);
    return lex_tag(lx, kind == '%');
}

/* \r\n and \r become \n, and one newline at the very end is dropped. */
static bool normalise(lexer *lx, const char *source, size_t size) {
    char *text = moe_jinja_arena_alloc(lx->arena, size + 1, 1);
    if (!text) return no_memory(lx);
    size_t used = 0;
    for (size_t i = 0; i < size; i++) {
        if (source[i] == '\r' && i + 1 < size && source[i + 1] == '\n') i++;
        text[used++] = (char)(source[i] == '\r' ? '\n' : source[i]);
    }
    if (used > 0 && text[used - 1] == '\n') used--;
    lx->source = text;
    lx->size = used;
    return true;
}

moe_status moe_jinja_lex(jinja_arena *arena, const char *source, jinja_token **tokens, moe_error *err) {
    moe_error own = {0};
    lexer lx = {.arena = arena, .line = 1, .line_starting = true, .err = &own};
    size_t size = strnlen(source, MOE_JINJA_MAX_SOURCE_BYTES + 1);
    if (size > MOE_JINJA_MAX_SOURCE_BYTES)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "the chat template is longer than %zu bytes", MOE_JINJA_MAX_SOURCE_BYTES);
    if (!moe_jinja_utf8_valid(source, size)) return moe_fail(err, MOE_INVALID_ARGUMENT, "the chat template is not UTF-8");
    bool going = normalise(&lx, source, size);
    while (going && lx.at < lx.size) going = lex_next(&lx);
    emit(&lx, JINJA_TOKEN_END, lx.size);
    if (lx.failed) return moe_fail(err, own.code, "%s", own.message);
    *tokens = lx.tokens;
    return MOE_OK;
}
