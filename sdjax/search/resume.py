"""Resuming a stored run: comparison with this process, and the record of what changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from sdjax.core.errors import UserError
from sdjax.core.versions import current_versions
from sdjax.search.config import RunConfig, config_from
from sdjax.search.extension import (
    check_moved_models,
    check_samples,
    config_changes,
    needs_acceptance,
)
from sdjax.search.provenance import describe_changes, version_changes
from sdjax.search.store import Store
from sdjax.search.types import Change, RunInput

logger = logging.getLogger(__name__)


def resume_store(
    store: Store, config: RunConfig, inputs: Mapping[str, str], *, accept_versions: bool
) -> tuple[Change, ...]:
    """Compare a stored run with this process, and record and return the changes.

    Args:
        store: the run's store.
        config: the config to resume it with.
        inputs: fingerprints of the loaded inputs.
        accept_versions: accept other versions and inputs.

    Raises:
        UserError: a change of the config that is not possible, or other versions or inputs that
            were not accepted.
    """
    versions = current_versions()
    changes = stored_config_changes(store, config)
    stored = {one.name: one.fingerprint for one in store.select(RunInput)}
    changes += version_changes(store.run().versions, versions, stored, inputs)
    check_moved_models(changes, str(store.folder))
    if (different := [one for one in changes if needs_acceptance(one)]) and not accept_versions:
        raise UserError(
            f"{store.folder}: the run was started differently: {describe_changes(different)}; "
            "so its results may differ from those to come; go back to what it was started with, "
            "or accept this with --accept-versions"
        )
    if changes or inputs.keys() - stored.keys():
        store.amend(
            config=config.to_json(),
            versions=versions,
            inputs=[RunInput(name=name, fingerprint=value) for name, value in inputs.items()],
            changes=changes,
        )
        for change in changes:
            logger.info("changed %s: %s -> %s", change.key, change.old, change.new)
    return tuple(changes)


def stored_config_changes(store: Store, config: RunConfig) -> list[Change]:
    """Return the changes from a stored run's config.

    Raises:
        UserError: a change that would make earlier results incomparable, or that has no effect.
    """
    old = config_from(store.run().config, f"{store.folder}: its config")
    changes = config_changes(old, config, str(store.folder))
    generated = sum(phase == "generate" for _, phase in store.phases())
    check_samples(config, changes, generated)
    return changes
