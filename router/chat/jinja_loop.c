/* for loops and the variable `loop`. */
#include "router/chat/jinja_run.h"

static bool meets_condition(jinja_run *run, jinja_loop *loop, jinja_value item) {
    if (!loop->condition) return true;
    jinja_scope *scope = moe_jinja_scope(run, loop->scope);
    if (!scope) return false;
    moe_jinja_assign_target(run, loop->target, item, scope);
    return moe_jinja_truth(moe_jinja_eval(run, loop->condition, scope));
}

/* Takes from the source until item `index` is there; false when the source ends first. */
static bool reach(jinja_run *run, jinja_loop *loop, size_t index) {
    while (loop->count <= index && loop->taken < loop->source.count && !run->failed) {
        jinja_value item = loop->source.items[loop->taken++];
        if (meets_condition(run, loop, item)) loop->items[loop->count++] = item;
    }
    return index < loop->count && !run->failed;
}

static size_t total(jinja_run *run, jinja_loop *loop) {
    reach(run, loop, SIZE_MAX);
    return loop->count;
}

jinja_value moe_jinja_loop_attribute(jinja_run *run, jinja_loop *loop, jinja_text name) {
    int64_t index = (int64_t)loop->index;
    if (moe_jinja_text_is(name, "index")) return jinja_int(index + 1);
    if (moe_jinja_text_is(name, "index0")) return jinja_int(index);
    if (moe_jinja_text_is(name, "first")) return jinja_bool(index == 0);
    if (moe_jinja_text_is(name, "last")) return jinja_bool(!reach(run, loop, loop->index + 1));
    if (moe_jinja_text_is(name, "length")) return jinja_int((int64_t)total(run, loop));
    if (moe_jinja_text_is(name, "revindex")) return jinja_int((int64_t)total(run, loop) - index);
    if (moe_jinja_text_is(name, "revindex0")) return jinja_int((int64_t)total(run, loop) - index - 1);
    if (moe_jinja_text_is(name, "depth")) return jinja_int(1);
    if (moe_jinja_text_is(name, "depth0")) return jinja_int(0);
    if (moe_jinja_text_is(name, "previtem") && index > 0) return loop->items[index - 1];
    if (moe_jinja_text_is(name, "nextitem") && reach(run, loop, loop->index + 1)) return loop->items[index + 1];
    return (jinja_value){.kind = JINJA_UNDEFINED, .text = name};
}

jinja_flow moe_jinja_exec_for(jinja_run *run, const jinja_node *node, jinja_scope *scope) {
    jinja_value iterable = moe_jinja_eval(run, node->b, scope);
    jinja_loop *loop = moe_jinja_alloc(run, 1, sizeof *loop);
    if (!loop) return JINJA_GO_ON;
    loop->source = moe_jinja_iterate(run, iterable);
    loop->items = moe_jinja_alloc(run, loop->source.count, sizeof *loop->items);
    if (!loop->items) return JINJA_GO_ON;
    loop->target = node->a;
    loop->condition = node->c;
    loop->scope = scope;
    for (; reach(run, loop, loop->index); loop->index++) {
        jinja_scope *inner = moe_jinja_scope(run, scope);
        if (!inner) return JINJA_GO_ON;
        moe_jinja_assign(run, inner, (jinja_text){"loop", 4}, (jinja_value){.kind = JINJA_LOOP, .loop = loop});
        moe_jinja_assign_target(run, node->a, loop->items[loop->index], inner);
        if (moe_jinja_exec(run, node->body, inner) == JINJA_DO_BREAK) return JINJA_GO_ON;
    }
    if (loop->index == 0 && node->otherwise && !run->failed) {
        jinja_scope *inner = moe_jinja_scope(run, scope);
        if (inner) return moe_jinja_exec(run, node->otherwise, inner);
    }
    return JINJA_GO_ON;
}
