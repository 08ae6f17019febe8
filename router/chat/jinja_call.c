/* Calls: binding arguments to the parameters of built-in functions and macros. */
#include <string.h>

#include "router/chat/jinja_run.h"

jinja_value moe_jinja_keyword(const jinja_args *args, const char *name) {
    for (size_t i = 0; i < args->named_count; i++)
        if (moe_jinja_text_is(args->names[i], name)) return args->named[i];
    return (jinja_value){.kind = JINJA_ABSENT};
}

/* The number of the parameter called `name` in "first second third", or SIZE_MAX. */
static size_t parameter_index(const char *parameters, jinja_text name) {
    for (size_t index = 0; *parameters; index++) {
        size_t size = strcspn(parameters, " ");
        if (moe_jinja_text_equal((jinja_text){parameters, size}, name)) return index;
        parameters += size + (parameters[size] == ' ');
    }
    return SIZE_MAX;
}

static size_t parameter_count(const char *parameters) {
    size_t count = *parameters != '\0';
    for (; *parameters; parameters++) count += *parameters == ' ';
    return count;
}

jinja_value moe_jinja_call_function(jinja_run *run, const jinja_function *function, jinja_value self, jinja_args *args) {
    if (run->failed) return jinja_undefined();
    if (!function->parameters) return function->call(run, self, args);
    size_t count = parameter_count(function->parameters);
    if (args->count > count) return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "%s: too many arguments", function->name);
    for (size_t i = 0; i < args->count; i++) args->at[i] = args->values[i];
    for (size_t i = 0; i < args->named_count; i++) {
        size_t index = parameter_index(function->parameters, args->names[i]);
        if (index == SIZE_MAX || args->at[index].kind != JINJA_ABSENT)
            return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "%s: unexpected argument '%.*s'", function->name,
                                  (int)args->names[i].size, args->names[i].data);
        args->at[index] = args->named[i];
    }
    for (size_t i = 0; i < function->required; i++)
        if (args->at[i].kind == JINJA_ABSENT)
            return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "%s: an argument is missing", function->name);
    return function->call(run, self, args);
}

jinja_value moe_jinja_call(jinja_run *run, jinja_value callee, jinja_args *args) {
    if (callee.kind == JINJA_BUILTIN) return moe_jinja_call_function(run, callee.builtin->function, callee.builtin->self, args);
    if (callee.kind == JINJA_MACRO) return moe_jinja_call_macro(run, callee.macro, args);
    if (callee.kind == JINJA_UNDEFINED)
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "'%.*s' is undefined, so it cannot be called", (int)callee.text.size,
                              callee.text.data);
    return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "%s cannot be called", moe_jinja_kind_name(callee.kind));
}

/* The argument for a parameter: by position, else by name, else the default, else undefined. */
static jinja_value macro_argument(jinja_run *run, const jinja_node *parameter, size_t index, const jinja_args *args,
                                  jinja_scope *scope, size_t *used) {
    if (index < args->count) return args->values[index];
    for (size_t i = 0; i < args->named_count; i++)
        if (moe_jinja_text_equal(args->names[i], parameter->text)) {
            (*used)++;
            return args->named[i];
        }
    if (parameter->a) return moe_jinja_eval(run, parameter->a, scope);
    return (jinja_value){.kind = JINJA_UNDEFINED, .text = parameter->text};
}

jinja_value moe_jinja_call_macro(jinja_run *run, const jinja_macro *macro, const jinja_args *args) {
    jinja_scope *scope = moe_jinja_scope(run, macro->scope);
    size_t index = 0, used = 0;
    if (!scope) return jinja_undefined();
    for (const jinja_node *p = macro->parameters; p && !run->failed; p = p->next, index++)
        moe_jinja_assign(run, scope, p->text, macro_argument(run, p, index, args, scope, &used));
    for (size_t i = 0; i < args->named_count; i++)
        if (moe_jinja_text_is(args->names[i], "caller")) {
            moe_jinja_assign(run, scope, args->names[i], args->named[i]);
            used++;
        }
    if (args->count > index || used < args->named_count)
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "the macro '%.*s' takes other arguments", (int)macro->name.size,
                              macro->name.data);
    return moe_jinja_capture(run, macro->body, scope);
}
