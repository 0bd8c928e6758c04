"""Generator checkpoints: retention, restoring, and damaged files."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sdjax.core.errors import UserError
from sdjax.io.orbax import GeneratorCheckpoints
from sdjax.models.lora import init_adapter
from sdjax.models.tree import flatten
from sdjax.sharding.mesh import make_mesh
from sdjax.testing import tiny_config

CONFIG = tiny_config()


# Orbax leaves unawaited coroutines behind when a file is damaged. Python warns about them when it
# collects them, which should happen within the test.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def collect():
    yield
    gc.collect()


def adapter(seed: int, rank: int = 4):
    """Return an adapter with nonzero factors."""
    fresh = init_adapter(CONFIG, jax.random.key(seed), rank=rank, alpha=8)
    return jax.tree.map(lambda leaf: leaf + 0.1 * (seed + 1), fresh)


def assert_same(found, expected):
    assert found.scale == expected.scale
    expected_leaves = flatten(expected.factors)
    assert flatten(found.factors).keys() == expected_leaves.keys()
    for path, leaf in flatten(found.factors).items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, expected_leaves[path])


def test_save_and_restore(tmp_path):
    metadata = {"loop-iterations": [1, 2], "fingerprint": "abc", "share": 0.1}
    with GeneratorCheckpoints(tmp_path / "c") as checkpoints:
        checkpoints.save_adapter(3, adapter(0), score=0.5, metadata=metadata)
    with GeneratorCheckpoints(tmp_path / "c") as checkpoints:
        loaded, found = checkpoints.restore_adapter()
    assert (found.number, found.description["metadata"], found.skipped) == (3, metadata, ())
    assert_same(loaded, adapter(0))


def test_newest_and_best_are_kept_across_restarts(tmp_path):
    for iteration, score in enumerate([0.2, 0.9, 0.1, 0.3, 0.4]):
        # Opened again each time, as in a resumed run.
        with GeneratorCheckpoints(tmp_path, keep_latest=2) as checkpoints:
            checkpoints.save_adapter(iteration, adapter(iteration), score=score)
    with GeneratorCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.numbers() == (1, 3, 4)
        assert_same(checkpoints.restore_adapter(1)[0], adapter(1))
        with pytest.raises(UserError, match="no checkpoint of iteration 2; available: 1, 3, 4"):
            checkpoints.restore(2)


def test_repeated_iteration_replaces_its_checkpoint(tmp_path):
    with GeneratorCheckpoints(tmp_path) as checkpoints:
        checkpoints.save_adapter(0, adapter(0), score=0.5)
        checkpoints.save_adapter(1, adapter(2), score=0.5)
        checkpoints.save_adapter(0, adapter(1), score=0.5)
        assert checkpoints.numbers() == (0, 1)
        assert_same(checkpoints.restore_adapter(0)[0], adapter(1))
        assert_same(checkpoints.restore_adapter()[0], adapter(2))


def test_restore_from_empty_folder_raises_user_error(tmp_path):
    with (
        GeneratorCheckpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match="no checkpoint; start from the beginning"),
    ):
        checkpoints.restore()


def test_restore_with_shardings_of_reference(tmp_path):
    sharding = NamedSharding(make_mesh({"tensor": -1}), PartitionSpec())
    reference = jax.device_put(adapter(1), sharding)
    with GeneratorCheckpoints(tmp_path) as checkpoints:
        checkpoints.save_adapter(0, adapter(0), score=0.5)
        loaded, _ = checkpoints.restore_adapter(reference=reference)
        assert_same(loaded, adapter(0))
        assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {sharding}
        with pytest.raises(UserError, match="projections, rank or shapes differ"):
            checkpoints.restore_adapter(reference=adapter(1, rank=2))


def test_truncated_file_falls_back_to_earlier_checkpoint(tmp_path):
    with GeneratorCheckpoints(tmp_path) as checkpoints:
        checkpoints.save_adapter(0, adapter(0), score=0.5)
        checkpoints.save_adapter(1, adapter(1), score=0.6)
    fell_back = set()
    # Orbax merges the files of each process into the others and does not read them again.
    files = [
        path
        for path in sorted((tmp_path / "1").rglob("*"))
        if path.is_file() and "ocdbt.process_0" not in path.parts
    ]
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with GeneratorCheckpoints(tmp_path) as checkpoints:
            loaded, found = checkpoints.restore_adapter()
        path.parent.mkdir(exist_ok=True)  # a damaged score is removed
        path.write_bytes(whole)
        assert found.skipped == ((1,) if found.number == 0 else ())
        assert_same(loaded, adapter(found.number))
        if found.number == 0:
            fell_back.add(path.parent.name)
    assert {"d", "factors", "description"} <= fell_back
    assert "metrics" in {path.name for path in files}


def test_all_checkpoints_damaged_raises_user_error(tmp_path):
    with GeneratorCheckpoints(tmp_path) as checkpoints:
        checkpoints.save_adapter(0, adapter(0), score=0.5)
        checkpoints.save_adapter(1, adapter(1), score=0.5)
    for iteration in (0, 1):
        (tmp_path / str(iteration) / "description/metadata").write_text('{"sca')
        with GeneratorCheckpoints(tmp_path) as checkpoints:
            with pytest.raises(UserError, match="truncated or damaged") as caught:
                checkpoints.restore(iteration)
            assert str(tmp_path / str(iteration)) in str(caught.value)
    message = r"/1, .*/0: truncated or damaged.*start from the beginning"
    with GeneratorCheckpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore()


def test_incomplete_checkpoint_is_ignored(tmp_path):
    with GeneratorCheckpoints(tmp_path) as checkpoints:
        checkpoints.save_adapter(0, adapter(0), score=0.5)
    # The folder that Orbax writes to before it commits by renaming.
    left = tmp_path / "1.orbax-checkpoint-tmp"
    (left / "factors").mkdir(parents=True)
    with GeneratorCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.restore().number == 0
        checkpoints.save_adapter(1, adapter(1), score=0.4)
        assert checkpoints.restore().number == 1
