import html.parser
import random
import re

import pytest
from rich.console import Console

from sdjax.core.visible import visible
from sdjax.report import final_table, write_report
from sdjax.report.page import render
from sdjax.search.store import Store
from sdjax.search.types import Entry


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
    assert page.count("<svg") == 6
    assert "unfinished" not in words


def test_program_of_a_prompt_with_memory_names_its_parents(page):
    assert f"combine from {'010003' * 2}, &lt;/pre&gt;" in page
    assert f"combine from {'020003' * 2}," in page


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


def printed(table, width: int) -> list[str]:
    """Return the lines of the table and of the notes below it."""
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().rstrip().splitlines()
    assert max(map(len, lines)) <= width
    return lines[next(n for n, line in enumerate(lines) if line.startswith("Test accuracy")) :]


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_final_table_has_one_line_per_row(finished, width):
    lines = printed(final_table(finished, width=width), width)
    body = lines[3 : 3 + 11]
    programs = [line for line in body if "program " in line]
    assert [line.split()[0] for line in programs] == ["*", "2", "3", "4", "5"]
    assert programs[0].split()[1] == "1"
    assert sum("task_arithmetic" in line for line in body) == (3 if width > 60 else 0)
    differences = 2 if width >= 100 else 1
    assert len(re.findall(r"[+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\]", body[3])) == differences
    assert "* the run's best program" in " ".join(lines)


def test_long_names_are_cut_in_the_table(tmp_path, made_up):
    name = f"method:ties({','.join(f'number_{n}=0.123' for n in range(9))},last=7)"
    with made_up.new_store(tmp_path) as store:
        store.save(Entry(name=name, kind="method"))
        store.save_scores(name, "test", made_up.outcomes(random.Random(0), 0.5, 40))
        (row,) = printed(final_table(store), 100)[3:4]
        assert re.search(r"ties\(number_0=.*….*,last=7\)", row)
        assert "number_5=0.123,number_6" in render(store)  # the page has the full name


def test_unknown_setting_has_no_rows(finished):
    assert "program" not in " ".join(printed(final_table(finished, "no such setting"), 100))


def test_page_and_terminal_agree(finished, page):
    """Check rank, name, scores and mark of each program in both tables."""
    for number, setting in enumerate(("main", "transfer")):
        lines = printed(final_table(finished, setting), 160)
        rows = re.findall(r'<tr class="program.*?</tr>', page, flags=re.S)[5 * number :][:5]
        programs = [line for line in lines if "program " in line][:5]
        for line, row in zip(programs, rows, strict=True):
            cells = [
                re.sub(r"<small>.*?</small>|<[^>]+>", "", cell).strip()
                for cell in re.findall(r"<td.*?</td>", row, flags=re.S)
            ]
            assert cells[1].endswith("the run's best program") == line.strip().startswith("*")
            shown = re.sub(r"\[.*?\]", "", line.replace("*", "")).split()
            assert shown[0] == cells[0]
            assert shown[1:3] == cells[1].split()[:2]
            assert shown[3:] == cells[2:-1]


def test_hidden_characters_are_shown_as_codes():
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("a\u200bb\x00\u2066") == "a\\u{200b}b\\u{0000}\\u{2066}"
    assert visible("x" * 30_000).endswith("(30000 characters in total)")
