/* Expressions, by recursive descent in the order of precedence of jinja2/parser.py. */
#include <string.h>

#include "router/chat/jinja_ast.h"
#include "router/chat/jinja_run.h"

static jinja_node *parse_unary(jinja_parser *p, bool filters);

static jinja_node *with_operands(jinja_parser *p, jinja_node_kind kind, int op, jinja_node *a, jinja_node *b) {
    jinja_node *node = moe_jinja_node(p, kind);
    node->op = op;
    node->a = a;
    node->b = b;
    if (a) node->line = a->line;
    return node;
}

static void append(jinja_node **first, jinja_node **last, jinja_node *node) {
    if (*last) (*last)->next = node;
    if (!*first) *first = node;
    *last = node;
}

/* Arguments up to the closing parenthesis; the opening one is at hand. */
static jinja_node *parse_arguments(jinja_parser *p) {
    jinja_node *first = NULL, *last = NULL;
    bool keywords = false;
    moe_jinja_expect_op(p, '(');
    while (!p->failed && !moe_jinja_at_op(p, ')')) {
        if (first) moe_jinja_expect_op(p, ',');
        if (moe_jinja_at_op(p, ')')) break;
        if (moe_jinja_at_op(p, '*') || moe_jinja_at_op(p, JINJA_OP2('*', '*'))) {
            moe_jinja_parse_fail(p, "* and ** arguments are not built");
            break;
        }
        bool keyword = p->at->kind == JINJA_TOKEN_NAME && p->at[1].kind == JINJA_TOKEN_OPERATOR && p->at[1].op == '=';
        if (!keyword && keywords) moe_jinja_parse_fail(p, "a positional argument follows a keyword argument");
        if (keyword) {
            jinja_node *node = moe_jinja_node(p, JINJA_KEYWORD);
            node->text = p->at->text;
            p->at += 2;
            node->a = moe_jinja_parse_expression(p, true);
            append(&first, &last, node);
            keywords = true;
        } else {
            append(&first, &last, moe_jinja_parse_expression(p, true));
        }
    }
    moe_jinja_expect_op(p, ')');
    return first;
}

static jinja_node *parse_call(jinja_parser *p, jinja_node *callee) {
    jinja_node *node = with_operands(p, JINJA_CALL, 0, callee, NULL);
    node->items = parse_arguments(p);
    return node;
}

static jinja_node *constant(jinja_parser *p, jinja_value value) {
    jinja_node *node = moe_jinja_node(p, JINJA_CONST);
    node->constant = value;
    p->at++;
    return node;
}

/* Adjacent literals are one string. */
static jinja_node *parse_string(jinja_parser *p) {
    size_t size = 0, used = 0, count = 0;
    for (; p->at[count].kind == JINJA_TOKEN_STRING; count++) size += p->at[count].text.size;
    jinja_node *node = moe_jinja_node(p, JINJA_CONST);
    node->constant = jinja_string(p->at->text.data, p->at->text.size);
    if (count > 1) {
        char *joined = moe_jinja_arena_alloc(p->arena, size + 1, 1);
        if (!joined) moe_jinja_parse_fail(p, "out of memory");
        for (size_t i = 0; joined && i < count; i++) {
            memcpy(joined + used, p->at[i].text.data, p->at[i].text.size);
            used += p->at[i].text.size;
        }
        node->constant = jinja_string(joined, used);
    }
    p->at += count;
    return node;
}

static jinja_node *parse_name(jinja_parser *p) {
    jinja_text text = p->at->text;
    if (moe_jinja_text_is(text, "true") || moe_jinja_text_is(text, "True")) return constant(p, jinja_bool(true));
    if (moe_jinja_text_is(text, "false") || moe_jinja_text_is(text, "False")) return constant(p, jinja_bool(false));
    if (moe_jinja_text_is(text, "none") || moe_jinja_text_is(text, "None")) return constant(p, jinja_none());
    jinja_node *node = moe_jinja_node(p, JINJA_NAME);
    node->text = text;
    p->at++;
    return node;
}

/* [a, b] or {a: b, c: d}, a trailing comma allowed. */
static jinja_node *parse_display(jinja_parser *p, jinja_node_kind kind, int close) {
    jinja_node *node = moe_jinja_node(p, kind), *last = NULL;
    p->at++;
    while (!p->failed && !moe_jinja_at_op(p, close)) {
        if (last) moe_jinja_expect_op(p, ',');
        if (moe_jinja_at_op(p, close)) break;
        append(&node->items, &last, moe_jinja_parse_expression(p, true));
        if (kind != JINJA_DICT_OF) continue;
        moe_jinja_expect_op(p, ':');
        append(&node->items, &last, moe_jinja_parse_expression(p, true));
    }
    moe_jinja_expect_op(p, close);
    return node;
}

jinja_node *moe_jinja_parse_primary(jinja_parser *p) {
    const jinja_token *token = p->at;
    jinja_node *node;
    if (token->kind == JINJA_TOKEN_NAME) return parse_name(p);
    if (token->kind == JINJA_TOKEN_STRING) return parse_string(p);
    if (token->kind == JINJA_TOKEN_INT) return constant(p, jinja_int(token->integer));
    if (token->kind == JINJA_TOKEN_FLOAT) return constant(p, jinja_float(token->number));
    if (moe_jinja_at_op(p, '[')) return parse_display(p, JINJA_LIST_OF, ']');
    if (moe_jinja_at_op(p, '{')) return parse_display(p, JINJA_DICT_OF, '}');
    if (moe_jinja_skip_op(p, '(')) {
        node = moe_jinja_parse_tuple(p, true, true);
        moe_jinja_expect_op(p, ')');
        return node;
    }
    moe_jinja_parse_fail(p, "an expression was expected");
    return &p->dummy;
}

static bool at_slice_end(const jinja_parser *p) {
    return moe_jinja_at_op(p, ']') || moe_jinja_at_op(p, ',') || moe_jinja_at_op(p, ':');
}

/* a[…]: an item or a slice. */
static jinja_node *parse_brackets(jinja_parser *p, jinja_node *object) {
    jinja_node *first = NULL;
    moe_jinja_expect_op(p, '[');
    if (!moe_jinja_at_op(p, ':')) first = moe_jinja_parse_expression(p, true);
    jinja_node *node = with_operands(p, moe_jinja_at_op(p, ':') ? JINJA_SLICE : JINJA_ITEM, 0, object, first);
    if (moe_jinja_skip_op(p, ':')) {
        if (!at_slice_end(p)) node->c = moe_jinja_parse_expression(p, true);
        if (moe_jinja_skip_op(p, ':') && !at_slice_end(p)) node->d = moe_jinja_parse_expression(p, true);
    }
    moe_jinja_expect_op(p, ']');
    return node;
}

static jinja_node *parse_postfix(jinja_parser *p, jinja_node *node) {
    while (!p->failed) {
        if (moe_jinja_skip_op(p, '.')) {
            if (p->at->kind == JINJA_TOKEN_INT) {
                jinja_node *index = constant(p, jinja_int(p->at->integer));
                node = with_operands(p, JINJA_ITEM, 0, node, index);
            } else {
                node = with_operands(p, JINJA_ATTRIBUTE, 0, node, NULL);
                node->text = moe_jinja_expect_name(p);
            }
        } else if (moe_jinja_at_op(p, '[')) {
            node = parse_brackets(p, node);
        } else if (moe_jinja_at_op(p, '(')) {
            node = parse_call(p, node);
        } else {
            break;
        }
    }
    return node;
}

static jinja_node *parse_filter(jinja_parser *p, jinja_node *subject) {
    jinja_node *node = with_operands(p, JINJA_FILTER, 0, subject, NULL);
    node->line = p->at->line;
    jinja_text name = moe_jinja_expect_name(p);
    node->function = moe_jinja_find_filter(name);
    if (!node->function) moe_jinja_parse_fail(p, "the filter '%.*s' is not built", (int)name.size, name.data);
    if (moe_jinja_at_op(p, '(')) node->items = parse_arguments(p);
    return node;
}

jinja_node *moe_jinja_parse_filters(jinja_parser *p, jinja_node *node, bool first) {
    if (first) node = parse_filter(p, node);
    while (!p->failed && moe_jinja_skip_op(p, '|')) node = parse_filter(p, node);
    return node;
}

/* A test may take one argument without parentheses: `x is divisibleby 3`. */
static bool at_bare_argument(const jinja_parser *p) {
    jinja_token_kind kind = p->at->kind;
    if (kind == JINJA_TOKEN_NAME)
        return !moe_jinja_at_name(p, "else") && !moe_jinja_at_name(p, "or") && !moe_jinja_at_name(p, "and");
    return kind == JINJA_TOKEN_STRING || kind == JINJA_TOKEN_INT || kind == JINJA_TOKEN_FLOAT || moe_jinja_at_op(p, '[') ||
           moe_jinja_at_op(p, '{');
}

static jinja_node *parse_test(jinja_parser *p, jinja_node *subject) {
    bool negated = moe_jinja_skip_name(p, "not");
    jinja_node *node = with_operands(p, JINJA_TEST, 0, subject, NULL);
    jinja_text name = moe_jinja_expect_name(p);
    node->function = moe_jinja_find_test(name);
    if (!node->function) moe_jinja_parse_fail(p, "the test '%.*s' is not built", (int)name.size, name.data);
    if (moe_jinja_at_op(p, '(')) {
        node->items = parse_arguments(p);
    } else if (at_bare_argument(p)) {
        if (moe_jinja_at_name(p, "is")) moe_jinja_parse_fail(p, "tests cannot be chained");
        node->items = parse_postfix(p, moe_jinja_parse_primary(p));
    }
    return negated ? with_operands(p, JINJA_UNARY, '!', node, NULL) : node;
}

static jinja_node *parse_filters_and_tests(jinja_parser *p, jinja_node *node) {
    while (!p->failed) {
        if (moe_jinja_at_op(p, '|')) {
            node = moe_jinja_parse_filters(p, node, false);
        } else if (moe_jinja_skip_name(p, "is")) {
            node = parse_test(p, node);
        } else if (moe_jinja_at_op(p, '(')) {
            node = parse_call(p, node);
        } else {
            break;
        }
    }
    return node;
}

static jinja_node *parse_unary(jinja_parser *p, bool filters) {
    jinja_node *node;
    if (!moe_jinja_enter(p)) return &p->dummy;
    if (moe_jinja_skip_op(p, '-')) {
        node = with_operands(p, JINJA_UNARY, '-', parse_unary(p, false), NULL);
    } else if (moe_jinja_skip_op(p, '+')) {
        node = with_operands(p, JINJA_UNARY, '+', parse_unary(p, false), NULL);
    } else {
        node = moe_jinja_parse_primary(p);
    }
    node = parse_postfix(p, node);
    if (filters) node = parse_filters_and_tests(p, node);
    p->nesting--;
    return node;
}

/* Binary operators of one level, left-associative. `ops` ends with 0. */
static int take_op(jinja_parser *p, const int *ops) {
    for (; *ops; ops++)
        if (moe_jinja_skip_op(p, *ops)) return *ops;
    return 0;
}

static jinja_node *parse_power(jinja_parser *p) {
    jinja_node *node = parse_unary(p, true);
    while (!p->failed && moe_jinja_skip_op(p, JINJA_OP2('*', '*')))
        node = with_operands(p, JINJA_BINARY, JINJA_OP2('*', '*'), node, parse_unary(p, true));
    return node;
}

static jinja_node *parse_product(jinja_parser *p) {
    static const int ops[] = {'*', '/', JINJA_OP2('/', '/'), '%', 0};
    jinja_node *node = parse_power(p);
    for (int op; !p->failed && (op = take_op(p, ops));) node = with_operands(p, JINJA_BINARY, op, node, parse_power(p));
    return node;
}

static jinja_node *parse_concatenation(jinja_parser *p) {
    jinja_node *node = parse_product(p);
    while (!p->failed && moe_jinja_skip_op(p, '~')) node = with_operands(p, JINJA_BINARY, '~', node, parse_product(p));
    return node;
}

static jinja_node *parse_sum(jinja_parser *p) {
    static const int ops[] = {'+', '-', 0};
    jinja_node *node = parse_concatenation(p);
    for (int op; !p->failed && (op = take_op(p, ops));) node = with_operands(p, JINJA_BINARY, op, node, parse_concatenation(p));
    return node;
}

static int take_comparison(jinja_parser *p) {
    static const int ops[] = {JINJA_OP2('=', '='), JINJA_OP2('!', '='), JINJA_OP2('<', '='), JINJA_OP2('>', '='), '<', '>', 0};
    if (moe_jinja_skip_name(p, "in")) return 'i';
    if (moe_jinja_at_name(p, "not") && p->at[1].kind == JINJA_TOKEN_NAME && moe_jinja_text_is(p->at[1].text, "in")) {
        p->at += 2;
        return 'n';
    }
    return take_op(p, ops);
}

static jinja_node *parse_comparison(jinja_parser *p) {
    jinja_node *left = parse_sum(p), *node = NULL, *last = NULL;
    for (int op; !p->failed && (op = take_comparison(p));) {
        if (!node) node = with_operands(p, JINJA_COMPARE, 0, left, NULL);
        append(&node->items, &last, with_operands(p, JINJA_OPERAND, op, parse_sum(p), NULL));
    }
    return node ? node : left;
}

static jinja_node *parse_not(jinja_parser *p) {
    if (!moe_jinja_skip_name(p, "not")) return parse_comparison(p);
    if (!moe_jinja_enter(p)) return &p->dummy;
    jinja_node *node = with_operands(p, JINJA_UNARY, '!', parse_not(p), NULL);
    p->nesting--;
    return node;
}

static jinja_node *parse_and(jinja_parser *p) {
    jinja_node *node = parse_not(p);
    while (!p->failed && moe_jinja_skip_name(p, "and")) node = with_operands(p, JINJA_AND, 0, node, parse_not(p));
    return node;
}

static jinja_node *parse_or(jinja_parser *p) {
    jinja_node *node = parse_and(p);
    while (!p->failed && moe_jinja_skip_name(p, "or")) node = with_operands(p, JINJA_OR, 0, node, parse_and(p));
    return node;
}

jinja_node *moe_jinja_parse_expression(jinja_parser *p, bool ternary) {
    if (!moe_jinja_enter(p)) return &p->dummy;
    jinja_node *node = parse_or(p);
    while (ternary && !p->failed && moe_jinja_skip_name(p, "if")) {
        jinja_node *then = node;
        node = with_operands(p, JINJA_IF_ELSE, 0, parse_or(p), then);
        if (moe_jinja_skip_name(p, "else")) node->c = moe_jinja_parse_expression(p, true);
    }
    p->nesting--;
    return node;
}

static bool at_tuple_end(const jinja_parser *p) {
    jinja_token_kind kind = p->at->kind;
    return kind == JINJA_TOKEN_VARIABLE_END || kind == JINJA_TOKEN_BLOCK_END || moe_jinja_at_op(p, ')') ||
           moe_jinja_at_name(p, "recursive");
}

jinja_node *moe_jinja_parse_tuple(jinja_parser *p, bool ternary, bool parenthesised) {
    jinja_node *first = NULL, *last = NULL;
    bool tuple = false;
    while (!p->failed && !at_tuple_end(p)) {
        append(&first, &last, moe_jinja_parse_expression(p, ternary));
        if (!moe_jinja_skip_op(p, ',')) break;
        tuple = true;
    }
    if (!tuple && first) return first;
    if (!first && !parenthesised) moe_jinja_parse_fail(p, "an expression was expected");
    jinja_node *node = moe_jinja_node(p, JINJA_TUPLE_OF);
    node->items = first;
    return node;
}
