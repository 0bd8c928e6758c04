"""A run whose programs an endpoint writes: killed, resumed, replayed, and out of its budget."""

import collections
import dataclasses
import json
import math
import os
import subprocess
import sys
import time

import jax
import pytest

from sdjax.decoding.config import DecoderConfig
from sdjax.generators.config import EndpointConfig, GeneratorConfig
from sdjax.report.data import read_report
from sdjax.search.config import config_from
from sdjax.search.loop import run_search
from sdjax.search.memory_config import MemoryConfig
from sdjax.search.store import Store
from sdjax.search.types import Prompt
from tests.generators.chat_server import completion, serving

pytestmark = pytest.mark.slow

SCRIPT = "import json, sys; from sdjax.search.loop import run_search; "
SCRIPT += "from sdjax.search.config import config_from; "
SCRIPT += "run_search(config_from(json.loads(sys.argv[1]), 'test'), sys.argv[2])"
CONCURRENCY, SAMPLES, ITERATIONS = 2, 6, 2
# Answers after which the endpoint is silent: in the first and in the second iteration.
SILENT_AFTER = (3, 8)


class Writer:
    """Answers each request by its seed alone; up to a number of answers, then never.

    Attributes:
        most: number of answers.
        usage: tokens of a prompt and of an answer.
        asked: the requests that were answered.
    """

    def __init__(self, usage=(10, 20)):
        self.most, self.asked, self.usage = math.inf, [], usage

    def __call__(self, body):
        if len(self.asked) >= self.most:
            return None
        self.asked.append(json.dumps(body, sort_keys=True))
        weight = body["seed"] % 50 / 50
        if weight > 0.9:
            return completion("I cannot think of any.", usage=self.usage)
        source = f"    return {weight} * task_vectors['expert_1']\n"
        source = f"def merge_models(task_vectors):\n{source}"
        return completion(f"I think of {weight}:\n```python\n{source}```", usage=self.usage)


def endpoint_config(config, **endpoint):
    fields = {"model": "m", "concurrency": CONCURRENCY, "base_url": "http://127.0.0.1:1/v1"}
    generator = GeneratorConfig(endpoint=EndpointConfig(**fields | endpoint))
    generation = dataclasses.replace(
        config.generation,
        samples=SAMPLES,
        seed_generator=False,
        memory=MemoryConfig(parents="puct", refused=1),
        decoding=DecoderConfig(slots=8, prefill_batch=8, buckets=(16, 352), max_new_tokens=96),
    )
    return dataclasses.replace(
        config,
        generators={"gpt": generator},
        iterations=ITERATIONS,
        generation=generation,
        training=dataclasses.replace(config.training, enabled=False),
    )


def results(folder):
    with Store.open(folder) as store:
        assert store.run().finished_at is not None
        samples = [dataclasses.asdict(sample) for sample in store.judged()]
        assert {sample["generator"] for sample in samples} == {"gpt"}
        table = sorted(map(repr, store.summaries(None, None)))
        return {"prompts": store.by_key(Prompt), "samples": samples, "table": table}


def recorded(folder):
    lines = (folder / "answers" / "gpt.jsonl").read_text().splitlines()
    return collections.Counter(lines)


def kill_while_it_waits(config, folder, server, writer):
    """Run a search until all of its requests wait for the endpoint, and kill it."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(config.to_json()), folder]
    compiled = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    environment = {**os.environ, **compiled}
    before, answered = len(server.requests), len(writer.asked)
    with subprocess.Popen(command, start_new_session=True, env=environment) as process:
        deadline = time.monotonic() + 400
        # A request follows another one when that one's answer is recorded.
        while len(server.requests) - before < len(writer.asked) - answered + waiting(writer):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()


def waiting(writer):
    """Return how many requests wait at the end of the answers."""
    left = SAMPLES - writer.most % SAMPLES
    return min(CONCURRENCY, left)


def test_run_killed_while_it_waits_pays_for_no_answer_twice(small_config, tmp_path):
    whole, killed, replayed = (tmp_path / name for name in ("whole", "killed", "replayed"))
    with serving(uninterrupted := Writer()) as server:
        run_search(endpoint_config(small_config, base_url=server.url), whole)
    with serving(writer := Writer()) as server:
        config = endpoint_config(small_config, base_url=server.url)
        for writer.most in SILENT_AFTER:
            kill_while_it_waits(config, killed, server, writer)
            assert len(writer.asked) == writer.most
        writer.most = math.inf
        run_search(config, killed)
    assert sorted(writer.asked) == sorted(uninterrupted.asked)  # each of them once
    assert len(writer.asked) == SAMPLES * ITERATIONS
    assert results(killed) == results(whole)
    assert recorded(killed) == recorded(whole)
    # Without the endpoint, its recording gives the same.
    replay = endpoint_config(small_config, replay=str(killed / "answers" / "gpt.jsonl"))
    run_search(config_from(replay.to_json(), "test"), replayed)
    assert results(replayed) == results(whole)


def test_run_whose_budget_is_used_up_has_its_answer_and_can_be_given_more(
    small_config, tmp_path, caplog
):
    caplog.set_level("INFO", logger="sdjax")
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    cost = 300  # of an answer; the first iteration has 6, and a 7th does not fit
    with serving(Writer(usage=(200, cost - 200))) as server:
        options = {"base_url": server.url, "max_tokens": 100}
        config = endpoint_config(small_config, **options)
        run_search(config, whole)
        budget = endpoint_config(small_config, **options, max_tokens_total=SAMPLES * cost + 200)
        run_search(budget, ended)
        reason = "generators that have nothing left to write: 6 of 12 programs"
        assert f"the search ends early, by {reason}; to continue it" in caplog.text
        first = results(ended)
        assert first["samples"] == results(whole)["samples"][:SAMPLES]
        assert any("split='test'" in row for row in first["table"])
        with Store.open(ended) as store:
            assert f"The search ended early, by {reason}." in read_report(store).missing
        asked = len(server.requests)
        run_search(budget, ended)  # which finds nothing to do
        assert len(server.requests) == asked
        assert results(ended) == first
        run_search(config, ended)
        assert len(server.requests) == asked + SAMPLES
    assert results(ended)["samples"] == results(whole)["samples"]
    assert recorded(whole) <= recorded(ended)
    with Store.open(ended) as store:
        assert "ended early" not in " ".join(read_report(store).missing)
