"""Training of the zoo with few steps, and resumption."""

import dataclasses
import logging

import pytest

from sdjax.io.hf_checkpoint import load_model
from sdjax.zoo import train
from sdjax.zoo.recipes import EXPERTS, SEED


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
    expert = dataclasses.replace(EXPERTS[0], optimizer=short(EXPERTS[0].optimizer, 2))
    monkeypatch.setattr(train, "SEED", seed)
    monkeypatch.setattr(train, "EXPERTS", (expert,))
    monkeypatch.setattr(train, "TRANSFER_EXPERTS", ())


@pytest.mark.slow
def test_zoo_is_trained_and_resumed(short_recipes, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="sdjax")
    readme = train.train_zoo(tmp_path / "zoo")
    lines = [message.partition(":")[0] for message in caplog.messages]
    assert lines == ["seed, step 2 of 4", "seed, step 4 of 4", "seed", "reader"]
    assert "| reader |" in readme.read_text()
    seed = load_model(tmp_path / "zoo" / "seed")
    expert = load_model(tmp_path / "zoo" / "reader")
    assert seed[0] == expert[0]
    before = (tmp_path / "zoo" / "seed" / "model.safetensors").stat().st_mtime_ns
    train.train_zoo(tmp_path / "zoo")
    assert (tmp_path / "zoo" / "seed" / "model.safetensors").stat().st_mtime_ns == before
