"""What a worker gives up before it sees a byte of a program, layer by layer.

A layer that the machine does not have is named and never skipped in silence: `require_layers`
refuses, and `confine` tells what is missing, so that a worker ends rather than goes on without it.
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

from sdjax.core.errors import UserError
from sdjax.isolation.landlock import restrict_files
from sdjax.isolation.seccomp import restrict_calls
from sdjax.sandbox.signature import Limits

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
NOBODY = 65_534
_CAPABILITY_VERSION = 0x2008_0522
_libc = ctypes.CDLL(None, use_errno=True)

# Everything the server is started with; nothing of the user's environment is passed on.
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "JAX_PLATFORMS": "cpu",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
# Layers that need nothing of the kernel's, and so are there on every machine.
ALWAYS = ("process", "environment", "descriptors", "wall-clock")
_SURVEY = (
    "import sys; sys.path[:0] = {paths!r}; from sdjax.isolation.confine import survey; survey()"
)


def confine(pipe: int, limits: Limits) -> tuple[str, ...]:
    """Lock this process down for good; which of LAYERS this machine does not have.

    The pipe is moved to descriptor 3 and is the only one that stays open. A session of its own: no
    terminal, and one signal ends whatever it starts.
    """
    os.setsid()
    if pipe != 3:
        os.dup2(pipe, 3)
    sys.stdin = sys.stdout = sys.stderr = None  # `print` is silent
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor != 3:
            os.closerange(descriptor, descriptor + 1)  # the listing's own is gone already
    missing = []
    for name, impose in LAYERS.items():
        try:
            impose(limits)
        except OSError:
            missing.append(name)
    return tuple(missing)


def _unprivileged_user(limits: Limits) -> None:
    """No capability, and where it was started as root, nobody's user and group."""
    try:
        if os.getuid() == 0 or os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    finally:
        header, nothing = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
        _checked(_libc.capset(header, nothing))


def _no_new_privileges(limits: Limits) -> None:
    _checked(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _end_with_parent(limits: Limits) -> None:
    _checked(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def _not_dumpable(limits: Limits) -> None:
    """No core, and no other process of the same user may look inside or attach."""
    _checked(_libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))


def _rlimits(limits: Limits) -> None:
    for kind, value in (
        (resource.RLIMIT_AS, limits.address_space),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (value, value))
    # The soft limit kills with SIGXCPU, by which the server knows that time was up.
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds + 1))


# In this order: a change of user clears the parent's signal and the dumpable flag, Landlock and
# seccomp need no_new_privs, Landlock opens a descriptor, and after seccomp none of this is allowed.
LAYERS: dict[str, Callable[[Limits], None]] = {
    "unprivileged-user": _unprivileged_user,
    "no-new-privs": _no_new_privileges,
    "parent-death-signal": _end_with_parent,
    "not-dumpable": _not_dumpable,
    "landlock": lambda limits: restrict_files(),
    "rlimits": _rlimits,
    "seccomp": lambda limits: restrict_calls(),
}


def require_layers(allow_missing: Collection[str] = ()) -> tuple[str, ...]:
    """The layers in force on this machine.

    Raises UserError where one is missing that `allow_missing` does not name.
    """
    if unknown := sorted(set(allow_missing) - set(LAYERS)):
        known = ", ".join(LAYERS)
        raise UserError(f"allow_missing: there is no layer {unknown[0]!r}; the layers are {known}")
    missing = _missing()
    if refused := [name for name in missing if name not in allow_missing]:
        flags = " ".join(f"--allow-missing {name}" for name in refused)
        raise UserError(
            f"the sandbox lacks {', '.join(refused)} on this machine ({platform.system()} "
            f"{platform.release()}, {platform.machine()}); to judge programs without it, name it: "
            f"{flags}, or sandbox.allow_missing of a run's configuration"
        )
    return (*ALWAYS, *(name for name in LAYERS if name not in missing))


def _missing() -> list[str]:
    """What a process of this machine that locks itself down has to do without."""
    boot = _SURVEY.format(paths=package_path())
    command = [sys.executable, "-P", "-c", boot]
    found = subprocess.run(command, env=ENVIRONMENT, cwd="/", capture_output=True, timeout=60)
    if found.returncode != 0:
        last = found.stderr.decode(errors="replace").strip().split("\n")[-1]
        raise UserError(f"the sandbox cannot lock a process down here ({last}): it needs Linux")
    return json.loads(found.stdout)


def survey() -> None:
    """In a process of its own: lock it down and write what was missing to standard output."""
    missing = confine(1, Limits())
    os.write(3, json.dumps(missing).encode())
    os._exit(0)


def package_path() -> list[str]:
    """Where a process that shares nothing with this one finds the package."""
    return [str(Path(__file__).resolve().parents[2])]


def die_with(parent: int) -> None:
    """Be killed when the process `parent`, which forked this one, ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, wherever it hides."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants() -> None:
    """Kill and reap all descendants of a process that adopts orphans."""
    here = f"/proc/self/task/{os.getpid()}/children"
    while True:
        with open(here) as children:
            for child in map(int, children.read().split()):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), "a layer of confinement is missing")
