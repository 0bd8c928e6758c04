"""Model cards of merged models."""

import platform
import re
import shutil
from types import SimpleNamespace

import jax
import pytest
import yaml
from small_models import TASK_ARITHMETIC, write

import sdjax
from sdjax.core.visible import escape
from sdjax.merging.recipe.model_card import Provenance, write_model_card
from sdjax.merging.recipe.pipeline import merge_recipe


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def merged_card(tmp_path, text):
    merge_recipe(write(tmp_path, text), tmp_path / "mine", seed=7)
    return (tmp_path / "mine" / "README.md").read_text()


def test_card_has_the_recipe_the_sources_and_the_versions(tmp_path, models):
    card = merged_card(tmp_path, TASK_ARITHMETIC)
    assert "# mine\n\nMerged by sdjax with `task_arithmetic` from:\n" in card
    assert "- `base`\n- `math`\n- `code`\n" in card
    assert "- Tensors: merged all 5 tensors\n" in card
    versions = f"sdjax {sdjax.__version__}, jax {jax.__version__}, python "
    assert f"- Versions: {versions}{platform.python_version()}\n" in card
    assert f"```yaml\n{TASK_ARITHMETIC}```" in card
    # Nothing is known on Hugging Face, and the method is not random.
    assert metadata(card) == {"library_name": "transformers", "tags": ["merge", "sdjax"]}
    assert "seed" not in card


def test_card_of_a_random_method_has_the_seed(tmp_path, models):
    text = TASK_ARITHMETIC.replace("task_arithmetic", "dare_linear")
    assert "- Random seed: 7\n" in merged_card(tmp_path, text)


def test_models_in_the_hub_cache_are_named_with_their_revisions(tmp_path, models):
    snapshot = tmp_path / "hub" / "models--org--Math-7B" / "snapshots" / "0a1b2c"
    shutil.copytree(tmp_path / "math", snapshot)
    card = merged_card(tmp_path, TASK_ARITHMETIC.replace("model: math", f"model: {snapshot}"))
    assert metadata(card)["base_model"] == ["org/Math-7B"]
    assert "- `base`\n- `org/Math-7B` at `0a1b2c`\n- `code`\n" in card


@pytest.mark.parametrize("name", ["```", "a`b", 'x"\n---\nevil: 1', "- [a](b): *", "\x1b[31mred"])
def test_hostile_names_do_not_break_the_card(tmp_path, name):
    model = SimpleNamespace(name=name, reader=SimpleNamespace(folders=(tmp_path / "x",)))
    plan = SimpleNamespace(
        models=(model,), slots=None, key=None, coverage="merged all 1 tensors", notes=(name,)
    )
    text = f"# ```\n{name}\n"
    write_model_card(tmp_path, name, plan, Provenance(method=name, file="recipe.yaml", text=text))
    card = (tmp_path / "README.md").read_text()
    assert metadata(card) == {"library_name": "transformers", "tags": ["merge", "sdjax"]}
    head, fence, rest = re.fullmatch(r"(.*)\n(`{4,})yaml\n(.*)\n", card, re.S).groups()
    assert rest == f"{escape(text.rstrip())}\n{fence}"
    body = head.split("---\n", 2)[2]
    assert all(line.isprintable() for line in body.splitlines())
    # Front matter and code fences appear only where the card puts them.
    assert not re.search(r"^(---|```)", body, re.M)
    assert (tmp_path / "recipe.yaml").read_text() == text
