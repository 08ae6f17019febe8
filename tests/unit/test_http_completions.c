/* Chat and text completions through HTTP, byte for byte, over a scripted engine. */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/metrics.h"
#include "router/http/server.h"
#include "tests/support/fake_inference.h"
#include "tests/support/http_client.h"
#include "tests/support/test.h"

#define CHAT "/v1/chat/completions"
#define TEXT "/v1/completions"
#define HI "\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}]"
#define FINGERPRINT "\"system_fingerprint\":\"moesaic-" MOESAIC_VERSION "\""
#define CHAT_HEAD \
    "{\"id\":\"ID\",\"object\":\"chat.completion\",\"created\":TIME,\"model\":\"demo\"," FINGERPRINT ",\"choices\":["
#define CHUNK_HEAD                                                                                               \
    "data: {\"id\":\"ID\",\"object\":\"chat.completion.chunk\",\"created\":TIME,\"model\":\"demo\"," FINGERPRINT \
    ",\"choices\":"                                                                                              \
    "["
#define TEXT_HEAD \
    "{\"id\":\"ID\",\"object\":\"text_completion\",\"created\":TIME,\"model\":\"demo\"," FINGERPRINT ",\"choices\":["
#define TEXT_CHUNK_HEAD "data: " TEXT_HEAD
#define ROLE(i) \
    CHUNK_HEAD "{\"index\":" i ",\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}]"
#define DELTA(i, text) \
    CHUNK_HEAD "{\"index\":" i ",\"delta\":{\"content\":\"" text "\"},\"logprobs\":null,\"finish_reason\":null}]"
#define FINISH(i, reason, why) \
    CHUNK_HEAD "{\"index\":" i ",\"delta\":{},\"logprobs\":null,\"finish_reason\":\"" reason "\",\"stop_reason\":" why "}]"
#define END "}\n\n"
#define DONE "data: [DONE]\n\n"

typedef struct fixture {
    fake_inference fake;
    moe_http_server *server;
    int port;
} fixture;

static int setup(void **state) {
    fixture *f = calloc(1, sizeof *f);
    moe_error err = {0};
    fake_inference_start(&f->fake, SOURCE_DIR "/models/demo");
    moe_http_config config = {.host = "127.0.0.1", .inference = &f->fake.inference};
    if (moe_http_server_start(&config, &f->server, &err) != MOE_OK) fail_msg("%s", err.message);
    f->port = moe_http_server_port(f->server);
    *state = f;
    return 0;
}

static int teardown(void **state) {
    fixture *f = *state;
    moe_http_server_stop(&f->server);
    fake_inference_stop(&f->fake);
    free(f);
    return 0;
}

/* Puts ID for the ids, after a look at their form, and TIME for `created`. All ids of one reply must be the same. */
static char *normalized(const char *text, const char *id_prefix) {
    char *out = calloc(strlen(text) + 1, 1), *at = out;
    char first[64] = "";
    while (*text) {
        size_t prefix = strlen(id_prefix);
        if (strncmp(text, "\"id\":\"", 6) == 0 && strncmp(text + 6, id_prefix, prefix) == 0) {
            size_t size = strcspn(text + 6, "\"");
            assert_int_equal(size, prefix + 32);
            for (size_t i = prefix; i < size; i++) assert_true(isxdigit((unsigned char)text[6 + i]));
            if (!*first) memcpy(first, text + 6, size);
            assert_memory_equal(first, text + 6, size);
            at = stpcpy(at, "\"id\":\"ID\"");
            text += 6 + size + 1;
        } else if (strncmp(text, "\"created\":", 10) == 0) {
            assert_true(strtol(text + 10, NULL, 10) > 1700000000);
            at = stpcpy(at, "\"created\":TIME");
            text += 10 + strspn(text + 10, "0123456789");
        } else {
            *at++ = *text++;
        }
    }
    return out;
}

static void expect(fixture *f, const char *path, const char *body, const char *wanted) {
    http_response response = http_post(f->port, path, body);
    bool stream = strncmp(wanted, "data:", 5) == 0;
    char *is = normalized(response.body, strcmp(path, CHAT) == 0 ? "chatcmpl-" : "cmpl-");
    if (response.status != 200) fail_msg("%d: %s", response.status, response.body);
    assert_string_equal(http_response_header(&response, "Content-Type"),
                        stream ? "text/event-stream; charset=utf-8" : "application/json");
    assert_string_equal(is, wanted);
    free(is);
    http_response_free(&response);
}

static void expect_error(fixture *f, const char *path, const char *body, int status, const char *code, const char *param) {
    http_response response = http_post(f->port, path, body);
    json_t *json = json_loads(response.body, 0, NULL), *error = json_object_get(json, "error");
    if (response.status != status) fail_msg("%d, not %d: %s", response.status, status, response.body);
    if (status == 429) assert_non_null(strstr(response.head, "429 Too Many Requests\r\n"));
    assert_string_equal(json_string_value(json_object_get(error, "code")), code);
    if (param)
        assert_string_equal(json_string_value(json_object_get(error, "param")), param);
    else
        assert_true(json_is_null(json_object_get(error, "param")));
    assert_int_equal(http_response_header(&response, "Retry-After") != NULL, status == 429 || status == 503);
    json_decref(json);
    http_response_free(&response);
}

/* The prompt of the last request is the text's ids by the model's own tokenizer. */
static int32_t check_prompt(fixture *f, const char *text) {
    const fake_request *request = &f->fake.requests[f->fake.num_requests - 1];
    moe_token_ids ids = {0};
    assert_int_equal(moe_tokenizer_encode(f->fake.inference.tokenizer, text, strlen(text), true, &ids, NULL), MOE_OK);
    assert_int_equal(ids.count, request->prompt_tokens);
    assert_memory_equal(ids.ids, request->prompt, (size_t)ids.count * sizeof *ids.ids);
    moe_free(ids.ids);
    return request->prompt_tokens;
}

static void test_chat(void **state) {
    fixture *f = *state;
    char wanted[1024];
    http_response first = http_post(f->port, CHAT, "{" HI "}");
    http_response_free(&first);
    int32_t prompt = check_prompt(f, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    snprintf(wanted, sizeof wanted,
             CHAT_HEAD
             "{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"Hello, world\",\"refusal\":null},"
             "\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null}],"
             "\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":3,\"total_tokens\":%d}}",
             prompt, prompt + 3);
    expect(f, CHAT, "{\"model\":\"demo\"," HI "}", wanted);
}

static void test_chat_template_options(void **state) {
    fixture *f = *state;
    http_response response = http_post(f->port, CHAT,
                                       "{\"messages\":[{\"role\":\"developer\",\"content\":\"S\"},{\"role\":\"user\",\"content\":"
                                       "\"U\"}],\"add_generation_prompt\":false}");
    assert_int_equal(response.status, 200);
    check_prompt(f, "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n");
    http_response_free(&response);
}

static void test_chat_stream(void **state) {
    fixture *f = *state;
    expect(f, CHAT, "{" HI ",\"stream\":true}",
           ROLE("0") END DELTA("0", "Hello") END DELTA("0", ",") END DELTA("0", " world") END FINISH("0", "stop", "null")
               END DONE);
}

static void test_chat_stream_with_usage(void **state) {
    fixture *f = *state;
    char wanted[4096];
    http_response first = http_post(f->port, CHAT, "{" HI "}");
    http_response_free(&first);
    int32_t prompt = f->fake.requests[0].prompt_tokens;
#define NO_USAGE ",\"usage\":null" END
    snprintf(wanted, sizeof wanted,
             ROLE("0") NO_USAGE DELTA("0", "Hello") NO_USAGE DELTA("0", ",") NO_USAGE DELTA("0", " world")
                 NO_USAGE FINISH("0", "stop", "null") NO_USAGE CHUNK_HEAD
             "],\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":3,\"total_tokens\":%d}" END DONE,
             prompt, prompt + 3);
    expect(f, CHAT, "{" HI ",\"stream\":true,\"stream_options\":{\"include_usage\":true}}", wanted);
}

static void test_finish_reasons(void **state) {
    fixture *f = *state;
    f->fake.finish = MOE_FINISH_LENGTH;
    expect(f, CHAT, "{" HI ",\"stream\":true}",
           ROLE("0") END DELTA("0", "Hello") END DELTA("0", ",") END DELTA("0", " world") END FINISH("0", "length", "null")
               END DONE);
    f->fake.finish = MOE_FINISH_STOP;
    f->fake.stop_reason = "\n\"";
    expect(f, CHAT, "{" HI ",\"stream\":true,\"stop\":\"\\n\\\"\"}",
           ROLE("0") END DELTA("0", "Hello") END DELTA("0", ",") END DELTA("0", " world") END FINISH("0", "stop", "\"\\n\\\"\"")
               END DONE);
    assert_string_equal(f->fake.requests[1].stop[0], "\n\"");
    f->fake.stop_reason = NULL;
    f->fake.stop_token_id = 77;
    expect(f, CHAT, "{" HI ",\"stream\":true,\"stop_token_ids\":[77]}",
           ROLE("0") END DELTA("0", "Hello") END DELTA("0", ",") END DELTA("0", " world") END FINISH("0", "stop", "77") END DONE);
}

/* Events without text make no chunk; what they carry comes with the next. */
static void test_events_without_text(void **state) {
    fixture *f = *state;
    static const fake_step steps[] = {{"", 300}, {"\xe2\x82\xac", 301}, {"", 302}};
    f->fake.steps = steps;
    expect(f, CHAT, "{" HI ",\"stream\":true}",
           ROLE("0") END DELTA("0", "\xe2\x82\xac") END FINISH("0", "stop", "null") END DONE);
    f->fake.num_steps = 0;
    expect(f, CHAT, "{" HI ",\"stream\":true}", ROLE("0") END FINISH("0", "stop", "null") END DONE);
}

static json_t *post_json(fixture *f, const char *path, const char *body) {
    http_response response = http_post(f->port, path, body);
    if (response.status != 200) fail_msg("%d: %s", response.status, response.body);
    json_t *json = json_loads(response.body, 0, NULL);
    assert_non_null(json);
    http_response_free(&response);
    return json;
}

static json_t *at(json_t *json, const char *path) { /* "choices.0.text" */
    char key[64];
    while (*path) {
        size_t size = strcspn(path, ".");
        snprintf(key, sizeof key, "%.*s", (int)size, path);
        json = isdigit((unsigned char)key[0]) && json_is_array(json) ? json_array_get(json, strtoul(key, NULL, 10))
                                                                     : json_object_get(json, key);
        path += size + (path[size] == '.');
    }
    return json;
}

static void test_n_choices_and_seeds(void **state) {
    fixture *f = *state;
    json_t *body = post_json(f, CHAT, "{" HI ",\"n\":3,\"seed\":5}");
    assert_int_equal(json_array_size(at(body, "choices")), 3);
    for (int i = 0; i < 3; i++) {
        char path[64];
        snprintf(path, sizeof path, "choices.%d.index", i);
        assert_int_equal(json_integer_value(at(body, path)), i);
        snprintf(path, sizeof path, "choices.%d.message.content", i);
        assert_string_equal(json_string_value(at(body, path)), "Hello, world");
    }
    int32_t prompt = f->fake.requests[0].prompt_tokens;
    assert_int_equal(json_integer_value(at(body, "usage.prompt_tokens")), prompt);
    assert_int_equal(json_integer_value(at(body, "usage.completion_tokens")), 9);
    assert_int_equal(json_integer_value(at(body, "usage.total_tokens")), prompt + 9);
    const fake_request *r = f->fake.requests;
    assert_true(r[0].sampling.seed == 5 && r[1].sampling.seed != 5 && r[2].sampling.seed != 5);
    assert_true(r[1].sampling.seed != r[2].sampling.seed);
    json_decref(body);
    /* The same seed gives the same streams again; without one they differ. */
    json_decref(post_json(f, CHAT, "{" HI ",\"n\":2,\"seed\":5}"));
    assert_true(r[3].sampling.seed == 5 && r[4].sampling.seed == r[1].sampling.seed);
    json_decref(post_json(f, CHAT, "{" HI "}"));
    json_decref(post_json(f, CHAT, "{" HI "}"));
    assert_true(r[5].sampling.seed != r[6].sampling.seed);
}

static void test_n_choices_stream(void **state) {
    fixture *f = *state;
    http_response response = http_post(f->port, CHAT, "{" HI ",\"n\":2,\"stream\":true}");
    static const char *const once[] = {"{\"index\":0,\"delta\":{\"role\"",
                                       "{\"index\":1,\"delta\":{\"role\"",
                                       "{\"index\":0,\"delta\":{\"content\":\" world\"}",
                                       "{\"index\":1,\"delta\":{\"content\":\" world\"}",
                                       "{\"index\":0,\"delta\":{},",
                                       "{\"index\":1,\"delta\":{},",
                                       "data: [DONE]"};
    for (size_t i = 0; i < sizeof once / sizeof once[0]; i++) {
        const char *found = strstr(response.body, once[i]);
        assert_non_null(found);
        assert_null(strstr(found + 1, once[i]));
    }
    http_response_free(&response);
}

static void test_sampling_reaches_the_engine(void **state) {
    fixture *f = *state;
    json_decref(
        post_json(f, TEXT,
                  "{\"prompt\":[7,8,9],\"temperature\":0,\"top_k\":5,\"max_tokens\":9,\"min_tokens\":2,\"ignore_eos\":true,"
                  "\"logit_bias\":{\"12\":-1.5},\"stop\":[\"x\"],\"include_stop_str_in_output\":true}"));
    const fake_request *r = &f->fake.requests[0];
    assert_true(r->prompt_tokens == 3 && r->prompt[0] == 7 && r->prompt[2] == 9);
    assert_true(r->sampling.temperature == 0 && r->sampling.top_k == 5 && r->sampling.max_tokens == 9);
    assert_true(r->sampling.min_tokens == 2 && r->sampling.ignore_eos && r->include_stop_in_output);
    assert_true(r->num_logit_bias == 1 && r->logit_bias[0].token_id == 12 && r->logit_bias[0].bias == -1.5f);
    assert_true(r->sampling.top_p == 0.9f); /* generation_config's */
}

static void test_text(void **state) {
    fixture *f = *state;
    char wanted[1024];
    json_decref(post_json(f, TEXT, "{\"prompt\":\"Once upon\"}"));
    int32_t prompt = check_prompt(f, "Once upon");
    assert_int_equal(f->fake.requests[0].sampling.max_tokens, 16);
    snprintf(wanted, sizeof wanted,
             TEXT_HEAD
             "{\"index\":0,\"text\":\"Hello, world\",\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null}],"
             "\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":3,\"total_tokens\":%d}}",
             prompt, prompt + 3);
    expect(f, TEXT, "{\"prompt\":\"Once upon\"}", wanted);
#define PIECE(text) "{\"index\":0,\"text\":\"" text "\",\"logprobs\":null,\"finish_reason\":null}]"
    expect(f, TEXT, "{\"prompt\":\"Once upon\",\"stream\":true,\"echo\":true}",
           TEXT_CHUNK_HEAD PIECE("Once uponHello") END TEXT_CHUNK_HEAD PIECE(",") END TEXT_CHUNK_HEAD PIECE(" world")
               END TEXT_CHUNK_HEAD
           "{\"index\":0,\"text\":\"\",\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null}]" END DONE);
}

static void test_several_prompts(void **state) {
    fixture *f = *state;
    json_t *body = post_json(f, TEXT, "{\"prompt\":[\"a\",[5,6],\"b\"],\"n\":2,\"echo\":true}");
    static const int32_t prompts[] = {0, 0, 1, 1, 2, 2};
    for (int i = 0; i < 6; i++) {
        char path[64];
        snprintf(path, sizeof path, "choices.%d.index", i);
        assert_int_equal(json_integer_value(at(body, path)), i);
        if (prompts[i] == 1) assert_int_equal(f->fake.requests[i].prompt[1], 6);
    }
    assert_string_equal(json_string_value(at(body, "choices.0.text")), "aHello, world");
    assert_string_equal(json_string_value(at(body, "choices.5.text")), "bHello, world");
    assert_int_equal(json_integer_value(at(body, "usage.prompt_tokens")),
                     f->fake.requests[0].prompt_tokens + 2 + f->fake.requests[4].prompt_tokens);
    assert_int_equal(json_integer_value(at(body, "usage.completion_tokens")), 18);
    json_decref(body);
    expect_error(f, TEXT, "{\"prompt\":[\"a\",5]}", 400, "invalid_type", "prompt");
}

static void test_token_ids(void **state) {
    fixture *f = *state;
    json_t *body = post_json(f, TEXT, "{\"prompt\":[5,6],\"return_token_ids\":true}");
    json_t *prompt = json_loads("[5,6]", 0, NULL), *ids = json_loads("[11,12,13]", 0, NULL);
    assert_true(json_equal(at(body, "choices.0.prompt_token_ids"), prompt));
    assert_true(json_equal(at(body, "choices.0.token_ids"), ids));
    json_decref(body);
    body = post_json(f, CHAT, "{" HI ",\"return_token_ids\":true}");
    assert_true(json_equal(at(body, "choices.0.token_ids"), ids));
    assert_int_equal(json_array_size(at(body, "prompt_token_ids")), f->fake.requests[1].prompt_tokens);
    json_decref(body);
    expect(f, TEXT, "{\"prompt\":[5,6],\"return_token_ids\":true,\"stream\":true}",
           TEXT_CHUNK_HEAD
           "{\"index\":0,\"text\":\"Hello\",\"logprobs\":null,\"finish_reason\":null,\"prompt_token_ids\":[5,6],"
           "\"token_ids\":[11]}]" END TEXT_CHUNK_HEAD
           "{\"index\":0,\"text\":\",\",\"logprobs\":null,\"finish_reason\":null,\"token_ids\":[12]}]" END TEXT_CHUNK_HEAD
           "{\"index\":0,\"text\":\" world\",\"logprobs\":null,\"finish_reason\":null,\"token_ids\":[13]}]" END TEXT_CHUNK_HEAD
           "{\"index\":0,\"text\":\"\",\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null}]" END DONE);
    json_decref(prompt);
    json_decref(ids);
}

/* What the tokenizer says of one token, as the API should. */
static void check_token(fixture *f, const json_t *entry, int32_t id, double logprob) {
    moe_buf text = {0}, bytes = {0};
    moe_tokenizer_decode(f->fake.inference.tokenizer, &id, 1, false, &text);
    moe_tokenizer_token_bytes(f->fake.inference.tokenizer, id, &bytes);
    assert_string_equal(json_string_value(json_object_get(entry, "token")), moe_buf_text(&text));
    assert_float_equal(json_number_value(json_object_get(entry, "logprob")), logprob, 1e-9);
    const json_t *list = json_object_get(entry, "bytes");
    assert_int_equal(json_array_size(list), bytes.size);
    for (size_t i = 0; i < bytes.size; i++)
        assert_int_equal(json_integer_value(json_array_get(list, i)), (unsigned char)bytes.data[i]);
    moe_buf_free(&text);
    moe_buf_free(&bytes);
}

static void test_chat_logprobs(void **state) {
    fixture *f = *state;
    json_t *body = post_json(f, CHAT, "{" HI ",\"logprobs\":true,\"top_logprobs\":2}");
    json_t *content = at(body, "choices.0.logprobs.content");
    assert_int_equal(json_array_size(content), 3);
    assert_true(json_is_null(at(body, "choices.0.logprobs.refusal")));
    for (int i = 0; i < 3; i++) {
        json_t *entry = json_array_get(content, (size_t)i), *top = json_object_get(entry, "top_logprobs");
        check_token(f, entry, 11 + i, -0.5 * (i + 1));
        assert_int_equal(json_array_size(top), 2);
        check_token(f, json_array_get(top, 0), 11 + i, -0.5 * (i + 1));
        check_token(f, json_array_get(top, 1), 20, -0.5 * (i + 1) - 0.25);
    }
    json_decref(body);
    body = post_json(f, CHAT, "{" HI ",\"logprobs\":true}");
    assert_int_equal(json_array_size(at(body, "choices.0.logprobs.content.0.top_logprobs")), 0);
    json_decref(body);
    body = post_json(f, CHAT, "{" HI ",\"logprobs\":true,\"return_tokens_as_token_ids\":true}");
    assert_string_equal(json_string_value(at(body, "choices.0.logprobs.content.1.token")), "token_id:12");
    json_decref(body);
    http_response stream = http_post(f->port, CHAT, "{" HI ",\"logprobs\":true,\"top_logprobs\":1,\"stream\":true}");
    int chunks = 0;
    for (const char *p = stream.body; (p = strstr(p, "\"logprobs\":{\"content\":[")); p++) chunks++;
    assert_int_equal(chunks, 3);
    http_response_free(&stream);
}

static void test_text_logprobs_and_echo(void **state) {
    fixture *f = *state;
    json_t *body = post_json(f, TEXT, "{\"prompt\":[40,41],\"logprobs\":2,\"echo\":true,\"return_tokens_as_token_ids\":true}");
    json_t *logprobs = at(body, "choices.0.logprobs");
    json_t *tokens = json_loads("[\"token_id:40\",\"token_id:41\",\"token_id:11\",\"token_id:12\",\"token_id:13\"]", 0, NULL);
    json_t *values = json_loads("[null,-1.0,-0.5,-1.0,-1.5]", 0, NULL);
    assert_true(json_equal(json_object_get(logprobs, "tokens"), tokens));
    assert_true(json_equal(json_object_get(logprobs, "token_logprobs"), values));
    assert_true(json_is_null(at(logprobs, "top_logprobs.0")));
    json_t *top = json_loads("{\"token_id:12\":-1.0,\"token_id:20\":-1.25}", 0, NULL);
    assert_true(json_equal(at(logprobs, "top_logprobs.3"), top));
    int64_t offset = 0;
    static const int32_t ids[] = {40, 41, 11, 12, 13};
    for (int i = 0; i < 5; i++) {
        moe_buf bytes = {0};
        assert_int_equal(json_integer_value(json_array_get(json_object_get(logprobs, "text_offset"), (size_t)i)), offset);
        moe_tokenizer_token_bytes(f->fake.inference.tokenizer, ids[i], &bytes);
        for (size_t b = 0; b < bytes.size; b++) offset += ((unsigned char)bytes.data[b] & 0xc0) != 0x80;
        moe_buf_free(&bytes);
    }
    json_decref(tokens);
    json_decref(values);
    json_decref(top);
    json_decref(body);
    body = post_json(f, TEXT, "{\"prompt\":[40],\"logprobs\":0}");
    assert_true(json_is_null(at(body, "choices.0.logprobs.top_logprobs.0")));
    assert_int_equal(json_array_size(at(body, "choices.0.logprobs.tokens")), 3);
    json_decref(body);
}

static void test_engine_refuses(void **state) {
    fixture *f = *state;
    static const struct {
        moe_status status;
        int http;
        const char *code;
    } rows[] = {{MOE_INVALID_ARGUMENT, 400, "invalid_value"},         {MOE_NOT_FOUND, 404, "not_found"},
                {MOE_RESOURCE_EXHAUSTED, 429, "rate_limit_exceeded"}, {MOE_UNAVAILABLE, 503, "service_unavailable"},
                {MOE_DEADLINE_EXCEEDED, 504, "deadline_exceeded"},    {MOE_INTERNAL, 500, "internal_error"}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        f->fake.submit_status = rows[i].status;
        expect_error(f, CHAT, "{" HI "}", rows[i].http, rows[i].code, NULL);
        f->fake.submit_status = MOE_OK;
        f->fake.num_steps = 0; /* the same as the first event of an accepted request: still a status, streaming or not */
        f->fake.finish = MOE_FINISH_ERROR;
        f->fake.fail_status = rows[i].status;
        f->fake.fail_message = "no replica left";
        expect_error(f, CHAT, "{" HI "}", rows[i].http, rows[i].code, NULL);
        expect_error(f, CHAT, "{" HI ",\"stream\":true}", rows[i].http, rows[i].code, NULL);
        f->fake.num_steps = 3;
        expect_error(f, TEXT, "{\"prompt\":\"a\"}", rows[i].http, rows[i].code, NULL);
    }
}

static void test_admission(void **state) {
    fixture *f = *state;
    int64_t rejected = moe_metric_value(MOE_METRIC_REQUESTS_REJECTED);
    f->fake.view = (moe_inference_view){.has_map = true, .ready = true, .waiting = 100};
    expect_error(f, CHAT, "{" HI "}", 429, "rate_limit_exceeded", NULL);
    f->fake.view = (moe_inference_view){0};
    expect_error(f, CHAT, "{" HI "}", 503, "service_unavailable", NULL);
    assert_int_equal(f->fake.num_requests, 0);
    assert_int_equal(moe_metric_value(MOE_METRIC_REQUESTS_REJECTED), rejected + 2);
    f->fake.view = (moe_inference_view){.has_map = true}; /* an expert has no replica: the engine may wait for one */
    json_decref(post_json(f, CHAT, "{" HI "}"));
}

/* The queue fills in the middle of a request's choices: all or nothing. */
static void test_queue_full_cancels_the_choices_begun(void **state) {
    fixture *f = *state;
    fake_inference_permit(&f->fake, 0);
    f->fake.refuse_from = 2;
    expect_error(f, CHAT, "{" HI ",\"n\":4}", 429, "rate_limit_exceeded", NULL);
    fake_inference_await(&f->fake, &f->fake.num_ended, 2);
    assert_int_equal(f->fake.num_cancelled, 2);
}

static void test_error_after_the_first_byte(void **state) {
    fixture *f = *state;
    f->fake.finish = MOE_FINISH_ERROR;
    f->fake.fail_status = MOE_UNAVAILABLE;
    f->fake.fail_message = "layer 3: no replica of expert 5 is left";
    expect(f, CHAT, "{" HI ",\"stream\":true}",
           ROLE("0") END DELTA("0", "Hello") END DELTA("0", ",") END DELTA("0", " world") END
           "data: {\"error\":{\"message\":\"layer 3: no replica of expert 5 is left\",\"type\":\"server_error\",\"param\":null,"
           "\"code\":\"service_unavailable\"}}\n\n");
}

static void test_cancelled_by_the_engine_closes(void **state) {
    fixture *f = *state;
    f->fake.finish = MOE_FINISH_ERROR;
    f->fake.fail_status = MOE_CANCELLED;
    for (int stream = 0; stream < 2; stream++) {
        http_client client = http_client_open(f->port);
        http_client_request(&client, "POST", CHAT, "", stream ? "{" HI ",\"stream\":true}" : "{" HI "}");
        assert_true(http_client_closed(&client));
        http_client_close(&client);
    }
}

static void test_prompt_length(void **state) {
    fixture *f = *state;
    f->fake.inference.max_model_len = 4;
    expect_error(f, TEXT, "{\"prompt\":[1,2,3,4]}", 400, "context_length_exceeded", "prompt");
    expect_error(f, TEXT, "{\"prompt\":[1,2],\"max_tokens\":3}", 400, "context_length_exceeded", "max_tokens");
    expect_error(f, TEXT, "{\"prompt\":\"\"}", 400, "invalid_value", "prompt");
    expect_error(f, CHAT, "{" HI "}", 400, "context_length_exceeded", "messages");
    json_decref(post_json(f, TEXT, "{\"prompt\":[1,2],\"max_tokens\":2}"));
    json_decref(post_json(f, TEXT, "{\"prompt\":[1,2,3]}"));
}

static void test_too_many_choices(void **state) {
    fixture *f = *state;
    char body[2048] = "{\"n\":16,\"prompt\":[";
    for (int i = 0; i < 17; i++) strcat(body, i ? ",[1]" : "[1]");
    strcat(body, "]}");
    expect_error(f, TEXT, body, 400, "invalid_value", "n");
}

static void test_without_tokenizer(void **state) {
    fixture *f = *state;
    const moe_tokenizer *tokenizer = f->fake.inference.tokenizer;
    static const fake_step steps[] = {{"", 11}, {"", 12}};
    f->fake.inference.tokenizer = NULL;
    f->fake.steps = steps;
    f->fake.num_steps = 2;
    expect_error(f, CHAT, "{" HI "}", 400, "unsupported_parameter", "messages");
    expect_error(f, TEXT, "{\"prompt\":\"text\"}", 400, "unsupported_value", "prompt");
    expect_error(f, "/tokenize", "{\"prompt\":\"text\"}", 400, "unsupported_parameter", NULL);
    expect_error(f, "/detokenize", "{\"tokens\":[1]}", 400, "unsupported_parameter", NULL);
    expect(f, TEXT, "{\"prompt\":[5,6],\"return_token_ids\":true,\"logprobs\":0}",
           TEXT_HEAD
           "{\"index\":0,\"text\":\"\",\"logprobs\":{\"text_offset\":[0,0],\"token_logprobs\":[-0.5,-1.0],"
           "\"tokens\":[\"token_id:11\",\"token_id:12\"],\"top_logprobs\":[null,null]},\"finish_reason\":\"stop\","
           "\"stop_reason\":null,\"prompt_token_ids\":[5,6],\"token_ids\":[11,12]}],"
           "\"usage\":{\"prompt_tokens\":2,\"completion_tokens\":2,\"total_tokens\":4}}");
    f->fake.inference.tokenizer = tokenizer;
}

static void test_tokenize(void **state) {
    fixture *f = *state;
    static const char text[] = "Hello, w\xc3\xb6rld";
    moe_token_ids ids = {0};
    assert_int_equal(moe_tokenizer_encode(f->fake.inference.tokenizer, text, strlen(text), true, &ids, NULL), MOE_OK);
    json_t *body =
        post_json(f, "/tokenize", "{\"model\":\"demo\",\"prompt\":\"Hello, w\xc3\xb6rld\",\"return_token_strs\":true}");
    json_t *tokens = at(body, "tokens");
    assert_int_equal(json_integer_value(at(body, "count")), ids.count);
    assert_int_equal(json_integer_value(at(body, "max_model_len")), 2048);
    assert_int_equal(json_array_size(tokens), ids.count);
    assert_int_equal(json_array_size(at(body, "token_strs")), ids.count);
    for (int32_t i = 0; i < ids.count; i++) assert_int_equal(json_integer_value(json_array_get(tokens, (size_t)i)), ids.ids[i]);
    char *list = json_dumps(tokens, 0), back[1024];
    snprintf(back, sizeof back, "{\"tokens\":%s}", list);
    json_t *decoded = post_json(f, "/detokenize", back);
    assert_string_equal(json_string_value(at(decoded, "prompt")), text);
    json_t *chat = post_json(f, "/tokenize", "{" HI "}");
    assert_true(json_is_null(at(chat, "token_strs")));
    json_decref(post_json(f, CHAT, "{" HI "}"));
    assert_int_equal(json_integer_value(at(chat, "count")), f->fake.requests[0].prompt_tokens);
    expect_error(f, "/tokenize", "{}", 400, "missing_required_parameter", "prompt");
    expect_error(f, "/detokenize", "{\"tokens\":[1,-2]}", 400, "invalid_value", "tokens");
    free(list);
    json_decref(body);
    json_decref(decoded);
    json_decref(chat);
    moe_free(ids.ids);
}

static void test_bad_requests_reach_no_engine(void **state) {
    fixture *f = *state;
    expect_error(f, CHAT, "{" HI ",\"model\":\"other\"}", 404, "model_not_found", "model");
    expect_error(f, CHAT, "{" HI ",\"tools\":[{}]}", 400, "unsupported_parameter", "tools");
    expect_error(f, TEXT, "{\"prompt\":\"a\",\"temperature\":\"x\"}", 400, "invalid_type", "temperature");
    expect_error(f, CHAT, "{", 400, "invalid_json", NULL);
    expect_error(f, TEXT, "", 400, "invalid_json", NULL);
    assert_int_equal(f->fake.num_requests, 0);
}

int main(void) {
#define TEST(function) cmocka_unit_test_setup_teardown(function, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_chat),
        TEST(test_chat_template_options),
        TEST(test_chat_stream),
        TEST(test_chat_stream_with_usage),
        TEST(test_finish_reasons),
        TEST(test_events_without_text),
        TEST(test_n_choices_and_seeds),
        TEST(test_n_choices_stream),
        TEST(test_sampling_reaches_the_engine),
        TEST(test_text),
        TEST(test_several_prompts),
        TEST(test_token_ids),
        TEST(test_chat_logprobs),
        TEST(test_text_logprobs_and_echo),
        TEST(test_engine_refuses),
        TEST(test_admission),
        TEST(test_queue_full_cancels_the_choices_begun),
        TEST(test_error_after_the_first_byte),
        TEST(test_cancelled_by_the_engine_closes),
        TEST(test_prompt_length),
        TEST(test_too_many_choices),
        TEST(test_without_tokenizer),
        TEST(test_tokenize),
        TEST(test_bad_requests_reach_no_engine),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
