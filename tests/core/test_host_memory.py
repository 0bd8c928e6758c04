"""Limits on the memory of this process."""

import os

import pytest

from sdjax.core.host_memory import cgroup_limits, host_memory

GB = 10**9


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "limits"),
    [
        ("0::/user/job\n", {"user/job/memory.max": "max", "user/memory.max": f"{GB}"}, [GB]),
        ("0::/\n", {"memory.max": f"{2 * GB}\n"}, [2 * GB]),
        # The path is that of the host, while a container sees only its own root.
        ("0::/kubepods/pod1\n", {"memory.max": f"{GB}"}, [GB]),
        (
            "5:cpu,cpuacct:/a\n4:memory:/a/b\n0::/\n",
            {"memory/a/b/memory.limit_in_bytes": f"{3 * GB}", "cpu/a/memory.max": "1"},
            [3 * GB],
        ),
        ("4:memory:/docker/c\n", {"memory/memory.limit_in_bytes": f"{GB}"}, [GB]),
        ("0::/x\n", {"x/memory.max": "nonsense"}, []),
        ("", {}, []),
    ],
)
def test_limits_of_cgroups(tmp_path, membership, files, limits):
    write(tmp_path / "cgroup", membership)
    for name, text in files.items():
        write(tmp_path / "sys" / name, text)
    assert cgroup_limits(tmp_path / "cgroup", tmp_path / "sys") == limits
    assert cgroup_limits(tmp_path / "none", tmp_path / "sys") == []


def test_host_memory_is_at_most_the_physical_memory():
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 1 << 28 < host_memory() <= physical
