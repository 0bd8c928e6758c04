"""Agreement of the tokenizer with AutoTokenizer, with and without importing transformers."""

import json
import re
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sdjax.core.errors import UserError
from sdjax.io import chat_template
from sdjax.io.tokenizer import load_full_tokenizer, load_tokenizer

CORPUS = [
    "Tom has 12 apples and buys 30 more. How many apples has he?",
    "def merge_models(task_vectors):\n    return sum(task_vectors.values())\n",
    "import jax.numpy as jnp\n\n    x = 0.5 * jnp.tanh(y)",
] * 4
SAMPLES = [
    "",
    " ",
    "Tom has 12 apples.",
    "def merge_models(task_vectors):\n    return 0.3 * a\n\n\n",
    "  leading and trailing  ",
    "naïve — Ünïcödé, 日本語, 🙂",
    "a</s>b<s>c <pad> , . ! n't",
    "tabs\tand\r\nreturns\x00",
    "it 's one , two .",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a byte-level BPE tokenizer like the zoo's, saved by transformers."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    trained.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    return tmp_path


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def assert_equal_to_transformers(folder):
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.pad_id) == (theirs.bos_token_id, theirs.pad_token_id)
    for text in SAMPLES:
        for special in (True, False):
            ids = ours.encode(text, add_special=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            assert ours.decode(ids, skip_special=special) == theirs.decode(
                ids, skip_special_tokens=special
            )
    return ours


def test_equal_to_transformers_with_special_tokens(folder):
    ours = assert_equal_to_transformers(folder)
    assert ours.eos_ids == (2,)
    assert ours.encode("a", add_special=True)[0] == ours.bos_id == 1
    text = "  def f(x):\n    return x\n"
    assert ours.decode(ours.encode(text, add_special=False)) == text


@pytest.mark.parametrize(
    "settings",
    [
        {"add_bos_token": True, "add_eos_token": True},
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": "GPT2Tokenizer"},
        {"extra_special_tokens": ["<new>"]},
        {"eos_token": "<|end|>"},
        {"clean_up_tokenization_spaces": True},
        {"split_special_tokens": True},
        {"model_max_length": 4},
    ],
)
def test_equal_to_transformers_with_modifying_settings(folder, settings):
    edit(folder / "tokenizer_config.json", **settings)
    assert_equal_to_transformers(folder)


def test_truncation_and_padding_are_disabled(folder):
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(3)
    saved.enable_padding(length=8)
    saved.save(str(folder / "tokenizer.json"))
    assert len(load_tokenizer(folder).encode("Tom has 12 apples and more", add_special=False)) > 3
    assert len(load_tokenizer(folder).encode("T", add_special=False)) == 1


def test_end_tokens_come_from_the_generation_config_first(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert load_tokenizer(folder).eos_ids == (2, 5)
    (folder / "generation_config.json").write_text('{"eos_token_id": [-1, 5]}')
    assert load_tokenizer(folder).eos_ids == (5,)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text("{}")
    assert load_tokenizer(folder).eos_ids == (2,)


def test_chat_template(folder):
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(folder).render_chat(messages)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    ours = load_tokenizer(folder)
    assert ours.render_chat(messages) == "<s><user>hello<assistant>"
    assert ours.render_chat(messages, add_generation_prompt=False) == "<s><user>hello"


def test_chats_are_rendered_as_by_transformers(folder):
    template = (
        "{{ bos_token }}{%- for m in messages %}\n  {{ m.role }}:{{ m.content | trim }}"
        "{% if m.reasoning_content is defined %}{{ m.reasoning_content }}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}"
        "{% if loop.last %}{% break %}{% endif %}"
        "{% endfor %}{{ tools }}{{ pad_token }}{{ none_token | default('?') }}"
        "{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}"
    )
    edit(folder / "tokenizer_config.json", chat_template=template)
    messages = [
        {"role": "user", "content": " \U0001f600 <é>", "name": None},
        {"role": "assistant", "content": "x", "reasoning_content": "y"},
    ]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert load_tokenizer(folder).render_chat(messages) == theirs


def test_prompt_has_one_start_token_with_and_without_chat_template(folder):
    plain = load_tokenizer(folder)
    assert plain.as_prompt("hello") == "hello"
    assert plain.encode_prompt("hello") == plain.encode("hello", add_special=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    chat = load_tokenizer(folder)
    ids = chat.encode_prompt(chat.as_prompt("hello"))
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_dict=False
    )
    assert ids == theirs
    assert ids.count(chat.bos_id) == plain.encode_prompt("hello").count(plain.bos_id) == 1


def test_template_error_raises_user_error(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(UserError, match=r"chat template rejects.*no system role"):
        load_tokenizer(folder).render_chat([{"role": "system", "content": "x"}])


def test_tokenizer_json_is_read_without_transformers(folder):
    code = (
        "import sys; from sdjax.io.tokenizer import load_tokenizer;"
        f"print(load_tokenizer({str(folder)!r}).encode('Tom', add_special=True));"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer; copy tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json: cannot be read"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "not valid JSON"),
        (lambda f: edit(f / "tokenizer_config.json", tokenizer_class=None), None),
    ],
)
def test_damaged_tokenizer_raises_user_error(folder, damage, message):
    damage(folder)
    if message is None:
        assert_equal_to_transformers(folder)
        return
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["post_processor", "unknown token"])
def test_tokenizer_that_fails_on_a_text_raises_user_error(folder, where):
    file = folder / "tokenizer.json"
    fields = json.loads(file.read_text())
    if where == "post_processor":  # the library panics
        fields["post_processor"]["special_tokens"] = {}
    else:
        fields["model"]["unk_token"] = "missing"
        fields["pre_tokenizer"] = None
    file.write_text(json.dumps(fields))
    with pytest.raises(UserError, match="copy the file again") as caught:
        load_tokenizer(folder).encode("日", add_special=True)
    assert "\n" not in str(caught.value)


def test_missing_folder_raises_user_error(tmp_path):
    with pytest.raises(UserError, match="no such model folder"):
        load_tokenizer(tmp_path / "none")


def test_code_in_a_tokenizer_folder_is_neither_run_nor_asked_for(folder, tmp_path, monkeypatch):
    def ask(prompt=""):
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr("builtins.input", ask)
    (folder / "tokenization_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    code = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    settings = folder / "tokenizer_config.json"
    edit(settings, tokenizer_class="XTokenizer", auto_map=code)
    with pytest.raises(UserError, match="tokenizer_class 'XTokenizer' is not a tokenizer class"):
        load_tokenizer(folder)
    edit(settings, tokenizer_class=None, auto_map=code)
    edit(folder / "config.json", model_type="x", auto_map={"AutoConfig": "tokenization_x.X"} | code)
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize(
    "name",
    [
        *("AutoTokenizer", "AutoModelForCausalLM", "LlamaForCausalLM", "CLIPModel", "Trainer"),
        *("RagTokenizer", "BertJapaneseTokenizer", "pipeline", "", ["LlamaTokenizer"], 5),
    ],
)
def test_only_tokenizer_classes_are_loaded(folder, file, name):
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    edit(folder / file, tokenizer_class=name)
    with pytest.raises(UserError, match=rf"{file}: tokenizer_class .* is not a tokenizer class"):
        load_full_tokenizer(folder)


def test_values_of_the_models_config_do_not_reach_transformers(folder):
    """transformers would build a list of all layers and all labels."""
    edit(folder / "tokenizer_config.json", add_bos_token=True)
    model = {"model_type": "qwen2", "num_hidden_layers": 10**9, "num_labels": 10**9}
    edit(folder / "config.json", **model)
    assert load_full_tokenizer(folder).get_vocab()["<s>"] == 1


@pytest.mark.parametrize(
    ("file", "name", "value", "message"),
    [
        ("tokenizer_config", "fast_tokenizer_files", ["../x/tokenizer.4.0.0.json"], "must list"),
        ("tokenizer_config", "fast_tokenizer_files", ["/tokenizer.4.0.0.json"], "must list"),
        ("tokenizer_config", "fast_tokenizer_files", [".."], "is not the name of a file"),
        ("tokenizer_config", "fast_tokenizer_files", {"a": 1}, "must list"),
        ("tokenizer_config", "sp_model_kwargs", {"model_file": "/x"}, "must be a mapping of"),
        ("tokenizer_config", "gguf_file", "/x", "may make transformers read other files"),
        ("tokenizer_config", "init_inputs", ["/x"], "may make transformers read other files"),
        ("special_tokens_map", "tokenizer_file", "/dev/zero", "is not a special token"),
        ("special_tokens_map", "vocab_file", "/etc/passwd", "is not a special token"),
    ],
)
def test_settings_that_name_other_files_are_refused(folder, file, name, value, message):
    path = folder / f"{file}.json"
    if not path.exists():
        path.write_text("{}")
    edit(folder / "tokenizer_config.json", add_bos_token=True)
    edit(path, **{name: value})
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.4.0.0.json", "normalizer.json", "any"])
def test_links_of_any_name_next_to_a_tokenizer_are_refused(folder, name):
    (folder / name).symlink_to("/dev/zero")
    for load in (load_tokenizer, load_full_tokenizer):
        with pytest.raises(UserError, match="leads to /dev/zero by a symbolic link"):
            load(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bos_token", [1], r"bos_token must be a token, not \[1\]"),
        ("eos_token", {"content": [1]}, "eos_token must be a token, not"),
        ("pad_token", 5, "pad_token must be a token, not 5"),
        ("extra_special_tokens", 1e400, "must be a list or mapping of tokens, not inf"),
        ("additional_special_tokens", [[]], "must be a list or mapping of tokens"),
        ("added_tokens_decoder", "12", "must be a mapping of ids to tokens, not '12'"),
        ("added_tokens_decoder", {"0": {"content": [1]}}, "must be a mapping of ids to tokens"),
        ("chat_template", 5, "must be a template, or a list with name and template, not 5"),
        ("chat_template", [{"name": "x"}], "must be a template, or a list with name and template"),
    ],
)
def test_settings_of_a_wrong_type_are_refused(folder, name, value, message):
    edit(folder / "tokenizer_config.json", **{name: value})
    with pytest.raises(UserError, match=f"tokenizer_config.json: {name} .*") as error:
        load_tokenizer(folder)
    assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)


def test_padding_id_of_a_wrong_type_is_refused(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"pad_token_id": "0"}')
    with pytest.raises(UserError, match="pad_token_id must be a token id, not '0'"):
        load_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"pad_token_id": 4294967296}')
    with pytest.raises(UserError, match="pad_token_id must be a token id, not 4294967296"):
        load_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"pad_token_id": -1}')
    assert load_tokenizer(folder).pad_id is None


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_templates_that_do_not_end_are_stopped(folder, monkeypatch):
    template = (
        "{% if messages[0].content == 'memory' %}{{ 'x' * messages[0] | length * 10**10 }}"
        "{% elif messages[0].content == 'text' %}{{ 'x' * messages[0] | length * 10**7 }}"
        "{% elif messages[0].content == 'time' %}" + LOOPS + "{% endif %}."
    )
    edit(folder / "tokenizer_config.json", chat_template=template)
    tokenizer = load_tokenizer(folder)
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 1)
    for content, reason in (
        ("time", "it takes more than 1 s of processor time"),
        ("memory", "MemoryError|needs too much memory"),
        ("text", "a text of more than 4,000,000 characters"),
    ):
        with pytest.raises(UserError, match=f"rejects these messages .*({reason})") as error:
            tokenizer.as_prompt(content)
        assert "\n" not in str(error.value)
        assert tokenizer.as_prompt("x") == "."  # the next template is rendered


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ [].x.y }}"])
def test_templates_that_fail_are_reported_in_one_line(folder, template):
    edit(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(UserError, match="the chat template rejects these messages") as error:
        load_tokenizer(folder).as_prompt("x")
    assert "\n" not in str(error.value)


def test_regular_expressions_that_take_too_long_are_reported(folder):
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    edit(folder / "tokenizer.json", pre_tokenizer={**pattern, "invert": False})
    tokenizer = load_tokenizer(folder)
    with pytest.raises(UserError, match=r"fails on a text \(.*retry-limit-in-match") as error:
        tokenizer.encode("a" * 40 + "c", add_special=False)
    assert "\n" not in str(error.value)


def replace(text, pattern="String"):
    return {"type": "Replace", "pattern": {pattern: "a"}, "content": text}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"normalizer": {"type": "Sequence", "normalizers": [replace("aa")] * 40}},
            "1,099,511,627",
        ),
        ({"normalizer": replace("a" * 2_000, "Regex")}, "may make a text 2,001 times as long"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 5_000}}, "a text 5,001 times as long"),
        (
            {"decoder": {"type": "Sequence", "decoders": [replace("aa")] * 40}},
            "the decoder may make",
        ),
        ({"normalizer": {"type": "Sequence", "normalizers": [replace("b")] * 40}}, None),
    ],
)
def test_texts_that_explode_are_refused(folder, parts, message):
    edit(folder / "tokenizer.json", **parts)
    if message is None:
        load_tokenizer(folder)
        return
    with pytest.raises(UserError, match=f"tokenizer.json: .*{message}"):
        load_tokenizer(folder)


def test_huge_tokens_are_refused(folder):
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    edit(
        folder / "tokenizer.json",
        added_tokens=[*added, {**added[0], "content": "a" * 20_000, "id": 400}],
    )
    with pytest.raises(UserError, match=r"tokenizer.json: a token of 20,000 characters"):
        load_tokenizer(folder)
