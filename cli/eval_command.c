/* `moesaic eval`: loss over texts, with the whole engine in this process. */
#include <stdio.h>

#include "cli/commands.h"
#include "cli/evaluate.h"
#include "cli/node_options.h"
#include "common/log.h"

int moe_command_eval(const moe_options *o) {
    moe_router_node_config config = {.embedded = true, .id = "eval"};
    moe_error err;
    json_t *texts = NULL, *result = NULL;
    if (!moe_option_given(o, "log-level")) moe_log_init(MOE_LOG_WARN, "eval");
    if (!moe_option_text(o, "data")) {
        fprintf(stderr, "moesaic: eval needs --data FILE\n");
        return 2;
    }
    moe_status status = moe_engine_options(o, &config, &err);
    config.gating = moe_gating_option(o);
    if (status == MOE_OK) status = moe_dummy_routing_option(o, &config.dummy_routing, &err);
    if (status == MOE_OK) status = moe_texts_read(moe_option_text(o, "data"), (int32_t)moe_option_int(o, "limit"), &texts, &err);
    moe_evaluation evaluation = {.texts = texts, .scored = true, .what = "eval"};
    if (status == MOE_OK) status = moe_evaluate(&config, &evaluation, &result, &err);
    json_decref(texts);
    if (status != MOE_OK) return moe_command_failed(&err);
    json_object_set_new(result, "gating", json_string(moe_option_text(o, "gating")));
    json_dumpf(result, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(7));
    putchar('\n');
    json_decref(result);
    return 0;
}
