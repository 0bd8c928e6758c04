"""Versions of everything that affects the results of a computation."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping

UNKNOWN = "unknown"  # instead of a version that was not recorded

# The backends of JAX have packages of their own.
_PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "numpy",
    "tokenizers",
)


def current_versions() -> dict[str, str]:
    """Return the versions of the installed packages, of Python, and the devices, by name.

    Starts the backend of JAX.

    Examples:
        >>> current_versions()["devices"]
        '1 cpu'
    """
    import jax

    from sdjax import __version__

    versions = {"sdjax": __version__}  # the metadata of an editable installation may be older
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    return versions | {"python": platform.python_version(), "devices": devices}


def changed_versions(
    stored: Mapping[str, str], current: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Return (old, new) of each version or fingerprint that differs, by name.

    Args:
        stored: versions at the start of a computation; empty if they are unknown.
        current: versions of this process.

    Examples:
        >>> changed_versions({"jax": "0.10.2"}, {"jax": "0.12.0", "numpy": "2.0"})
        {'jax': ('0.10.2', '0.12.0'), 'numpy': ('unknown', '2.0')}
    """
    return {
        name: (stored.get(name, UNKNOWN), current.get(name, "not installed"))
        for name in sorted(stored.keys() | current.keys())
        if stored.get(name) != current.get(name)
    }


def version_differences(stored: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """Return the result of `changed_versions` as texts such as "jax 0.10.2 -> 0.12"."""
    changes = changed_versions(stored, current)
    return [f"{name} {old} -> {new}" for name, (old, new) in changes.items()]
