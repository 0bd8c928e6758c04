"""What several processes know together, and how they end together."""

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
        return 7, f"told: {error}"

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


def test_alone_everything_is_as_it_is():
    assert broadcast_from_main(lambda: b"mine") == b"mine"
    with pytest.raises(ValueError, match="as it is"), exit_together(lambda error: (7, "")):
        raise ValueError("as it is")


@pytest.mark.parametrize(
    "failing", ["main", *(pytest.param(x, marks=pytest.mark.slow) for x in ("other", "both"))]
)
def test_one_that_fails_ends_all_and_the_main_process_says_why(two_processes, failing):
    processes = two_processes("-c", textwrap.dedent(CODE), failing)
    texts = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [7, 7], texts
    assert f"told: {failing}" in texts[0][1].splitlines()
    assert "told" not in texts[1][1]
    assert all("done" not in output for output, _ in texts)


@pytest.mark.slow
def test_without_a_failure_all_go_on(two_processes):
    processes = two_processes("-c", textwrap.dedent(CODE), "none")
    texts = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert all("done" in output for output, _ in texts)
