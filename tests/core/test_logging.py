import logging

import pytest

from sdjax.core.logging import configure_logging, is_main_process


@pytest.fixture
def package_logger():
    logger = logging.getLogger("sdjax")
    before = logger.level, list(logger.handlers)
    yield logger
    logger.setLevel(before[0])
    logger.handlers[:] = before[1]


def test_messages_are_printed_once_with_prefix_on_stderr(capsys, package_logger):
    configure_logging()
    configure_logging()
    logging.getLogger("sdjax.some.module").info("one %s", "note")
    logging.getLogger("sdjax.some.module").debug("detail")
    logging.getLogger("another.library").info("not ours")
    captured = capsys.readouterr()
    assert captured.err == "sdjax: one note\n"
    assert captured.out == ""


def test_other_processes_print_nothing(capsys, package_logger, monkeypatch):
    monkeypatch.setattr("sdjax.core.logging.is_main_process", lambda: False)
    configure_logging()
    logging.getLogger("sdjax").warning("note")
    assert capsys.readouterr().err == ""


def test_single_process_is_main():
    assert is_main_process()
