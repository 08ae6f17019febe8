/* Source → tokens → syntax tree. The language is Jinja 3's (https://jinja.palletsprojects.com/templates/) as transformers sets it
 * up: trim_blocks, lstrip_blocks, loop controls, `generation` blocks. Not built, and refused by name and line: include, import,
 * extends, block, autoescape, recursive loops, * and ** arguments, and filters or tests not in the tables. */
#pragma once
#include "common/status.h"
#include "router/chat/jinja_value.h"

#define MOE_JINJA_MAX_SOURCE_BYTES ((size_t)1 << 20)
#define MOE_JINJA_MAX_TREE_BYTES ((size_t)256 << 20) /* tokens and tree; about 200 bytes for a byte of source at worst */
#define MOE_JINJA_MAX_NESTING 100                    /* blocks and expressions inside each other */

/* ---- tokens (jinja_lex.c) ---- */

typedef enum jinja_token_kind {
    JINJA_TOKEN_DATA, /* text outside of tags, white space already trimmed */
    JINJA_TOKEN_VARIABLE_BEGIN,
    JINJA_TOKEN_VARIABLE_END,
    JINJA_TOKEN_BLOCK_BEGIN,
    JINJA_TOKEN_BLOCK_END,
    JINJA_TOKEN_NAME,
    JINJA_TOKEN_STRING,
    JINJA_TOKEN_INT,
    JINJA_TOKEN_FLOAT,
    JINJA_TOKEN_OPERATOR,
    JINJA_TOKEN_END
} jinja_token_kind;

#define JINJA_OP2(a, b) ((a) << 8 | (b)) /* an operator of two characters; one of one character is the character */

typedef struct jinja_token {
    jinja_token_kind kind;
    int line;
    int op;
    jinja_text text; /* DATA, NAME; STRING with its escapes decoded */
    int64_t integer;
    double number;
} jinja_token;

/* All tokens of the source, the last one END. Everything is in the arena. */
moe_status moe_jinja_lex(jinja_arena *arena, const char *source, jinja_token **tokens, moe_error *err);

/* ---- tree ---- */

typedef enum jinja_node_kind {
    /* expressions */
    JINJA_CONST,     /* constant */
    JINJA_NAME,      /* text */
    JINJA_ATTRIBUTE, /* a.text */
    JINJA_ITEM,      /* a[b] */
    JINJA_SLICE,     /* a[b:c:d] */
    JINJA_CALL,      /* a(items) */
    JINJA_FILTER,    /* a | function(items) */
    JINJA_TEST,      /* a is function(items) */
    JINJA_KEYWORD,   /* text=a, among the items of a call */
    JINJA_UNARY,     /* op a: '-', '+', '!' for not */
    JINJA_BINARY,    /* a op b */
    JINJA_AND,       /* a and b */
    JINJA_OR,        /* a or b */
    JINJA_COMPARE,   /* a, then items: OPERANDs */
    JINJA_OPERAND,   /* op a; 'i' for in, 'n' for not in */
    JINJA_IF_ELSE,   /* a: test, b: then, c: else or NULL */
    JINJA_LIST_OF,   /* items */
    JINJA_TUPLE_OF,  /* items */
    JINJA_DICT_OF,   /* items: key, value, key, value … */
    JINJA_CAPTURED,  /* the text that a filter block's filters apply to */
    /* statements */
    JINJA_TEXT,         /* text */
    JINJA_PRINT,        /* a */
    JINJA_FOR,          /* a: target, b: iterable, c: condition or NULL; body, otherwise */
    JINJA_IF,           /* a: test; body, otherwise */
    JINJA_SET,          /* a: target, b: value */
    JINJA_SET_BLOCK,    /* a: target, b: filters over CAPTURED; body */
    JINJA_MACRO_DEF,    /* text; items: PARAMETERs; body */
    JINJA_PARAMETER,    /* text, a: default or NULL */
    JINJA_CALL_BLOCK,   /* a: CALL; items: PARAMETERs; body */
    JINJA_FILTER_BLOCK, /* b: filters over CAPTURED; body */
    JINJA_WITH,         /* items: target, value, target, value …; body */
    JINJA_SCOPED,       /* body (a generation block) */
    JINJA_BREAK,
    JINJA_CONTINUE
} jinja_node_kind;

typedef struct jinja_node {
    jinja_node_kind kind;
    int line;
    int op;
    jinja_text text;
    jinja_value constant;
    const struct jinja_function *function;
    struct jinja_node *a, *b, *c, *d;
    struct jinja_node *items, *body, *otherwise; /* first of a list linked by `next` */
    struct jinja_node *next;
} jinja_node;

/* The statements of a template, in the arena; *body is NULL for an empty one. */
moe_status moe_jinja_parse(jinja_arena *arena, const char *source, jinja_node **body, moe_error *err);

/* ---- inside the parser (jinja_parse.c statements, jinja_parse_expression.c expressions) ---- */

typedef struct jinja_parser {
    jinja_arena *arena;
    const jinja_token *at;
    int nesting, loops; /* depth of blocks and expressions; of for loops of the same macro */
    bool failed;        /* sticky; *err says why. Nodes made after it are the dummy. */
    moe_error *err;
    jinja_node dummy;
} jinja_parser;

jinja_node *moe_jinja_node(jinja_parser *parser, jinja_node_kind kind);
/* Records the first failure, with the line of the token at hand. */
void moe_jinja_parse_fail(jinja_parser *parser, const char *format, ...) __attribute__((format(printf, 2, 3)));
bool moe_jinja_at_op(const jinja_parser *parser, int op);
bool moe_jinja_at_name(const jinja_parser *parser, const char *name);
bool moe_jinja_skip_op(jinja_parser *parser, int op); /* takes it if it is there */
bool moe_jinja_skip_name(jinja_parser *parser, const char *name);
void moe_jinja_expect_op(jinja_parser *parser, int op);
jinja_text moe_jinja_expect_name(jinja_parser *parser);
/* Counts nesting; false (and a failure) when too deep. Pair with parser->nesting--. */
bool moe_jinja_enter(jinja_parser *parser);

/* `ternary`: whether `x if y else z` is allowed (not in the head of a for). */
jinja_node *moe_jinja_parse_expression(jinja_parser *parser, bool ternary);
/* An expression, or a tuple of several without parentheses. */
jinja_node *moe_jinja_parse_tuple(jinja_parser *parser, bool ternary, bool parenthesised);
jinja_node *moe_jinja_parse_primary(jinja_parser *parser);
/* The filters that follow, applied to node; `first`: the first one stands without its `|`. */
jinja_node *moe_jinja_parse_filters(jinja_parser *parser, jinja_node *node, bool first);
