"""Look-ups on the Hugging Face Hub: of models and of datasets, with or without a network.

The Hub's clients retry a failed request for half a minute and print each attempt, also if there is
no network at all. Here, the first look-up of a process connects to the Hub, or to its proxy: if it
fails twice, all look-ups use the cache alone, as under HF_HUB_OFFLINE=1. If it succeeds, the
clients' retries bridge later failures, and one line says so.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sdjax.core.errors import UserError
from sdjax.io.dataset_folder import check_columns, check_data_folder

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0  # also bounds the name look-up, which has no time limit of its own
_CONNECT_ATTEMPTS = 2
_LIBRARIES = ("huggingface_hub", "datasets")
# Of a model: no duplicate weights in other formats, and no subfolders.
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
# Only if it has no safetensors.
_TORCH_FILES = ("pytorch_model*.bin", "adapter_model.bin", "pytorch_model.bin.index.json")
_IGNORED_FILES = ("*/*", "consolidated*")


class HubError(Exception):
    """A failed look-up; the message says why, and what to do."""


def download_model(name: str) -> Path:
    """Return the folder of a model in the cache, downloading it if necessary.

    Args:
        name: OWNER/MODEL or OWNER/MODEL@REVISION.

    Raises:
        HubError: there is no such model, or it cannot be downloaded.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = name.partition("@")
    with _session() as unreachable:
        try:
            for files in (_MODEL_FILES, _TORCH_FILES):
                folder = Path(
                    huggingface_hub.snapshot_download(
                        repository,
                        revision=revision or None,
                        allow_patterns=list(files),
                        ignore_patterns=list(_IGNORED_FILES),
                    )
                )
                if any(folder.glob("*.safetensors")):
                    break
            return folder
        except errors.GatedRepoError:
            reason = "it is gated: accept its terms on its page, then log in with `hf auth login`"
        except errors.RepositoryNotFoundError:
            reason = (
                "it does not exist or is private: correct the name, or log in with `hf auth login`"
            )
        except errors.RevisionNotFoundError:
            reason = f"it has no revision {revision!r}"
        except errors.LocalEntryNotFoundError:
            reason = (
                f"it is not in the cache, and {unreachable or 'Hugging Face cannot be reached'}: "
                "copy the model into a folder"
            )
        except Exception as error:  # of the client, the network or the disk
            reason = _line(error)
    raise HubError(reason)


def cached_model(name: str) -> Path | None:
    """Return the folder of a model in the cache, without a look-up; None if it is not there.

    Args:
        name: OWNER/MODEL or OWNER/MODEL@REVISION.
    """
    import huggingface_hub

    repository, _, revision = name.partition("@")
    with contextlib.suppress(Exception):  # of the client, or a damaged cache
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision or None, local_files_only=True
            )
        )
    return None


def load_dataset(path: str, config: str | None = None, *, split: str) -> Any:
    """Load a split of a dataset with the `datasets` library.

    Args:
        path: name on the Hub, or a local folder.
        config: configuration of the dataset; its default one if None.
        split: name of the split.

    Raises:
        HubError: the dataset does not exist, or cannot be downloaded or read.
        UserError: a local folder contains a link that leads out of it, a compressed file or a
            README.md that names files elsewhere; or the data has columns of images and the like.
    """
    import datasets

    if os.path.isdir(path):
        check_data_folder(Path(path))
    with _session(is_local=os.path.isdir(path)) as unreachable:
        try:
            data = datasets.load_dataset(path, config, split=split, trust_remote_code=False)
            check_columns(data.features, path)
            return data
        except UserError:
            raise
        except Exception as error:  # raised by the network, the cache or a parser
            missing = isinstance(error, ConnectionError | FileNotFoundError)
            reason = _line(error)
            if unreachable and missing:
                reason = f"it is not in the cache, and {unreachable}"
    raise HubError(reason)


@functools.cache
def unreachable_reason() -> str | None:
    """Return why the Hub cannot be reached, or None if it can; connects once per process."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    host, port = _address(constants.ENDPOINT)
    for attempt in range(_CONNECT_ATTEMPTS):
        if _connects(host, port):
            return None
        if attempt + 1 < _CONNECT_ATTEMPTS:
            time.sleep(1)
    return f"{host} cannot be reached"


@contextlib.contextmanager
def _session(*, is_local: bool = False) -> Iterator[str | None]:
    """Let the libraries work quietly, and offline if the Hub cannot be reached.

    Args:
        is_local: whether no look-up is needed.

    Yields:
        why the Hub cannot be reached, or None.
    """
    reason = None if is_local else unreachable_reason()
    with contextlib.ExitStack() as stack:
        if reason is not None:
            stack.enter_context(_offline())
        quiet = _OneRetryLine()
        for library in _LIBRARIES:
            for handler in logging.getLogger(library).handlers:
                handler.addFilter(quiet)
                stack.callback(handler.removeFilter, quiet)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield reason


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Set HF_HUB_OFFLINE, which the libraries read from the environment only when imported."""
    from huggingface_hub import constants

    # `datasets` has a copy of the setting.
    modules: list[Any] = [constants]
    if "datasets.config" in sys.modules:
        modules.append(sys.modules["datasets.config"])
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


class _OneRetryLine(logging.Filter):
    """Replaces the libraries' messages about failed requests by one line."""

    def __init__(self) -> None:
        super().__init__()
        self._reported = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not self._reported and "retry" in record.getMessage().lower():
            self._reported = True
            logger.info("Hugging Face does not answer; trying again for up to 30 s")
        return record.levelno >= logging.ERROR


def _address(endpoint: str) -> tuple[str, int]:
    """Return host and port of the Hub, or of the proxy that the environment names for it."""
    import urllib.request

    url = urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return url.hostname or "", url.port or (443 if url.scheme == "https" else 80)


def _connects(host: str, port: int) -> bool:
    """Return whether a connection succeeds in time."""
    connected = threading.Event()
    finished = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
            connected.set()
        finished.set()

    threading.Thread(target=connect, daemon=True).start()
    finished.wait(_CONNECT_SECONDS)
    return connected.is_set()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
