"""Prompts of an iteration: what they show of a store, and what fits into the decoder."""

import dataclasses

import pytest

from sdjax.core.errors import UserError
from sdjax.evaluation.task import Outcome
from sdjax.io.tokenizer import load_tokenizer
from sdjax.search.config import read_config
from sdjax.search.memory.prompts import iteration_prompts
from sdjax.search.plan import check_prompt, prompt_renderer
from sdjax.search.score_types import Application, ScoredStructure
from sdjax.search.store import Store
from sdjax.search.types import (
    RANDOM,
    SEARCH,
    UNTRAINED,
    Entry,
    Program,
    Sample,
    Setting,
    StoredVerdict,
    program_entry,
)

PROBLEMS = 10


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("zoo:seed")


def configured(*overrides):
    settings = [
        "score=as_written",
        "generation.prompt=short-memory",
        "generation.decoding.buckets=[16,300]",
        *overrides,
    ]
    if not any(setting.startswith("generation.memory") for setting in overrides):
        settings.append("generation.memory.programs=2")
    return read_config("demo", settings)


def renderer_of(tokenizer, *overrides):
    config = configured(*overrides)
    return prompt_renderer(config, tokenizer, config.generation.decoding)


@pytest.fixture
def store(tmp_path):
    return created(tmp_path / "run", configured())


def created(folder, config):
    store = Store.create(folder, config=config.to_json(), versions={}, layers=[])
    store.save(Setting(seed="zoo:seed", slots={}, scope="mlp", task="arithmetic"))
    return store


def source_of(name):
    return f"def merge_models(task_vectors):\n    return {name}\n"


def add(store, iteration, scores, *, purpose=SEARCH, parents=(), change=0.5, structure=None):
    """Save the samples of an iteration: scored programs by name, or None if refused."""
    prompt = store.save_prompt("short", "def\n")
    for number, (name, score) in enumerate(scores.items()):
        source = source_of(name)
        sample = Sample(
            purpose=purpose,
            iteration=iteration,
            number=number,
            prompt=prompt,
            text=source,
            tokens=(),
            stopped=True,
            source=source,
            parents=parents,
        )
        if score is None:
            store.save(sample, StoredVerdict(source=source, verdict="bad syntax", message="line 2"))
            continue
        verdict = StoredVerdict(
            source=source, verdict="admitted", identity=name, structure=structure
        )
        store.save(sample, verdict)
        add_program(store, name, score, change)


def add_program(store, name, score, change=0.5):
    entry = program_entry(name)
    store.save(
        Program(identity=name, source=source_of(name), ir="{}", families=("mean",)),
        Entry(name=entry, kind="program", identity=name),
        Application(entry=entry, change=change),
    )
    outcomes = [
        Outcome(problem_id=f"{n}", output="", strict=n < score, flexible=True)
        for n in range(PROBLEMS)
    ]
    store.save_scores(entry, "development", outcomes)


def prompts(renderer, store, iteration=2, numbers=range(8), purpose=SEARCH):
    return iteration_prompts(
        renderer, store, purpose=purpose, iteration=iteration, numbers=list(numbers)
    )


def shown(prompted):
    return {name for one in prompted for name in one.parents}


def test_prompts_show_earlier_programs_with_their_scores(tokenizer, store):
    renderer = renderer_of(tokenizer)
    add(store, 1, {"a": 3, "b": 7, "refused": None})
    add(store, 2, {"later": 9})
    assert {one.prompt for one in prompts(renderer, store, 1)} == {"# merge three experts"}
    prompted = prompts(renderer, store)
    for one in prompted:
        expected = f"# 30%\n{source_of('a')}# 70%\n{source_of('b')}# merge three experts"
        assert one.prompt == one.message == f"{expected}: {one.operation}"
        assert one.parents == ("a", "b")
    assert len({one.operation for one in prompted}) > 1
    assert [one.number for one in prompted] == list(range(8))
    # A resumed run asks the same, whatever it has already.
    assert prompts(renderer, store, numbers=[5, 2]) == [prompted[5], prompted[2]]
    assert prompts(renderer_of(tokenizer, "rng_seed=1"), store) != prompted


def test_without_memory_the_prompt_never_changes(tokenizer, store):
    renderer = renderer_of(tokenizer, "generation.memory=null")
    add(store, 1, {"a": 3, "b": 7})
    assert {one.prompt for one in prompts(renderer, store)} == {"# merge three experts"}


def test_samples_share_prompts(tokenizer, store):
    renderer = renderer_of(tokenizer, "generation.memory.samples_per_prompt=4")
    add(store, 1, {name: score for score, name in enumerate("abcdef")})
    texts = [one.prompt for one in prompts(renderer, store)]
    assert texts == [texts[0]] * 4 + [texts[4]] * 4
    assert texts[0] != texts[4]
    assert [one.prompt for one in prompts(renderer, store, numbers=[6])] == [texts[4]]


def test_untrained_generator_has_a_memory_of_its_own(tokenizer, store):
    renderer = renderer_of(tokenizer)
    add(store, 1, {"first": 1})
    add(store, 2, {"trained": 9})
    add(store, 1, {"own": 2}, purpose=UNTRAINED)
    add(store, 1, {"random": 9}, purpose=RANDOM)
    assert shown(prompts(renderer, store, 1, purpose=UNTRAINED)) == {"first"}
    assert shown(prompts(renderer, store, 2, purpose=UNTRAINED)) == {"first", "own"}
    assert shown(prompts(renderer, store, 3)) == {"first", "trained"}
    assert shown(prompts(renderer, store, 3, purpose="measurement")) == {"first", "trained"}


def test_refused_program_is_shown_with_its_verdict(tokenizer, store):
    renderer = renderer_of(tokenizer, "generation.memory.refused=1")
    add(store, 1, {"a": 3, "old": None})
    add(store, 2, {"b": 5, "new": None})
    add(store, 3, {"c": 6})
    for one in prompts(renderer, store, 4):
        assert f"# refused: bad syntax\n{source_of('new')}# merge" in one.prompt
        assert "old" not in one.prompt


def test_program_that_leaves_the_seed_as_it_was_is_not_shown(tokenizer, store):
    renderer = renderer_of(tokenizer, "selection.min_change=0.1")
    add(store, 1, {"unchanged": 9}, change=0.01)
    add(store, 2, {"a": 5})
    prompted = prompts(renderer, store, 3)
    assert shown(prompted) == {"a"}
    assert "combine" not in {one.operation for one in prompted}  # there is only one


def test_structure_is_shown_with_its_best_numbers(tokenizer, tmp_path):
    with created(tmp_path / "run", configured("score=tuned")) as store:
        add(store, 1, {"written": 3, "other": 2}, structure="s")
        add_program(store, "tuned", 8)
        store.save(
            ScoredStructure(
                structure="s", purpose=SEARCH, iteration=1, written="written", best="tuned"
            )
        )
        (one,) = prompts(renderer_of(tokenizer, "score=tuned"), store, numbers=[0])
    assert one.parents == ("tuned",)
    assert one.prompt.startswith(f"# 80%\n{source_of('tuned')}# merge")


def test_prompt_that_is_too_long_loses_its_worst_programs(tokenizer, store):
    renderer = renderer_of(tokenizer, "generation.memory.refused=1")
    add(store, 1, {"a": 3, "b": 7, "refused": None})
    lengths = {}
    for size in (300, *range(120, 4, -4)):
        short = dataclasses.replace(renderer, max_tokens=size)
        for one in prompts(short, store, numbers=range(3)):
            assert renderer.length(one.message) <= size
            lengths[size] = (len(one.parents), "refused" in one.prompt)
            assert one.operation != "combine" or len(one.parents) == 2
            assert one.parents in ((), ("b",), ("a", "b"))
    assert list(dict.fromkeys(lengths.values())) == [(2, True), (2, False), (1, False), (0, False)]


def test_source_with_special_tokens_is_not_shown(tokenizer, store):
    end = tokenizer.decode(tokenizer.eos_ids[:1], skip_special=False)
    add(store, 1, {f"'{end}'": 9, "a": 3})
    assert shown(prompts(renderer_of(tokenizer), store)) == {"a"}


def test_longest_prompt_must_fit(tokenizer):
    check_prompt(renderer_of(tokenizer), 512)
    too_small = renderer_of(tokenizer, "generation.decoding.buckets=[16,64]")
    with pytest.raises(UserError, match=r"buckets.*may have \d+ tokens.*add a bucket of at least"):
        check_prompt(too_small, 512)
    with pytest.raises(UserError, match=r"memory.programs: .*exceeds.* length of 256; lower"):
        check_prompt(too_small, 256)


def test_memory_that_the_docs_name_fits_the_zoo(tokenizer):
    def check(memory):
        config = read_config("demo", [f"generation.memory={memory}"])
        check_prompt(prompt_renderer(config, tokenizer, config.generation.decoding), 512)

    check("{programs: 2}")
    check("{programs: 1, refused: 1}")
    with pytest.raises(UserError, match=r"or set generation.memory.refused to 0$"):
        check("{programs: 2, refused: 1}")


@pytest.mark.parametrize(
    ("template", "memory", "message"),
    [
        (None, "programs=1", "memory: the prompt 'short' has no place for earlier programs; set"),
        ("{{ names }}", "programs=1", "has no place for earlier programs; .* or set gen.* to null"),
        ("{{ names }} {{ programs }}", "refused=1", "memory.refused: .* no place for refused prog"),
        ("{{ names }} {{ programs }}", "operations={improve: 1}", "asks for no operation; show"),
    ],
)
def test_prompt_must_read_what_memory_sets(tokenizer, tmp_path, template, memory, message):
    prompt = "short"
    if template is not None:
        (tmp_path / "mine.jinja").write_text(template)
        prompt = tmp_path / "mine.jinja"
    with pytest.raises(UserError, match=message):
        renderer_of(tokenizer, f"generation.prompt={prompt}", f"generation.memory.{memory}")


def test_prompt_is_checked_with_every_number_of_programs_and_operation(tokenizer, tmp_path):
    (tmp_path / "mine.jinja").write_text(
        "{{ programs | length }} {{ operation }}"
        "{% if programs | length == 3 and operation == 'explore' %}{{ programs[3] }}{% endif %}"
    )

    def check(programs, operations):
        prompt = f"generation.prompt={tmp_path / 'mine.jinja'}"
        memory = f"generation.memory={{programs: {programs}, operations: {operations}}}"
        buckets = "generation.decoding.buckets=[900]"
        check_prompt(renderer_of(tokenizer, prompt, memory, buckets), 1024)

    check(4, "{combine: 1, explore: 0}")
    with pytest.raises(UserError, match=r"generation.prompt: .* with 3 earlier programs to expl"):
        check(4, "{explore: 1}")


def test_operation_that_a_prompt_does_not_ask_for_is_not_recorded(tokenizer, store, tmp_path):
    (tmp_path / "mine.jinja").write_text("{% for one in programs %}{{ one.source }}{% endfor %}x")
    renderer = renderer_of(
        tokenizer, f"generation.prompt={tmp_path / 'mine.jinja'}", "generation.memory.programs=2"
    )
    add(store, 1, {"a": 3, "b": 7})
    assert {(one.parents, one.operation) for one in prompts(renderer, store)} == {
        (("a", "b"), None)
    }
