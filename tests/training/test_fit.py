"""Training loop: gradient accumulation, checkpoints, bitwise resumption, and meshes."""

import dataclasses
import gc
import itertools
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.models.hf_config import from_hf
from sdjax.models.lora import shard_adapter
from sdjax.models.params import param_specs
from sdjax.sharding.mesh import make_mesh
from sdjax.training.api import train_dpo
from sdjax.training.checkpoints import MetricsLog, TrainingCheckpoints, cached_array
from sdjax.training.config import DPOConfig, OptimizerConfig
from sdjax.training.dpo import TokenPair
from sdjax.training.fit import fit, weight_decay_mask
from sdjax.training.packing import Example, pack
from sdjax.training.sft import sft_loss
from sdjax.training.trainable import lora_finetune

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, max_steps=6, warmup_steps=2, min_lr_ratio=0.1)

# Orbax leaves coroutines unawaited when a file that it reads is damaged.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def collect():
    yield
    gc.collect()


def batches(count=6):
    rng = np.random.default_rng(0)
    for _ in range(count):
        texts = [
            Example(prompt=(3,), target=tuple(rng.integers(4, 48, 6).tolist())) for _ in range(8)
        ]
        packed = [pack([text], 8) for text in texts]
        yield {name: np.concatenate([one[name] for one in packed]) for name in packed[0]}


def train(config, weights, adapter, optimizer=OPTIMIZER, data=None, **options):
    trainable = lora_finetune(config, weights, adapter)
    loss = sft_loss(config, trainable.assemble)
    return fit(loss, trainable.trainable, trainable.frozen, data or batches(), optimizer, **options)


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_accumulated_batches_equal_one_large_batch(config, weights, fresh_adapter):
    large = list(batches(2))
    small = [
        {name: array[part] for name, array in batch.items()}
        for batch in large
        for part in (slice(0, 4), slice(4, 8))
    ]
    whole, history = train(config, weights, fresh_adapter, data=large)
    halves = dataclasses.replace(OPTIMIZER, gradient_accumulation_steps=2)
    parts, steps = train(config, weights, fresh_adapter, optimizer=halves, data=small)
    assert len(steps) == len(history) == 2
    np.testing.assert_allclose(steps[1]["loss"], history[1]["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), whole, parts)


def test_resumed_training_is_bitwise_equal_after_any_step(tmp_path, config, weights, fresh_adapter):
    expected, history = train(config, weights, fresh_adapter)

    class Killed(Exception):
        pass

    for last in range(1, 6):
        folder = tmp_path / str(last)

        def keep(metrics, last=last):
            def on_step(step, values):
                metrics.add(step, values)
                if step == last:
                    raise Killed

            return on_step

        with MetricsLog(folder) as metrics, pytest.raises(Killed), checkpoints(folder) as kept:
            train(config, weights, fresh_adapter, on_step=keep(metrics), checkpoints=kept)
        with MetricsLog(folder) as metrics, checkpoints(folder) as kept:
            found, _ = train(config, weights, fresh_adapter, on_step=metrics.add, checkpoints=kept)
        assert_equal(found, expected)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line.pop("step") for line in lines] == [1, 2, 3, 4, 5, 6]
        assert lines == history
    assert list((folder / "events").glob("events*"))


def checkpoints(folder, every=2, versions=None, accept_versions=False, **job):
    return TrainingCheckpoints(
        folder / "checkpoints",
        every=every,
        job=job,
        versions=versions,
        accept_versions=accept_versions,
    )


def test_damaged_checkpoint_falls_back_to_previous_one(
    tmp_path, config, weights, fresh_adapter, caplog
):
    expected, _ = train(config, weights, fresh_adapter)
    with checkpoints(tmp_path) as kept:
        train(config, weights, fresh_adapter, data=itertools.islice(batches(), 4), checkpoints=kept)
    (tmp_path / "checkpoints/4/description/metadata").write_text('{"ori')
    with checkpoints(tmp_path) as kept:
        found, history = train(config, weights, fresh_adapter, checkpoints=kept)
    assert caplog.messages == [
        "the checkpoint of step 4 is truncated or damaged; resuming from step 2"
    ]
    assert len(history) == 4
    assert_equal(found, expected)


def test_other_versions_must_be_accepted(tmp_path):
    trainable = {"a": jax.numpy.zeros(2)}

    def resume(step, **options):
        with checkpoints(tmp_path, every=1, **options) as kept:
            kept.restore(trainable, ())
            kept.save(step, trainable, (), last=False)

    resume(1)  # as sdjax 0.2, which stored no versions
    old, new = {"jax": "1", "model": "a"}, {"jax": "2", "model": "a"}
    with pytest.raises(
        UserError, match=r"differently: jax unknown -> 1, model unknown -> a; .*--acc"
    ):
        resume(2, versions=old)
    resume(2, versions=old, accept_versions=True)
    resume(3, versions=old)
    with pytest.raises(UserError, match="differently: jax 1 -> 2; so the result"):
        resume(4, versions=new)
    with pytest.raises(UserError, match="differently: jax 1 -> not installed; so"):
        resume(4, versions={"model": "a"})
    resume(4, versions=new, accept_versions=True)
    saved = json.loads((tmp_path / "checkpoints/4/description/metadata").read_text())
    assert saved["versions"] == new
    assert saved["accepted"] == ["jax unknown -> 1", "model unknown -> a", "jax 1 -> 2"]


def test_checkpoints_of_another_job_raise_user_error(tmp_path, config, weights, fresh_adapter):
    with checkpoints(tmp_path, steps=4) as kept:
        train(config, weights, fresh_adapter, checkpoints=kept)
    with (
        checkpoints(tmp_path, steps=5) as kept,
        pytest.raises(UserError, match=r"with steps = 4, not 5; resume with the same config"),
    ):
        train(config, weights, fresh_adapter, checkpoints=kept)


def test_last_good_checkpoint_survives_a_nan_loss(tmp_path, config, weights, fresh_adapter):
    def broken():
        for number, batch in enumerate(batches(), 1):
            yield batch | {"weights": batch["weights"] * (np.nan if number == 4 else 1)}

    with (
        checkpoints(tmp_path, every=1) as kept,
        pytest.raises(
            UserError, match=r"the loss is nan at step 4; .* from the checkpoint of step 2"
        ),
    ):
        train(config, weights, fresh_adapter, data=broken(), checkpoints=kept)
    with checkpoints(tmp_path, every=1) as kept:
        _, history = train(config, weights, fresh_adapter, checkpoints=kept)
    assert len(history) == 4


def test_diverged_last_step_raises_user_error(tmp_path, config, weights, fresh_adapter):
    """Check a last step whose loss and gradient are finite, as they belong to the old weights."""
    wild = OptimizerConfig(learning_rate=1e30, max_steps=2, warmup_steps=1)
    data = list(batches(2))
    with (
        checkpoints(tmp_path, every=1) as kept,
        pytest.raises(UserError, match=r"weights' norm is inf at step 2; .* checkpoint of step 1"),
    ):
        train(config, weights, fresh_adapter, optimizer=wild, data=data, checkpoints=kept)


def test_weights_that_break_the_next_loss_are_discarded(tmp_path, config, weights, fresh_adapter):
    """Check weights that only the step after their checkpoint reveals as broken."""
    wild = dataclasses.replace(OPTIMIZER, learning_rate=1e15, warmup_steps=0)
    with checkpoints(tmp_path, every=1) as kept:
        with pytest.raises(UserError, match=r"at step 2; .* max_grad_norm, then start over"):
            train(config, weights, fresh_adapter, optimizer=wild, checkpoints=kept)
        assert kept.discard(0) == 0


def test_cached_array_is_computed_once_per_input(tmp_path):
    path, made = tmp_path / "job" / "reference.npz", []

    def compute():
        made.append(np.random.default_rng(len(made)).normal(size=(3, 2)).astype(np.float32))
        return made[-1]

    def read(settings, tokens=(1, 2)):
        return cached_array(path, settings, compute, {"tokens": np.array(tokens)})

    first = read({"adapter": None})
    np.testing.assert_array_equal(read({"adapter": None}), first)
    assert len(made) == 1
    read({"adapter": None}, tokens=(1, 3))
    read({"adapter": "other"}, tokens=(1, 3))
    assert len(made) == 3
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(read({"adapter": "other"}, tokens=(1, 3)), made[3])
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_full_disk_raises_user_error_and_keeps_previous_checkpoint(
    tmp_path, config, weights, fresh_adapter
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        with checkpoints(disk, every=1) as kept:
            with pytest.raises(UserError, match="the disk is full") as caught:
                train(config, weights, fresh_adapter, checkpoints=kept)
            assert "free some space and run the same command again" in str(caught.value)
        shutil.copytree(disk, tmp_path / "roomy", ignore=shutil.ignore_patterns("*tmp*"))
        assert "is intact" in str(caught.value)
        with checkpoints(tmp_path / "roomy", every=1) as kept:
            _, history = train(config, weights, fresh_adapter, checkpoints=kept)
        assert len(history) < 6
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_weight_decay_applies_to_matrices_only():
    before = {"matrix": np.ones((2, 2), np.float32), "norm": np.ones(2, np.float32)}
    decaying = OptimizerConfig(learning_rate=0.1, max_steps=1, weight_decay=0.5)
    after, _ = fit(
        lambda trained, frozen, batch: (jax.numpy.zeros(()), {}),
        jax.tree.map(jax.numpy.array, before),
        {},
        [{"x": np.zeros(1)}],
        decaying,
    )
    np.testing.assert_allclose(after["matrix"], 0.95 * before["matrix"], rtol=1e-6)
    np.testing.assert_array_equal(after["norm"], before["norm"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Gemma2", "Phi3"])
def test_weight_decay_mask_equals_that_of_transformers(family):
    torch = pytest.importorskip("torch", reason="needs torch, the reference of the parity tests")
    import transformers

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{family}Config")(
        **sizes, num_hidden_layers=2, head_dim=8, tie_word_embeddings=True
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = set(transformers.Trainer.get_decay_parameter_names(None, model))
    specs = param_specs(from_hf(config.to_dict(), family))
    leaves = {spec.hf_name: jax.ShapeDtypeStruct(spec.shape, "float32") for spec in specs.values()}
    assert {name for name, decays in weight_decay_mask(leaves).items() if decays} | {
        "lm_head.weight"
    } == (
        theirs | {"lm_head.weight"}  # which is the embedding
    )


MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.mark.slow
def test_losses_are_equal_on_one_and_eight_devices():
    code = "import tests.training.test_fit as t; t.compare_devices()"
    flags = "--xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**__import__("os").environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )


def compare_devices():
    """Compare losses across meshes; runs in a process with eight devices."""
    from sdjax.models.lora import init_adapter
    from sdjax.models.params import init_params
    from sdjax.models.tree import flatten, unflatten
    from sdjax.sharding.rules import shardings
    from sdjax.testing import tiny_config
    from sdjax.training.trainable import full_finetune

    config = tiny_config(hidden_size=32, intermediate_size=64, max_seq_len=64)
    fresh = init_adapter(config, jax.random.key(1), rank=4, alpha=8)

    rng = np.random.default_rng(3)
    pairs = [
        TokenPair(
            chosen=Example(
                prompt=(3,), target=tuple(rng.integers(4, 60, rng.integers(1, 30)).tolist())
            ),
            rejected=Example(
                prompt=(3,), target=tuple(rng.integers(4, 60, rng.integers(1, 30)).tolist())
            ),
        )
        for _ in range(12)
    ]

    def curves(mesh):
        weights = init_params(config, jax.random.key(0), jax.numpy.float32)
        adapter = fresh
        if mesh is not None:
            expected = shardings(unflatten(param_specs(config)), mesh)
            weights = jax.device_put(weights, expected)
            adapter = shard_adapter(fresh, config, mesh)
        yield train(config, weights, adapter)[1]
        # Eight pairs, one per device, and six, which is not a multiple of eight devices.
        for size in (8, 6):
            settings = DPOConfig(beta=0.1, learning_rate=1e-2, batch_size=size, max_steps=4)
            trainable = lora_finetune(config, weights, adapter)
            yield train_dpo(trainable, pairs, settings, key=jax.random.key(2))[1]
        trainable = full_finetune(config, weights)
        loss = sft_loss(config, trainable.assemble)
        trained, history = fit(loss, trainable.trainable, {}, batches(), OPTIMIZER)
        if mesh is not None:
            assert {path: leaf.sharding for path, leaf in trained.items()} == flatten(expected)
        yield history

    alone = list(curves(None))
    for sizes in MESHES:
        for found, expected in zip(curves(make_mesh(sizes)), alone, strict=True):
            losses = [[step["loss"] for step in history] for history in (found, expected)]
            np.testing.assert_allclose(*losses, rtol=1e-4)


def test_files_of_others_in_a_working_folder_are_not_trusted(tmp_path):
    """Neither links nor compressed arrays are read, and metrics may be anything."""
    (tmp_path / "outside").mkdir()
    for name in ("metrics.jsonl", "events"):
        work = tmp_path / f"with linked {name}"
        work.mkdir()
        (work / name).symlink_to(tmp_path / "outside")
        with pytest.raises(UserError, match="symbolic link, which is not followed"):
            MetricsLog(work)
    with MetricsLog(tmp_path / "work") as log:
        log.add(1, {"loss": 0.5})
    with (tmp_path / "work" / "metrics.jsonl").open("a") as file:
        file.write('{"step": [2]}\n3\n' + "[" * 10_000)
    with MetricsLog(tmp_path / "work") as log:
        log.add(2, {"loss": 0.5})
    lines = (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    path, computed = tmp_path / "array.npz", np.arange(3.0)
    assert cached_array(path, {}, lambda: computed, {}) is computed
    with np.load(path) as stored:
        forged = dict(stored)
    np.testing.assert_array_equal(cached_array(path, {}, lambda: 1 / 0, {}), computed)
    np.savez_compressed(path, **forged)
    assert cached_array(path, {}, lambda: computed, {}) is computed
