"""Versions of everything that decides the numbers of a computation."""

from __future__ import annotations

import importlib.metadata
import platform

# The backends of JAX have packages of their own.
_PACKAGES = (
    "sdjax",
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

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    return versions | {"python": platform.python_version(), "devices": devices}
