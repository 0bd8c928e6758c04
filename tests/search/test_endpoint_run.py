"""A run whose programs an endpoint writes: killed while it waits, resumed, and replayed."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

from sdjax.generators.config import EndpointConfig, GeneratorConfig
from sdjax.search.config import config_from
from sdjax.search.loop import run_search
from sdjax.search.store import Store
from tests.generators.chat_server import completion, serving

pytestmark = pytest.mark.slow

SCRIPT = "import json, sys; from sdjax.search.loop import run_search; "
SCRIPT += "from sdjax.search.config import config_from; "
SCRIPT += "run_search(config_from(json.loads(sys.argv[1]), 'test'), sys.argv[2])"


def program(weight):
    source = f"def merge_models(task_vectors):\n    return {weight} * task_vectors['expert_1']\n"
    return completion(f"I think of {weight}:\n```python\n{source}```")


def endpoint_config(config, **endpoint):
    fields = {"model": "m", "concurrency": 1, "base_url": "http://127.0.0.1:1/v1"} | endpoint
    generator = GeneratorConfig(endpoint=EndpointConfig(**fields))
    return dataclasses.replace(
        config,
        generators={"gpt": generator},
        iterations=1,
        generation=dataclasses.replace(config.generation, samples=4, seed_generator=False),
        training=dataclasses.replace(config.training, enabled=False),
    )


def results(folder):
    with Store.open(folder) as store:
        assert store.run().finished_at is not None
        samples = [(s.number, s.text, s.generator, s.status) for s in store.judged()]
        return samples, sorted(map(repr, store.summaries(None, None)))


def test_run_killed_while_it_waits_pays_for_no_answer_twice(small_config, tmp_path):
    answers = [program(weight) for weight in (0.2, 0.4, 0.6)]
    with serving(*answers, None) as server:
        config = endpoint_config(small_config, base_url=server.url)
        command = [sys.executable, "-c", SCRIPT, json.dumps(config.to_json()), tmp_path / "run"]
        with subprocess.Popen(command, start_new_session=True, env=dict(os.environ)) as process:
            deadline = time.monotonic() + 400
            while len(server.requests) < 4:  # the fourth waits
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.kill()
        asked = [body["messages"] and body["seed"] for _, body in server.requests]
    with serving(program(0.8)) as server:
        config = endpoint_config(small_config, base_url=server.url)
        run_search(config, tmp_path / "run")
        assert [body["seed"] for _, body in server.requests] == asked[3:]
    recording = tmp_path / "run" / "answers" / "gpt.jsonl"
    assert len(recording.read_text().splitlines()) == 4
    replayed = endpoint_config(small_config, replay=str(recording))
    run_search(config_from(replayed.to_json(), "test"), tmp_path / "replayed")
    assert results(tmp_path / "replayed") == results(tmp_path / "run")
    assert {sample[2] for sample in results(tmp_path / "run")[0]} == {"gpt"}
