"""Resuming a stored run: comparison with this process, and the record of what changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from sdjax.core.errors import UserError
from sdjax.core.versions import current_versions
from sdjax.search.config import RunConfig
from sdjax.search.extension import (
    check_moved_models,
    check_samples,
    config_changes,
    needs_acceptance,
)
from sdjax.search.provenance import describe_changes, version_changes
from sdjax.search.run_limits import complete_samples
from sdjax.search.store import Store
from sdjax.search.types import Change, RunInput

logger = logging.getLogger(__name__)


def resume_store(
    store: Store, config: RunConfig, inputs: Mapping[str, str], *, accept_versions: bool
) -> tuple[Change, ...]:
    """Compare a stored run with this process, and record and return the changes.

    The arguments and errors are those of `run_changes`.
    """
    changes = run_changes(store, config, inputs, accept_versions=accept_versions)
    if changes or inputs.keys() - store.by_key(RunInput).keys():
        store.amend(
            config=config.to_json(),
            versions=current_versions(),
            inputs=[RunInput(name=name, fingerprint=value) for name, value in inputs.items()],
            changes=changes,
        )
        for change in changes:
            logger.info("changed %s: %s -> %s", change.key, change.old, change.new)
    return tuple(changes)


def run_changes(
    store: Store, config: RunConfig, inputs: Mapping[str, str], *, accept_versions: bool
) -> list[Change]:
    """Return the differences between a stored run and this process.

    Args:
        store: the run's store.
        config: the config to resume it with.
        inputs: fingerprints of the inputs that are compared.
        accept_versions: accept other versions and inputs.

    Raises:
        UserError: a change of the config that is not possible, or other versions or inputs that
            were not accepted.
    """
    changes = stored_config_changes(store, config)
    stored = {name: one.fingerprint for name, one in store.by_key(RunInput).items()}
    compared = {name: value for name, value in stored.items() if name in inputs}
    changes += version_changes(store.run().versions, current_versions(), compared, inputs)
    check_moved_models(changes, str(store.folder))
    if (different := [one for one in changes if needs_acceptance(one)]) and not accept_versions:
        raise UserError(
            f"{store.folder}: the run was started differently: {describe_changes(different)}; "
            "so its results may differ from those to come; go back to what it was started with, "
            "or accept this with --accept-versions"
        )
    return changes


def stored_config_changes(store: Store, config: RunConfig) -> list[Change]:
    """Return the changes from a stored run's config.

    Raises:
        UserError: a change that would make earlier results incomparable, or that has no effect.
    """
    changes = config_changes(store.config(), config, str(store.folder))
    check_samples(config, changes, len(complete_samples(store)))
    return changes
