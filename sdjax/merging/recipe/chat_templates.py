"""Chat formats that a recipe may name instead of writing a template.

Each gives the text that mergekit's template of the same name gives, as transformers renders it
(blocks trimmed), odd line ends and indents included: see `tests/merging/test_chat_templates.py`.
"""

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The last system message stands first, whether there is one or not; other turns have a heading.
_ALPACA = (
    "{{ ((messages | selectattr('role', 'equalto', 'system') | list)[-1:] "
    "| map(attribute='content') | join) | trim ~ '\n\n' }}"
    "{% set heads = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'} %}"
    "{% for m in messages %}{% if m['role'] in heads %}"
    "### {{ heads[m['role']] ~ ':\n' ~ m['content'] | trim }}"
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

# The format has no system turn: it is said before the first question.
_MISTRAL = (
    "{{ bos_token }}{% set said = messages[0]['role'] == 'system' %}"
    "{% for m in messages[1 if said else 0:] %}"
    "{% if m['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('after an optional system message, user and assistant must take turns') }}"
    "{% elif m['role'] == 'user' %}"
    " [INST] {% if said and loop.first %}{{ messages[0]['content'] ~ '\n\n' }}{% endif %}"
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
