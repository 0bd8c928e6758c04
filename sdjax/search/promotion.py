"""Co-evolution: whether the best merged model of an iteration is the next base or generator.

After an iteration, the best program on the present base, by development score, is compared with
that base on the confirmation problems, paired by problem. It is promoted if the interval of the
difference is above zero. Each comparison is a *look* at the confirmation problems, so the error
probability of 5 % is spent over the looks: the k-th look of a purpose has the level
0.05 / (k (k + 1)). These levels sum up to 5 % however many looks follow, so that a run can be
extended by iterations. Given the programs that are compared, the probability of promoting a model
that is not better than its base is therefore at most 5 %. A program is compared once, and only if
its development score is above that of the base. Without a new best program above the
base, nothing is compared and no level is spent.

What a look reads is used up: the score of a promoted model on these problems is biased upwards, and
so are confirmation scores of programs on it. The answer of a run stays valid, since its interval is
that of the test problems, which no look reads; see `sdjax.search.answer`.

A new generator must also write programs: as many samples as the config says are drawn from the
merged model with the present adapter, judged, and kept under the purpose `GENERATOR_TEST`. They
are compared with what the present generator wrote in the iteration. If that is less, since other
generators wrote the rest, the present one is sampled too, under `PRESENT_GENERATOR_TEST`.
"""

from __future__ import annotations

import dataclasses
import logging

from sdjax.evaluation.statistics import paired_difference, paired_p_value, percent
from sdjax.models.fingerprint import fingerprint
from sdjax.models.lora import Adapter
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.base_chains import base_of_entry
from sdjax.search.base_identity import base_of_iteration, generator_base, promotions_of
from sdjax.search.baselines import SEED, score_baseline
from sdjax.search.bases import context_on_base
from sdjax.search.context import RunContext, ScoringContext
from sdjax.search.entry_names import display_name
from sdjax.search.phases import generate, judge
from sdjax.search.ranking import complete_scores, correct_answers, ranked_programs
from sdjax.search.score_types import Promotion
from sdjax.search.scoring import score_program
from sdjax.search.store import Store
from sdjax.search.types import CONFIRMATION, OWN_GENERATOR, SEARCH, Entry

GENERATOR_TEST = "generator test"  # purpose of the samples of a merged model as a generator
PRESENT_GENERATOR_TEST = "present generator test"  # of the one that it may replace
LEVEL = 0.05

logger = logging.getLogger(__name__)


def promote(
    context: RunContext,
    store: Store,
    sandbox: Sandbox | None,
    *,
    iteration: int,
    purpose: str = SEARCH,
    adapter: Adapter | None = None,
) -> None:
    """Decide after an iteration whether its best merged model is promoted; save the decision.

    Args:
        context: the loaded run.
        store: the run's store.
        sandbox: the sandbox on the main process; None on the others.
        iteration: number of the iteration, or of the batch of a control.
        purpose: whose programs.
        adapter: adapter of the iteration's generator; None if no generator can be promoted.
    """
    config = context.config.coevolution
    if config is None or store.select(Promotion, purpose=purpose, iteration=iteration):
        return
    base = base_of_iteration(store.select(Promotion), purpose, iteration)
    earlier = promotions_of(store.select(Promotion), purpose)
    candidate = _candidate(context, store, purpose, base)
    if candidate is None or candidate.name in {one.entry for one in earlier}:
        store.save(Promotion(purpose=purpose, iteration=iteration, base=base))
        return
    decision = compare_with_base(
        context, store, sandbox, candidate, base, purpose=purpose, iteration=iteration
    )
    if decision.low > 0:
        is_generator = False
        if adapter is not None and config.generator:
            decision = _with_shares(context, store, sandbox, decision, adapter)
            is_generator = (
                decision.admissible is not None
                and decision.admissible_before is not None
                and decision.admissible >= decision.admissible_before - config.tolerance
            )
        decision = dataclasses.replace(decision, is_base=config.base, is_generator=is_generator)
        if decision.is_base or decision.is_generator:
            decision = _with_fingerprint(context, store, sandbox, decision)
    store.save(decision)
    if purpose == SEARCH:
        logger.info("%s", describe_promotion(decision))


def compare_with_base(
    context: ScoringContext,
    store: Store,
    sandbox: Sandbox | None,
    candidate: Entry,
    base: str | None,
    *,
    purpose: str,
    iteration: int,
) -> Promotion:
    """Compare an entry with its base on the confirmation problems; promote nothing yet.

    Args:
        context: the loaded run.
        store: the run's store.
        sandbox: the sandbox on the main process; None on the others.
        candidate: entry of a merged model.
        base: entry of its base; None for the seed.
        purpose: whose looks at the confirmation problems are counted.
        iteration: number of the decision.
    """
    for name in (base or SEED, candidate.name):
        (entry,) = store.select(Entry, name=name)
        if entry.kind == "program":
            assert entry.identity is not None
            score_program(context, store, sandbox, entry.identity, CONFIRMATION)
        else:
            score_baseline(context, store, name, dict(entry.detail) or None, CONFIRMATION)
    correct = correct_answers(store, CONFIRMATION, context.config.task.metric)
    new, old = correct[candidate.name], correct[base or SEED]
    pair = [new[key] for key in old], [old[key] for key in old]
    earlier = promotions_of(store.select(Promotion), purpose)
    level = level_of_look(1 + sum(one.entry is not None for one in earlier))
    gain = paired_difference(*pair, 1 - level)
    return Promotion(
        purpose=purpose,
        iteration=iteration,
        base=base,
        entry=candidate.name,
        problems=len(old),
        gain=gain.mean,
        low=max(gain.low, -1.0),  # the interval of one problem is infinite
        high=min(gain.high, 1.0),
        p_value=paired_p_value(*pair),
        confidence=1 - level,
    )


def is_above_base(store: Store, metric: str, name: str, base: str | None) -> bool:
    """Return whether an entry has a higher development score than its base.

    Args:
        store: the run's store.
        metric: "strict" or "flexible".
        name: entry of a merged model that has answered all development problems.
        base: entry of its base, which has done so too; None for the seed.
    """
    scores = complete_scores(store, metric)
    return scores[name] > scores[base or SEED]


def level_of_look(number: int) -> float:
    """Return the level of the n-th look, counted from 1; the levels of all looks sum to 5 %."""
    return LEVEL / (number * (number + 1))


def describe_promotion(decision: Promotion) -> str:
    """Return the decision in one sentence."""
    if decision.entry is None:
        return (
            f"after iteration {decision.iteration}: no new best program above the base by "
            "development score, so the base is kept"
        )
    roles = [
        role
        for role, is_role in (
            ("base", decision.is_base),
            ("generator", decision.is_generator),
        )
        if is_role
    ]
    verdict = f"becomes the {' and the '.join(roles)}" if roles else "is not promoted"
    shares = ""
    if decision.admissible is not None:
        shares = (
            f"; as a generator, {percent(decision.admissible)} % of its samples are admissible, "
            f"before {percent(decision.admissible_before)} %"
        )
    return (
        f"after iteration {decision.iteration}: {display_name(decision.entry)} {verdict}: "
        f"{decision.interval.in_percent(signed=True)} points against "
        f"{display_name(decision.base or SEED)} on {decision.problems:,} confirmation problems "
        f"({percent(decision.confidence)} % interval){shares}"
    )


def _candidate(context: RunContext, store: Store, purpose: str, base: str | None) -> Entry | None:
    """Return the best program of a purpose on a base, if its development score is above the base's.

    The programs of earlier iterations on the base count, too.
    """
    metric = context.config.task.metric
    ranking = ranked_programs(store, metric, purpose)
    best = next((entry for entry in ranking if base_of_entry(store, entry) == base), None)
    if best is None or not is_above_base(store, metric, best.name, base):
        return None
    return best


def _with_shares(
    context: RunContext,
    store: Store,
    sandbox: Sandbox | None,
    decision: Promotion,
    adapter: Adapter,
) -> Promotion:
    """Return a decision with the shares of admissible samples, for which the model is sampled."""
    config, iteration = context.config, decision.iteration
    assert config.coevolution is not None

    def sample(model: str | None, count: int, purpose: str) -> list[bool]:
        generate(
            context_on_base(context, store, model, sandbox=sandbox),
            store,
            adapter,
            iteration=iteration,
            count=count,
            temperature=config.generation.temperature_at(iteration),
            purpose=purpose,
        )
        judge(context, store, sandbox, iteration=iteration, purpose=purpose)
        return [one.admissible for one in store.judged(iteration, purpose)]

    count = config.coevolution.samples
    old = [one.admissible for one in store.judged(iteration) if one.generator == OWN_GENERATOR]
    if len(old) < count:
        present = generator_base(store.select(Promotion), iteration)
        old += sample(present, count - len(old), PRESENT_GENERATOR_TEST)
    new = sample(decision.entry, count, GENERATOR_TEST)
    return dataclasses.replace(
        decision,
        admissible=sum(new) / len(new),
        admissible_before=sum(old) / len(old),
    )


def _with_fingerprint(
    context: ScoringContext, store: Store, sandbox: Sandbox | None, decision: Promotion
) -> Promotion:
    promoted = context_on_base(context, store, decision.entry, sandbox=sandbox)
    return dataclasses.replace(decision, fingerprint=fingerprint(promoted.seed))
