"""Readings that are written otherwise than lm-evaluation-harness's patterns, to be linear."""

import random
import re

from sdjax.evaluation.extraction import comparable, final_answer_sentence

ANNOUNCED, HOPED = "Final Answer: The final answer is", ". I hope it is correct."
PIECES = (ANNOUNCED, HOPED, HOPED[:-1], " ", "$7$", "1,0", ".", "\n", "#### ", "####", "A", ".\n")
# Of minerva_math/utils.py and gsm8k.yaml (lm-evaluation-harness 0.4.13).
SENTENCE = r"Final Answer: The final answer is(.*?). I hope it is correct."
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


def test_they_read_what_the_patterns_read():
    draw = random.Random(0)
    found = 0
    for _ in range(2_000):
        text = "".join(draw.choices(PIECES, k=draw.randint(0, 9)))
        sentence = re.search(SENTENCE, text + "I hope it is correct.")
        assert final_answer_sentence(text) == (sentence and sentence[1].strip()), text
        found += sentence is not None
        plain = text
        for pattern in IGNORED:
            plain = re.sub(pattern, "", plain)
        assert comparable(text) == plain.lower(), text
    assert 100 < found < 1_900


def test_long_texts_are_read_at_once():
    """The patterns take the square of the length: minutes, here."""
    assert final_answer_sentence(ANNOUNCED * 100_000) is None
    assert comparable("7 " * 1_000_000).startswith("7 7")
