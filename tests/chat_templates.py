"""Chat templates in the ways that model families write them, and what they are made of.

The texts they render are those of the named models' own templates, without tools and media.
"""

from __future__ import annotations

CHATML_BODY = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml_with_default(message: str) -> str:
    return (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n"
        + message
        + "<|im_end|>\n' }}"
        "{% endif %}" + CHATML_BODY
    )


LLAMA3_BODY = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = DATE %}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{ 'Cutting Knowledge Date: December 2023\n' }}"
    "{{ 'Today Date: ' + date_string + '\n\n' }}{{ system }}{{ '<|eot_id|>' }}" + LLAMA3_BODY
)
QWEN3 = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set content = m.content %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}"
    "{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V03 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{% if loop.last and system is defined %}"
    "{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
NO_SYSTEM_ROLE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<|im_start|>' + role + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN25 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA3_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
_SP_TOKENS = ("<s>", "</s>", "[INST]", "[/INST]")

# name -> (template, special tokens, bos, eos)
TEMPLATES: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "chatml": (CHATML_BODY, _CHATML_TOKENS, "<|endoftext|>", "<|im_end|>"),
    # SmolLM2's bos token is the one that opens every message
    "smollm2": (chatml_with_default(SMOLLM), _CHATML_TOKENS, "<|im_start|>", "<|im_end|>"),
    "qwen2": (
        chatml_with_default("You are a helpful assistant."),
        _CHATML_TOKENS,
        "<|endoftext|>",
        "<|im_end|>",
    ),
    "qwen2.5": (chatml_with_default(QWEN25), _CHATML_TOKENS, "<|endoftext|>", "<|im_end|>"),
    "qwen3": (QWEN3, _CHATML_TOKENS, "<|endoftext|>", "<|im_end|>"),
    "llama-3": (
        "{{ bos_token }}" + LLAMA3_BODY,
        _LLAMA3_TOKENS,
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "llama-3.1": (
        LLAMA31.replace("DATE", "'26 Jul 2024'"),
        _LLAMA3_TOKENS,
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "zephyr": (ZEPHYR, ("<s>", "</s>"), "<s>", "</s>"),
    "llama-2": (LLAMA2, ("<s>", "</s>"), "<s>", "</s>"),
    "mistral-v0.3": (MISTRAL_V03, _SP_TOKENS, "<s>", "</s>"),
}
