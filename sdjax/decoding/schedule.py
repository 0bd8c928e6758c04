"""Assignment of sequences to slots: the host side of decoding, without arrays.

Each distinct prompt is prefilled once. Its first sample gets the slot that the prefill writes to;
further samples fork a slot that holds the prompt. A slot holds its prompt until another prompt is
written there, because new tokens are written after it.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """Assignment of one sequence to a slot.

    Attributes:
        index: index of the sequence.
        slot: slot that it is assigned to.
        source_slot: slot that holds its prompt, or None if the prompt must be prefilled.
    """

    index: int
    slot: int
    source_slot: int | None


class Schedule:
    """Assignment of slots to sequences, ordered by the bucket of their prompts.

    Attributes:
        owners: index of the sequence that occupies each slot, or None.
    """

    def __init__(
        self,
        prompts: Mapping[int, Sequence[int]],
        buckets: Sequence[int],
        *,
        slots: int,
        prefill_batch: int,
    ):
        """Start with all slots free.

        Args:
            prompts: sequence index -> tokens of its prompt, which must fit into a bucket.
            buckets: padded prompt lengths in ascending order.
            slots: number of slots.
            prefill_batch: maximum number of prompts per prefill call.
        """
        self._slots, self._prefill_batch = slots, prefill_batch
        self._buckets = buckets
        indices: dict[tuple[int, ...], deque[int]] = {}
        for index, prompt in prompts.items():
            indices.setdefault(tuple(prompt), deque()).append(index)
        # Waiting sequences by prompt: prompts not prefilled yet, and prompts held by some slot.
        self._new = deque(sorted(indices.items(), key=lambda item: self._bucket(item[0])))
        self._forkable: dict[tuple[int, ...], deque[int]] = {}
        self._held_prompts: list[tuple[int, ...] | None] = [None] * slots
        self.owners: list[int | None] = [None] * slots

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence is waiting or occupies a slot."""
        return bool(self._new or self._forkable or any(index is not None for index in self.owners))

    @property
    def min_free_slots(self) -> int:
        """Number of slots that must be free before a refill is worthwhile.

        A prefill is efficient with a full batch, a fork at any time. When no sequence is waiting,
        all slots finish.
        """
        if self._forkable:
            return max(1, self._slots // 16)
        return min(self._prefill_batch, len(self._new)) if self._new else self._slots

    def fill(self) -> Iterator[tuple[int | None, list[Assignment]]]:
        """Fill the free slots.

        Yields:
            A bucket and the assignments of one prefill call, or None and the assignments of one
            fork call.
        """
        while free := [slot for slot, index in enumerate(self.owners) if index is None]:
            if self._forkable:
                yield None, self._fork(free)
            elif self._new:
                yield self._prefill(free)
            else:
                return

    def release(self, slot: int) -> None:
        """Mark a slot as free."""
        self.owners[slot] = None

    def _fork(self, free: list[int]) -> list[Assignment]:
        sources = {prompt: self._held_prompts.index(prompt) for prompt in self._forkable}
        # Free slots that hold a waiting prompt come first and keep it: they may be its only copy.
        free.sort(key=lambda slot: self._held_prompts[slot] not in self._forkable)
        assignments = []
        for slot in free:
            if not self._forkable:
                break
            held = self._held_prompts[slot]
            prompt = held if held in self._forkable else next(iter(self._forkable))
            assert prompt is not None
            index = self._forkable[prompt].popleft()
            if not self._forkable[prompt]:
                del self._forkable[prompt]
            assignments.append(Assignment(index=index, slot=slot, source_slot=sources[prompt]))
            self._occupy(assignments[-1], prompt)
        return assignments

    def _prefill(self, free: list[int]) -> tuple[int, list[Assignment]]:
        bucket = self._bucket(self._new[0][0])
        assignments: list[Assignment] = []
        for slot in free[: self._prefill_batch]:
            if not self._new or self._bucket(self._new[0][0]) != bucket:
                break
            prompt, indices = self._new.popleft()
            assignments.append(Assignment(index=indices.popleft(), slot=slot, source_slot=None))
            self._occupy(assignments[-1], prompt)
            if indices:
                self._forkable[prompt] = indices
        return bucket, assignments

    def _bucket(self, prompt: Sequence[int]) -> int:
        return next(bucket for bucket in self._buckets if bucket >= len(prompt))

    def _occupy(self, assignment: Assignment, prompt: tuple[int, ...]) -> None:
        self.owners[assignment.slot] = assignment.index
        self._held_prompts[assignment.slot] = prompt
