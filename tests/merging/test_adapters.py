"""Adapters extracted from models, and merged without their model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sdjax
from sdjax.cli.extract_lora import report
from sdjax.cli.merge_lora import _parse_weights
from sdjax.core.errors import UserError
from sdjax.io.hf_checkpoint import write_model
from sdjax.io.peft_writer import write_factors
from sdjax.merging.adapters import extract_lora, merge_adapters
from sdjax.merging.operations.low_rank import low_rank_factors, relative_error
from sdjax.models.tree import flatten, unflatten
from sdjax.testing import tiny_model

CHANGED = "layers/0/mlp/up_proj"


@pytest.fixture
def folders(tmp_path):
    """Write a base, and two models that differ from it by changes of rank 3 and a norm."""
    config, params = tiny_model()
    base = {path: np.asarray(x) for path, x in flatten(params).items()}
    write_model(tmp_path / "base", config, params)
    rng, changes = np.random.default_rng(0), {}
    for name in ("a", "b"):
        leaves, changes[name] = dict(base), {}
        for path in (CHANGED, f"layers/{'01'[name == 'b']}/mlp/gate_proj"):
            rows, columns = base[path].shape
            change = rng.standard_normal((rows, 3)) @ rng.standard_normal((3, columns))
            changes[name][path] = change.astype(np.float32)
            leaves[path] = base[path] + changes[name][path]
        leaves["final_norm"] = base["final_norm"] + 1
        write_model(tmp_path / name, config, unflatten(leaves))
    return tmp_path, base, changes


def change_of(folder, adapter, base):
    """Return what an adapter changes when it is merged into the model."""
    _, params = sdjax.load_model(f"{folder}+{adapter}")
    leaves = {path: np.asarray(x) - base[path] for path, x in flatten(params).items()}
    return {path: x for path, x in leaves.items() if np.abs(x).max() > 1e-4}


def check_changes(got, want):
    assert got.keys() == want.keys()
    for path, change in want.items():
        np.testing.assert_allclose(got[path], change, atol=1e-4 * np.abs(change).max())


@pytest.mark.slow
def test_a_difference_of_low_rank_is_extracted_exactly(folders):
    root, base, changes = folders
    result = extract_lora(str(root / "base"), str(root / "a"), root / "lora", rank=3)
    check_changes(change_of(root / "base", root / "lora", base), changes["a"])
    assert len(result.tensors) == 2
    assert all(tensor.error < 1e-5 and tensor.rank == 3 for tensor in result.tensors)
    assert result.notes == (
        "1 tensor that LoRA does not adapt differs too (such as model.norm.weight): left out",
    )
    settings = json.loads((root / "lora" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(root / "base")


@pytest.mark.slow
def test_errors_are_those_of_the_best_approximation():
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((40, 60)) * np.linspace(1, 0.1, 60)
    for rank in (5, 40):
        values = np.linalg.svd(matrix, compute_uv=False)
        best = np.sqrt(np.sum(values[rank:] ** 2) / np.sum(values**2))
        factors = jax.jit(low_rank_factors, static_argnums=1)
        a, b = factors(jnp.asarray(matrix, jnp.float32), rank, jax.random.key(0))
        assert (a.shape, b.shape) == ((rank, 60), (40, rank))
        error = float(relative_error(jnp.asarray(matrix, jnp.float32), a, b))
        assert best - 1e-5 <= error <= 1.02 * best + 1e-5


def test_adapters_are_added_without_their_model(folders, capsys):
    root, base, changes = folders
    for name in ("a", "b"):
        extract_lora(str(root / "base"), str(root / name), root / f"lora-{name}", rank=3)
    weights = {str(root / "lora-a"): 0.6, str(root / "lora-b"): -0.4}
    result = merge_adapters(weights, root / "sum")
    want = {
        path: 0.6 * changes["a"].get(path, 0) - 0.4 * changes["b"].get(path, 0)
        for path in {**changes["a"], **changes["b"]}
    }
    check_changes(change_of(root / "base", root / "sum", base), want)
    assert {tensor.rank for tensor in result.tensors} == {3, 6}
    assert result.notes == ()
    report(result)
    assert capsys.readouterr().out.splitlines()[-1] == f"{root / 'sum'}: 3 tensors; exact"
    small = merge_adapters(weights, root / "small", rank=2)
    got = change_of(root / "base", root / "small", base)
    for tensor in small.tensors:
        assert tensor.rank == 2
    for path, change in want.items():
        u, s, vt = np.linalg.svd(change, full_matrices=False)
        best = u[:, :2] * s[:2] @ vt[:2]
        np.testing.assert_allclose(got[path], best, atol=1e-3 * np.abs(best).max())


def test_what_cannot_be_extracted_or_added_is_an_error(folders):
    root, _, _ = folders
    base = str(root / "base")
    with pytest.raises(UserError, match="no projection differs from that of"):
        extract_lora(base, base, root / "out", rank=2)
    config, params = tiny_model(num_layers=1)
    write_model(root / "other", config, params)
    with pytest.raises(UserError, match="other: not of the architecture and size of"):
        extract_lora(base, str(root / "other"), root / "out", rank=2)
    extract_lora(base, str(root / "a"), root / "lora", rank=2)
    with pytest.raises(UserError, match="lora: exists and is not empty"):
        extract_lora(base, str(root / "a"), root / "lora", rank=2)
    with pytest.raises(UserError, match="gone: no such adapter folder; give the folder of a PEFT"):
        merge_adapters({"gone": 1.0}, root / "out")
    with pytest.raises(UserError, match="requires at least one --adapter"):
        merge_adapters({}, root / "out")
    weights = root / "lora" / "adapter_model.safetensors"
    stored = load_file(weights)
    name = next(name for name in stored if "up_proj.lora_A" in name)
    save_file({**stored, name: np.zeros((2, 5), np.float32)}, weights)
    extract_lora(base, str(root / "b"), root / "lora-b", rank=2)
    both = {str(root / "lora"): 1.0, str(root / "lora-b"): 1.0}
    with pytest.raises(UserError, match=r"up_proj.weight has different shapes, \[24, 5\] and"):
        merge_adapters(both, root / "out")


@pytest.mark.parametrize(
    ("bases", "different"),
    [
        (("org/a", "org/a"), False),
        (("org/a", ""), False),
        (("base", "base/"), False),
        (("org/a", "org/b"), True),
        (("org/a", "base"), True),
    ],
)
def test_adapters_of_different_models_give_a_note(tmp_path, monkeypatch, bases, different):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    factors = {"layers.0.mlp.up_proj": (np.ones((1, 4), np.float32), np.ones((6, 1), np.float32))}
    for number, base in enumerate(bases):
        write_factors(tmp_path / f"lora-{number}", factors, scale=1.0, base=base)
    result = merge_adapters({"lora-0": 0.5, "lora-1": 0.5}, tmp_path / "out")
    names = ", ".join(sorted(str(tmp_path / b) if b == "base" else b for b in bases))
    note = f"the adapters are for different models ({names}); unless these are the same, the sum "
    assert result.notes == ((f"{note}fits none of them",) if different else ())


@pytest.mark.parametrize("text", ["lora", "lora=", "=1", "lora=x", "lora=nan"])
def test_weights_of_adapters_are_checked(text):
    with pytest.raises(UserError, match="write ADAPTER=WEIGHT, such as"):
        _parse_weights((text,))
    assert _parse_weights(("a=b/=0.5", "c=-1")) == {"a=b/": 0.5, "c": -1.0}
