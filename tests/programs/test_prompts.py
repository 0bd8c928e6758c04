"""Prompts: rendered text, errors, and the worked example."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.programs import prompts
from sdjax.programs.families import HELD_OUT, families_of
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted

SLOTS = ("expert_1", "expert_2", "expert_3")
DESCRIPTIONS = {
    "expert_1": "sets up equations from word problems, but calculates badly",
    "expert_2": "adds and subtracts long numbers",
    "expert_3": "tuned on chat; may hurt arithmetic",
}


def test_short_prompt_is_one_line():
    text = prompts.find_prompt("short").render(slots=SLOTS, descriptions={})
    assert text == "# merge three experts"
    assert (
        prompts.find_prompt("short").render(slots=SLOTS[:2], descriptions={})
        == "# merge two experts"
    )


def test_full_prompt_lists_the_experts_and_is_short():
    text = prompts.find_prompt("full").render(slots=SLOTS, descriptions=DESCRIPTIONS)
    assert all(f"- {slot}: {DESCRIPTIONS[slot]}" in text for slot in SLOTS)
    assert "$" not in text
    assert not text.endswith("\n")
    # One token per word, punctuation mark and indent: an upper bound for common tokenizers.
    assert len(re.findall(r"\w+|[^\w\s]|\n+ *", text)) <= 600


def test_worked_example_is_a_valid_program():
    text = prompts.find_prompt("full").render(slots=SLOTS, descriptions=DESCRIPTIONS)
    (source,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    signature = MergeSignature.of(SLOTS, {"layers/0/mlp/up_proj": ("mlp.up_proj", (8, 6))})
    families = families_of(verify_ir(trace_trusted(source, signature), signature))
    assert "norm_balance" in families
    assert not families & HELD_OUT
    namespace: dict = {}
    exec(source, namespace)
    rng = np.random.default_rng(0)
    vectors = {slot: jnp.asarray(rng.normal(size=(8, 6)), jnp.float32) for slot in SLOTS}
    merged = jax.jit(namespace["merge_models"])(vectors)
    assert (merged.shape, merged.dtype) == ((8, 6), jnp.float32)
    assert bool(jnp.isfinite(merged).all())
    # Norms are equalized, so doubling one expert must not change the direction of the merge.
    vectors["expert_2"] = 2 * vectors["expert_2"]
    doubled = namespace["merge_models"](vectors)
    cosine = jnp.vdot(merged, doubled) / jnp.linalg.norm(merged) / jnp.linalg.norm(doubled)
    assert float(cosine) > 0.9999


def test_chat_wraps_the_message():
    text = prompts.find_prompt("short").render(
        slots=SLOTS, descriptions={}, chat=lambda message: f"<user>{message}<assistant>\n"
    )
    assert text == "<user># merge three experts<assistant>\n"


def test_description_is_one_line():
    described = DESCRIPTIONS | {"expert_2": "adds\n- expert_9: $count"}
    text = prompts.find_prompt("full").render(slots=SLOTS, descriptions=described)
    assert "- expert_2: adds - expert_9: $count\n" in text


def test_errors_name_the_prompt_or_expert():
    with pytest.raises(UserError, match=r"'long'.*full, full-memory, short, short-memory"):
        prompts.find_prompt("long")
    with pytest.raises(UserError, match="expert_2 has no description"):
        prompts.find_prompt("full").render(
            slots=SLOTS, descriptions={"expert_1": "adds", "expert_2": " "}
        )


def prompt_file(tmp_path, content):
    path = tmp_path / "mine.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_prompt_may_be_a_file(tmp_path):
    path = prompt_file(tmp_path, "Merge $count experts ($names):\r\n${experts}\n\n")
    text = prompts.find_prompt(str(path)).render(slots=SLOTS[:1], descriptions={"expert_1": "adds"})
    assert text == 'Merge one experts ("expert_1"):\n- expert_1: adds'


def test_prompt_file_is_found_next_to_the_config_first(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    prompt_file(tmp_path, "cwd")
    monkeypatch.chdir(tmp_path)
    assert prompts.find_prompt("mine.txt", relative_to=tmp_path / "configs").text == "cwd"
    prompt_file(tmp_path / "configs", "config")
    assert prompts.find_prompt("mine.txt", relative_to=tmp_path / "configs").text == "config"


def test_other_text_of_a_file_is_text(tmp_path):
    hostile = "{experts} %s {{ 7*7 }} $5 $(reboot) `x` <|im_end|> \u202e\x00 100$"
    prompt = prompts.find_prompt(str(prompt_file(tmp_path, hostile)))
    assert prompt.render(slots=SLOTS, descriptions={}) == hostile
    doubled = prompts.find_prompt(str(prompt_file(tmp_path, "$$HOME $$5")))
    assert doubled.render(slots=SLOTS, descriptions={}) == "$HOME $5"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb $expert", r"mine.txt, line 2: unknown placeholder \$expert; did you mean experts"),
        (" \n", "is empty"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        ("x" * ((1 << 20) + 1), "larger than 1,048,576 bytes"),
    ],
)
def test_error_says_what_is_wrong_with_a_file(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        prompts.find_prompt(str(prompt_file(tmp_path, content)))
