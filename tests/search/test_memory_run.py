"""An iteration with memory on real models: interruption, and the examples to train on."""

import dataclasses

import pytest

from sdjax.decoding.config import DecoderConfig
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.context import build_context
from sdjax.search.iteration_scores import score_programs
from sdjax.search.memory_config import MemoryConfig
from sdjax.search.phases import generate, judge
from sdjax.search.scoring import save_settings
from sdjax.search.store import Store
from sdjax.search.types import Prompt, Sample

SAMPLES = 8


class Killed(Exception):
    """Ends a phase in the middle."""


@pytest.mark.slow
@pytest.mark.parametrize("parents", ["top", "islands", "puct"])
def test_interrupted_iteration_with_memory_asks_and_samples_the_same(
    small_config, tmp_path, monkeypatch, parents
):
    memory = MemoryConfig(parents=parents, islands=2, archive=parents == "top", refused=1)
    generation = dataclasses.replace(
        small_config.generation,
        prompt="short-memory",
        memory=memory,
        decoding=DecoderConfig(slots=8, prefill_batch=8, buckets=(16, 352), max_new_tokens=96),
    )
    context = build_context(dataclasses.replace(small_config, generation=generation))
    store = Store.create(tmp_path / "run", config=context.config.to_json(), versions={}, layers=[])

    def sample(iteration):
        adapter = context.new_adapter()
        generate(context, store, adapter, iteration=iteration, count=SAMPLES, temperature=1.0)
        return store.select(Sample, iteration=iteration)

    with store:
        save_settings(context, store)
        first = sample(1)
        assert {one.parents for one in first} == {()}
        with Sandbox(context.signature, workers=1) as sandbox:
            judge(context, store, sandbox, iteration=1)
            score_programs(context, store, sandbox, iteration=1)
        complete = sample(2)
        assert all(one.parents and one.operation for one in complete)
        store.delete(Sample, iteration=2)
        save, saved = Store.save, []

        def save_three(self, *records):
            if isinstance(records[0], Sample):
                saved.append(records)
                if len(saved) > 3:
                    raise Killed
            save(self, *records)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "save", save_three)
            with pytest.raises(Killed):
                sample(2)
        assert 0 < len(store.select(Sample, iteration=2)) < SAMPLES
        assert sample(2) == complete
        prompts = store.by_key(Prompt)
        for one in complete:
            text = prompts[one.prompt].text
            assert text.endswith(f"# merge three experts: {one.operation}")
            assert text.count("%\n") >= len(one.parents)
