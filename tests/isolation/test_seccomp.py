"""The seccomp filters of all architectures, interpreted in Python."""

import errno
import re
from pathlib import Path

import pytest

from sdjax.isolation import seccomp
from sdjax.isolation.seccomp import ALLOW, ERRNO, KILL, PROCESSORS, X32, assemble

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
EPERM, ENOENT = ERRNO | errno.EPERM, ERRNO | errno.ENOENT


def action_for(
    machine: str,
    number: int,
    *,
    first: int = 0,
    third: int = 0,
    audit: int | None = None,
    compiles: bool = False,
) -> int:
    """Interpret the filter's five instructions as the kernel does."""
    processor = PROCESSORS[machine]
    program = assemble(processor, compiles=compiles)
    data = {
        seccomp.NUMBER: number,
        seccomp.ARCHITECTURE: processor.audit if audit is None else audit,
        seccomp.FIRST_ARGUMENT: first & 0xFFFF_FFFF,
        seccomp.THIRD_ARGUMENT: third & 0xFFFF_FFFF,
    }
    index, accumulator = 0, 0
    while True:
        code, if_true, if_false, operand = program[index]
        index += 1
        if code == seccomp.RETURN:
            return operand
        if code == seccomp.LOAD:
            accumulator = data[operand]
            continue
        test = {
            seccomp.EQUAL: accumulator == operand,
            seccomp.AT_LEAST: accumulator >= operand,
            seccomp.ANY_BIT: accumulator & operand != 0,
        }[code]
        index += if_true if test else if_false


@pytest.mark.parametrize("machine", PROCESSORS)
def test_calls_get_the_action_of_their_group_and_all_others_fail(machine):
    processor = PROCESSORS[machine]
    groups = [
        (processor.allowed, ALLOW),
        (processor.without_exec, ALLOW),
        (processor.paths, ENOENT),
        (processor.killed, KILL),
    ]
    expected = {number: action for calls, action in groups for number in calls.values()}
    assert len(expected) == sum(len(calls) for calls, _ in groups)  # no number twice
    for number in range(600):
        assert action_for(machine, number) == expected.get(number, EPERM)


@pytest.mark.parametrize("machine", PROCESSORS)
def test_executable_memory_is_refused(machine):
    for number in PROCESSORS[machine].without_exec.values():
        assert action_for(machine, number, third=3) == ALLOW
        for protection in (4, 5, 6, 7, 0x0100_0007):
            assert action_for(machine, number, third=protection) == EPERM


@pytest.mark.parametrize("machine", PROCESSORS)
def test_filter_of_a_compiler_allows_executable_memory_and_threads_and_no_process(machine):
    processor = PROCESSORS[machine]
    for number in (*processor.without_exec.values(), *processor.compiler.values()):
        assert action_for(machine, number, third=7, compiles=True) == ALLOW
    for number in processor.compiler.values():
        assert action_for(machine, number) == EPERM
    for number in processor.threads.values():
        assert action_for(machine, number, first=0x003D_0F00, compiles=True) == ALLOW  # glibc's
        assert action_for(machine, number, first=0x0120_0011, compiles=True) == EPERM  # fork
        assert action_for(machine, number, first=seccomp.CLONE_THREAD) == EPERM
    for number in processor.absent.values():
        assert action_for(machine, number, compiles=True) == ERRNO | errno.ENOSYS
    known = {
        n
        for calls in (
            processor.allowed,
            processor.without_exec,
            processor.compiler,
            processor.paths,
            processor.killed,
            processor.threads,
            processor.absent,
        )
        for n in calls.values()
    }
    for number in set(range(600)) - known:
        assert action_for(machine, number, compiles=True) == EPERM
    for calls, action in ((processor.paths, ENOENT), (processor.killed, KILL)):
        assert {action_for(machine, n, compiles=True) for n in calls.values()} == {action}


@pytest.mark.parametrize("machine", PROCESSORS)
def test_foreign_calling_conventions_kill_the_worker(machine):
    for audit in (0, 0x40000003, 0x40000028, *(p.audit for p in PROCESSORS.values())):
        if audit != PROCESSORS[machine].audit:
            assert action_for(machine, PROCESSORS[machine].allowed["read"], audit=audit) == KILL
    assert action_for("x86_64", X32) == action_for("x86_64", X32 | 1) == KILL


@pytest.mark.parametrize("machine", PROCESSORS)
def test_dangerous_calls_are_not_allowed(machine):
    dangerous = """open openat socket connect bind clone clone3 fork vfork execve execveat kill
        tgkill tkill ptrace prctl seccomp unshare setns mount bpf io_uring_setup memfd_create
        userfaultfd keyctl add_key perf_event_open process_vm_readv pidfd_open pidfd_getfd sendmsg
        recvmsg dup dup2 fcntl ioctl shmget shmat setuid setrlimit
        prlimit64 rt_sigaction personality"""
    processor = PROCESSORS[machine]
    permitted = {*processor.allowed, *processor.without_exec}
    assert not permitted & set(dangerous.split())


@pytest.mark.parametrize("machine", PROCESSORS)
def test_numbers_match_the_kernel_headers(machine):
    if not HEADERS[machine].exists():
        pytest.skip("no kernel headers on this machine")
    text = HEADERS[machine].read_text()
    numbers = {n: int(v) for n, v in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", text)}
    renamed = re.findall(r"#define __NR_(\w+) __NR3264_(\w+)", text)
    numbers |= {new: numbers[old] for new, old in renamed if old in numbers}
    processor = PROCESSORS[machine]
    for calls in (
        *(processor.allowed, processor.without_exec, processor.paths, processor.killed),
        *(processor.compiler, processor.threads, processor.absent, {"seccomp": processor.seccomp}),
    ):
        for name, number in calls.items():
            assert numbers[name] == number
