import html.parser
import random
import re

import pytest
from rich.console import Console

from sdjax.report import final_table, write_report
from sdjax.report.page import render, visible
from sdjax.search.store import Store


class Reader(html.parser.HTMLParser):
    """Parser that collects elements, attributes and the text inside <pre>."""

    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "br", "img", "link", "input"):
            self.open.append(tag)
        if tag == "pre":
            self.sources.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            self.sources[-1] += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []  # every element is closed
    return reader


@pytest.fixture(scope="module")
def page(finished):
    return render(finished)


def test_untrusted_text_is_escaped(page, made_up):
    reader = read(page)
    assert not {"script", "img", "iframe", "link", "object", "b"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert "{{ 7*7 }}" in page
    for hidden in ("\u202e", "\x1b"):
        assert hidden in made_up.hostile
        assert hidden not in page
    hostile_source = next(source for source in reader.sources if "<script>alert" in source)
    assert "def merge_models(task_vectors):\n" in hostile_source
    assert "\\u{202e}evil\\u{001b}[31m" in hostile_source


def test_page_makes_no_requests(page):
    for name, value in read(page).attributes:
        if name in ("href", "src", "xlink:href", "action", "data"):
            assert value.startswith("#"), (name, value)
    assert not re.search(r"url\((?!#)", page)
    assert not re.search(r"@import|<style[^>]*src", page)
    assert "default-src 'none'" in page


def test_page_contains_the_results(page, finished):
    words = " ".join(re.sub(r"<svg.*?</svg>|<[^>]+>", " ", page, flags=re.S).split())
    for text in (
        "Setting: transfer",
        "task_arithmetic(scale=0.7)",
        "sandbox layers rlimits, seccomp",
        "jax 0.10.2",
        "not in training",
        "scales expert_2",
        "refused: import",
        "wrong signature: shape",
        "max_magnitude",
        "generator-3 (checkpoints/3), steps 50, loss 0.61",
        "seed zoo:seed; expert_1 = zoo:a;",
    ):
        assert text in words, text
    assert ">in training<" in page
    assert page.count("<svg") == 5
    assert "unfinished" not in words


def test_page_is_written_atomically_and_deterministically(tmp_path, finished, page):
    path = write_report(finished, tmp_path / "report.html")
    assert path.read_text() == page
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_report_in_every_state_of_a_run(tmp_path, made_up):
    rng = random.Random(1)
    with made_up.new_store(tmp_path) as store:
        steps = [
            lambda: None,
            lambda: made_up.add_iteration(store, rng, 1, size=6),
            lambda: made_up.add_baselines(store, rng),
            lambda: made_up.add_test(store, rng),
        ]
        for step in steps:
            step()
            text = render(store)
            read(text)
            assert "The run is unfinished" in text
            Console(quiet=True).print(final_table(store))


def test_report_of_a_run_that_is_being_written(tmp_path, made_up):
    with made_up.new_store(tmp_path) as writer:
        made_up.add_iteration(writer, random.Random(3), 1, size=6)
        with Store.open(tmp_path) as reader:
            write_report(reader, tmp_path / "report.html")
        made_up.add_iteration(writer, random.Random(3), 2, size=6)
    read((tmp_path / "report.html").read_text())


def test_final_table_fits_80_columns(finished):
    console = Console(width=80, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        console.print(final_table(finished))
    text = captured.get()
    assert max(map(len, text.splitlines())) <= 80
    assert "seed" in text
    assert "task_arithmetic" in text
    assert len(re.findall(r"^program [0-9a-f]{8}", text, flags=re.M)) == 5
    assert re.search(r"\[[+-]\d+\.\d, [+-]\d+\.\d\]", text)
    with console.capture() as captured:
        console.print(final_table(finished, "no such setting"))
    assert "program" not in captured.get()


def test_hidden_characters_are_shown_as_codes():
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("a\u200bb\x00\u2066") == "a\\u{200b}b\\u{0000}\\u{2066}"
    assert visible("x" * 30_000).endswith("(30000 characters in total)")
