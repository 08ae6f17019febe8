/* Expressions. */
#include <string.h>

#include "router/chat/jinja_run.h"

static size_t count_items(const jinja_node *items) {
    size_t count = 0;
    for (; items; items = items->next) count++;
    return count;
}

static jinja_value eval_name(jinja_run *run, const jinja_node *node, const jinja_scope *scope) {
    const jinja_value *found = moe_jinja_lookup(scope, node->text);
    if (found) return *found;
    const jinja_function *function = moe_jinja_find_global(node->text);
    if (!function) return (jinja_value){.kind = JINJA_UNDEFINED, .text = node->text};
    jinja_builtin *builtin = moe_jinja_alloc(run, 1, sizeof *builtin);
    if (!builtin) return jinja_undefined();
    *builtin = (jinja_builtin){function, jinja_none()};
    return (jinja_value){.kind = JINJA_BUILTIN, .builtin = builtin};
}

static jinja_value eval_optional(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    return node ? moe_jinja_eval(run, node, scope) : (jinja_value){.kind = JINJA_ABSENT};
}

jinja_args moe_jinja_eval_args(jinja_run *run, const jinja_node *items, jinja_scope *scope) {
    size_t count = count_items(items);
    jinja_args args = {0};
    jinja_value *values = moe_jinja_alloc(run, count, sizeof *values);
    jinja_text *names = moe_jinja_alloc(run, count, sizeof *names);
    if (!values || !names) return args;
    size_t positional = 0, named = 0;
    for (; items && !run->failed; items = items->next) {
        bool keyword = items->kind == JINJA_KEYWORD;
        if (keyword) names[named++] = items->text;
        values[positional + named - keyword] = moe_jinja_eval(run, keyword ? items->a : items, scope);
        positional += !keyword;
    }
    args.values = values;
    args.count = positional;
    args.names = names;
    args.named = values + positional;
    args.named_count = named;
    return args;
}

static jinja_value eval_list(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    size_t count = count_items(node->items), used = 0;
    jinja_value *values = moe_jinja_alloc(run, count, sizeof *values);
    for (const jinja_node *item = node->items; values && item && !run->failed; item = item->next)
        values[used++] = moe_jinja_eval(run, item, scope);
    return moe_jinja_list(node->kind == JINJA_TUPLE_OF ? JINJA_TUPLE : JINJA_LIST, values, used);
}

static jinja_value eval_dict(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    jinja_dict *dict = moe_jinja_alloc(run, 1, sizeof *dict);
    jinja_pair *pairs = moe_jinja_alloc(run, count_items(node->items) / 2, sizeof *pairs);
    if (!dict || !pairs) return jinja_undefined();
    dict->pairs = pairs;
    for (const jinja_node *item = node->items; item && !run->failed; item = item->next->next) {
        jinja_value key = moe_jinja_eval(run, item, scope), value = moe_jinja_eval(run, item->next, scope);
        if (key.kind == JINJA_LIST || key.kind == JINJA_DICT)
            return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "%s cannot be a key", moe_jinja_kind_name(key.kind));
        size_t at = 0;
        while (at < dict->count && !moe_jinja_equal(run, pairs[at].key, key)) at++;
        if (at == dict->count) pairs[dict->count++].key = key;
        pairs[at].value = value;
    }
    return (jinja_value){.kind = JINJA_DICT, .dict = dict};
}

static jinja_value eval_compare(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    jinja_value left = moe_jinja_eval(run, node->a, scope);
    bool holds = true;
    for (const jinja_node *operand = node->items; operand && holds && !run->failed; operand = operand->next) {
        jinja_value right = moe_jinja_eval(run, operand->a, scope);
        if (run->failed) break;
        switch (operand->op) {
            case 'i':
                holds = moe_jinja_contains(run, right, left);
                break;
            case 'n':
                holds = !moe_jinja_contains(run, right, left);
                break;
            case JINJA_OP2('=', '='):
                holds = moe_jinja_equal(run, left, right);
                break;
            case JINJA_OP2('!', '='):
                holds = !moe_jinja_equal(run, left, right);
                break;
            case '<':
                holds = moe_jinja_compare(run, left, right) < 0;
                break;
            case '>':
                holds = moe_jinja_compare(run, left, right) > 0;
                break;
            case JINJA_OP2('<', '='):
                holds = moe_jinja_compare(run, left, right) <= 0;
                break;
            default:
                holds = moe_jinja_compare(run, left, right) >= 0;
                break;
        }
        left = right;
    }
    return jinja_bool(holds);
}

static jinja_value eval_call(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    jinja_value callee = moe_jinja_eval(run, node->a, scope);
    jinja_args args = moe_jinja_eval_args(run, node->items, scope);
    run->line = node->line;
    if (callee.kind == JINJA_UNDEFINED && node->a->kind == JINJA_ATTRIBUTE)
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT,
                              "the method or attribute '%.*s' is not there (methods that change a value are "
                              "not allowed in chat templates)",
                              (int)node->a->text.size, node->a->text.data);
    return moe_jinja_call(run, callee, &args);
}

static jinja_value eval_function(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    jinja_value subject = moe_jinja_eval(run, node->a, scope);
    jinja_args args = moe_jinja_eval_args(run, node->items, scope);
    run->line = node->line;
    return moe_jinja_call_function(run, node->function, subject, &args);
}

static jinja_value eval_choice(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    if (moe_jinja_truth(moe_jinja_eval(run, node->a, scope))) return moe_jinja_eval(run, node->b, scope);
    return node->c ? moe_jinja_eval(run, node->c, scope) : jinja_undefined();
}

static jinja_value eval_slice(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    jinja_value object = moe_jinja_eval(run, node->a, scope);
    jinja_value start = eval_optional(run, node->b, scope), stop = eval_optional(run, node->c, scope);
    return moe_jinja_slice(run, object, start, stop, eval_optional(run, node->d, scope));
}

static jinja_value eval_operation(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    jinja_value a = moe_jinja_eval(run, node->a, scope);
    switch (node->kind) {
        case JINJA_AND:
            return moe_jinja_truth(a) ? moe_jinja_eval(run, node->b, scope) : a;
        case JINJA_OR:
            return moe_jinja_truth(a) ? a : moe_jinja_eval(run, node->b, scope);
        case JINJA_UNARY:
            return moe_jinja_unary(run, node->op, a);
        case JINJA_ATTRIBUTE:
            return moe_jinja_attribute(run, a, node->text);
        case JINJA_ITEM:
            return moe_jinja_item(run, a, moe_jinja_eval(run, node->b, scope));
        default:
            return moe_jinja_binary(run, node->op, a, moe_jinja_eval(run, node->b, scope));
    }
}

static jinja_value eval_kind(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    switch (node->kind) {
        case JINJA_CONST:
            return node->constant;
        case JINJA_CAPTURED:
            return run->captured;
        case JINJA_NAME:
            return eval_name(run, node, scope);
        case JINJA_SLICE:
            return eval_slice(run, node, scope);
        case JINJA_CALL:
            return eval_call(run, node, scope);
        case JINJA_FILTER:
        case JINJA_TEST:
            return eval_function(run, node, scope);
        case JINJA_COMPARE:
            return eval_compare(run, node, scope);
        case JINJA_IF_ELSE:
            return eval_choice(run, node, scope);
        case JINJA_LIST_OF:
        case JINJA_TUPLE_OF:
            return eval_list(run, node, scope);
        case JINJA_DICT_OF:
            return eval_dict(run, node, scope);
        default:
            return eval_operation(run, node, scope);
    }
}

jinja_value moe_jinja_eval(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    if (!moe_jinja_charge(run, 1)) return jinja_undefined();
    run->line = node->line;
    if (run->depth >= MOE_JINJA_MAX_DEPTH)
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "evaluation is nested deeper than %d", MOE_JINJA_MAX_DEPTH);
    run->depth++;
    jinja_value value = eval_kind(run, node, scope);
    run->depth--;
    return run->failed ? jinja_undefined() : value;
}
