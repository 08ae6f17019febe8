/* Chat messages → prompt text, by the model's own Jinja template (tokenizer_config.json `chat_template`, a string or a list of
 * named ones, or DIR/chat_template.jinja), else by a named fallback. The Jinja subset that templates use is interpreted with
 * trim_blocks and lstrip_blocks on, as transformers does; a construct that is not built is refused at load by name and line. */
#pragma once
#include <jansson.h>

#include "common/buf.h"
#include "common/status.h"

typedef struct moe_chat_template moe_chat_template;

/* `fallback`: name of a built-in template used where the model has none ("chatml", "llama2", "llama3", "mistral"; NULL: none, then
 * NOT_FOUND). Also reads bos/eos/pad token texts from tokenizer_config.json. Immutable afterwards: any thread may render. */
moe_status moe_chat_template_load(const char *dir, const char *fallback, moe_chat_template **out, moe_error *err);
/* From source text, for tests and tools. */
moe_status moe_chat_template_parse(const char *source, moe_chat_template **out, moe_error *err);
void moe_chat_template_free(moe_chat_template **chat_template); /* NULLs; idempotent */

/* Renders with `variables`, a JSON object: messages, add_generation_prompt, tools, …; the special-token texts are added to it
 * where it lacks them, and null as `tools` and `documents`, as transformers does. INVALID_ARGUMENT: what raise_exception says, other
 * errors of the template, and too large a rendering (output bytes, memory, steps and recursion are bounded). */
moe_status moe_chat_template_render(const moe_chat_template *chat_template, json_t *variables, moe_buf *out, moe_error *err);
