"""Landlock: deny all file access, TCP ports, signals and abstract sockets.

A second barrier in addition to seccomp, implemented by another part of the kernel: a ruleset that
handles every access right that the kernel knows and grants none, except reading named files.
"""

import ctypes
import os
import struct
from collections.abc import Sequence

# System call numbers, the same on every architecture.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
CREATE_RULESET_VERSION = 1
PATH_BENEATH, READ_FILE = 1, 1 << 2
# Landlock ABI version -> number of file rights, network rights and scopes.
RIGHTS = {1: (13, 0, 0), 2: (14, 0, 0), 3: (15, 0, 0), 4: (15, 2, 0), 5: (16, 2, 0), 6: (16, 2, 2)}


def abi_version() -> int:
    """Return the kernel's Landlock ABI version; raise OSError if Landlock is unavailable."""
    return _syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(CREATE_RULESET_VERSION))


def restrict_files(readable: Sequence[str] = ()) -> None:
    """Drop every right that Landlock controls. Requires no_new_privs or root.

    Args:
        readable: files that may still be read.
    """
    supported = min(abi_version(), max(RIGHTS))
    files, network, scopes = ((1 << count) - 1 for count in RIGHTS[supported])
    # Older kernels have a shorter struct and accept a longer one whose extra bytes are zero.
    attributes = struct.pack("=QQQ", files, network, scopes)
    size = ctypes.c_size_t(len(attributes))
    ruleset = _syscall(CREATE_RULESET, attributes, size, ctypes.c_uint(0))
    try:
        for path in readable:
            file = os.open(path, os.O_PATH)
            rule = struct.pack("=Qi", READ_FILE, file)
            _syscall(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(PATH_BENEATH), rule, None)
            os.close(file)
        _syscall(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0))
    finally:
        os.close(ruleset)


def _syscall(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "landlock")
    return result
