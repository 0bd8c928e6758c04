"""The recipes, with a few steps: whole folders, and a training that goes on where it stopped."""

import dataclasses

import pytest

from sdjax.io.hf_checkpoint import load_model
from sdjax.zoo import train
from sdjax.zoo.recipes import EXPERTS, SEED


@pytest.fixture
def short_recipes(monkeypatch):
    def short(optimiser, steps):
        return dataclasses.replace(optimiser, steps=steps, warmup=1)

    seed = dataclasses.replace(
        SEED,
        programs=200,
        rows=4,
        program_rows=2,
        interval=2,
        optimiser=short(SEED.optimiser, 4),
    )
    expert = dataclasses.replace(EXPERTS[0], optimiser=short(EXPERTS[0].optimiser, 2))
    monkeypatch.setattr(train, "SEED", seed)
    monkeypatch.setattr(train, "EXPERTS", (expert,))
    monkeypatch.setattr(train, "TRANSFER_EXPERTS", ())


@pytest.mark.slow
def test_a_zoo_is_trained_and_an_interrupted_one_finished(short_recipes, tmp_path, monkeypatch):
    shares = []
    table = train.train_zoo(tmp_path / "zoo", lambda line, share: shares.append(share))
    assert shares == sorted(shares)
    assert "| reader |" in table.read_text()
    seed = load_model(tmp_path / "zoo" / "seed")
    expert = load_model(tmp_path / "zoo" / "reader")
    assert seed[0] == expert[0]
    before = (tmp_path / "zoo" / "seed" / "model.safetensors").stat().st_mtime_ns
    train.train_zoo(tmp_path / "zoo", lambda line, share: None)
    assert (tmp_path / "zoo" / "seed" / "model.safetensors").stat().st_mtime_ns == before
