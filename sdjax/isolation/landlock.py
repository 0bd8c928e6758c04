"""Landlock: no file, no TCP port, no signal and no abstract socket beyond the worker itself.

A second fence behind seccomp, by another part of the kernel: a ruleset that handles every right
the kernel knows and grants none of them.
"""

import ctypes
import os
import struct

# The numbers are the same on every processor.
CREATE_RULESET, RESTRICT_SELF = 444, 446
ASK_VERSION = 1
# Rights by the version that brought them: number of file rights, network rights, scopes.
RIGHTS = {1: (13, 0, 0), 2: (14, 0, 0), 3: (15, 0, 0), 4: (15, 2, 0), 5: (16, 2, 0), 6: (16, 2, 2)}


def version() -> int:
    """The kernel's version of Landlock; OSError where it has none or it is switched off."""
    return _call(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(ASK_VERSION))


def restrict_files() -> None:
    """Give up every right that the kernel can take away; needs no_new_privs (or root)."""
    known = min(version(), max(RIGHTS))
    files, network, scopes = ((1 << count) - 1 for count in RIGHTS[known])
    # Older kernels know a shorter structure, and take a longer one if the rest of it is zero.
    attributes = struct.pack("=QQQ", files, network, scopes)
    ruleset = _call(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    try:
        _call(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0))
    finally:
        os.close(ruleset)


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "landlock")
    return result
