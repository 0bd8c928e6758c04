"""Look-ups on the Hub with a stub transport: without a network, and with one that fails."""

import importlib
import logging
import socket
import time

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from sdjax.io import hub


@pytest.fixture(autouse=True)
def no_memory_of_the_last_connection(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub.unreachable_reason.cache_clear()
    yield
    hub.unreachable_reason.cache_clear()


@pytest.fixture
def connections(monkeypatch):
    """Addresses of attempted connections; `answers` has an exception or None for each."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    addresses, answers = [], []

    def connect(address, timeout):
        addresses.append(address)
        if answer := answers.pop(0):
            raise answer
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)
    return addresses, answers


@pytest.fixture
def requests(monkeypatch, tmp_path):
    """Requests to the Hub, all of which fail to connect."""
    httpx = importlib.import_module(type(huggingface_hub.get_session()).__module__.split(".")[0])
    sent = []

    def fail(request):
        sent.append(request)
        raise httpx.ConnectError("no route")

    http = importlib.import_module("huggingface_hub.utils._http")
    huggingface_hub.set_client_factory(
        lambda: httpx.Client(
            transport=httpx.MockTransport(fail),
            event_hooks={"request": [http.hf_request_event_hook]},
        )
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    yield sent
    huggingface_hub.set_client_factory(http.default_client_factory)


@pytest.fixture
def printed():
    """Messages of the libraries."""
    records = []

    class Handler(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    handler = Handler()
    for library in ("huggingface_hub", "datasets"):
        logging.getLogger(library).addHandler(handler)
    yield records
    for library in ("huggingface_hub", "datasets"):
        logging.getLogger(library).removeHandler(handler)


def test_no_network_is_noticed_after_two_connections(connections):
    addresses, answers = connections
    answers += [socket.gaierror(-2, "Name or service not known"), OSError("no route")]
    assert hub.unreachable_reason() == "huggingface.co cannot be reached"
    assert hub.unreachable_reason() == "huggingface.co cannot be reached"  # not asked again
    assert addresses == [("huggingface.co", 443)] * 2


def test_one_failed_connection_is_tolerated(connections):
    _, answers = connections
    answers += [TimeoutError(), None]
    assert hub.unreachable_reason() is None


def test_proxy_is_connected_to_instead(connections, monkeypatch):
    addresses, answers = connections
    answers += [None]
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert hub.unreachable_reason() is None
    assert addresses == [("proxy.example", 3128)]


def test_offline_variable_is_respected(connections, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.unreachable_reason() == "HF_HUB_OFFLINE is set"
    assert connections[0] == []


@pytest.mark.parametrize(
    "look_up",
    [
        lambda: hub.download_model("owner/model"),
        lambda: hub.load_dataset("owner/data", split="test"),
    ],
)
def test_without_a_network_nothing_is_requested_or_printed(connections, requests, printed, look_up):
    connections[1].extend([OSError(), OSError()])
    with pytest.raises(hub.HubError, match=r"not in the cache, and huggingface.co cannot be reach"):
        look_up()
    assert requests == []
    assert printed == []
    assert not constants.HF_HUB_OFFLINE


def test_failures_of_a_network_are_retried_and_reported_in_one_line(
    connections, requests, printed, caplog
):
    connections[1].append(None)
    with caplog.at_level(logging.INFO, "sdjax"), pytest.raises(hub.HubError):
        hub.load_dataset("owner/data", split="test")
    assert len(requests) > 3
    assert printed == []
    ours = [one.getMessage() for one in caplog.records if one.name.startswith("sdjax")]
    assert ours == ["Hugging Face does not answer; trying again for up to 30 s"]


def test_cached_model_is_found_without_a_network(connections, requests, tmp_path):
    connections[1].extend([OSError(), OSError()])
    folder = tmp_path / "models--owner--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("a" * 40) / "config.json").write_text("{}")
    assert hub.download_model("owner/model") == folder / "snapshots" / ("a" * 40)
    assert hub.cached_model("owner/model") == folder / "snapshots" / ("a" * 40)
    assert hub.cached_model("owner/other") is None
    assert requests == []
