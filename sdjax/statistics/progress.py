"""The sums of an interrupted computation, in a hidden folder next to the result."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np

from sdjax.core.errors import UserError
from sdjax.io.atomic_write import make_folder
from sdjax.io.links import check_own_folder
from sdjax.io.safetensors_reader import SafetensorsReader
from sdjax.io.safetensors_writer import SINGLE, write_safetensors
from sdjax.statistics.sums import Sums

_FINGERPRINT, _BATCHES = "progress/fingerprint", "progress/batches"


class Progress:
    """Sums over the first batches, stored now and then, and replaced as a whole."""

    def __init__(self, out: Path, fingerprint: str):
        """Prepare to read and write the sums.

        Args:
            out: folder of the result.
            fingerprint: hexadecimal digest of all that determines the sums; others are ignored.
        """
        self._folder = out.with_name(f".{out.name}.progress")
        self._fingerprint = np.frombuffer(bytes.fromhex(fingerprint), np.uint8)

    def read(self, zero: Sums) -> tuple[Sums, int]:
        """Return the stored sums and the number of batches in them, or `zero` and 0.

        Args:
            zero: sums over no examples, whose shardings the result has.
        """
        if not (self._folder / SINGLE).exists():
            return zero, 0
        try:
            reader = SafetensorsReader(self._folder)
            if not np.array_equal(reader.read(_FINGERPRINT), self._fingerprint):
                return zero, 0
            sums = {
                name: jax.device_put(reader.read(name), value.sharding)
                for name, value in zero.items()
            }
            return sums, int(reader.read(_BATCHES)[0])
        except (UserError, KeyError):  # of an earlier version, or damaged
            return zero, 0

    def write(self, sums: Sums, batches: int) -> None:
        """Store the sums over the first batches; with several processes, all must call this."""
        arrays = {
            **sums,
            _FINGERPRINT: self._fingerprint,
            _BATCHES: np.array([batches], np.int64),
        }
        path = None
        if jax.process_index() == 0:
            make_folder(self._folder)
            check_own_folder(self._folder)
            path = self._folder / SINGLE
        write_safetensors(path, arrays)

    def remove(self) -> None:
        """Remove the sums, once the result is complete."""
        if jax.process_index() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
