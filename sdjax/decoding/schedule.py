"""Which sequence stands in which slot: the host's side of decoding, without arrays.

A prompt is computed once, however many samples of it are asked for: its first sample's slot gets
it from a row of an admission, the others copy it from a slot that holds it. A slot holds a prompt
until another one is put there, since new tokens are written behind it.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """A sequence gets a slot. `source` is a slot that holds its prompt, None if it is computed."""

    index: int
    slot: int
    source: int | None


class Schedule:
    """Hands out slots to the samples of prompts.

    Prompts are taken in the order of their buckets, and of the first sample in each.
    """

    def __init__(
        self,
        prompts: Mapping[int, Sequence[int]],
        buckets: Sequence[int],
        *,
        slots: int,
        rows: int,
    ):
        """Nothing is seated yet.

        Args:
            prompts: index of a sample to the tokens of its prompt, which fits into a bucket.
            buckets: padded lengths, ascending.
            slots: how many there are.
            rows: the most prompts that are computed at once.
        """
        self._slots, self._rows = slots, rows
        self._buckets = buckets
        groups: dict[tuple[int, ...], deque[int]] = {}
        for index, prompt in prompts.items():
            groups.setdefault(tuple(prompt), deque()).append(index)
        # Prompts that are in no slot yet, and samples of those that are in one.
        self._new = deque(sorted(groups.items(), key=lambda group: self._bucket(group[0])))
        self._held: dict[tuple[int, ...], deque[int]] = {}
        self._holds: list[tuple[int, ...] | None] = [None] * slots
        self.owner: list[int | None] = [None] * slots

    @property
    def busy(self) -> bool:
        return bool(self._new or self._held or any(index is not None for index in self.owner))

    @property
    def wanted(self) -> int:
        """How many slots are to be free before the next are filled.

        Computing prompts pays by the full admission, a copy at once; with none waiting the slots
        run dry.
        """
        if self._held:
            return max(1, self._slots // 16)
        return min(self._rows, len(self._new)) if self._new else self._slots

    def fill(self) -> Iterator[tuple[int | None, list[Assignment]]]:
        """Fills free slots: a bucket and at most `rows` prompts to compute, or None and copies."""
        while free := [slot for slot, index in enumerate(self.owner) if index is None]:
            if self._held:
                yield None, self._copies(free)
            elif self._new:
                yield self._admission(free)
            else:
                return

    def release(self, slot: int) -> None:
        """A sequence has ended."""
        self.owner[slot] = None

    def _copies(self, free: list[int]) -> list[Assignment]:
        sources = {prompt: self._holds.index(prompt) for prompt in self._held}
        # A free slot that holds a prompt of waiting samples is theirs: it may be the only one.
        free.sort(key=lambda slot: self._holds[slot] not in self._held)
        seated = []
        for slot in free:
            if not self._held:
                break
            own = self._holds[slot]
            prompt = own if own in self._held else next(iter(self._held))
            assert prompt is not None
            seated.append(
                Assignment(index=self._held[prompt].popleft(), slot=slot, source=sources[prompt])
            )
            if not self._held[prompt]:
                del self._held[prompt]
            self._seat(seated[-1], prompt)
        return seated

    def _admission(self, free: list[int]) -> tuple[int, list[Assignment]]:
        bucket = self._bucket(self._new[0][0])
        seated: list[Assignment] = []
        while (
            len(seated) < min(self._rows, len(free))
            and self._new
            and self._bucket(self._new[0][0]) == bucket
        ):
            prompt, samples = self._new.popleft()
            seated.append(Assignment(index=samples.popleft(), slot=free[len(seated)], source=None))
            self._seat(seated[-1], prompt)
            if samples:
                self._held[prompt] = samples
        return bucket, seated

    def _bucket(self, prompt: Sequence[int]) -> int:
        return next(bucket for bucket in self._buckets if bucket >= len(prompt))

    def _seat(self, seat: Assignment, prompt: tuple[int, ...]) -> None:
        self.owner[seat.slot] = seat.index
        self._holds[seat.slot] = prompt
