"""Limits and endpoints in the config of a stored run, which were chosen by its author.

A folder from someone else must not raise what a command may use of this machine, nor have it send a
key of the user's anywhere. The stored limits may be lower than the defaults; higher ones, and
endpoints, are used only if the user says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sdjax.core.errors import UserError
from sdjax.sandbox.config import SandboxConfig
from sdjax.search.config import RunConfig


def raised_limits(config: SandboxConfig) -> dict[str, str]:
    """Return the keys that allow more than by default, with a description of the difference."""
    default, raised = SandboxConfig(), {}
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        if isinstance(value, tuple):  # layers of confinement that may be missing
            if added := sorted(set(value) - set(usual)):
                raised[field.name] = f"sandbox.{field.name} includes {', '.join(added)}"
        elif value > usual:
            raised[field.name] = f"sandbox.{field.name} is {value:,}, not {usual:,}"
    return raised


def check_limits(
    config: SandboxConfig, where: str, *, trusted: bool, overrides: Sequence[str] = ()
) -> None:
    """Check that the config of a stored run allows no more than the defaults.

    Args:
        config: the `sandbox` section of the run's config, with the overrides.
        where: the run's folder, for the message.
        trusted: whether the user accepts higher limits.
        overrides: assignments of the command line, such as "sandbox.workers=8", which are the
            user's own.

    Raises:
        UserError: a limit is higher, and the user has not accepted it.
    """
    keys = {override.partition("=")[0] for override in overrides}
    higher = [
        text
        for name, text in raised_limits(config).items()
        if not keys & {"sandbox", f"sandbox.{name}"}
    ]
    if higher and not trusted:
        more = f" (and {len(higher) - 3} more)" if len(higher) > 3 else ""
        raise UserError(
            f"{where}: its config allows programs more than the defaults: "
            f"{'; '.join(higher[:3])}{more}; if you trust the author of this run, add "
            "--trust-limits"
        )


def contacted_endpoints(config: RunConfig) -> dict[str, str]:
    """Return the generators that send something to an endpoint, with a description."""
    endpoints = {name: one.endpoint for name, one in config.generators.items()}
    return {
        name: f"generators.{name} sends prompts"
        + (f" and the key in {one.api_key_env}" if one.api_key_env else "")
        + f" to {one.base_url}"
        for name, one in endpoints.items()
        if one is not None and one.replay is None
    }


def check_endpoints(
    config: RunConfig, where: str, *, trusted: bool, overrides: Sequence[str] = ()
) -> None:
    """Check that the config of a stored run sends nothing to an endpoint.

    Args:
        config: the run's config, with the overrides.
        where: the run's folder, for the message.
        trusted: whether the user accepts the endpoints.
        overrides: assignments of the command line; an endpoint whose `base_url` they set is the
            user's own.

    Raises:
        UserError: there is an endpoint that the user has not accepted.
    """
    keys = {override.partition("=")[0] for override in overrides}
    foreign = [
        text
        for name, text in contacted_endpoints(config).items()
        if f"generators.{name}.endpoint.base_url" not in keys
    ]
    if foreign and not trusted:
        raise UserError(
            f"{where}: its config contacts endpoints: {'; '.join(foreign[:3])}; if it is your run, "
            "or you trust its author, add --trust-limits"
        )


def limits_of_run(config: RunConfig, run: Path, *, trusted: bool) -> SandboxConfig:
    """Return the limits of a stored run, for a command that judges or applies programs as it did.

    The layers of confinement that may be missing are not the run's to say: none, or those that the
    command line names.

    Raises:
        UserError: see `check_limits`.
    """
    limits = dataclasses.replace(config.sandbox, allow_missing=())
    check_limits(limits, str(run), trusted=trusted)
    return limits
