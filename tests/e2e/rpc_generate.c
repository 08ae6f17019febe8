/* A client of InferenceService/Generate: rpc_generate ENDPOINT KEYS_DIR|- MAX_TOKENS ID,ID,…  prints the token ids,
 * comma-separated, then the finish reason. Exit status: the RPC's status. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/zmq/zmq_transport.h"
#include "proto/rpc.h"

#define MAX_IDS 4096
#define TIMEOUT_NS (60 * MOE_NS_PER_S)

typedef struct answer {
    bool ended;
    moe_status status;
    int32_t tokens;
} answer;

static void on_reply(void *ctx, const moe_rpc_reply *reply) {
    answer *a = ctx;
    const Moesaic__V1__GenerateResponse *item = (const Moesaic__V1__GenerateResponse *)reply->body;
    for (size_t i = 0; item && i < item->n_token_ids; i++) printf("%s%u", a->tokens++ ? "," : "", item->token_ids[i]);
    if (item && item->finish_reason[0]) printf(" %s\n", item->finish_reason);
    if (!reply->last) return;
    a->ended = true;
    a->status = reply->status;
    if (reply->status != MOE_OK) fprintf(stderr, "%s: %s\n", moe_status_name(reply->status), reply->message);
}

static size_t parse_ids(char *text, uint32_t *ids) {
    size_t count = 0;
    for (char *p = text; *p && count < MAX_IDS; p += *p == ',') ids[count++] = (uint32_t)strtoul(p, &p, 10);
    return count;
}

static moe_status generate(moe_rpc *rpc, uint64_t link, int argc, char **argv, moe_error *err) {
    uint32_t ids[MAX_IDS];
    answer a = {0};
    int64_t deadline = moe_now_ns(moe_clock_real()) + TIMEOUT_NS;
    Moesaic__V1__SamplingParams sampling = MOESAIC__V1__SAMPLING_PARAMS__INIT;
    Moesaic__V1__GenerateRequest request = MOESAIC__V1__GENERATE_REQUEST__INIT;
    (void)argc;
    sampling.max_tokens = (uint32_t)strtoul(argv[3], NULL, 10);
    sampling.top_p = 1;
    request.n_prompt_token_ids = parse_ids(argv[4], ids);
    request.prompt_token_ids = ids;
    request.sampling = &sampling;
    while (!moe_rpc_peer_of_link(rpc, link)) {
        if (moe_now_ns(moe_clock_real()) > deadline) return moe_fail(err, MOE_UNAVAILABLE, "no router answers");
        moe_status status = moe_rpc_step(rpc, moe_now_ns(moe_clock_real()) + 100 * MOE_NS_PER_MS, err);
        if (status != MOE_OK) return status;
    }
    moe_status status = moe_rpc_call_start(rpc, moe_rpc_peer_of_link(rpc, link)->peer, "/moesaic.v1.InferenceService/Generate",
                                           &request.base, NULL, 0, deadline, on_reply, &a, NULL, err);
    while (status == MOE_OK && !a.ended) status = moe_rpc_step(rpc, moe_now_ns(moe_clock_real()) + MOE_NS_PER_S, err);
    return status == MOE_OK ? a.status : status;
}

int main(int argc, char **argv) {
    moe_error err = {0};
    moe_transport *transport = NULL;
    moe_rpc *rpc = NULL;
    moe_curve_keys keys;
    uint64_t link;
    if (argc != 5) return 64;
    bool authenticated = strcmp(argv[2], "-") != 0;
    moe_status status = authenticated ? moe_curve_keys_read(argv[2], MOE_ROLE_OPERATOR, &keys, &err) : MOE_OK;
    moe_zmq_config config = {.clock = moe_clock_real(), .keys = authenticated ? &keys : NULL, .linger_ms = 100};
    if (status == MOE_OK) status = moe_zmq_open(&config, &transport, &err);
    moe_rpc_config rpc_config = {
        .transport = transport,
        .clock = moe_clock_real(),
        .hello = {.cluster_uuid = "", .role = "operator", .id = "test", .profile = "", .incarnation = 1}};
    if (status == MOE_OK) status = moe_rpc_new(&rpc_config, &rpc, &err);
    if (status == MOE_OK) status = moe_rpc_connect(rpc, argv[1], &link, &err);
    if (status == MOE_OK) status = generate(rpc, link, argc, argv, &err);
    if (status != MOE_OK) fprintf(stderr, "rpc_generate: %s %s\n", moe_status_name(status), err.message);
    moe_rpc_free(&rpc);
    if (transport) transport->ops->close(transport);
    return (int)status;
}
