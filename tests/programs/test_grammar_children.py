"""Children of programs of the grammar: validity, kinship, and what each operation changes."""

import functools
import re

import numpy as np
import pytest

from sdjax.programs.grammar import sample_draft
from sdjax.programs.grammar_children import sample_child
from sdjax.programs.grammar_draft import Draft
from sdjax.programs.memory_prompts import OPERATIONS
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted

NUMBER = re.compile(r"\d+\.\d+")
SIGNATURE = MergeSignature.of(
    ("expert_1", "expert_2", "expert_3"),
    {
        f"layers/0/mlp/{name}": (f"mlp.{name}", (8, 6))
        for name in ("gate_proj", "up_proj", "down_proj")
    },
)


@functools.cache
def families(operation: str, count: int = 30) -> tuple[tuple[list[Draft], Draft], ...]:
    """Return pairs of parents and their child."""
    rng = np.random.default_rng(OPERATIONS.index(operation))
    found: list[tuple[list[Draft], Draft]] = []
    while len(found) < count:
        parents = [sample_draft(rng), sample_draft(rng)]
        child = sample_child(rng, operation, parents)
        if child is not None:
            found.append((parents, child))
    return tuple(found)


def code(draft: Draft) -> list[str]:
    """Return the code of each piece."""
    return [piece.text for piece in draft.pieces]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_children_are_admissible_and_differ_from_their_parents(operation):
    for parents, child in families(operation)[:15]:
        identities = [
            verify_ir(trace_trusted(draft.text(), SIGNATURE), SIGNATURE).identity
            for draft in (*parents, child)
        ]
        assert len(set(identities)) == 3, child.text()


def test_an_improved_program_keeps_the_form_of_the_best_one():
    for (_, best), child in families("improve"):
        assert child.names == best.names
        assert NUMBER.sub("", child.core.text) == NUMBER.sub("", best.core.text)
        assert len(set(code(child)) - set(code(best))) == 1 or len(child.pieces) == len(best.pieces)


def test_a_combination_has_pieces_of_both():
    for (other, best), child in families("combine"):
        own = set(code(child))
        assert own & set(code(best)) - set(code(other)), child.text()
        assert own & set(code(other)) - set(code(best)), child.text()
        assert own <= {*code(best), *code(other)}


def test_a_simplified_program_is_shorter():
    for (_, best), child in families("simplify"):
        assert len(child.text()) < len(best.text())
        assert len(child.pieces) <= len(best.pieces)


def test_an_exploration_has_a_new_family():
    for parents, child in families("explore"):
        known = {family for parent in parents for family in parent.families}
        assert child.families - known - {"subset"}
        assert child.core not in [parent.core for parent in parents]


def test_nothing_to_combine_or_to_simplify():
    rng = np.random.default_rng(0)
    plain = next(
        draft
        for draft in iter(lambda: sample_draft(rng), None)
        if not draft.steps and draft.finish is None and not draft.core.experts
    )
    assert sample_child(rng, "combine", [plain, plain]) is None
    assert sample_child(rng, "improve", [plain]) is not None


def test_unknown_operation():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="operation invent: not one of improve, combine"):
        sample_child(rng, "invent", [sample_draft(rng)])
