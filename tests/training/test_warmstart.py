"""Warm start: targets, order of the batches, and stored training programs."""

import dataclasses
import gzip
import io
import json

import jax
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.io import training_programs
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
from sdjax.programs.extraction import extract_source
from sdjax.programs.signature import model_signature
from sdjax.sandbox.trusted_identities import candidate_identities
from sdjax.training.warmstart import (
    make_warmstart_data,
    sample_candidates,
    signature_digest,
    warmstart_batches,
)

SEED = zoo_models()["seed"]
SLOTS = ("expert_1", "expert_2", "expert_3")
TOKENIZER = load_tokenizer(SEED)
EXPERTS = ("reads", "calculates", "compares")


def test_targets_contain_candidates_as_extraction_finds_them():
    programs = sample_candidates(5, 0, slots=3)
    data = make_warmstart_data(TOKENIZER, "full", EXPERTS, programs)
    for program, target in zip(programs, data.targets, strict=True):
        assert target[-1] == TOKENIZER.eos_ids[0]
        assert extract_source(TOKENIZER.decode(target)).strip() == program
    assert "calculates" in TOKENIZER.decode(data.prompt)


def test_every_candidate_occurs_once_per_epoch():
    data = make_warmstart_data(TOKENIZER, "short", EXPERTS, sample_candidates(12, 0, slots=3))
    batches = list(warmstart_batches(data, batch_size=4, num_batches=6, key=jax.random.key(0)))
    shown = [
        tuple(row[weights == 1])
        for batch in batches
        for row, weights in zip(batch["tokens"], batch["weights"], strict=True)
    ]
    assert set(shown[:12]) == set(shown[12:]) == set(data.targets)
    assert {batch["tokens"].shape[1] % 64 for batch in batches} == {0}
    again = warmstart_batches(data, batch_size=4, num_batches=6, key=jax.random.key(0))
    for one, other in zip(batches, again, strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])


def test_identities_equal_those_of_a_search():
    """Check the identities of the training programs that ship with the zoo's seed."""
    texts = read_training_sources(SEED)
    assert len(texts) == 55_566  # distinct programs of both trainings of the seed
    signature = model_signature(load_config(SEED), SLOTS, "mlp")
    known = read_training_identities(SEED, signature_digest(signature))
    other = model_signature(load_config(SEED), SLOTS, "attention")
    assert read_training_identities(SEED, signature_digest(other)) is None
    found = [one for one in candidate_identities(texts[:2], signature) if one is not None]
    assert found
    assert np.isin(np.array(found, np.uint64), known).all()


def test_training_programs_round_trip(tmp_path):
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


def test_files_that_expand_or_announce_too_much_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(training_programs, "MAX_SOURCES_BYTES", 100)
    fields = {"contract": "mlp", "texts": ["x" * 100]}
    for content in (
        gzip.compress(json.dumps(fields).encode()),
        gzip.compress(b"[" * 100),
        gzip.compress(b'{"contract": 1, "texts": 5}'),
        gzip.compress(b"{}")[:10] + b"damaged",
        b"",
    ):
        (tmp_path / SOURCES_FILE).write_bytes(content)
        with pytest.raises(UserError, match=r"training_programs\.json\.gz: cannot be read"):
            read_training_sources(tmp_path)
    TrainingPrograms.create(["a"], [7], signature="mlp").write(tmp_path)
    header = io.BytesIO()
    array = {"descr": "<u8", "fortran_order": False, "shape": (2**55,)}
    np.lib.format.write_array_header_1_0(header, array)
    (tmp_path / TRAINING_PROGRAMS).write_bytes(header.getvalue())
    with pytest.raises(UserError, match=r"training_programs\.npy: not a list of the programs"):
        read_training_identities(tmp_path, "mlp")
