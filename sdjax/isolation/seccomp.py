"""Seccomp filter: a BPF program that lists the system calls a worker may make (two architectures).

A worker computes in memory and communicates over one descriptor, so it needs memory, that
descriptor, the clock and exit. All other calls fail: calls that take a path with ENOENT, so that
Python treats files as missing and continues, the rest with EPERM. Calls that only an attacker makes
(exec, ptrace, access to another process's memory, a foreign calling convention) kill the worker.
Memory cannot be made executable, unless the worker compiles: then it may also start threads.
"""

import ctypes
import errno
import platform
import struct
from collections.abc import Mapping
from dataclasses import dataclass

KILL, ERRNO, ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000  # SECCOMP_RET_…
SET_MODE_FILTER, ALL_THREADS = 1, 1
PROT_EXEC, CLONE_THREAD = 4, 0x0001_0000
X32 = 0x4000_0000  # bit that marks calls of the x32 ABI on x86_64
# Offsets into `struct seccomp_data`: call number, architecture, and the low words of the first and
# the third argument (both architectures are little-endian).
NUMBER, ARCHITECTURE, FIRST_ARGUMENT, THIRD_ARGUMENT = 0, 4, 16, 32
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def _table(text: str) -> dict[str, int]:
    words = text.split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


@dataclass(frozen=True, kw_only=True)
class Processor:
    """System calls of one architecture, grouped by how the filter answers them.

    Attributes:
        audit: the architecture's AUDIT_ARCH number.
        allowed: calls that are always allowed.
        without_exec: calls that are allowed unless they request executable memory.
        paths: calls that fail with ENOENT.
        killed: calls that kill the process.
        seccomp: number of the call that applies a filter.
        compiler: calls that are also allowed if the worker compiles.
        threads: calls that start a thread or a process; only threads, and only if it compiles.
        absent: calls that fail with ENOSYS if it compiles, since their arguments are in memory;
            the C library then uses those of `threads`.
        x32: whether the architecture has the x32 ABI, whose calls kill the process.
    """

    audit: int
    allowed: Mapping[str, int]
    without_exec: Mapping[str, int]
    paths: Mapping[str, int]
    killed: Mapping[str, int]
    seccomp: int
    compiler: Mapping[str, int]
    threads: Mapping[str, int]
    absent: Mapping[str, int]
    x32: bool = False


PROCESSORS = {
    "x86_64": Processor(
        audit=0xC000003E,
        x32=True,
        allowed=_table(
            """read 0 write 1 munmap 11 brk 12 mremap 25 madvise 28 sched_yield 24 getpid 39
            exit 60 gettimeofday 96 getrusage 98 getppid 110 gettid 186 time 201 futex 202
            restart_syscall 219 clock_gettime 228 clock_getres 229 exit_group 231 getrandom 318"""
        ),
        without_exec=_table("mmap 9 mprotect 10"),
        paths=_table(
            """open 2 stat 4 lstat 6 access 21 truncate 76 getcwd 79 chdir 80 rename 82 mkdir 83
            rmdir 84 creat 85 link 86 unlink 87 symlink 88 readlink 89 chmod 90 chown 92 lchown 94
            utime 132 mknod 133 statfs 137 chroot 161 utimes 235 openat 257 mkdirat 258
            mknodat 259 fchownat 260 newfstatat 262 unlinkat 263 renameat 264 linkat 265
            symlinkat 266 readlinkat 267 fchmodat 268 faccessat 269 utimensat 280 renameat2 316
            statx 332 openat2 437 faccessat2 439"""
        ),
        killed=_table(
            "execve 59 ptrace 101 process_vm_readv 310 process_vm_writev 311 execveat 322"
        ),
        seccomp=317,
        compiler=_table(
            """rt_sigprocmask 14 sched_getparam 143 sched_getscheduler 145 sched_getaffinity 204
            clock_nanosleep 230 set_robust_list 273 rseq 334"""
        ),
        threads=_table("clone 56"),
        absent=_table("clone3 435"),
    ),
    "aarch64": Processor(
        audit=0xC00000B7,
        allowed=_table(
            """read 63 write 64 exit 93 exit_group 94 futex 98 clock_gettime 113 clock_getres 114
            sched_yield 124 restart_syscall 128 getrusage 165 gettimeofday 169 getpid 172
            getppid 173 gettid 178 brk 214 munmap 215 mremap 216 madvise 233 getrandom 278"""
        ),
        without_exec=_table("mmap 222 mprotect 226"),
        paths=_table(
            """getcwd 17 mknodat 33 mkdirat 34 unlinkat 35 symlinkat 36 linkat 37 renameat 38
            statfs 43 truncate 45 faccessat 48 chdir 49 chroot 51 fchmodat 53 fchownat 54 openat 56
            readlinkat 78 newfstatat 79 utimensat 88 renameat2 276 statx 291 openat2 437
            faccessat2 439"""
        ),
        killed=_table(
            "ptrace 117 execve 221 process_vm_readv 270 process_vm_writev 271 execveat 281"
        ),
        seccomp=277,
        compiler=_table(
            """set_robust_list 99 clock_nanosleep 115 sched_getscheduler 120 sched_getparam 121
            sched_getaffinity 123 rt_sigprocmask 135 rseq 293"""
        ),
        threads=_table("clone 220"),
        absent=_table("clone3 435"),
    ),
}

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def assemble(processor: Processor, *, compiles: bool = False) -> list[Instruction]:
    """Return the filter as BPF; each test directly precedes its result, so jumps stay short.

    Args:
        processor: system calls of the architecture.
        compiles: whether the worker compiles.
    """
    refuse = ERRNO | errno.EPERM
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, processor.audit),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    if processor.x32:
        program += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    groups = [
        (processor.allowed, ALLOW),
        (processor.paths, ERRNO | errno.ENOENT),
        (processor.killed, KILL),
    ]
    if compiles:
        groups += [
            (processor.compiler, ALLOW),
            (processor.without_exec, ALLOW),
            (processor.absent, ERRNO | errno.ENOSYS),
        ]
        tested = [(processor.threads, FIRST_ARGUMENT, CLONE_THREAD, ALLOW, refuse)]
    else:
        tested = [(processor.without_exec, THIRD_ARGUMENT, PROT_EXEC, refuse, ALLOW)]
    for calls, action in groups:
        for number in calls.values():
            program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, action)]
    for calls, argument, bit, if_set, if_unset in tested:
        for number in calls.values():
            program += [
                (EQUAL, 0, 4, number),
                (LOAD, 0, 0, argument),
                (ANY_BIT, 0, 1, bit),
                (RETURN, 0, 0, if_set),
                (RETURN, 0, 0, if_unset),
            ]
    return [*program, (RETURN, 0, 0, refuse)]


def install(program: list[Instruction]) -> None:
    """Apply a filter to all threads of this process irrevocably; raise OSError if unsupported."""

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))

    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    filter_ = Filter(len(program), code)
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_uint(SET_MODE_FILTER), ctypes.c_uint(ALL_THREADS), ctypes.byref(filter_))
    if libc.syscall(ctypes.c_long(_processor().seccomp), *arguments) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


def restrict_calls(*, compiles: bool = False) -> None:
    """Apply the filter for this machine's architecture; raise OSError if there is none."""
    install(assemble(_processor(), compiles=compiles))


def _processor() -> Processor:
    processor = PROCESSORS.get(platform.machine())
    if processor is None:
        raise OSError(errno.ENOSYS, f"no seccomp filter for {platform.machine()}")
    return processor
