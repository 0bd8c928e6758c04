"""The models that ship: complete Hugging Face folders that transformers reads as we do."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdjax.core.errors import UserError
from sdjax.evaluation.statistics import paired_difference
from sdjax.evaluation.tasks.arithmetic import KINDS, ArithmeticTask
from sdjax.io.hf_checkpoint import load_config, load_model
from sdjax.io.model_paths import TRAINING_PROGRAMS, ZOO, model_folder, zoo_models
from sdjax.io.tokenizer import load_tokenizer
from sdjax.merging.engine import Merger
from sdjax.merging.methods.registry import algorithm
from sdjax.models.params import kind_of
from sdjax.models.transformer import forward, unembed
from sdjax.models.tree import flatten
from sdjax.zoo.recipes import EXPERTS, PLAIN, STORIES, TRANSFER_EXPERTS
from sdjax.zoo.train import Probe

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_the_zoo_is_whole_and_small():
    names = ["seed", *(recipe.name for recipe in (*EXPERTS, *TRANSFER_EXPERTS))]
    assert sorted(zoo_models()) == sorted(names)
    for folder in zoo_models().values():
        assert {path.name for path in folder.iterdir()} >= FILES
    assert sum(path.stat().st_size for path in ZOO.rglob("*") if path.is_file()) < 25e6


def test_the_seed_has_the_size_it_should_have():
    config, params = load_model(model_folder("zoo:seed"))
    assert 1e6 <= sum(leaf.size for leaf in flatten(params).values()) <= 1.5e6
    assert all(leaf.dtype == jnp.bfloat16 for leaf in flatten(params).values())
    assert config.vocab_size <= 1024
    assert config.max_seq_len >= 512


@pytest.mark.parametrize("name", ["seed", "reader"])
def test_logits_equal_transformers(name):
    torch = pytest.importorskip("torch", reason="needs torch, the reference of the parity tests")
    folder = model_folder(f"zoo:{name}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = ArithmeticTask()
    text = task.prompt(task.problems("development")[3]) + "12+34=46"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert load_tokenizer(folder).encode(text, add_special=True) == ids[0].tolist()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(ids).logits.numpy()
    config, params = load_model(folder, dtype=jnp.float32)
    positions = jnp.arange(ids.shape[1])[None]
    hidden, _ = forward(params, None, jnp.asarray(ids.numpy()), config=config, positions=positions)
    np.testing.assert_allclose(unembed(params, hidden, config=config), expected, atol=1e-4)


def test_experts_differ_from_the_seed_in_the_mlp_tensors_alone():
    seed = flatten(load_model(model_folder("zoo:seed"))[1])
    for recipe in (*EXPERTS, *TRANSFER_EXPERTS):
        expert = flatten(load_model(model_folder(f"zoo:{recipe.name}"))[1])
        changed = {path for path in seed if not jnp.array_equal(seed[path], expert[path])}
        assert {path for path in seed if kind_of(path).startswith("mlp.")} == changed


OWN = {
    "reader": STORIES,
    "calculator": PLAIN,
    "judge": ("largest",),
    "storyteller": ("story_all", "story_left"),
    "accountant": PLAIN,
    "detective": ("missing",),
}


@pytest.fixture(scope="module")
def right():
    """Model to kind to whether each development problem of the kind is solved."""
    seed = model_folder("zoo:seed")
    probe = Probe(load_tokenizer(seed), load_config(seed), split="development")
    kinds = np.array([problem.kind for problem in probe.problems])

    def by_kind(params):
        strict = np.array([outcome.strict for outcome in probe.outcomes(params)], float)
        return {kind: strict[kinds == kind] for kind in KINDS}

    trees = {name: load_model(model_folder(f"zoo:{name}"))[1] for name in ("seed", *OWN)}
    three = [trees[recipe.name] for recipe in EXPERTS]
    method = algorithm("task_arithmetic", weight=0.7)
    merged = Merger(trees["seed"], three, num_layers=4)(method).params
    return {name: by_kind(params) for name, params in (trees | {"merged": merged}).items()}


def together(outcomes, kinds):
    return np.concatenate([outcomes[kind] for kind in kinds])


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_solves_a_part_of_every_kind(right, kind):
    assert 0.3 <= right["seed"][kind].mean() <= 0.7


@pytest.mark.parametrize("name", OWN)
def test_an_expert_is_clearly_better_at_its_own_and_worse_at_something(right, name):
    own = (together(right[model], OWN[name]) for model in (name, "seed"))
    assert paired_difference(*own).low > 0
    others = set(KINDS) - set(OWN[name])
    assert any(right[name][kind].mean() < right["seed"][kind].mean() for kind in others)


def test_a_merge_beats_the_seed_by_five_points_and_every_expert(right):
    merged = together(right["merged"], KINDS)
    assert paired_difference(merged, together(right["seed"], KINDS)).low > 0.05
    for recipe in EXPERTS:
        assert merged.mean() > together(right[recipe.name], KINDS).mean()


def test_the_training_programs_are_known():
    identities = np.load(model_folder("zoo:seed") / TRAINING_PROGRAMS, allow_pickle=False)
    assert identities.dtype == np.uint64
    assert len(identities) > 10_000
    assert np.all(np.diff(identities.astype(object)) > 0)


def test_the_end_token_is_the_tokenizers():
    folder = model_folder("zoo:seed")
    generation = json.loads((folder / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert load_tokenizer(folder).eos_ids == (tokenizer.eos_token_id,)


def test_an_unknown_name_lists_the_zoo():
    with pytest.raises(UserError, match=r"zoo:sed: no such model in the zoo; available: .*seed"):
        model_folder("zoo:sed")
