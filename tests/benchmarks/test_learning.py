"""The comparison of searches: what was found within a budget, and the tables of its rows."""

import json

import pytest

from benchmarks.learning.arm_plot import draw
from benchmarks.learning.arm_settings import (
    KNOWN,
    SHARED,
    UNTRAINED_ARMS,
    chosen_arms,
    parse_arm,
)
from benchmarks.learning.arm_table import print_tables, read_rows
from benchmarks.learning.budget import Tried, best_programs, curve, measures, within
from sdjax.core.errors import UserError
from sdjax.search.config import read_config


def program(identity, problems, score, structure=None):
    return Tried(
        iteration=1,
        structure=structure or identity,
        identity=identity,
        admissible=True,
        novel=True,
        problems=problems,
        score=score,
        complete=problems == 100,
    )


REFUSED, DUPLICATE = Tried(iteration=1), Tried(iteration=1, admissible=True)
TRIED = [
    program("a", 100, 0.5),
    REFUSED,
    program("b", 20, 0.9),  # stopped early, though its score so far is the highest
    DUPLICATE,
    program("c", 100, 0.7),
    program("d", 100, 0.7, structure="c"),
]


@pytest.mark.parametrize(("budget", "samples"), [(99, 0), (100, 2), (219, 4), (220, 5), (320, 6)])
def test_samples_count_until_a_program_exceeds_the_budget(budget, samples):
    assert within(TRIED, budget) == TRIED[:samples]


def test_measures_by_hand():
    found = measures(TRIED)
    assert found["samples"] == 6
    assert found["problems"] == 320
    assert found["best"] == 0.7  # of the programs that answered all problems
    assert found["top mean"] == pytest.approx((0.5 + 0.9 + 0.7 + 0.7) / 4)
    assert found["distinct"] == 4
    assert found["distinct share"] == pytest.approx(4 / 6)
    assert found["unique scores"] == 3
    assert found["admissible share"] == pytest.approx(5 / 6)
    assert measures([])["samples"] == 0


def test_top_mean_has_the_ten_best_and_complete_programs_first():
    complete = [program(f"p{n:02}", 100, n / 100) for n in range(12)]
    partial = program("partial", 20, 1.0)
    assert measures([partial, *complete])["top mean"] == pytest.approx(sum(range(2, 12)) / 1000)


def test_best_programs_are_complete_and_of_different_structures():
    assert [one.identity for one in best_programs(TRIED, 3)] == ["c", "a"]
    assert [one.identity for one in best_programs(TRIED, 1)] == ["c"]


def test_curve_ends_with_the_measures_of_the_whole_budget():
    points = curve(TRIED, 320)
    assert points[-1] == {"problems": 320, "best": 0.7, "top mean": measures(TRIED)["top mean"]}
    assert [point["best"] for point in points] == sorted(point["best"] for point in points)


@pytest.mark.parametrize("name", KNOWN)
def test_settings_of_every_arm_are_a_valid_config(name):
    arm = KNOWN[name]
    config = read_config("demo", [*SHARED, *arm.settings])
    untrained = {"random", "untrained", "memory", *(arm.name for arm in UNTRAINED_ARMS)}
    assert config.training.enabled == (name not in untrained)
    assert (config.generation.memory is not None) == ("short-memory" in str(arm.settings))
    assert config.race.winners == 10
    assert config.controls is None
    assert arm.against in {"", *KNOWN}


def test_an_arm_of_the_command_line_changes_another():
    arm = parse_arm(["slow", "trained", "training.learning_rate=1e-4"])
    assert arm.settings == (*KNOWN["trained"].settings, "training.learning_rate=1e-4")
    assert arm.against == "trained"
    assert not arm.random
    assert chosen_arms([], [["slow", "trained"]])[0].name == "slow"
    for words in (["trained", "memory"], ["new"], ["new", "training.beta=1"], ["a/b", "memory"]):
        with pytest.raises(UserError):
            parse_arm(words)
    with pytest.raises(UserError, match="no such arm"):
        chosen_arms(["traned"], [])


def row(arm, seed, top, tested):
    point = {"samples": 9, "problems": 320, "best": 0.7, "top mean": top, "distinct": 4}
    point |= {"distinct share": 0.5, "unique scores": 3, "admissible share": 0.75}
    best = {"constants": 4, "test": tested, "transfer": tested}
    return {
        "arm": arm,
        "seed": seed,
        "environment": "here",
        "budget": 320,
        "points": [point | {"written": best, "tuned": best}],
        "curve": [{"problems": 320, "best": 0.7, "top mean": top}],
    }


def control(constants, confirmation, tested):
    entry = {"entry": f"method:{constants}", "constants": constants, "test": tested}
    return entry | {"development": 0.5, "confirmation": confirmation}


def test_tables_of_rows(tmp_path, capsys):
    entries = [control(0, 0.1, "0000"), control(3, 0.5, "1100"), control(12, 0.9, "1111")]
    rows = [row("untrained", 0, 0.5, "1110"), row("untrained", 1, 0.6, "1110")]
    rows += [row("trained", 0, 0.6, "1111"), row("trained", 1, 0.7, "1111")]
    shared = {"seed": 0, "environment": "here", "budget": 320}
    rows += [{"arm": "controls", "entries": entries, "transfer": entries[:2], **shared}]
    rows += [rows[-1] | {"seed": 1}]
    for one in rows:
        (tmp_path / f"{one['arm']}-{one['seed']}.json").write_text(json.dumps(one))
    read = read_rows(tmp_path)
    print_tables(read, {"trained": "untrained"})
    shown = capsys.readouterr().out
    assert "| trained − untrained | 2 | +0.0 [+0.0, +0.0] | +10.0 [+10.0, +10.0] |" in shown
    # A program with 4 constants is compared with 3 tuned ones, not with 12 or with the seed.
    assert "| trained, tuned | 2 | 4 | 100.0 | 50.0 | +50.0 [" in shown
    assert "| untrained, as written | 2 | 4 | 75.0 | 50.0 | +25.0 [" in shown
    assert "| trained, tuned | 2 | 100.0 | 50.0 | +50.0 [" in shown  # with the transfer experts
    draw(read, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().startswith("<svg")


def test_rows_of_different_budgets_are_refused(tmp_path):
    with pytest.raises(UserError, match="no rows"):
        read_rows(tmp_path)
    for seed, budget in enumerate((320, 640)):
        one = row("trained", seed, 0.5, "1") | {"budget": budget}
        (tmp_path / f"trained-{seed}.json").write_text(json.dumps(one))
    with pytest.raises(UserError, match="different budgets"):
        read_rows(tmp_path)
