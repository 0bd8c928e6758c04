"""Texts of the main process on every process."""

import pytest

from sdjax.generators import shared
from sdjax.generators.shared import SharedGenerator
from sdjax.generators.types import GeneratedText, GenerationRequest

REQUESTS = [GenerationRequest(number=number, prompt="p") for number in (3, 5)]
TEXTS = {
    5: GeneratedText(text="five \ud800", source=None, stopped=False),
    3: GeneratedText(text="three", source="three", stopped=True, tokens=(1, 2)),
}


class Source:
    """Writes both texts, and notes whether it was closed."""

    def __init__(self):
        self.closed = False

    def texts(self, requests):
        assert requests == REQUESTS
        try:
            yield from TEXTS.items()
        finally:
            self.closed = True


def test_other_processes_get_the_texts_of_the_main_process(monkeypatch):
    messages = []

    def send(compute):
        messages.append(compute())
        return messages[-1]

    sent, received, source = {}, {}, Source()
    monkeypatch.setattr(shared, "broadcast_from_main", send)
    SharedGenerator(source).sample(REQUESTS, on_text=sent.__setitem__)
    monkeypatch.setattr(shared, "broadcast_from_main", lambda compute: messages.pop(0))
    SharedGenerator(None).sample(REQUESTS, on_text=received.__setitem__)
    assert sent == received == TEXTS
    assert messages == []
    assert source.closed


def test_source_is_closed_after_an_error():
    source = Source()
    with pytest.raises(ZeroDivisionError):
        SharedGenerator(source).sample(REQUESTS, on_text=lambda number, text: 1 / 0)
    assert source.closed
