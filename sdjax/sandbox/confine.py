"""What a worker gives up before it sees a byte of a program."""

import ctypes
import os
import resource
import signal

from sdjax.sandbox.contract import Limits

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
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


def confine(pipe: int, limits: Limits) -> int:
    """Lock this process down for good; the one descriptor left is the pipe, whose number returns.

    A session of its own (no terminal, and one signal ends whatever it starts), no new privileges,
    limits on address space, processor time, files and core dumps, and no descriptor besides
    /dev/null on 0 to 2 and the pipe on 3.
    """
    os.setsid()
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(pipe, 3)  # neither can be among 0 to 2: those are the server's /dev/null
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.closerange(4, 4096)
    for kind, value in (
        (resource.RLIMIT_AS, limits.address_space),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 16),
    ):
        resource.setrlimit(kind, (value, value))
    # The soft limit kills with SIGXCPU, by which the server knows that time was up.
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds + 1))
    return 3
