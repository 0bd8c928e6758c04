"""Several generators in one iteration: who writes what, and what a resumed run does."""

import dataclasses
import json

import pytest

from sdjax.core.errors import UserError
from sdjax.evaluation.task import Outcome
from sdjax.generators.config import EndpointConfig, GeneratorConfig, SharesConfig
from sdjax.generators.endpoint import Endpoint
from sdjax.generators.types import GeneratedText
from sdjax.search import loop
from sdjax.search.announcement import announce
from sdjax.search.config import LimitsConfig, RunConfig
from sdjax.search.context import RunContext
from sdjax.search.estimate import work_left
from sdjax.search.generator_plan import GeneratorsPlan, describe_generators, plan_generators
from sdjax.search.iteration_generators import assignment, generator_records
from sdjax.search.loop import run_iterations
from sdjax.search.memory.renderer import longest_prompt
from sdjax.search.phase_clock import PhaseClock
from sdjax.search.phases import generate
from sdjax.search.plan import plan_run
from sdjax.search.provenance import plan_inputs
from sdjax.search.run_limits import end_reason
from sdjax.search.score_types import Application
from sdjax.search.scoring import save_settings
from sdjax.search.store import Store
from sdjax.search.types import Entry, Program, Sample, StoredVerdict, program_entry

PROGRAMS = tuple(
    f"def merge_models(task_vectors):\n    return 0.{n} * task_vectors['expert_1']\n"
    for n in range(1, 4)
)
ENDPOINT = EndpointConfig(base_url="http://127.0.0.1:1/v1", model="m")


def with_generators(context: RunContext, plan: GeneratorsPlan, **generation) -> RunContext:
    """Return a context whose run has a folder of programs and, with a key, an endpoint."""
    generators = {name: GeneratorConfig(programs="folder") for name in plan.programs}
    generators |= {name: GeneratorConfig(endpoint=ENDPOINT) for name in plan.keys}
    generation = dataclasses.replace(context.config.generation, **generation)
    training = dataclasses.replace(context.config.training, enabled=generation.seed_generator)
    config = dataclasses.replace(
        context.config, generators=generators, generation=generation, training=training
    )
    return dataclasses.replace(context, config=config, generators=plan)


def new_store(folder, context):
    store = Store.create(folder, config=context.config.to_json(), versions={}, layers=())
    save_settings(context, store)
    return store


def write(context, store, iteration=1):
    generate(context, store, context.new_adapter(), iteration=iteration, count=8, temperature=1.0)
    return {sample.number: sample for sample in store.select(Sample, iteration=iteration)}


@pytest.fixture(scope="module")
def alone(context, tmp_path_factory):
    """Samples of a run whose only generator is the seed."""
    with new_store(tmp_path_factory.mktemp("alone"), context) as store:
        return write(context, store)


def test_each_sample_is_written_by_its_generator(context, alone, tmp_path):
    both = with_generators(context, GeneratorsPlan(programs={"files": PROGRAMS}))
    with new_store(tmp_path, both) as store:
        samples = write(both, store)
        files = [one for one in samples.values() if one.generator == "files"]
        assert [one.source for one in files] == list(PROGRAMS)
        assert all(one.tokens == () and one.stopped for one in files)
        own = [one for one in samples.values() if one.generator == "seed"]
        assert len(own) == 5
        # The seed's samples are those that it writes alone.
        assert all(one == alone[one.number] for one in own)
        # A resumed iteration is the same.
        for number in (files[0].number, files[2].number, own[1].number):
            store.delete(Sample, iteration=1, number=number)
        assert write(both, store) == samples
        # A file is used once.
        assert {one.generator for one in write(both, store, 2).values()} == {"seed"}
    assert {one.generator for one in alone.values()} == {"seed"}


def test_what_an_endpoint_leaves_is_written_by_a_local_model(context, monkeypatch, tmp_path):
    def texts(endpoint, requests):
        assert endpoint.key == "secret"
        (first, *_) = requests
        yield first.number, dataclasses.replace(_text(PROGRAMS[0]), text=f"Text: {PROGRAMS[0]}")

    monkeypatch.setattr(Endpoint, "texts", texts)
    both = with_generators(context, GeneratorsPlan(keys={"gpt": "secret"}))
    with new_store(tmp_path, both) as store:
        samples = write(both, store)
        assert sorted(one.generator for one in samples.values()) == ["gpt", *["seed"] * 7]
        (answer,) = (one for one in samples.values() if one.generator == "gpt")
        assert (answer.text, answer.tokens) == (f"Text: {PROGRAMS[0]}", ())
    alone = with_generators(both, both.generators, seed_generator=False)
    with new_store(tmp_path / "alone", alone) as store:
        assert len(write(alone, store)) == 1


def _text(source):
    return GeneratedText(text=source, source=source, stopped=True)


def test_what_an_endpoint_leaves_is_written_by_a_folder(context, monkeypatch, tmp_path):
    monkeypatch.setattr(Endpoint, "texts", lambda *_: (one for one in ()))
    plan = GeneratorsPlan(programs={"files": PROGRAMS}, keys={"gpt": None})
    both = with_generators(context, plan, seed_generator=False)
    with new_store(tmp_path, both) as store:
        samples = write(both, store)
        assert sorted(one.text for one in samples.values()) == list(PROGRAMS)
        store.delete(Sample, iteration=1, number=min(samples))
        assert write(both, store) == samples
        assert write(both, store, 2) == {}


def save_search_scores(context, store, *, iteration, **options):
    """Stand for scoring: give each program of an iteration a score, unless it has one."""
    for sample in store.select(Sample, iteration=iteration):
        if store.select(StoredVerdict, source=sample.source):
            continue
        number = 10 * iteration + sample.number
        save_scored(store, sample.prompt, number, "files", 0.5, sample=sample)


def test_search_ends_when_its_generators_have_nothing_left(context, monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO", logger="sdjax")
    for name in ("judge", "choose_training_data", "load_generator"):
        monkeypatch.setattr(loop, name, lambda *arguments, **options: None)
    monkeypatch.setattr(
        loop,
        "score_programs",
        lambda c, store, _, **options: save_search_scores(c, store, **options),
    )

    def search(programs, iterations):
        plan = GeneratorsPlan(programs={"files": programs})
        alone = with_generators(context, plan, seed_generator=False, samples=2)
        config = dataclasses.replace(alone.config, iterations=iterations)
        alone = dataclasses.replace(alone, config=config)
        run_iterations(alone, store, None, None, PhaseClock(alone, store))
        samples = [(one.iteration, one.text) for one in store.select(Sample)]
        return samples, end_reason(config, store)

    with new_store(tmp_path, context) as store:
        written, reason = search(PROGRAMS, 4)
        assert written == [(1, PROGRAMS[0]), (1, PROGRAMS[1]), (2, PROGRAMS[2])]
        assert reason == "generators that have nothing left to write: 3 of 8 programs"
        assert f"by {reason}; to continue it with --resume, raise max_tokens_total" in caplog.text
        assert "iteration 2 has 1 of 2 samples" in caplog.text
        assert search(PROGRAMS, 4) == (written, reason)
        # One that comes first by its name is written next, and the search continues.
        more = ("a = 1", *PROGRAMS, "z = 1", "y = 1")
        continued = [*written, (3, "a = 1"), (3, "z = 1"), (4, "y = 1")]
        assert search(more, 4) == (continued, None)
    nothing = pytest.raises(UserError, match="have not written a program; raise max_tokens_total")
    with new_store(tmp_path / "none", context) as store, nothing:
        search((), 4)


def test_shares_follow_the_best_programs_of_earlier_iterations(context, tmp_path):
    taken = tuple(f"program {number:032x}" for number in (0, 2, 3))
    plan = GeneratorsPlan(programs={"files": (*taken, *PROGRAMS * 99)})
    both = with_generators(context, plan, shares=SharesConfig(top_percent=50))
    with new_store(tmp_path, both) as store:
        prompt = store.save_prompt("short", "p")
        # Of four programs, the two best are from the files; the third is sampled by both.
        written = {0: ("files", 0.9), 1: ("seed", 0.2), 2: ("files", 0.8), 3: ("seed", 0.4)}
        for number, (generator, score) in written.items():
            save_scored(store, prompt, number, generator, score)
        save_scored(store, prompt, 4, "files", 0.4, program=3)
        records = generator_records(both, store, before=2)
        assert [(one.samples, one.successes) for one in records.values()] == [(2, 0), (3, 2)]
        assert records["files"].remaining == 297
        assert generator_records(both, store, before=1)["files"].samples == 0
        shares = {n: len(v) for n, v in assignment(both, store, iteration=2, count=50).items()}
        assert shares["files"] > shares["seed"] >= 5


def save_scored(store, prompt, number, generator, score, program=None, sample=None):
    """Save a sample, by default of its own, whose program has a score."""
    identity = f"{number if program is None else program:032x}"
    source = f"program {identity}" if sample is None else sample.source
    if program is None:
        name = program_entry(identity)
        store.save(
            StoredVerdict(source=source, verdict="admitted", identity=identity),
            Program(identity=identity, source=source),
            Entry(name=name, kind="program", identity=identity),
            Application(entry=name, change=1.0),
        )
        outcomes = [
            Outcome(problem_id=str(n), output="", strict=n < 10 * score, flexible=False)
            for n in range(10)
        ]
        store.save_scores(name, "development", outcomes)
    if sample is not None:
        return
    store.save(
        Sample(
            iteration=1,
            number=number,
            prompt=prompt,
            text=source,
            tokens=(),
            stopped=True,
            source=source,
            generator=generator,
        )
    )


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "programs"
    path.mkdir()
    for number, program in enumerate(PROGRAMS):
        (path / f"{number}.py").write_text(program)
    return path


def configured(config: RunConfig, **generators) -> RunConfig:
    return dataclasses.replace(config, generators=generators)


def test_plan_checks_and_describes_the_generators(small_config, folder, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    endpoint = dataclasses.replace(ENDPOINT, api_key_env="MY_KEY", max_tokens_total=5_000)
    config = configured(
        small_config,
        files=GeneratorConfig(programs=str(folder)),
        gpt=GeneratorConfig(endpoint=endpoint),
        other=GeneratorConfig(model="zoo:reader"),
    )
    plan = plan_run(config)
    assert plan.generators.programs == {"files": PROGRAMS}
    assert plan.generators.keys == {"gpt": "secret"}
    assert "secret" not in repr(plan.generators)
    assert plan.generators.local["other"].decoder.tokenizer is not plan.tokenizer
    (line,) = describe_generators(config, plan.generators, plan.renderer)
    assert line == (
        f"generators: seed (zoo:seed), files (3 programs in {folder}), "
        "gpt (m from http://127.0.0.1:1/v1, at most 5,000 tokens), other (zoo:reader)"
    )
    unlimited = dataclasses.replace(endpoint, max_tokens_total=None)
    config = configured(small_config, gpt=GeneratorConfig(endpoint=unlimited))
    most = 16 * (longest_prompt(plan.renderer, 96) + 2048)
    (line,) = describe_generators(config, plan.generators, plan.renderer)
    assert line.endswith(f"up to about {most:,} tokens without repeated requests)")
    assert {"programs files", "tokenizer other"} <= plan_inputs(plan).keys()
    assert "secret" not in json.dumps(config.to_json())


def test_announcement_and_estimate_count_the_programs_of_folders(context, tmp_path):
    plan = with_generators(
        context, GeneratorsPlan(programs={"files": PROGRAMS}), seed_generator=False
    )
    (line,) = (line for line in announce(plan) if line.startswith("search: "))
    assert line.startswith("search: the 3 programs of the folder (at most 2 iterations of 8) and ")
    with new_store(tmp_path / "run", plan) as store:
        assert work_left(plan, store).generate == 3
        store.save_phase(1, "generate", 1.0)
        assert work_left(plan, store).generate == 0
    limited = dataclasses.replace(plan.config, limits=LimitsConfig(max_programs=2))
    lines = announce(dataclasses.replace(plan, config=limited))
    assert any(line.startswith("search: 16 programs (2 iterations of 8) and ") for line in lines)


def test_unusable_generators_are_reported_before_the_run(
    small_config, context, folder, monkeypatch
):
    monkeypatch.delenv("NO_KEY", raising=False)
    missing = folder / "missing"
    for generator, message in (
        (GeneratorConfig(programs=str(missing)), r"generators\.one\.programs: .*missing"),
        (GeneratorConfig(model=str(missing)), r"generators\.one\.model: .*missing"),
        (
            GeneratorConfig(endpoint=dataclasses.replace(ENDPOINT, api_key_env="NO_KEY")),
            r"generators\.one\.endpoint\.api_key_env: the environment variable NO_KEY is not set",
        ),
        (
            GeneratorConfig(endpoint=dataclasses.replace(ENDPOINT, replay=str(missing))),
            r"generators\.one\.endpoint\.replay: .*missing: cannot be read",
        ),
    ):
        with pytest.raises(UserError, match=message):
            plan_generators(configured(small_config, one=generator), context.renderer, None)
    with pytest.raises(ValueError, match=r"set training\.enabled to false"):
        dataclasses.replace(
            configured(small_config, one=GeneratorConfig(programs="x")),
            generation=dataclasses.replace(small_config.generation, seed_generator=False),
        )
