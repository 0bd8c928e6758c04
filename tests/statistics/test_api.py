"""The statistics of a small model on disk: files, resumption and errors."""

import json

import numpy as np
import pytest

import sdjax
from sdjax.core.errors import UserError
from sdjax.io.hf_checkpoint import write_model
from sdjax.io.model_paths import zoo_models
from sdjax.io.tokenizer import load_tokenizer
from sdjax.io.weights_digest import weights_digest
from sdjax.statistics.config import StatisticsConfig
from sdjax.statistics.progress import Progress
from sdjax.testing import tiny_model

GRAM = StatisticsConfig(kinds=("gram",), batch=2, checkpoint_every=2)
ROWS = [
    {"text": "12+34=46"},
    {"prompt": "7+8=", "completion": "15"},
    {"text": "1+1=2"},
    {"text": "99-98=1"},
    {"text": "5+5=10"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    seed = zoo_models()["seed"]
    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocab_size = load_tokenizer(seed).vocab_size
    config, params = tiny_model(num_layers=1, vocab_size=vocab_size)
    write_model(folder, config, params, assets_from=seed)
    return folder


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_statistics_are_stored_next_to_the_model(folder, texts):
    settings = StatisticsConfig(kinds=("gram", "input_norm"), batch=2, checkpoint_every=8)
    result = sdjax.compute_stats(str(folder), data=texts, settings=settings)
    assert result.folder == folder.with_name("tiny.stats")
    stats = sdjax.load_stats(result.folder)
    assert len(stats) == result.count == 2 * 5  # distinct inputs, with that of the output matrix
    assert all(stats[name].shape == stats.shapes[name].shape for name in stats)
    gram = stats["gram/layers/0/mlp/down_proj"]
    norm = stats["input_norm/layers/0/mlp/down_proj"]
    np.testing.assert_allclose(np.sqrt(np.diag(gram)), norm, rtol=1e-5)
    assert stats.manifest["examples"] == result.examples == len(ROWS)
    assert {path.name for path in result.folder.iterdir()} == {
        "model.safetensors",
        "statistics.json",
    }
    with pytest.raises(UserError, match=r"tiny\.stats: has statistics already; .* `stats:` in"):
        sdjax.compute_stats(str(folder), data=texts)
    assert stats.manifest["weights"] == weights_digest(folder)


def test_an_interrupted_computation_resumes_and_ends_the_same(folder, texts, tmp_path, monkeypatch):
    whole = sdjax.compute_stats(str(folder), tmp_path / "whole", data=texts, settings=GRAM).folder
    stored = []

    def write_one(self, sums, batches, write=Progress.write):
        if stored:
            raise KeyboardInterrupt
        stored.append(batches)
        write(self, sums, batches)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "write", write_one)
        with pytest.raises(KeyboardInterrupt):
            sdjax.compute_stats(str(folder), out, data=texts, settings=GRAM)
    assert not out.exists()
    resumed = []
    with monkeypatch.context() as patch:
        read = Progress.read

        def observed(self, zero):
            sums, done = read(self, zero)
            resumed.append(done)
            return sums, done

        patch.setattr(Progress, "read", observed)
        sdjax.compute_stats(str(folder), out, data=texts, settings=GRAM)
        # Other data do not go on with these sums.
        sdjax.compute_stats(str(folder), tmp_path / "other", data=texts, limit=3, settings=GRAM)
    assert (stored, resumed) == ([1], [1, 0])
    same = [(path / "model.safetensors").read_bytes() for path in (whole, out)]
    assert same[0] == same[1]
    assert {path.name for path in tmp_path.iterdir()} == {"texts.jsonl", "whole", "out", "other"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "a"}, "line 1: needs the field text, or prompt and completion, or messages; f"),
        ({"text": 3}, "line 1: text must be a string"),
        (None, "texts.jsonl: no examples; add at least one row"),
    ],
)
def test_unusable_texts_are_an_error(folder, tmp_path, row, message):
    path = tmp_path / "texts.jsonl"
    path.write_text("" if row is None else json.dumps(row))
    with pytest.raises(UserError, match=message):
        sdjax.compute_stats(str(folder), tmp_path / "out", data=str(path))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("zoo:seed", {"data": "x"}, "zoo:seed: nothing is written next to this model; pass --out"),
        (None, {"out": "out"}, "stats requires --data FILE or --task TASK"),
        (None, {"out": "out", "data": "none.jsonl"}, "none.jsonl: no such file"),
        (None, {"out": "out", "task": "arithmtic"}, "unknown task 'arithmtic'"),
    ],
)
def test_wrong_arguments_are_an_error(folder, tmp_path, monkeypatch, model, options, message):
    monkeypatch.chdir(tmp_path)
    options = {**options, "out": tmp_path / options["out"]} if "out" in options else options
    with pytest.raises(UserError, match=message):
        sdjax.compute_stats(model or str(folder), **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ("fischer",)}, "no statistic 'fischer'; did you mean fisher?"),
        ({"kinds": ()}, "kinds is empty; available: fisher, gram, input_norm"),
        ({"labels": "x"}, "labels must be model or data, not 'x'"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
    ],
)
def test_wrong_settings_are_an_error(settings, message):
    with pytest.raises(UserError, match=message):
        StatisticsConfig(**settings)


def test_folders_without_statistics_are_an_error(tmp_path):
    with pytest.raises(UserError, match="no statistics; compute them with `sdjax stats"):
        sdjax.load_stats(tmp_path)
