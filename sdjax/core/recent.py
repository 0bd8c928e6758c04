"""A mapping of bounded size, for what can be computed again."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(OrderedDict[K, V]):
    """Dict that keeps the most recently used items.

    Examples:
        >>> recent = Recent(2)
        >>> recent["a"], recent["b"] = 1, 2
        >>> recent["a"]
        1
        >>> recent["c"] = 3
        >>> list(recent)
        ['a', 'c']
    """

    def __init__(self, capacity: int) -> None:
        """Create an empty dict.

        Args:
            capacity: maximum number of items.
        """
        super().__init__()
        self.capacity = capacity

    def __getitem__(self, key: K) -> V:
        """Return an item, which becomes the most recently used one."""
        value = super().__getitem__(key)
        self.move_to_end(key)
        return value

    def __setitem__(self, key: K, value: V) -> None:
        """Add an item; remove the least recently used ones beyond the capacity."""
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > self.capacity:
            self.popitem(last=False)
