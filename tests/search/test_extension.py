"""Which changes of a run's config are possible when it is resumed."""

import dataclasses
import re

import pytest

from sdjax.core.errors import UserError
from sdjax.search.config import RunConfig, config_from, read_config
from sdjax.search.extension import (
    ENVIRONMENT,
    EXTENSIONS,
    REASONS,
    check_moved_models,
    check_samples,
    config_changes,
    needs_acceptance,
)
from sdjax.search.types import Change


@pytest.fixture(scope="module")
def demo() -> RunConfig:
    return read_config("demo", ["iterations=3", "generation.samples=64"])


def changed(demo: RunConfig, *overrides: str):
    new = config_from(demo.to_json(), "runs/a", overrides)
    return config_changes(demo, new, "runs/a")


def test_every_key_of_the_config_can_change_or_has_a_reason():
    sections = {key.split(".")[0] for key in EXTENSIONS}
    for field in dataclasses.fields(RunConfig):
        assert field.name in {*sections, *ENVIRONMENT, *REASONS}, field.name


@pytest.mark.parametrize(
    ("override", "key", "new"),
    [
        ("iterations=5", "iterations", "5"),
        ("generation.samples=65", "generation.samples", "65"),
        ("test.top_k=6", "test.top_k", "6"),
        ("training.after_last=true", "training.after_last", "true"),
        ("name=longer", "name", '"longer"'),
        ("sandbox.workers=7", "sandbox.workers", "7"),
        ("baselines.fine.karcher={}", "baselines.fine.karcher", "{}"),
        ("baselines.paper.ties.density=[0.1, 0.2, 0.4, 0.6]", "baselines.paper.ties", None),
        ("seed=elsewhere/seed", "seed", '"elsewhere/seed"'),
        ("experts.expert_2.model=/moved", "experts.expert_2.model", '"/moved"'),
        ("transfer.expert_1.model=/moved", "transfer.expert_1.model", '"/moved"'),
    ],
)
def test_extensions_are_recorded(demo, override, key, new):
    (change,) = changed(demo, override)
    assert (change.kind, change.key) == ("config", key)
    assert new is None or change.new == new
    assert not needs_acceptance(change)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("iterations=2", "iterations = 3, which cannot become 2: it can only grow"),
        ("generation.samples=63", "it can only grow"),
        ("test.top_k=4", "it can only grow"),
        ("rng_seed=1", "all random numbers depend on it"),
        ("task.development=641", "scores on other problems are not comparable"),
        ("task.test=1201", "scores on other problems are not comparable"),
        ("task.metric=flexible", "not comparable"),
        ("generation.temperature=1.1", "earlier iterations were sampled with it"),
        ("selection.elites=7", "pairs that it chose"),
        ("training.beta=0.2", "earlier generators were trained with it"),
        ("evaluation.max_new_tokens=11", "scores of other answers"),
        ("sandbox.step_budget=9", "decides which programs are admitted"),
        ("scope=all", "all programs were scored on it"),
        ("experts.expert_1.description=other", "the prompt depends on it"),
        ("transfer={}", "only be added to a run without them"),
        ("transfer.expert_1.description=other", "only be added to a run without them"),
        ("baselines.fine={}", "can only be added"),
        ("baselines.fine.ties.density=[0.2, 0.5]", "can only be added"),
        ("baselines.fine.linear.weight=[1.0]", "with baselines.fine.linear = "),
        ("generator=zoo:seed", "all iterations started from it"),
    ],
)
def test_changes_of_earlier_results_are_refused(demo, override, reason):
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        changed(demo, override)
    assert str(caught.value).startswith("runs/a: contains a run with ")


def test_transfer_experts_can_be_added():
    without = read_config("demo", ["transfer={}"])
    (change,) = config_changes(without, read_config("demo"), "runs/a")
    assert (change.key, change.old) == ("transfer", "{}")


def test_mesh_needs_acceptance(demo):
    (change,) = changed(demo, "mesh.data=2")
    assert (change.key, change.old, change.new) == ("mesh.data", "null", "2")
    assert needs_acceptance(change)


def test_moved_model_must_have_the_same_weights(demo):
    started = dataclasses.replace(demo, generator="zoo:adapter")
    changes = changed(
        started,
        "seed=/moved/seed",
        "generator=/moved/generator",
        "experts.expert_2.model=/moved/expert",
        "transfer.expert_1.model=/moved/transfer",
    )
    check_moved_models(changes, "runs/a")
    other = Change(kind="input", key="expert_1", old="1", new="2")
    check_moved_models([*changes, other], "runs/a")  # replaced in place, not renamed
    for key, config_key in (
        ("seed", "seed"),
        ("generator", "generator"),
        ("expert_2", "experts.expert_2.model"),
        ("transfer expert_1", "transfer.expert_1.model"),
    ):
        unknown = Change(kind="input", key=key, old="unknown", new="2")  # a run of sdjax 0.2
        check_moved_models([*changes, unknown], "runs/a")
        different = Change(kind="input", key=key, old="1", new="2")
        with pytest.raises(UserError, match=f"{config_key} = .*it has other weights"):
            check_moved_models([*changes, different], "runs/a")


def test_more_samples_need_an_iteration_without_samples(demo):
    changes = changed(demo, "generation.samples=128")
    check_samples(demo, changes, 2)
    with pytest.raises(UserError, match="also set iterations=4"):
        check_samples(demo, changes, 3)


def test_error_names_the_option():
    with pytest.raises(UserError, match=r"--set iterations=0: iterations: must be at least 1"):
        config_from(read_config("demo").to_json(), "runs/a", ["iterations=0"])
