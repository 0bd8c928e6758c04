"""The loop: accumulation, checkpoints, resumption bit for bit, devices."""

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
from sdjax.training.checkpoints import Metrics, TrainingCheckpoints, kept_array
from sdjax.training.dpo import DPOSettings, TokenPair, train_dpo
from sdjax.training.fit import OptimiserSettings, decayed, fit
from sdjax.training.packing import Example, pack
from sdjax.training.sft import sft_loss
from sdjax.training.trainable import lora_finetune

OPTIMISER = OptimiserSettings(learning_rate=1e-2, steps=6, warmup=2, final=0.1)

# Orbax leaves coroutines behind, unawaited, when a file that it reads is damaged.
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
        texts = [Example(prompt=(3,), target=tuple(rng.integers(4, 48, 6))) for _ in range(8)]
        packed = [pack([text], 8) for text in texts]
        yield {name: np.concatenate([one[name] for one in packed]) for name in packed[0]}


def train(config, weights, adapter, optimiser=OPTIMISER, given=None, **options):
    trainee = lora_finetune(config, weights, adapter)
    loss = sft_loss(config, trainee.assemble)
    return fit(loss, trainee.trainable, trainee.frozen, given or batches(), optimiser, **options)


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_accumulated_batches_make_the_update_of_one_large_batch(config, weights, fresh_adapter):
    large = list(batches(2))
    small = [
        {name: array[part] for name, array in batch.items()}
        for batch in large
        for part in (slice(0, 4), slice(4, 8))
    ]
    whole, history = train(config, weights, fresh_adapter, given=large)
    halves = dataclasses.replace(OPTIMISER, accumulate=2)
    parts, steps = train(config, weights, fresh_adapter, optimiser=halves, given=small)
    assert len(steps) == len(history) == 2
    np.testing.assert_allclose(steps[1]["loss"], history[1]["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), whole, parts)


def test_killed_after_any_step_the_curve_continues_bit_for_bit(
    tmp_path, config, weights, fresh_adapter
):
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

        with Metrics(folder) as metrics, pytest.raises(Killed), checkpoints(folder) as kept:
            train(config, weights, fresh_adapter, on_step=keep(metrics), checkpoints=kept)
        with Metrics(folder) as metrics, checkpoints(folder) as kept:
            found, _ = train(config, weights, fresh_adapter, on_step=metrics.add, checkpoints=kept)
        assert_equal(found, expected)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line.pop("step") for line in lines] == [1, 2, 3, 4, 5, 6]
        assert lines == history
    assert list((folder / "events").glob("events*"))


def checkpoints(folder, every=2, say=print, **origin):
    return TrainingCheckpoints(folder / "checkpoints", every=every, last=6, origin=origin, say=say)


def test_a_checkpoint_cut_short_falls_back_to_the_one_before_and_says_so(
    tmp_path, config, weights, fresh_adapter
):
    expected, _ = train(config, weights, fresh_adapter)
    with checkpoints(tmp_path) as kept:
        train(
            config, weights, fresh_adapter, given=itertools.islice(batches(), 4), checkpoints=kept
        )
    (tmp_path / "checkpoints/4/description/metadata").write_text('{"ori')
    said = []
    with checkpoints(tmp_path, say=said.append) as kept:
        found, history = train(config, weights, fresh_adapter, checkpoints=kept)
    assert said == ["the checkpoint of step 4 is cut short or damaged; going on from step 2"]
    assert len(history) == 4
    assert_equal(found, expected)


def test_checkpoints_of_another_training_are_refused(tmp_path, config, weights, fresh_adapter):
    with checkpoints(tmp_path, steps=4) as kept:
        train(config, weights, fresh_adapter, checkpoints=kept)
    with (
        checkpoints(tmp_path, steps=5) as kept,
        pytest.raises(UserError, match=r"begun with steps = 4, not 5; go on with the same config"),
    ):
        train(config, weights, fresh_adapter, checkpoints=kept)


def test_where_the_loss_breaks_the_last_good_checkpoint_stays(
    tmp_path, config, weights, fresh_adapter
):
    def broken():
        for number, batch in enumerate(batches(), 1):
            yield batch | {"weights": batch["weights"] * (np.nan if number == 4 else 1)}

    with (
        checkpoints(tmp_path, every=1) as kept,
        pytest.raises(
            UserError, match=r"the loss is nan at step 4; .* from the checkpoint of step 2"
        ),
    ):
        train(config, weights, fresh_adapter, given=broken(), checkpoints=kept)
    with checkpoints(tmp_path, every=1) as kept:
        _, history = train(config, weights, fresh_adapter, checkpoints=kept)
    assert len(history) == 4


def test_a_wild_last_step_is_no_result(tmp_path, config, weights, fresh_adapter):
    """Its loss and its gradient are those of the weights before it: nothing is odd about them."""
    wild = OptimiserSettings(learning_rate=1e30, steps=2, warmup=1)  # the first step has rate 0
    given = list(batches(2))
    with (
        checkpoints(tmp_path, every=1) as kept,
        pytest.raises(UserError, match=r"weights' norm is inf at step 2; .* checkpoint of step 1"),
    ):
        train(config, weights, fresh_adapter, optimiser=wild, given=given, checkpoints=kept)


def test_weights_that_break_the_loss_are_not_kept(tmp_path, config, weights, fresh_adapter):
    """A checkpoint is of weights that the next step finds out about."""
    wild = dataclasses.replace(OPTIMISER, learning_rate=1e15, warmup=0)
    with checkpoints(tmp_path, every=1) as kept:
        with pytest.raises(UserError, match="at step 2; lower learning_rate or clip, begin anew"):
            train(config, weights, fresh_adapter, optimiser=wild, checkpoints=kept)
        assert kept.forget(0) == 0


def test_a_resumed_training_reads_what_its_reference_made(tmp_path):
    path, made = tmp_path / "job" / "reference.npz", []

    def compute():
        made.append(np.random.default_rng(len(made)).normal(size=(3, 2)).astype(np.float32))
        return made[-1]

    def read(told, tokens=(1, 2)):
        return kept_array(path, compute, data={"tokens": np.array(tokens)}, told=told)

    first = read({"adapter": None})
    np.testing.assert_array_equal(read({"adapter": None}), first)
    assert len(made) == 1
    read({"adapter": None}, tokens=(1, 3))
    read({"adapter": "other"}, tokens=(1, 3))
    assert len(made) == 3
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(read({"adapter": "other"}, tokens=(1, 3)), made[3])
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_full_disk_is_told_and_the_checkpoint_before_is_whole(
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


def test_what_has_no_gradient_decays_unless_it_is_a_vector():
    before = {"matrix": np.ones((2, 2), np.float32), "norm": np.ones(2, np.float32)}
    decaying = OptimiserSettings(learning_rate=0.1, steps=1, weight_decay=0.5)
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
def test_weight_decay_is_of_what_transformers_decays(family):
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
    assert {name for name, decays in decayed(leaves).items() if decays} | {"lm_head.weight"} == (
        theirs | {"lm_head.weight"}  # which is the embedding
    )


MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.mark.slow
def test_one_and_eight_devices_have_the_same_curve():
    code = "import tests.training.test_fit as t; t.compare_devices()"
    flags = "--xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**__import__("os").environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )


def compare_devices():
    """Runs in a process with eight devices."""
    from sdjax.models.config import ModelConfig
    from sdjax.models.lora import init_adapter
    from sdjax.models.params import init_params
    from sdjax.models.tree import flatten, unflatten
    from sdjax.sharding.rules import shardings
    from sdjax.training.trainable import full_finetune

    config = ModelConfig(
        family="llama",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_seq_len=64,
        eos_token_ids=(1,),
    )
    fresh = init_adapter(config, jax.random.key(1), rank=4, alpha=8)

    rng = np.random.default_rng(3)
    pairs = [
        TokenPair(
            winner=Example(prompt=(3,), target=tuple(rng.integers(4, 60, rng.integers(1, 30)))),
            loser=Example(prompt=(3,), target=tuple(rng.integers(4, 60, rng.integers(1, 30)))),
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
        # Eight pairs in a part a device, and six, which eight devices do not divide.
        for size in (8, 6):
            settings = DPOSettings(beta=0.1, learning_rate=1e-2, batch=size, steps=4)
            trainee = lora_finetune(config, weights, adapter)
            yield train_dpo(trainee, pairs, settings, key=jax.random.key(2))[1]
        trainee = full_finetune(config, weights)
        loss = sft_loss(config, trainee.assemble)
        trained, history = fit(loss, trainee.trainable, {}, batches(), OPTIMISER)
        if mesh is not None:
            assert {path: leaf.sharding for path, leaf in trained.items()} == flatten(expected)
        yield history

    alone = list(curves(None))
    for sizes in MESHES:
        for found, expected in zip(curves(make_mesh(sizes)), alone, strict=True):
            losses = [[step["loss"] for step in history] for history in (found, expected)]
            np.testing.assert_allclose(*losses, rtol=1e-4)
