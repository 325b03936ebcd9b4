"""Chat templates for files that carry none, by a token that only vocabularies of that kind have.

A base model's file has no template, but its vocabulary shows which turns its family is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping

DEFAULT_TEMPLATES: Mapping[str, str] = {
    "<start_of_turn>": (
        "{{ bos_token }}"
        "{% set start = 1 if messages and messages[0].role == 'system' else 0 %}"
        "{% for message in messages[start:] %}"
        "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
        "{% if loop.first and start %}{{ messages[0].content | trim }}\n\n{% endif %}"
        "{{ message.content | trim }}<end_of_turn>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "<|im_start|>": (
        "{% for message in messages %}"
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "<|start_header_id|>": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
}
