"""Commands that several processes execute together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sdjax.cli.group import exit_status
from sdjax.cli.interrupts import handle_signals, resume_hint
from sdjax.cli.watchdog import report_role


@contextmanager
def joined_processes(hint: str | Callable[[], str]) -> Iterator[None]:
    """Join the processes of a distributed command and make them exit together.

    Args:
        hint: what to do after an interrupt; see `sdjax.cli.interrupts.resume_hint`.
    """
    from sdjax.sharding.multihost import exit_together, is_main_process, start_distributed

    if start_distributed():
        handle_signals()  # JAX has replaced a handler
        report_role(is_main=is_main_process())
    with exit_together(exit_status), resume_hint(hint):
        yield
