from sdjax.decoding.schedule import Schedule

A, B, C = (5, 6), (7,), (1, 2, 3, 4, 5)


def run(prompts, *, slots, rows):
    """Fills and releases, the first owned slot ending each time; the admissions that were made."""
    schedule = Schedule(dict(enumerate(prompts)), (2, 8), slots=slots, rows=rows)
    made, holds = [], [None] * slots
    while schedule.busy:
        for bucket, seated in schedule.fill():
            made.append((bucket, [one.index for one in seated]))
            before = list(holds)
            for one in seated:
                assert (one.source is None) == (bucket is not None)
                assert one.source is None or before[one.source] == prompts[one.index]
                holds[one.slot] = prompts[one.index]
        owned = [slot for slot, index in enumerate(schedule.owner) if index is not None]
        schedule.release(owned[0])
    return made


def test_prompts_are_computed_bucket_by_bucket_at_most_rows_at_once():
    made = run([C, A, C[:4], B], slots=4, rows=2)
    assert made == [(2, [1, 3]), (8, [0, 2])]


def test_every_sample_is_seated_once_and_every_prompt_computed_once():
    prompts = [A, B, A, C, A, A, B, A, C, C, A, B, B]
    for slots, rows in ((1, 1), (2, 1), (3, 3), (5, 2), (16, 16)):
        made = run(prompts, slots=slots, rows=rows)
        assert sorted(index for _, seated in made for index in seated) == list(range(len(prompts)))
        computed = [prompts[index] for bucket, seated in made if bucket for index in seated]
        assert sorted(computed) == sorted({A, B, C})


def test_a_round_waits_for_a_full_admission_while_prompts_wait():
    schedule = Schedule({0: A, 1: B, 2: C}, (8,), slots=2, rows=2)
    assert schedule.wanted == 2
    list(schedule.fill())
    assert schedule.wanted == 1
    schedule.release(0)
    list(schedule.fill())
    assert schedule.wanted == 2
