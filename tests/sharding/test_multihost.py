"""Broadcast from the main process and coordinated exit."""

import textwrap

import pytest

from sdjax.sharding.multihost import broadcast_from_main, exit_together

CODE = """
    import sys
    from sdjax.sharding.multihost import start_distributed
    from sdjax.sharding.multihost import exit_together, broadcast_from_main
    start_distributed()
    import jax, numpy as np
    from jax.experimental import multihost_utils

    def describe(error):
        return 7, f"failure: {error}"

    with exit_together(describe):
        main = jax.process_index() == 0
        for size in (0, 1, 256, 257, 5_000_000):
            data = bytes(range(256)) * (size // 256 + 1)
            assert broadcast_from_main(lambda: data[:size] if main else 1 / 0) == data[:size]
        failing = {"main": [0], "other": [1], "both": [0, 1], "none": []}[sys.argv[1]]
        if jax.process_index() in failing:
            raise ValueError(sys.argv[1])
        if failing:  # in the main thread, where no signal and no other thread can end it
            multihost_utils.broadcast_one_to_all(np.zeros(1))
    print("done")
"""


def test_single_process_is_unaffected():
    assert broadcast_from_main(lambda: b"mine") == b"mine"
    with pytest.raises(ValueError, match="unaffected"), exit_together(lambda error: (7, "")):
        raise ValueError("unaffected")


@pytest.mark.parametrize(
    "failing", ["main", *(pytest.param(x, marks=pytest.mark.slow) for x in ("other", "both"))]
)
def test_failure_ends_all_processes_with_one_message(two_processes, failing):
    processes = two_processes("-c", textwrap.dedent(CODE), failing)
    texts = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [7, 7], texts
    assert f"failure: {failing}" in texts[0][1].splitlines()
    assert "failure" not in texts[1][1]
    assert all("done" not in output for output, _ in texts)


@pytest.mark.slow
def test_all_processes_continue_without_failure(two_processes):
    processes = two_processes("-c", textwrap.dedent(CODE), "none")
    texts = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert all("done" in output for output, _ in texts)
