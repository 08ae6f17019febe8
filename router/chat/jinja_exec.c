/* Statements, scopes, and the run itself. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "router/chat/jinja_run.h"

/* ---- the run ---- */

jinja_value moe_jinja_fail(jinja_run *run, moe_status code, const char *format, ...) {
    char what[MOE_ERROR_MESSAGE_BYTES - 64];
    va_list args;
    if (!run->failed) {
        va_start(args, format);
        vsnprintf(what, sizeof what, format, args);
        va_end(args);
        moe_fail(run->err, code, "line %d: %s", run->line, what);
    }
    run->failed = true;
    return jinja_undefined();
}

bool moe_jinja_charge(jinja_run *run, size_t steps) {
    if (run->failed) return false;
    run->steps += (int64_t)steps;
    if (run->steps <= MOE_JINJA_MAX_STEPS) return true;
    moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "rendering takes more than %d steps", MOE_JINJA_MAX_STEPS);
    return false;
}

void *moe_jinja_alloc(jinja_run *run, size_t count, size_t size) {
    if (run->failed) return NULL;
    void *memory = moe_jinja_arena_alloc(&run->arena, count, size);
    size_t left = run->arena.limit_bytes - run->arena.used_bytes;
    if (!memory && (size == 0 || count > left / size))
        moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "rendering takes more than %zu MiB", MOE_JINJA_MAX_RUN_BYTES >> 20);
    if (!memory) moe_jinja_fail(run, MOE_RESOURCE_EXHAUSTED, "out of memory");
    return memory;
}

jinja_value moe_jinja_copy(jinja_run *run, const char *data, size_t size) {
    char *copy = moe_jinja_alloc(run, size, 1);
    if (!copy) return jinja_undefined();
    if (size) memcpy(copy, data, size);
    return jinja_string(copy, size);
}

jinja_value moe_jinja_take(jinja_run *run, moe_buf *buf) {
    if (buf->failed) moe_jinja_fail(run, MOE_RESOURCE_EXHAUSTED, "out of memory");
    jinja_value text = moe_jinja_copy(run, buf->data, buf->size);
    moe_buf_free(buf);
    return text;
}

void moe_jinja_append(jinja_run *run, moe_buf *buf, const char *data, size_t size) {
    if (run->failed || !moe_jinja_charge(run, size / 64)) return;
    if (size > MOE_JINJA_MAX_OUTPUT_BYTES - buf->size) {
        moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "the output is longer than %zu MiB", MOE_JINJA_MAX_OUTPUT_BYTES >> 20);
        return;
    }
    moe_buf_append(buf, data, size);
    if (buf->failed) moe_jinja_fail(run, MOE_RESOURCE_EXHAUSTED, "out of memory");
}

/* ---- scopes ---- */

jinja_scope *moe_jinja_scope(jinja_run *run, jinja_scope *parent) {
    jinja_scope *scope = moe_jinja_alloc(run, 1, sizeof *scope);
    if (scope) scope->parent = parent;
    return scope;
}

static jinja_variable *find_variable(const jinja_scope *scope, jinja_text name) {
    for (jinja_variable *v = scope->variables; v; v = v->next)
        if (moe_jinja_text_equal(v->name, name)) return v;
    return NULL;
}

void moe_jinja_assign(jinja_run *run, jinja_scope *scope, jinja_text name, jinja_value value) {
    jinja_variable *variable = find_variable(scope, name);
    if (!variable) {
        variable = moe_jinja_alloc(run, 1, sizeof *variable);
        if (!variable) return;
        variable->name = name;
        variable->next = scope->variables;
        scope->variables = variable;
    }
    variable->value = value;
}

const jinja_value *moe_jinja_lookup(const jinja_scope *scope, jinja_text name) {
    for (; scope; scope = scope->parent) {
        const jinja_variable *variable = find_variable(scope, name);
        if (variable) return &variable->value;
    }
    return NULL;
}

static void unpack(jinja_run *run, const jinja_node *target, jinja_value value, jinja_scope *scope) {
    jinja_list list = moe_jinja_iterate(run, value);
    size_t index = 0;
    const jinja_node *item = target->items;
    for (; item && index < list.count && !run->failed; item = item->next, index++)
        moe_jinja_assign_target(run, item, list.items[index], scope);
    if (item || index < list.count)
        moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "%zu values cannot be unpacked into these names", list.count);
}

void moe_jinja_assign_target(jinja_run *run, const jinja_node *target, jinja_value value, jinja_scope *scope) {
    if (target->kind == JINJA_NAME) {
        moe_jinja_assign(run, scope, target->text, value);
    } else if (target->kind == JINJA_TUPLE_OF) {
        unpack(run, target, value, scope);
    } else {
        jinja_value object = moe_jinja_eval(run, target->a, scope);
        if (object.kind != JINJA_NAMESPACE) {
            moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "attributes can only be set on a namespace, and '%.*s' is %s",
                           (int)target->a->text.size, target->a->text.data, moe_jinja_kind_name(object.kind));
            return;
        }
        moe_jinja_assign(run, object.attributes, target->text, value);
    }
}

/* ---- statements ---- */

jinja_value moe_jinja_capture(jinja_run *run, const jinja_node *first, jinja_scope *scope) {
    moe_buf text = {0}, *outer = run->out;
    run->out = &text;
    moe_jinja_exec(run, first, scope);
    run->out = outer;
    return moe_jinja_take(run, &text);
}

/* The filters of a filter block or block set, over the text of its body. */
static jinja_value captured_value(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    jinja_scope *inner = moe_jinja_scope(run, scope);
    if (!inner) return jinja_undefined();
    jinja_value text = moe_jinja_capture(run, node->body, inner), outer = run->captured;
    run->captured = text;
    jinja_value value = moe_jinja_eval(run, node->b, scope);
    run->captured = outer;
    return value;
}

static jinja_value make_macro(jinja_run *run, const jinja_node *node, jinja_text name, jinja_scope *scope) {
    jinja_macro *macro = moe_jinja_alloc(run, 1, sizeof *macro);
    if (!macro) return jinja_undefined();
    *macro = (jinja_macro){name, node->items, node->body, scope};
    return (jinja_value){.kind = JINJA_MACRO, .macro = macro};
}

/* {% call(x) m(1) %}…{% endcall %}: m(1) with the body as its `caller`. */
static jinja_value call_with_block(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    jinja_value callee = moe_jinja_eval(run, node->a->a, scope);
    jinja_args args = moe_jinja_eval_args(run, node->a->items, scope);
    jinja_text *names = moe_jinja_alloc(run, args.named_count + 1, sizeof *names);
    jinja_value *named = moe_jinja_alloc(run, args.named_count + 1, sizeof *named);
    if (!names || !named) return jinja_undefined();
    if (args.named_count) memcpy(names, args.names, args.named_count * sizeof *names);
    if (args.named_count) memcpy(named, args.named, args.named_count * sizeof *named);
    names[args.named_count] = (jinja_text){"caller", 6};
    named[args.named_count++] = make_macro(run, node, (jinja_text){"caller", 6}, scope);
    args.names = names;
    args.named = named;
    return moe_jinja_call(run, callee, &args);
}

static jinja_flow exec_with(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    jinja_scope *inner = moe_jinja_scope(run, scope);
    for (const jinja_node *item = node->items; inner && item && !run->failed; item = item->next->next)
        moe_jinja_assign(run, inner, item->text, moe_jinja_eval(run, item->next, scope));
    return inner ? moe_jinja_exec(run, node->body, inner) : JINJA_GO_ON;
}

static jinja_flow exec_scoped(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    jinja_scope *inner = moe_jinja_scope(run, scope);
    return inner ? moe_jinja_exec(run, node->body, inner) : JINJA_GO_ON;
}

static jinja_flow exec_one(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    switch (node->kind) {
        case JINJA_TEXT:
            moe_jinja_append(run, run->out, node->text.data, node->text.size);
            break;
        case JINJA_PRINT:
            moe_jinja_print(run, moe_jinja_eval(run, node->a, scope), run->out);
            break;
        case JINJA_FOR:
            return moe_jinja_exec_for(run, node, scope);
        case JINJA_IF:
            return moe_jinja_exec(run, moe_jinja_truth(moe_jinja_eval(run, node->a, scope)) ? node->body : node->otherwise,
                                  scope);
        case JINJA_SET:
            moe_jinja_assign_target(run, node->a, moe_jinja_eval(run, node->b, scope), scope);
            break;
        case JINJA_SET_BLOCK:
            moe_jinja_assign_target(run, node->a, captured_value(run, node, scope), scope);
            break;
        case JINJA_FILTER_BLOCK:
            moe_jinja_print(run, captured_value(run, node, scope), run->out);
            break;
        case JINJA_MACRO_DEF:
            moe_jinja_assign(run, scope, node->text, make_macro(run, node, node->text, scope));
            break;
        case JINJA_CALL_BLOCK:
            moe_jinja_print(run, call_with_block(run, node, scope), run->out);
            break;
        case JINJA_WITH:
            return exec_with(run, node, scope);
        case JINJA_SCOPED:
            return exec_scoped(run, node, scope);
        case JINJA_BREAK:
            return JINJA_DO_BREAK;
        case JINJA_CONTINUE:
            return JINJA_DO_CONTINUE;
        default:
            moe_jinja_fail(run, MOE_INTERNAL, "an expression stands where a statement should");
    }
    return JINJA_GO_ON;
}

jinja_flow moe_jinja_exec(jinja_run *run, const jinja_node *first, jinja_scope *scope) {
    jinja_flow flow = JINJA_GO_ON;
    if (run->failed) return flow;
    if (run->depth >= MOE_JINJA_MAX_DEPTH) {
        moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "evaluation is nested deeper than %d", MOE_JINJA_MAX_DEPTH);
        return flow;
    }
    run->depth++;
    for (const jinja_node *node = first; node && flow == JINJA_GO_ON && moe_jinja_charge(run, 1); node = node->next) {
        run->line = node->line;
        flow = exec_one(run, node, scope);
    }
    run->depth--;
    return flow;
}

moe_status moe_jinja_render(const jinja_node *body, json_t *variables, moe_buf *out, moe_error *err) {
    moe_error own = {0};
    moe_buf text = {0};
    jinja_run run = {.arena = {.limit_bytes = MOE_JINJA_MAX_RUN_BYTES}, .out = &text, .captured = jinja_none(), .err = &own};
    jinja_scope *globals = moe_jinja_scope(&run, NULL), *scope = moe_jinja_scope(&run, globals);
    for (void *it = json_object_iter(variables); it && scope; it = json_object_iter_next(variables, it)) {
        const char *name = json_object_iter_key(it);
        moe_jinja_assign(&run, globals, (jinja_text){name, strlen(name)}, moe_jinja_from_json(&run, json_object_iter_value(it)));
    }
    if (scope) moe_jinja_exec(&run, body, scope);
    if (!run.failed) moe_buf_append(out, text.data, text.size);
    if (!run.failed && out->failed) moe_jinja_fail(&run, MOE_RESOURCE_EXHAUSTED, "out of memory");
    moe_buf_free(&text);
    moe_jinja_arena_free(&run.arena);
    return run.failed ? moe_fail(err, own.code, "%s", own.message) : MOE_OK;
}
