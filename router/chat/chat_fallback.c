#include "router/chat/chat_fallback.h"

#include <stddef.h>
#include <string.h>

/* OpenAI's chat markup, as Qwen and many others use it. */
static const char chatml[] =
    "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/* Llama 2 (Touvron et al. 2023, appendix A.3.3): the system message goes into the first instruction. */
static const char llama2[] =
    "{% set ns = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}"
    "{% set ns.system = '<<SYS>>\\n' ~ message.content ~ '\\n<</SYS>>\\n\\n' %}"
    "{% elif message.role == 'user' %}"
    "{{ bos_token ~ '[INST] ' ~ ns.system ~ message.content | trim ~ ' [/INST]' }}{% set ns.system = '' %}"
    "{% elif message.role == 'assistant' %}"
    "{{ ' ' ~ message.content | trim ~ ' ' ~ eos_token }}"
    "{% else %}{{ raise_exception('the role ' ~ message.role ~ ' is not known to the llama2 template') }}{% endif %}"
    "{% endfor %}";

/* Llama 3: https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/ */
static const char llama3[] =
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content | trim ~ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";

/* Mistral's instruct format v1 (https://docs.mistral.ai/guides/tokenization/), which Mixtral uses. */
static const char mistral[] =
    "{{ bos_token }}"
    "{% set ns = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{% set ns.system = message.content ~ '\\n\\n' %}"
    "{% elif message.role == 'user' %}{{ ' [INST] ' ~ ns.system ~ message.content ~ ' [/INST]' }}{% set ns.system = '' %}"
    "{% elif message.role == 'assistant' %}{{ ' ' ~ message.content ~ eos_token }}"
    "{% else %}{{ raise_exception('the role ' ~ message.role ~ ' is not known to the mistral template') }}{% endif %}"
    "{% endfor %}";

static const struct {
    const char *name, *source;
} fallbacks[] = {{"chatml", chatml}, {"llama2", llama2}, {"llama3", llama3}, {"mistral", mistral}};

const char *moe_chat_fallback_source(const char *name) {
    for (size_t i = 0; i < sizeof fallbacks / sizeof *fallbacks; i++)
        if (strcmp(name, fallbacks[i].name) == 0) return fallbacks[i].source;
    return NULL;
}

const char *moe_chat_fallback_names(void) { return "chatml, llama2, llama3, mistral"; }
