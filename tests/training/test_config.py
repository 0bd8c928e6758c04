"""Training configs: number of steps, and combinations that are rejected."""

import re

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from sdjax.cli.main import main
from sdjax.training.config import DPOConfig, DPOJob, OptimizerConfig, RunTrainingConfig, SFTJob

JOB = {"model": "zoo:seed", "data": "pairs.jsonl", "out": "trained"}


def test_epochs_become_steps():
    config = DPOConfig(epochs=2, batch_size=8, gradient_accumulation_steps=2)
    assert config.for_count(40).num_steps == 5
    assert config.for_count(41).num_steps == 6
    assert config.for_count(1).num_steps == 1
    fixed = DPOConfig(max_steps=7)
    assert fixed.for_count(40) is fixed


def test_epochs_become_steps_with_an_adapter():
    job = DPOJob(**JOB, adapter="trained-before", epochs=1).for_count(8)
    assert (job.num_steps, job.epochs, job.adapter) == (2, None, "trained-before")


def test_batches_include_accumulation():
    assert OptimizerConfig(max_steps=3, gradient_accumulation_steps=4).num_batches == 12


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (DPOConfig, {}, "set exactly one of max_steps and epochs"),
        (DPOConfig, {"max_steps": 1, "epochs": 1.0}, "set exactly one of max_steps and epochs"),
        (OptimizerConfig, {"max_steps": 2, "warmup_steps": 3}, "warmup_steps: 3 exceeds max_steps"),
        (
            DPOConfig,
            {"max_steps": 1, "loss": "hinge"},
            "must be one of sigmoid, ipo, robust, forward_kl",
        ),
        (DPOConfig, {"max_steps": 1, "loss": "robust"}, "loss: robust needs label_smoothing"),
        (
            DPOConfig,
            {"max_steps": 1, "label_smoothing": 0.1},
            "label_smoothing: loss: sigmoid does not use it; set it to null, or set loss: robust",
        ),
        (
            DPOConfig,
            {"max_steps": 1, "loss": "robust", "label_smoothing": 0.5},
            "less than 0.5",
        ),
        (
            RunTrainingConfig,
            {"max_steps": 1, "objective": "entropic", "nll_weight": 1.0},
            "nll_weight: objective: entropic has no pairs; set training.nll_weight to 0",
        ),
        (
            RunTrainingConfig,
            {"max_steps": 1, "objective": "entropic", "loss": "ipo"},
            "loss: objective: entropic has no pairs; set training.loss to sigmoid",
        ),
        (
            RunTrainingConfig,
            {"max_steps": 1, "clip_range": 0.3},
            "clip_range: objective: pairs does not use it; set it to 0.2",
        ),
        (
            RunTrainingConfig,
            {"max_steps": 1, "objective": "entropic", "start": "first"},
            "start: objective: entropic learns from what the current generator wrote",
        ),
        (DPOJob, {**JOB, "max_steps": 1, "enabled": False}, "enabled"),
        (
            SFTJob,
            {**JOB, "max_steps": 1, "adapter": "a", "rank": 4},
            "set by the adapter to start from",
        ),
        (SFTJob, {**JOB, "max_steps": 1, "save": "adapter"}, "save: adapter requires rank"),
    ],
)
def test_invalid_combinations_are_rejected(kind, fields, message):
    with pytest.raises(ValidationError, match=message):
        kind(**fields)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_steps=1000000000", "max_steps: must be at most 1000000"),
        ("batch_size=100000000", "a batch of 100000000 sequences of 128 tokens requires"),
        ("max_length=100000000", r"sequences of 100000000 tokens requires [\d,.]+ GB, but"),
        ("rank=1000000", "rank is 1000000, but no adapted projection has a rank above"),
    ],
)
def test_sizes_beyond_the_memory_are_errors_at_once(tmp_path, override, message):
    arguments = ["train", "sft", "train-sft", "--out", str(tmp_path / "out"), "--set", override]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert re.search(message, result.output)
