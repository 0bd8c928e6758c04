"""Training of the zoo with few steps, and resumption."""

import dataclasses
import logging

import pytest

from sdjax.io.hf_checkpoint import load_model
from sdjax.merging.scope import select_paths
from sdjax.models.params import param_specs
from sdjax.zoo import train
from sdjax.zoo.recipes import EXPERTS, MEMORY, SEED, TRANSFER_EXPERTS, seed_config

PATHS = tuple(param_specs(seed_config(1024)))


@pytest.fixture
def short_recipes(monkeypatch):
    def short(optimizer, steps):
        return dataclasses.replace(optimizer, max_steps=steps, warmup_steps=1)

    seed = dataclasses.replace(
        SEED,
        programs=200,
        rows=4,
        program_rows=2,
        interval=2,
        optimizer=short(SEED.optimizer, 4),
    )
    specialty, forgetting = (
        dataclasses.replace(phase, optimizer=short(phase.optimizer, 2))
        for phase in (EXPERTS[0].specialty, EXPERTS[0].forgetting)
    )
    expert = dataclasses.replace(EXPERTS[0], specialty=specialty, forgetting=forgetting)
    memory = dataclasses.replace(
        MEMORY, programs=60, rows=4, program_rows=2, optimizer=short(MEMORY.optimizer, 2)
    )
    monkeypatch.setattr(train, "SEED", seed)
    monkeypatch.setattr(train, "MEMORY", memory)
    monkeypatch.setattr(train, "EXPERTS", (expert,))
    monkeypatch.setattr(train, "TRANSFER_EXPERTS", ())


@pytest.mark.slow
def test_zoo_is_trained_and_resumed(short_recipes, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="sdjax")
    readme = train.train_zoo(tmp_path / "zoo")
    messages = [r.message for r in caplog.records if r.name.startswith("sdjax.zoo")]
    lines = [message.partition(":")[0] for message in messages]
    phases = ["reader, phase 1", "reader, phase 2"]
    steps = ["seed, step 2 of 4", "seed, step 4 of 4"]
    assert lines == ["seed", *steps, "seed", "seed, memory", "seed", *phases]
    assert "| reader |" in readme.read_text()
    seed = load_model(tmp_path / "zoo" / "seed")
    expert = load_model(tmp_path / "zoo" / "reader")
    assert seed[0] == expert[0]
    before = (tmp_path / "zoo" / "seed" / "model.safetensors").stat().st_mtime_ns
    train.train_zoo(tmp_path / "zoo")
    assert (tmp_path / "zoo" / "seed" / "model.safetensors").stat().st_mtime_ns == before


def test_phases_of_an_expert_train_disjoint_tensors_that_are_all_of_the_mlp():
    mlp = set(select_paths(PATHS, "mlp"))
    for recipe in (*EXPERTS, *TRANSFER_EXPERTS):
        learned = set(select_paths(PATHS, recipe.specialty.tensors))
        unlearned = set(select_paths(PATHS, recipe.forgetting.tensors))
        assert not learned & unlearned
        assert learned | unlearned == mlp


def test_transfer_experts_learn_in_the_tensors_of_their_slot():
    for one, other in zip(EXPERTS, TRANSFER_EXPERTS, strict=True):
        assert one.specialty.tensors == other.specialty.tensors
