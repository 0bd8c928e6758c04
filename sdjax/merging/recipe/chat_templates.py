"""Built-in chat templates that a recipe can select by name.

Each renders the same text as mergekit's template of the same name does in transformers (with
trimmed blocks), including its unusual line breaks and indentation; tests compare the two.
"""

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The last system message, or an empty line, comes first; other turns have a heading.
_ALPACA = (
    "{{ ((messages | selectattr('role', 'equalto', 'system') | list)[-1:] "
    "| map(attribute='content') | join) | trim ~ '\n\n' }}"
    "{% set headings = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'} %}"
    "{% for m in messages %}{% if m['role'] in headings %}"
    "### {{ headings[m['role']] ~ ':\n' ~ m['content'] | trim }}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{ '### Response:\n' }}{% endif %}"
)

_LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m['role'] ~ '<|end_header_id|>\n\n' ~ m['content'] | trim }}<|eot_id|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)

# The format has no system turn: the message is prepended to the first question.
_MISTRAL = (
    "{{ bos_token }}{% set has_system = messages[0]['role'] == 'system' %}"
    "{% for m in messages[1 if has_system else 0:] %}"
    "{% if m['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception("
    "'after an optional system message, user and assistant turns must alternate') }}"
    "{% elif m['role'] == 'user' %}"
    " [INST] {% if has_system and loop.first %}{{ messages[0]['content'] ~ '\n\n' }}{% endif %}"
    "{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] ~ eos_token }}{% endif %}{% endfor %}"
)

_EXAONE = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}"
    "{{ '        [|system|][|endofturn|]\n\n' }}{% endif %}"
    "{{ '    [|' ~ m['role'] ~ '|]' ~ m['content'] ~ '\n        ' }}"
    "{% if m['role'] != 'user' %}[|endofturn|]{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '    [|assistant|]\n' }}{% endif %}"
)

CHAT_TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
