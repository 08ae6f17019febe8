/* Rendering a tree. Errors are sticky, as in moe_buf and moe_cursor: the first failure is kept in the run, later operations yield
 * undefined at once, and the caller of the whole checks `failed` at the end; loops check it in each round. */
#pragma once
#include <jansson.h>

#include "common/buf.h"
#include "router/chat/jinja_ast.h"

#define MOE_JINJA_MAX_RUN_BYTES ((size_t)64 << 20)    /* values of one rendering */
#define MOE_JINJA_MAX_OUTPUT_BYTES ((size_t)16 << 20) /* also of one captured block */
#define MOE_JINJA_MAX_STEPS 4000000                   /* nodes evaluated, and items or 64-byte stretches worked on */
#define MOE_JINJA_MAX_DEPTH 400                       /* evaluations and values inside each other; macros may recurse */
#define MOE_JINJA_MAX_RANGE 100000                    /* items of range(), as in jinja2's sandbox */
#define JINJA_MAX_PARAMETERS 6                        /* of a built-in function */

typedef struct jinja_variable {
    struct jinja_variable *next;
    jinja_text name;
    jinja_value value;
} jinja_variable;

typedef struct jinja_scope {
    struct jinja_scope *parent;
    jinja_variable *variables;
} jinja_scope;

typedef struct jinja_macro {
    jinja_text name;
    const jinja_node *parameters, *body;
    jinja_scope *scope; /* where it was defined */
} jinja_macro;

/* The iterable of a running for loop, filtered as it goes (a condition may depend on what the body did). */
typedef struct jinja_loop {
    jinja_list source;
    size_t taken;       /* of source */
    jinja_value *items; /* those that met the condition so far */
    size_t count, index;
    const jinja_node *target, *condition;
    jinja_scope *scope; /* around the loop */
} jinja_loop;

/* A method with its object, or a global function. */
typedef struct jinja_builtin {
    const struct jinja_function *function;
    jinja_value self;
} jinja_builtin;

typedef struct jinja_run {
    jinja_arena arena;
    moe_buf *out;         /* where text goes now */
    jinja_value captured; /* of the filter block being applied */
    int line, depth;
    int64_t steps;
    bool failed;
    moe_error *err;
} jinja_run;

typedef enum jinja_flow { JINJA_GO_ON, JINJA_DO_BREAK, JINJA_DO_CONTINUE } jinja_flow;

/* ---- built-in functions: filters, tests, methods, globals ---- */

typedef struct jinja_args {
    const jinja_value *values; /* positional */
    size_t count;
    const jinja_text *names; /* of the keyword arguments */
    const jinja_value *named;
    size_t named_count;
    jinja_value at[JINJA_MAX_PARAMETERS]; /* by parameter, ABSENT where not given; unused where parameters is NULL */
} jinja_args;

typedef struct jinja_function {
    const char *name;
    const char *parameters; /* names, separated by blanks; NULL: any arguments */
    size_t required;        /* how many must be given */
    jinja_value (*call)(jinja_run *run, jinja_value self, const jinja_args *args);
    jinja_kind self; /* methods: the kind they belong to */
} jinja_function;

const jinja_function *moe_jinja_find_filter(jinja_text name);          /* NULL when not built */
const jinja_function *moe_jinja_find_sequence_filter(jinja_text name); /* those of find_filter that work on sequences */
const jinja_function *moe_jinja_find_test(jinja_text name);
const jinja_function *moe_jinja_find_method(jinja_kind kind, jinja_text name);
const jinja_function *moe_jinja_find_global(jinja_text name);

/* Binds the arguments to the parameters and calls. */
jinja_value moe_jinja_call_function(jinja_run *run, const jinja_function *function, jinja_value self, jinja_args *args);
/* Calls a macro or built-in value; anything else is an error. */
jinja_value moe_jinja_call(jinja_run *run, jinja_value callee, jinja_args *args);
/* The keyword argument of that name, or ABSENT; for functions that take any arguments. */
jinja_value moe_jinja_keyword(const jinja_args *args, const char *name);

/* ---- the run ---- */

/* Records the first failure; returns undefined. */
jinja_value moe_jinja_fail(jinja_run *run, moe_status code, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* Counts work; false once there was too much of it, or after any failure. */
bool moe_jinja_charge(jinja_run *run, size_t steps);
/* As moe_jinja_arena_alloc; failing is recorded. */
void *moe_jinja_alloc(jinja_run *run, size_t count, size_t size);
/* A string of the run's own with these bytes. */
jinja_value moe_jinja_copy(jinja_run *run, const char *data, size_t size);
/* Moves a buffer's text into a string and frees the buffer. */
jinja_value moe_jinja_take(jinja_run *run, moe_buf *buf);
/* Appends, and records a failure beyond MOE_JINJA_MAX_OUTPUT_BYTES. */
void moe_jinja_append(jinja_run *run, moe_buf *buf, const char *data, size_t size);

/* ---- values (jinja_value.c, jinja_print.c, jinja_operators.c) ---- */

const char *moe_jinja_kind_name(jinja_kind kind); /* for messages */
bool moe_jinja_truth(jinja_value value);
bool moe_jinja_is_number(jinja_value value); /* INT, FLOAT, BOOL */
double moe_jinja_number(jinja_value value);  /* of those */
bool moe_jinja_equal(jinja_run *run, jinja_value a, jinja_value b);
/* < 0, 0, > 0; kinds without an order are an error. */
int moe_jinja_compare(jinja_run *run, jinja_value a, jinja_value b);
/* What iterating over it yields: items, keys, characters. Others are an error and yield nothing. */
jinja_list moe_jinja_iterate(jinja_run *run, jinja_value value);
jinja_value moe_jinja_from_json(jinja_run *run, json_t *json); /* strings stay borrowed */
jinja_value moe_jinja_list(jinja_kind kind, const jinja_value *items, size_t count);
jinja_value moe_jinja_length(jinja_run *run, jinja_value value);
const jinja_value *moe_jinja_dict_find(jinja_run *run, const jinja_dict *dict, jinja_value key); /* NULL: not there */
bool moe_jinja_contains(jinja_run *run, jinja_value container, jinja_value item);

/* object.name: a method first, then an item; object[key]: an item first. Undefined when neither is there. */
jinja_value moe_jinja_attribute(jinja_run *run, jinja_value object, jinja_text name);
jinja_value moe_jinja_item(jinja_run *run, jinja_value object, jinja_value key);
/* object[start:stop:step], each bound ABSENT or none or an integer. */
jinja_value moe_jinja_slice(jinja_run *run, jinja_value object, jinja_value start, jinja_value stop, jinja_value step);

jinja_value moe_jinja_binary(jinja_run *run, int op, jinja_value a, jinja_value b);
jinja_value moe_jinja_unary(jinja_run *run, int op, jinja_value a);

/* Python's str(value) and repr(value), appended. */
void moe_jinja_print(jinja_run *run, jinja_value value, moe_buf *out);
void moe_jinja_repr(jinja_run *run, jinja_value value, moe_buf *out);
/* str(value) as text: the string itself, or a new one. */
jinja_text moe_jinja_str(jinja_run *run, jinja_value value);
/* Python's repr of a float. */
void moe_jinja_print_float(double number, char out[40]);

/* json.dumps; `indent` as a text put before each level, NULL for one line. */
typedef struct jinja_json_style {
    const jinja_text *indent;
    jinja_text item_separator, key_separator;
    bool sort_keys, ensure_ascii;
} jinja_json_style;
void moe_jinja_dump_json(jinja_run *run, jinja_value value, const jinja_json_style *style, int level, moe_buf *out);

/* ---- strings (jinja_strings.c) ---- */

typedef enum jinja_case { JINJA_UPPER, JINJA_LOWER, JINJA_CAPITALIZE, JINJA_TITLE } jinja_case;
/* One character for one (no 'ß' → 'SS'). TITLE: a capital at the start of each run of letters. */
jinja_value moe_jinja_to_case(jinja_run *run, jinja_text text, jinja_case to);
/* The first `count` (negative: all) occurrences of `from` replaced. */
jinja_value moe_jinja_replace(jinja_run *run, jinja_text text, jinja_text from, jinja_text to, int64_t count);
bool moe_jinja_parse_int(jinja_text text, int base, int64_t *out);
bool moe_jinja_parse_float(jinja_text text, double *out);

/* ---- evaluation (jinja_eval.c, jinja_exec.c, jinja_loop.c) ---- */

jinja_value moe_jinja_eval(jinja_run *run, const jinja_node *node, jinja_scope *scope);
jinja_flow moe_jinja_exec(jinja_run *run, const jinja_node *first, jinja_scope *scope);
jinja_scope *moe_jinja_scope(jinja_run *run, jinja_scope *parent); /* NULL (and a failure) when out of memory */
void moe_jinja_assign(jinja_run *run, jinja_scope *scope, jinja_text name, jinja_value value);
/* Assigns to a target: a name, an attribute of a namespace, a tuple of targets. */
void moe_jinja_assign_target(jinja_run *run, const jinja_node *target, jinja_value value, jinja_scope *scope);
const jinja_value *moe_jinja_lookup(const jinja_scope *scope, jinja_text name); /* NULL: not there */
/* The text that the statements print. */
jinja_value moe_jinja_capture(jinja_run *run, const jinja_node *first, jinja_scope *scope);
jinja_args moe_jinja_eval_args(jinja_run *run, const jinja_node *items, jinja_scope *scope);
jinja_value moe_jinja_call_macro(jinja_run *run, const jinja_macro *macro, const jinja_args *args);
jinja_flow moe_jinja_exec_for(jinja_run *run, const jinja_node *node, jinja_scope *scope);
jinja_value moe_jinja_loop_attribute(jinja_run *run, jinja_loop *loop, jinja_text name);

/* Renders a tree with the members of `variables` (an object; borrowed) into *out. */
moe_status moe_jinja_render(const jinja_node *body, json_t *variables, moe_buf *out, moe_error *err);
