"""Layers of confinement that a worker applies to itself before it reads any untrusted input.

A layer that the machine lacks is never skipped silently: `require_layers` raises UserError, and
`confine` returns the missing layers so that a worker exits instead of running without them.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from sdjax.core.errors import UserError, did_you_mean
from sdjax.isolation.landlock import restrict_files
from sdjax.isolation.limits import WorkerLimits
from sdjax.isolation.seccomp import restrict_calls

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
NOBODY = 65_534
_CAPABILITY_VERSION = 0x2008_0522
_libc = ctypes.CDLL(None, use_errno=True)

# Complete environment of the server; the user's environment is not inherited.
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
# Layers that need no kernel support and are therefore always in force.
ALWAYS = ("process", "environment", "descriptors", "wall-clock")
_SURVEY = (
    "import sys; sys.path[:0] = {paths!r}; from sdjax.isolation.confine import survey; survey()"
)


# What XLA reads when it first compiles and runs something: the seed of a generator, and what the
# processor can do. The filter of system calls then forbids opening any file.
READ_BY_COMPILERS = ("/dev/urandom", "/proc/cpuinfo", "/sys/devices/system/cpu")


def confine(
    pipe: int, limits: WorkerLimits, start: Callable[[], None] = lambda: None
) -> tuple[str, ...]:
    """Confine this process irrevocably and return the names of the LAYERS that are missing.

    The process becomes the leader of a new session, so it has no terminal and one signal kills
    everything it starts. All descriptors are closed except `pipe`, which is moved to number 3.

    Args:
        pipe: descriptor of the connection to the dispatcher.
        limits: limits for the `rlimits` layer, and whether the process compiles.
        start: called when only the last layer, the filter of system calls, is missing. Threads
            that it starts have all layers: they inherit the others, and the filter applies to all.
    """
    os.setsid()
    if pipe != 3:
        os.dup2(pipe, 3)
    sys.stdin = sys.stdout = sys.stderr = None  # `print` is silent
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor != 3:
            # `close` would fail for the descriptor of the listing, which is closed already.
            os.closerange(descriptor, descriptor + 1)
    missing = []
    for name, apply_layer in LAYERS.items():
        if name == "seccomp":
            start()
        try:
            apply_layer(limits)
        except OSError:
            missing.append(name)
    return tuple(missing)


def _unprivileged_user(limits: WorkerLimits) -> None:
    """Drop all capabilities and, if running as root, switch to user and group nobody."""
    try:
        if os.getuid() == 0 or os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    finally:
        header, empty = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION), (ctypes.c_uint32 * 6)()
        _checked(_libc.capset(header, empty))


def _no_new_privileges(limits: WorkerLimits) -> None:
    _checked(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _end_with_parent(limits: WorkerLimits) -> None:
    _checked(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def _not_dumpable(limits: WorkerLimits) -> None:
    """Forbid core dumps, and inspection or tracing by other processes of the same user."""
    _checked(_libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))


def _rlimits(limits: WorkerLimits) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limits.address_space, limits.address_space))
    for kind in ("FSIZE", "CORE") if limits.compiles else ("FSIZE", "CORE", "NOFILE", "NPROC"):
        resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (0, 0))
    if limits.compiles:  # descriptor 3 is the pipe; `start` opens files as 0 to 2
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))
    if limits.requests == 1:  # else the dispatcher measures each request
        # Exceeding the soft limit kills with SIGXCPU, which tells the server that CPU time ran out.
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds + 1))


# The order matters: changing the user resets the parent-death signal and the dumpable flag,
# Landlock and seccomp need no_new_privs, Landlock opens a descriptor, and seccomp forbids the rest.
LAYERS: dict[str, Callable[[WorkerLimits], None]] = {
    "unprivileged-user": _unprivileged_user,
    "no-new-privs": _no_new_privileges,
    "parent-death-signal": _end_with_parent,
    "not-dumpable": _not_dumpable,
    "landlock": lambda limits: restrict_files(READ_BY_COMPILERS if limits.compiles else ()),
    "rlimits": _rlimits,
    "seccomp": lambda limits: restrict_calls(compiles=limits.compiles),
}


def require_layers(allow_missing: Collection[str] = ()) -> tuple[str, ...]:
    """Return the layers of confinement that are in force on this machine.

    Args:
        allow_missing: names of layers that the machine may lack.

    Raises:
        UserError: a layer that `allow_missing` does not name is missing, or `allow_missing` names
            an unknown layer.
    """
    if unknown := sorted(set(allow_missing) - set(LAYERS)):
        advice = did_you_mean(unknown[0], LAYERS, f"the layers are {', '.join(LAYERS)}")
        raise UserError(f"allow_missing: unknown layer {unknown[0]!r}; {advice}")
    missing = _missing()
    if refused := [name for name in missing if name not in allow_missing]:
        flags = " ".join(f"--allow-missing {name}" for name in refused)
        raise UserError(
            f"confinement layers unavailable: {', '.join(refused)} ({platform.system()} "
            f"{platform.release()}, {platform.machine()}); to run without them, pass {flags} "
            "(in the config of a run: sandbox.allow_missing)"
        )
    return (*ALWAYS, *(name for name in LAYERS if name not in missing))


def _missing() -> list[str]:
    """Confine a short-lived process and return the layers that it could not apply."""
    command = [sys.executable, "-P", "-c", _SURVEY.format(paths=package_path())]
    survey = subprocess.run(command, env=ENVIRONMENT, cwd="/", capture_output=True, timeout=60)
    if survey.returncode != 0:
        last_line = survey.stderr.decode(errors="replace").strip().split("\n")[-1]
        raise UserError(f"cannot confine a process on this machine; Linux is needed ({last_line})")
    return json.loads(survey.stdout)


def survey() -> None:
    """Confine this process and write the missing layers to standard output as JSON."""
    limits = WorkerLimits(cpu_seconds=4, wall_seconds=60, address_space=2 << 30, message_bytes=0)
    missing = confine(1, limits)
    os.write(3, json.dumps(missing).encode())
    os._exit(0)


def package_path() -> list[str]:
    """Return the `sys.path` entries from which a new process can import the package."""
    return [str(Path(__file__).resolve().parents[2])]


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent process, `parent`, exits."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent exited before the call
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent exits (subreaper)."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants() -> None:
    """Kill and reap all descendants. Requires `adopt_orphans`."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as children:
            for child in map(int, children.read().split()):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), "layer of confinement unavailable")
