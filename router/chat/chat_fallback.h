/* Chat templates by name, for models that bring none. */
#pragma once

/* Jinja source of "chatml", "llama2", "llama3" or "mistral"; NULL for another name. */
const char *moe_chat_fallback_source(const char *name);
/* The names above, for messages: "chatml, llama2, …". */
const char *moe_chat_fallback_names(void);
