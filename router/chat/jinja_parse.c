/* Statements, after jinja2/parser.py. */
#include <stdarg.h>
#include <stdio.h>

#include "router/chat/jinja_ast.h"

static jinja_node *parse_statement(jinja_parser *p);

jinja_node *moe_jinja_node(jinja_parser *p, jinja_node_kind kind) {
    jinja_node *node = p->failed ? NULL : moe_jinja_arena_alloc(p->arena, 1, sizeof *node);
    if (!node) {
        moe_jinja_parse_fail(p, "out of memory");
        p->dummy = (jinja_node){0};
        return &p->dummy;
    }
    node->kind = kind;
    node->line = p->at->line;
    return node;
}

void moe_jinja_parse_fail(jinja_parser *p, const char *format, ...) {
    char what[MOE_ERROR_MESSAGE_BYTES - 64];
    va_list args;
    if (p->failed) return;
    p->failed = true;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    moe_fail(p->err, MOE_INVALID_ARGUMENT, "line %d: %s", p->at->line, what);
}

bool moe_jinja_at_op(const jinja_parser *p, int op) { return p->at->kind == JINJA_TOKEN_OPERATOR && p->at->op == op; }

bool moe_jinja_at_name(const jinja_parser *p, const char *name) {
    return p->at->kind == JINJA_TOKEN_NAME && moe_jinja_text_is(p->at->text, name);
}

bool moe_jinja_skip_op(jinja_parser *p, int op) {
    bool there = moe_jinja_at_op(p, op);
    if (there) p->at++;
    return there;
}

bool moe_jinja_skip_name(jinja_parser *p, const char *name) {
    bool there = moe_jinja_at_name(p, name);
    if (there) p->at++;
    return there;
}

void moe_jinja_expect_op(jinja_parser *p, int op) {
    if (!moe_jinja_skip_op(p, op)) moe_jinja_parse_fail(p, "'%c' was expected", op);
}

jinja_text moe_jinja_expect_name(jinja_parser *p) {
    if (p->at->kind == JINJA_TOKEN_NAME) return p->at++->text;
    moe_jinja_parse_fail(p, "a name was expected");
    return (jinja_text){"", 0};
}

bool moe_jinja_enter(jinja_parser *p) {
    if (p->failed) return false;
    if (p->nesting == MOE_JINJA_MAX_NESTING) {
        moe_jinja_parse_fail(p, "blocks and expressions are nested deeper than %d", MOE_JINJA_MAX_NESTING);
        return false;
    }
    p->nesting++;
    return true;
}

static void expect_block_end(jinja_parser *p) {
    if (p->at->kind == JINJA_TOKEN_BLOCK_END)
        p->at++;
    else
        moe_jinja_parse_fail(p, "the end of the tag was expected");
}

static bool at_any(const jinja_parser *p, const char *const *ends) {
    for (; ends && *ends; ends++)
        if (moe_jinja_at_name(p, *ends)) return true;
    return false;
}

/* Statements up to a tag whose name is in `ends` (NULL: the end of the template); the name is at hand afterwards. */
static jinja_node *parse_body(jinja_parser *p, const char *const *ends) {
    jinja_node *first = NULL, **link = &first;
    while (!p->failed) {
        jinja_node *node;
        if (p->at->kind == JINJA_TOKEN_END) {
            if (ends) moe_jinja_parse_fail(p, "the template ends where '%s' was expected", *ends);
            break;
        } else if (p->at->kind == JINJA_TOKEN_DATA) {
            node = moe_jinja_node(p, JINJA_TEXT);
            node->text = p->at++->text;
        } else if (p->at->kind == JINJA_TOKEN_VARIABLE_BEGIN) {
            p->at++;
            node = moe_jinja_node(p, JINJA_PRINT);
            node->a = moe_jinja_parse_tuple(p, true, false);
            if (p->at->kind == JINJA_TOKEN_VARIABLE_END)
                p->at++;
            else
                moe_jinja_parse_fail(p, "'}}' was expected");
        } else {
            p->at++;
            if (at_any(p, ends)) break;
            node = parse_statement(p);
            expect_block_end(p);
        }
        if (p->failed) break;
        *link = node;
        link = &node->next;
    }
    return first;
}

/* The body between the tag at hand and its end tag, whose name is taken. */
static jinja_node *parse_block_body(jinja_parser *p, const char *end) {
    const char *const ends[] = {end, NULL};
    expect_block_end(p);
    jinja_node *body = parse_body(p, ends);
    moe_jinja_skip_name(p, end);
    return body;
}

/* ---- targets ---- */

static jinja_node *parse_target_name(jinja_parser *p, bool attributes) {
    if (moe_jinja_at_name(p, "true") || moe_jinja_at_name(p, "false") || moe_jinja_at_name(p, "none"))
        moe_jinja_parse_fail(p, "a constant cannot be assigned to");
    jinja_node *node = moe_jinja_node(p, JINJA_NAME);
    node->text = moe_jinja_expect_name(p);
    if (attributes && moe_jinja_skip_op(p, '.')) {
        jinja_node *attribute = moe_jinja_node(p, JINJA_ATTRIBUTE);
        attribute->a = node;
        attribute->text = moe_jinja_expect_name(p);
        return attribute;
    }
    return node;
}

/* A name, `namespace.attribute`, or a tuple of names, parenthesised or not. */
static jinja_node *parse_target(jinja_parser *p, bool attributes) {
    if (!moe_jinja_enter(p)) return &p->dummy;
    jinja_node *first = NULL, **link = &first;
    bool tuple = false;
    do {
        if (first && (moe_jinja_at_name(p, "in") || moe_jinja_at_op(p, '=') || moe_jinja_at_op(p, ')'))) break;
        bool inner = moe_jinja_skip_op(p, '(');
        *link = inner ? parse_target(p, false) : parse_target_name(p, attributes && !tuple);
        if (inner) moe_jinja_expect_op(p, ')');
        if (p->failed) break;
        link = &(*link)->next;
        tuple = tuple || moe_jinja_at_op(p, ',');
    } while (moe_jinja_skip_op(p, ','));
    p->nesting--;
    if (!tuple || p->failed) return first ? first : &p->dummy;
    jinja_node *node = moe_jinja_node(p, JINJA_TUPLE_OF);
    node->items = first;
    return node;
}

/* ---- statements; the name of the tag has been taken ---- */

static jinja_node *parse_for(jinja_parser *p) {
    static const char *const ends[] = {"endfor", "else", NULL};
    jinja_node *node = moe_jinja_node(p, JINJA_FOR);
    node->a = parse_target(p, false);
    if (!moe_jinja_skip_name(p, "in")) moe_jinja_parse_fail(p, "'in' was expected");
    node->b = moe_jinja_parse_tuple(p, false, false);
    if (moe_jinja_skip_name(p, "if")) node->c = moe_jinja_parse_expression(p, true);
    if (moe_jinja_at_name(p, "recursive")) moe_jinja_parse_fail(p, "recursive loops are not built");
    expect_block_end(p);
    p->loops++;
    node->body = parse_body(p, ends);
    p->loops--;
    if (moe_jinja_skip_name(p, "else")) {
        node->otherwise = parse_block_body(p, "endfor");
    } else {
        moe_jinja_skip_name(p, "endfor");
    }
    return node;
}

static jinja_node *parse_if(jinja_parser *p) {
    static const char *const ends[] = {"endif", "elif", "else", NULL};
    jinja_node *first = moe_jinja_node(p, JINJA_IF), *node = first;
    for (;;) {
        node->a = moe_jinja_parse_tuple(p, false, false);
        expect_block_end(p);
        node->body = parse_body(p, ends);
        if (p->failed || !moe_jinja_skip_name(p, "elif")) break;
        node->otherwise = moe_jinja_node(p, JINJA_IF);
        node = node->otherwise;
    }
    if (moe_jinja_skip_name(p, "else")) {
        node->otherwise = parse_block_body(p, "endif");
    } else {
        moe_jinja_skip_name(p, "endif");
    }
    return first;
}

static jinja_node *parse_set(jinja_parser *p) {
    jinja_node *node = moe_jinja_node(p, JINJA_SET);
    node->a = parse_target(p, true);
    if (moe_jinja_skip_op(p, '=')) {
        node->b = moe_jinja_parse_tuple(p, true, false);
        return node;
    }
    node->kind = JINJA_SET_BLOCK;
    node->b = moe_jinja_parse_filters(p, moe_jinja_node(p, JINJA_CAPTURED), false);
    node->body = parse_block_body(p, "endset");
    return node;
}

/* (a, b=1) */
static jinja_node *parse_parameters(jinja_parser *p) {
    jinja_node *first = NULL, **link = &first;
    bool defaults = false;
    moe_jinja_expect_op(p, '(');
    while (!p->failed && !moe_jinja_at_op(p, ')')) {
        if (first) moe_jinja_expect_op(p, ',');
        if (first && moe_jinja_at_op(p, ')')) break;
        jinja_node *node = moe_jinja_node(p, JINJA_PARAMETER);
        node->text = moe_jinja_expect_name(p);
        if (moe_jinja_skip_op(p, '=')) {
            node->a = moe_jinja_parse_expression(p, true);
            defaults = true;
        } else if (defaults) {
            moe_jinja_parse_fail(p, "a parameter without a default follows one with a default");
        }
        *link = node;
        link = &node->next;
    }
    moe_jinja_expect_op(p, ')');
    return first;
}

/* Loops around a macro are not the macro's. */
static jinja_node *parse_macro_body(jinja_parser *p, const char *end) {
    int loops = p->loops;
    p->loops = 0;
    jinja_node *body = parse_block_body(p, end);
    p->loops = loops;
    return body;
}

static jinja_node *parse_macro(jinja_parser *p) {
    jinja_node *node = moe_jinja_node(p, JINJA_MACRO_DEF);
    node->text = moe_jinja_expect_name(p);
    node->items = parse_parameters(p);
    node->body = parse_macro_body(p, "endmacro");
    return node;
}

static jinja_node *parse_call_block(jinja_parser *p) {
    jinja_node *node = moe_jinja_node(p, JINJA_CALL_BLOCK);
    if (moe_jinja_at_op(p, '(')) node->items = parse_parameters(p);
    node->a = moe_jinja_parse_expression(p, true);
    if (node->a->kind != JINJA_CALL) moe_jinja_parse_fail(p, "a call was expected");
    node->body = parse_macro_body(p, "endcall");
    return node;
}

static jinja_node *parse_filter_block(jinja_parser *p) {
    jinja_node *node = moe_jinja_node(p, JINJA_FILTER_BLOCK);
    node->b = moe_jinja_parse_filters(p, moe_jinja_node(p, JINJA_CAPTURED), true);
    node->body = parse_block_body(p, "endfilter");
    return node;
}

static jinja_node *parse_with(jinja_parser *p) {
    jinja_node *node = moe_jinja_node(p, JINJA_WITH), **link = &node->items;
    while (!p->failed && p->at->kind != JINJA_TOKEN_BLOCK_END) {
        if (node->items) moe_jinja_expect_op(p, ',');
        jinja_node *target = parse_target_name(p, false);
        moe_jinja_expect_op(p, '=');
        jinja_node *value = moe_jinja_parse_expression(p, true);
        if (p->failed) break;
        *link = target;
        target->next = value;
        link = &value->next;
    }
    node->body = parse_block_body(p, "endwith");
    return node;
}

static jinja_node *parse_generation(jinja_parser *p) {
    jinja_node *node = moe_jinja_node(p, JINJA_SCOPED);
    node->body = parse_macro_body(p, "endgeneration");
    return node;
}

static jinja_node *parse_print(jinja_parser *p) {
    jinja_node *node = moe_jinja_node(p, JINJA_PRINT);
    node->a = moe_jinja_parse_tuple(p, true, false);
    return node;
}

static jinja_node *parse_jump(jinja_parser *p, jinja_node_kind kind) {
    if (p->loops == 0) moe_jinja_parse_fail(p, "break or continue stands outside of a loop");
    return moe_jinja_node(p, kind);
}

static jinja_node *parse_break(jinja_parser *p) { return parse_jump(p, JINJA_BREAK); }
static jinja_node *parse_continue(jinja_parser *p) { return parse_jump(p, JINJA_CONTINUE); }

static jinja_node *parse_statement(jinja_parser *p) {
    static const struct {
        const char *name;
        jinja_node *(*parse)(jinja_parser *p);
    } statements[] = {{"for", parse_for},          {"if", parse_if},
                      {"set", parse_set},          {"macro", parse_macro},
                      {"call", parse_call_block},  {"filter", parse_filter_block},
                      {"with", parse_with},        {"generation", parse_generation},
                      {"print", parse_print},      {"break", parse_break},
                      {"continue", parse_continue}};
    if (!moe_jinja_enter(p)) return &p->dummy;
    jinja_node *node = NULL;
    for (size_t i = 0; !node && i < sizeof statements / sizeof *statements; i++)
        if (moe_jinja_skip_name(p, statements[i].name)) node = statements[i].parse(p);
    if (!node) {
        jinja_text name = p->at->kind == JINJA_TOKEN_NAME ? p->at->text : (jinja_text){"", 0};
        moe_jinja_parse_fail(p, "the tag '%.*s' is unknown, misplaced or not built", (int)name.size, name.data);
        node = &p->dummy;
    }
    p->nesting--;
    return node;
}

moe_status moe_jinja_parse(jinja_arena *arena, const char *source, jinja_node **body, moe_error *err) {
    moe_error own = {0};
    jinja_token *tokens;
    moe_status status = moe_jinja_lex(arena, source, &tokens, err);
    if (status != MOE_OK) return status;
    jinja_parser p = {.arena = arena, .at = tokens, .err = &own};
    *body = parse_body(&p, NULL);
    return p.failed ? moe_fail(err, own.code, "%s", own.message) : MOE_OK;
}
