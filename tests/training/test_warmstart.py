"""The warm start: what a generator is shown, in which order, and what is kept of it."""

import dataclasses

import jax
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.io.hf_checkpoint import load_config
from sdjax.io.model_paths import TRAINING_PROGRAMS, zoo_models
from sdjax.io.tokenizer import load_tokenizer
from sdjax.io.training_programs import (
    MIXED_SIGNATURES,
    SOURCES_FILE,
    TrainingPrograms,
    read_training_identities,
    read_training_sources,
)
from sdjax.programs.extraction import extract_program
from sdjax.training.warmstart import (
    draw_programs,
    identities_of,
    lesson_batches,
    make_lesson,
    name_of,
    signature_for,
)

SEED = zoo_models()["seed"]
TOKENIZER = load_tokenizer(SEED)
EXPERTS = ("reads", "calculates", "compares")


def test_targets_hold_the_programs_as_they_are_extracted_from_samples():
    programs = draw_programs(5, 0, slots=3)
    lesson = make_lesson(TOKENIZER, "full", EXPERTS, programs)
    for program, target in zip(programs, lesson.targets, strict=True):
        assert target[-1] == TOKENIZER.eos_ids[0]
        assert extract_program(TOKENIZER.decode(target)).strip() == program
    assert "calculates" in TOKENIZER.decode(lesson.prompt)


def test_every_program_is_shown_once_before_any_is_shown_twice():
    lesson = make_lesson(TOKENIZER, "short", EXPERTS, draw_programs(12, 0, slots=3))
    batches = list(lesson_batches(lesson, batch=4, steps=6, key=jax.random.key(0)))
    shown = [
        tuple(row[weights == 1])
        for batch in batches
        for row, weights in zip(batch["tokens"], batch["weights"], strict=True)
    ]
    assert set(shown[:12]) == set(shown[12:]) == set(lesson.targets)
    assert {batch["tokens"].shape[1] % 64 for batch in batches} == {0}
    again = lesson_batches(lesson, batch=4, steps=6, key=jax.random.key(0))
    for one, other in zip(batches, again, strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])


def test_identities_are_those_of_a_search_over_the_model():
    """The zoo's seed ships with the identities of its own training programs."""
    texts = read_training_sources(SEED)
    assert len(texts) == 24_000
    signature = signature_for(load_config(SEED), experts=3)
    known = read_training_identities(SEED, name_of(signature))
    other = signature_for(load_config(SEED), experts=3, scope="attention")
    assert read_training_identities(SEED, name_of(other)) is None
    found = [one for one in identities_of(texts[:2], signature) if one is not None]
    assert found
    assert np.isin(np.array(found, np.uint64), known).all()


def test_training_programs_come_back(tmp_path):
    kept = TrainingPrograms.create(["a", "b", "c"], [7, None, 7], signature="mlp of three")
    assert {path.name for path in kept.write(tmp_path)} == {TRAINING_PROGRAMS, SOURCES_FILE}
    assert read_training_sources(tmp_path) == ("a", "b", "c")
    assert read_training_identities(tmp_path, "mlp of three").tolist() == [7]
    assert read_training_identities(tmp_path, "attention of three") is None
    more = TrainingPrograms.create(["c", "d"], [9, None], signature="mlp of three").union(kept)
    assert (more.sources, more.identities.tolist()) == (("a", "b", "c", "d"), [7, 9])
    assert more.signature == kept.signature
    assert (
        dataclasses.replace(kept, signature="attention").union(kept).signature == MIXED_SIGNATURES
    )
    assert read_training_sources(tmp_path / "other") is None
    (tmp_path / SOURCES_FILE).write_bytes((tmp_path / SOURCES_FILE).read_bytes()[:20])
    with pytest.raises(UserError, match=r"training_programs\.json\.gz: cannot be read"):
        read_training_sources(tmp_path)
