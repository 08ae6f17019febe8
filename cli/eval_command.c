/* `moesaic eval`: loss over texts, with the whole engine in this process. */
#include <stdio.h>
#include <unistd.h>

#include "cli/commands.h"
#include "cli/evaluate.h"
#include "cli/node_options.h"
#include "cli/signals.h"
#include "common/log.h"

#define READY_POLL_NS (10 * MOE_NS_PER_MS)

static void show_progress(void *ctx, int32_t done, int32_t total) {
    (void)ctx;
    fprintf(stderr, "\reval: %d of %d texts", done, total);
    if (done == total) fputc('\n', stderr);
}

static moe_status evaluate(const moe_options *o, moe_router_node *node, json_t **result, moe_error *err) {
    while (!moe_router_node_ready(node))
        if (moe_signals_wait(READY_POLL_NS)) return moe_fail(err, MOE_CANCELLED, "interrupted");
    return moe_evaluate(moe_router_node_inference(node), moe_option_text(o, "data"), (int32_t)moe_option_int(o, "limit"),
                        isatty(STDERR_FILENO) ? show_progress : NULL, NULL, result, err);
}

int moe_command_eval(const moe_options *o) {
    moe_router_node_config config = {.embedded = true, .id = "eval"};
    moe_router_node *node;
    moe_error err;
    json_t *result = NULL;
    if (!moe_option_given(o, "log-level")) moe_log_init(MOE_LOG_WARN, "eval");
    if (!moe_option_text(o, "data")) {
        fprintf(stderr, "moesaic: eval needs --data FILE\n");
        return 2;
    }
    moe_status status = moe_engine_options(o, &config, &err);
    if (status == MOE_OK) status = moe_router_node_open(&config, &node, &err);
    if (status != MOE_OK) return moe_command_failed(&err);
    status = evaluate(o, node, &result, &err);
    moe_router_node_close(&node);
    if (status != MOE_OK) return moe_command_failed(&err);
    json_object_set_new(result, "gating", json_string(moe_option_text(o, "gating")));
    json_dumpf(result, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(7));
    putchar('\n');
    json_decref(result);
    return 0;
}
