"""Zoo models: complete Hugging Face folders, parity with transformers, accuracies."""

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
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.engine import Merger
from sdjax.merging.methods.registry import algorithm
from sdjax.models.params import kind_of
from sdjax.models.transformer import forward, unembed
from sdjax.models.tree import flatten
from sdjax.zoo.evaluator import Evaluator
from sdjax.zoo.recipes import EXPERTS, PLAIN, STORIES, TRANSFER_EXPERTS

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_zoo_is_complete_and_small():
    names = ["seed", *(recipe.name for recipe in (*EXPERTS, *TRANSFER_EXPERTS))]
    assert sorted(zoo_models()) == sorted(names)
    for folder in zoo_models().values():
        assert {path.name for path in folder.iterdir()} >= FILES
    assert sum(path.stat().st_size for path in ZOO.rglob("*") if path.is_file()) < 25e6


def test_size_of_the_seed():
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


def test_experts_differ_from_the_seed_in_mlp_tensors_only():
    seed = flatten(load_model(model_folder("zoo:seed"))[1])
    for recipe in (*EXPERTS, *TRANSFER_EXPERTS):
        expert = flatten(load_model(model_folder(f"zoo:{recipe.name}"))[1])
        changed = {path for path in seed if not jnp.array_equal(seed[path], expert[path])}
        assert {path for path in seed if kind_of(path).startswith("mlp.")} == changed


OWN_KINDS = {
    "reader": STORIES,
    "calculator": PLAIN,
    "judge": ("largest",),
    "storyteller": ("story_all", "story_left"),
    "accountant": PLAIN,
    "detective": ("missing",),
}


@pytest.fixture(scope="module")
def correct():
    """Model name -> kind -> whether each development problem is solved."""
    seed = model_folder("zoo:seed")
    evaluator = Evaluator(load_tokenizer(seed), load_config(seed), split="development")
    kinds = np.array([problem.kind for problem in evaluator.problems])

    def by_kind(params):
        strict = np.array([outcome.strict for outcome in evaluator.outcomes(params)], float)
        return {kind: strict[kinds == kind] for kind in KINDS}

    trees = {name: load_model(model_folder(f"zoo:{name}"))[1] for name in ("seed", *OWN_KINDS)}
    three = [trees[recipe.name] for recipe in EXPERTS]
    merge = Merger(trees["seed"], three, num_layers=4)
    merges = {
        # The best weights that the demo's control finds in 42 evaluations.
        "weights": merge(algorithm("task_arithmetic", weight=[1.16, 0.85, 0.1])).params,
        "gates": merge(Algorithm.from_function(gates, name="gates")).params,
    }
    return {name: by_kind(params) for name, params in (trees | merges).items()}


def gates(task_vectors, depth, kind):
    """Use each expert where it learned its specialty."""
    a, b, c = task_vectors.values()
    if kind != "mlp.down_proj":
        b = 0.1 * b
    a = jnp.where(depth < 1, 0.1, 1.0) * a
    return a + b + jnp.where(depth < 0.5, 1.0, 0.1) * c


def concatenate(outcomes, kinds):
    return np.concatenate([outcomes[kind] for kind in kinds])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_seed_solves_some_of_every_kind(correct, kind):
    assert 0.3 <= correct["seed"][kind].mean() <= 0.7


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN_KINDS)
def test_expert_is_better_at_its_own_kinds_and_worse_at_others(correct, name):
    own = (concatenate(correct[model], OWN_KINDS[name]) for model in (name, "seed"))
    assert paired_difference(*own).low > 0
    others = set(KINDS) - set(OWN_KINDS[name])
    assert any(correct[name][kind].mean() < correct["seed"][kind].mean() for kind in others)


@pytest.mark.slow
def test_tuned_weights_beat_the_seed_by_five_points_and_every_expert(correct):
    merged = concatenate(correct["weights"], KINDS)
    assert paired_difference(merged, concatenate(correct["seed"], KINDS)).low > 0.05
    for recipe in EXPERTS:
        assert merged.mean() > concatenate(correct[recipe.name], KINDS).mean()


@pytest.mark.slow
def test_untuned_gates_beat_tuned_weights_by_five_points(correct):
    gated = concatenate(correct["gates"], KINDS)
    gain = paired_difference(gated, concatenate(correct["weights"], KINDS))
    assert gain.mean > 0.05
    assert gain.low > 0


def test_identities_of_training_programs_are_sorted():
    identities = np.load(model_folder("zoo:seed") / TRAINING_PROGRAMS, allow_pickle=False)
    assert identities.dtype == np.uint64
    assert len(identities) > 10_000
    assert np.all(np.diff(identities.astype(object)) > 0)


def test_end_token_equals_that_of_the_tokenizer():
    folder = model_folder("zoo:seed")
    generation = json.loads((folder / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert load_tokenizer(folder).eos_ids == (tokenizer.eos_token_id,)


def test_unknown_name_raises_user_error_with_the_zoo():
    with pytest.raises(
        UserError, match=r"zoo:sed: no such model in the zoo; did you mean seed\? available: .*seed"
    ):
        model_folder("zoo:sed")
