"""Linear-time extraction, which must equal lm-evaluation-harness's regular expressions."""

import random
import re

from sdjax.evaluation.extraction import final_answer_sentence, normalize_number

PREFIX, SUFFIX = "Final Answer: The final answer is", ". I hope it is correct."
PIECES = (PREFIX, SUFFIX, SUFFIX[:-1], " ", "$7$", "1,0", ".", "\n", "#### ", "####", "A", ".\n")
# From minerva_math/utils.py and gsm8k.yaml (lm-evaluation-harness 0.4.13).
SENTENCE = r"Final Answer: The final answer is(.*?). I hope it is correct."
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


def test_extraction_equals_regular_expressions():
    rng = random.Random(0)
    matches = 0
    for _ in range(2_000):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 9)))
        sentence = re.search(SENTENCE, text + "I hope it is correct.")
        assert final_answer_sentence(text) == (sentence and sentence[1].strip()), text
        matches += sentence is not None
        plain = text
        for pattern in IGNORED:
            plain = re.sub(pattern, "", plain)
        assert normalize_number(text) == plain.lower(), text
    assert 100 < matches < 1_900


def test_long_texts_take_linear_time():
    """Check texts for which quadratic regular expressions would take minutes."""
    assert final_answer_sentence(PREFIX * 100_000) is None
    assert normalize_number("7 " * 1_000_000).startswith("7 7")
