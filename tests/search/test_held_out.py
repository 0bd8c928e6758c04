"""The remark on families of operations that the generator's training programs lack."""

from sdjax.search.loop import held_out_note
from sdjax.search.store import Store
from sdjax.search.types import Program, Sample, StoredVerdict


def test_families_that_training_lacks_are_counted_by_distinct_program(tmp_path):
    families = [(), ("max_magnitude",), ("max_magnitude", "projection_removal"), None]
    with Store.create(tmp_path, config={}, versions={}, layers=[]) as store:
        prompt = store.save_prompt("short", "def")
        for number, held_out in enumerate([*families, ("max_magnitude",)]):
            source = "1" if number == 4 else str(number)  # the last one is a duplicate
            store.save(
                Program(identity=source * 8, source=source, held_out=held_out),
                StoredVerdict(source=source, verdict="admitted", identity=source * 8),
                Sample(
                    iteration=1 if number else 2,
                    number=number,
                    prompt=prompt,
                    text=source,
                    tokens=(1,),
                    stopped=True,
                    source=source,
                ),
            )
        expected = "; families that its training lacks: max_magnitude (2), projection_removal (1)"
        assert held_out_note(store, 1) == expected
        assert held_out_note(store, 2) == ""
