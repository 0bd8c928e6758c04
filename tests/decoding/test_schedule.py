from sdjax.decoding.schedule import Schedule

A, B, C = (5, 6), (7,), (1, 2, 3, 4, 5)


def run(prompts, *, slots, prefill_batch):
    """Fill the slots repeatedly, finishing the first occupied slot each time; return all fills."""
    schedule = Schedule(dict(enumerate(prompts)), (2, 8), slots=slots, prefill_batch=prefill_batch)
    fills, held_prompts = [], [None] * slots
    while schedule.has_unfinished:
        for bucket, assignments in schedule.fill():
            fills.append((bucket, [assignment.index for assignment in assignments]))
            before = list(held_prompts)
            for assignment in assignments:
                source_slot, prompt = assignment.source_slot, prompts[assignment.index]
                assert (source_slot is None) == (bucket is not None)
                assert source_slot is None or before[source_slot] == prompt
                held_prompts[assignment.slot] = prompt
        occupied = [slot for slot, index in enumerate(schedule.owners) if index is not None]
        schedule.release(occupied[0])
    return fills


def test_prompts_are_prefilled_by_bucket_in_limited_batches():
    fills = run([C, A, C[:4], B], slots=4, prefill_batch=2)
    assert fills == [(2, [1, 3]), (8, [0, 2])]


def test_every_sample_is_assigned_once_and_every_prompt_prefilled_once():
    prompts = [A, B, A, C, A, A, B, A, C, C, A, B, B]
    for slots, prefill_batch in ((1, 1), (2, 1), (3, 3), (5, 2), (16, 16)):
        fills = run(prompts, slots=slots, prefill_batch=prefill_batch)
        assigned = [index for _, indices in fills for index in indices]
        assert sorted(assigned) == list(range(len(prompts)))
        prefilled = [prompts[index] for bucket, indices in fills if bucket for index in indices]
        assert sorted(prefilled) == sorted({A, B, C})


def test_refill_waits_for_a_full_prefill_batch():
    schedule = Schedule({0: A, 1: B, 2: C}, (8,), slots=2, prefill_batch=2)
    assert schedule.min_free_slots == 2
    list(schedule.fill())
    assert schedule.min_free_slots == 1
    schedule.release(0)
    list(schedule.fill())
    assert schedule.min_free_slots == 2
