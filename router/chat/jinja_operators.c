/* Arithmetic and concatenation with Python's rules, on 64-bit integers (what overflows them is an error). */
#include <math.h>
#include <string.h>

#include "router/chat/jinja_run.h"

static jinja_value no_operator(jinja_run *run, int op, jinja_value a, jinja_value b) {
    char text[3] = {(char)(op > 0xff ? op >> 8 : op), (char)(op > 0xff ? op & 0xff : 0), '\0'};
    return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "'%s' is not defined between %s and %s", text, moe_jinja_kind_name(a.kind),
                          moe_jinja_kind_name(b.kind));
}

static jinja_value concatenate(jinja_run *run, jinja_text a, jinja_text b) {
    char *joined = moe_jinja_charge(run, (a.size + b.size) / 64) ? moe_jinja_alloc(run, a.size + b.size, 1) : NULL;
    if (!joined) return jinja_undefined();
    if (a.size) memcpy(joined, a.data, a.size);
    if (b.size) memcpy(joined + a.size, b.data, b.size);
    return jinja_string(joined, a.size + b.size);
}

static jinja_value join_lists(jinja_run *run, jinja_value a, jinja_value b) {
    size_t count = a.list.count + b.list.count;
    jinja_value *items = moe_jinja_charge(run, count) ? moe_jinja_alloc(run, count, sizeof *items) : NULL;
    if (!items) return jinja_undefined();
    if (a.list.count) memcpy(items, a.list.items, a.list.count * sizeof *items);
    if (b.list.count) memcpy(items + a.list.count, b.list.items, b.list.count * sizeof *items);
    return moe_jinja_list(a.kind, items, count);
}

static jinja_value repeat(jinja_run *run, jinja_value a, int64_t times) {
    bool text = a.kind == JINJA_STRING;
    size_t count = text ? a.text.size : a.list.count, size = text ? 1 : sizeof(jinja_value);
    if (times <= 0 || count == 0) return text ? jinja_string("", 0) : moe_jinja_list(a.kind, NULL, 0);
    if ((uint64_t)times > MOE_JINJA_MAX_RUN_BYTES / size / count)
        return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "a repetition is too long");
    size_t total = count * (size_t)times;
    char *memory = moe_jinja_charge(run, total / 64 + (size_t)times / 16) ? moe_jinja_alloc(run, total, size) : NULL;
    if (!memory) return jinja_undefined();
    for (size_t i = 0; i < (size_t)times; i++)
        memcpy(memory + i * count * size, text ? (const void *)a.text.data : (const void *)a.list.items, count * size);
    return text ? jinja_string(memory, total) : moe_jinja_list(a.kind, (const jinja_value *)(const void *)memory, total);
}

static int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

static bool integer_power(int64_t base, int64_t exponent, int64_t *out) {
    *out = 1;
    if (exponent > 64 && base != 0 && base != 1 && base != -1) return false;
    if (exponent > 64) exponent = 64 + exponent % 2;
    for (int64_t i = 0; i < exponent; i++)
        if (__builtin_mul_overflow(*out, base, out)) return false;
    return true;
}

static jinja_value integer_operation(jinja_run *run, int op, int64_t a, int64_t b) {
    int64_t result = 0;
    bool overflow = false;
    bool divides = op == '/' || op == '%' || op == JINJA_OP2('/', '/');
    if (divides && b == 0) return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "division by zero");
    switch (op) {
        case '+':
            overflow = __builtin_add_overflow(a, b, &result);
            break;
        case '-':
            overflow = __builtin_sub_overflow(a, b, &result);
            break;
        case '*':
            overflow = __builtin_mul_overflow(a, b, &result);
            break;
        case '/':
            return jinja_float((double)a / (double)b);
        case '%':
            result = b == -1 ? 0 : a - floor_divide(a, b) * b;
            break;
        case JINJA_OP2('/', '/'):
            overflow = b == -1 && a == INT64_MIN;
            if (!overflow) result = floor_divide(a, b);
            break;
        default:
            if (b < 0) return jinja_float(pow((double)a, (double)b));
            overflow = !integer_power(a, b, &result);
    }
    if (overflow) return moe_jinja_fail(run, MOE_OUT_OF_RANGE, "an integer does not fit 64 bits");
    return jinja_int(result);
}

static jinja_value float_operation(jinja_run *run, int op, double a, double b) {
    bool divides = op == '/' || op == '%' || op == JINJA_OP2('/', '/');
    if (divides && b == 0) return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "division by zero");
    switch (op) {
        case '+':
            return jinja_float(a + b);
        case '-':
            return jinja_float(a - b);
        case '*':
            return jinja_float(a * b);
        case '/':
            return jinja_float(a / b);
        case JINJA_OP2('/', '/'):
            return jinja_float(floor(a / b));
        case '%': {
            double rest = fmod(a, b);
            return jinja_float(rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest);
        }
        default:
            return jinja_float(pow(a, b));
    }
}

static bool is_defined(jinja_run *run, jinja_value value) {
    if (value.kind != JINJA_UNDEFINED) return true;
    moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "'%.*s' is undefined", (int)value.text.size, value.text.data);
    return false;
}

static int64_t as_integer(jinja_value v) { return v.kind == JINJA_BOOL ? v.boolean : v.integer; }

static bool is_sequence(jinja_value v) { return v.kind == JINJA_STRING || v.kind == JINJA_LIST || v.kind == JINJA_TUPLE; }

jinja_value moe_jinja_binary(jinja_run *run, int op, jinja_value a, jinja_value b) {
    if (op == '~') return concatenate(run, moe_jinja_str(run, a), moe_jinja_str(run, b));
    if (!is_defined(run, a) || !is_defined(run, b)) return jinja_undefined();
    if (moe_jinja_is_number(a) && moe_jinja_is_number(b)) {
        if (a.kind == JINJA_FLOAT || b.kind == JINJA_FLOAT)
            return float_operation(run, op, moe_jinja_number(a), moe_jinja_number(b));
        return integer_operation(run, op, as_integer(a), as_integer(b));
    }
    if (op == '+' && a.kind == b.kind && a.kind == JINJA_STRING) return concatenate(run, a.text, b.text);
    if (op == '+' && a.kind == b.kind && is_sequence(a)) return join_lists(run, a, b);
    if (op == '*' && is_sequence(a) && (b.kind == JINJA_INT || b.kind == JINJA_BOOL)) return repeat(run, a, as_integer(b));
    if (op == '*' && is_sequence(b) && (a.kind == JINJA_INT || a.kind == JINJA_BOOL)) return repeat(run, b, as_integer(a));
    return no_operator(run, op, a, b);
}

jinja_value moe_jinja_unary(jinja_run *run, int op, jinja_value a) {
    if (op == '!') return jinja_bool(!moe_jinja_truth(a));
    if (!is_defined(run, a)) return jinja_undefined();
    if (a.kind == JINJA_FLOAT) return jinja_float(op == '-' ? -a.number : a.number);
    if (!moe_jinja_is_number(a)) return moe_jinja_fail(run, MOE_INVALID_ARGUMENT, "%s has no sign", moe_jinja_kind_name(a.kind));
    return op == '-' ? integer_operation(run, '-', 0, as_integer(a)) : jinja_int(as_integer(a));
}
