/* Values of the Jinja interpreter, and the arena that everything of one template or one rendering lives in.
 *
 * Values are immutable (a namespace's attributes excepted), as in the sandbox that transformers renders in, so they share memory
 * freely and are passed by value. Strings are valid UTF-8; lengths and indices that templates see are code points. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct jinja_text {
    const char *data; /* not NUL-terminated */
    size_t size;      /* bytes */
} jinja_text;

typedef enum jinja_kind {
    JINJA_ABSENT, /* an argument that was not given; never reaches a template */
    JINJA_UNDEFINED,
    JINJA_NONE,
    JINJA_BOOL,
    JINJA_INT,
    JINJA_FLOAT,
    JINJA_STRING,
    JINJA_LIST,
    JINJA_TUPLE,
    JINJA_DICT,
    JINJA_NAMESPACE,
    JINJA_MACRO,
    JINJA_BUILTIN, /* a global function, or a method with its object */
    JINJA_LOOP     /* the variable `loop` */
} jinja_kind;

typedef struct jinja_value jinja_value;

typedef struct jinja_list {
    const jinja_value *items;
    size_t count;
} jinja_list;

struct jinja_value {
    jinja_kind kind;
    union {
        bool boolean;
        int64_t integer;
        double number;
        jinja_text text;                 /* STRING; of UNDEFINED: the name, for messages */
        jinja_list list;                 /* LIST, TUPLE */
        const struct jinja_dict *dict;   /* */
        struct jinja_scope *attributes;  /* NAMESPACE */
        const struct jinja_macro *macro; /* */
        const struct jinja_builtin *builtin;
        struct jinja_loop *loop;
    };
};

typedef struct jinja_pair {
    jinja_value key, value;
} jinja_pair;

typedef struct jinja_dict { /* in order of insertion */
    jinja_pair *pairs;
    size_t count;
} jinja_dict;

static inline jinja_value jinja_none(void) { return (jinja_value){.kind = JINJA_NONE}; }
static inline jinja_value jinja_undefined(void) { return (jinja_value){.kind = JINJA_UNDEFINED, .text = {"value", 5}}; }
static inline jinja_value jinja_bool(bool b) { return (jinja_value){.kind = JINJA_BOOL, .boolean = b}; }
static inline jinja_value jinja_int(int64_t i) { return (jinja_value){.kind = JINJA_INT, .integer = i}; }
static inline jinja_value jinja_float(double d) { return (jinja_value){.kind = JINJA_FLOAT, .number = d}; }
static inline jinja_value jinja_string(const char *data, size_t size) {
    return (jinja_value){.kind = JINJA_STRING, .text = {data, size}};
}

/* A bump allocator: nothing is freed before the whole. */
typedef struct jinja_arena {
    struct jinja_chunk *chunks;
    char *at;
    size_t left;        /* bytes at `at` */
    size_t used_bytes;  /* of all chunks */
    size_t limit_bytes; /* allocations beyond fail */
} jinja_arena;

/* Zeroed, 16-byte aligned; NULL when out of memory or beyond the limit. */
void *moe_jinja_arena_alloc(jinja_arena *arena, size_t count, size_t size);
void moe_jinja_arena_free(jinja_arena *arena); /* idempotent */

/* ---- text (jinja_text.c) ---- */

bool moe_jinja_text_is(jinja_text text, const char *literal);
bool moe_jinja_text_equal(jinja_text a, jinja_text b);
bool moe_jinja_utf8_valid(const char *data, size_t size);
/* Code point at *at (< size) of valid UTF-8; moves *at past it. */
uint32_t moe_jinja_utf8_next(const char *data, size_t size, size_t *at);
/* Writes 1 to 4 bytes and returns how many. */
size_t moe_jinja_utf8_put(char out[4], uint32_t code_point);
size_t moe_jinja_utf8_length(jinja_text text); /* code points */
/* Byte offset of code point `index`; text.size when there are fewer. */
size_t moe_jinja_utf8_offset(jinja_text text, size_t index);
/* Python's str.isspace for one code point. */
bool moe_jinja_is_space(uint32_t code_point);
/* str.strip: white space when `chars` is NULL, else any of its characters. */
jinja_text moe_jinja_strip(jinja_text text, const jinja_text *chars, bool left, bool right);
/* Position of `needle` in text at or after `from` (bytes), or SIZE_MAX. */
size_t moe_jinja_find(jinja_text text, jinja_text needle, size_t from);
/* End of the line that starts at `at`, without its line break, after which *next starts (Python's str.splitlines). */
size_t moe_jinja_line_end(jinja_text text, size_t at, size_t *next);
