"""Write small SentencePiece models, and the ids that the SentencePiece library gives to texts.

Run it in an environment with sentencepiece 0.2.3:

    python tests/io/sentencepiece_references/make_references.py
"""

import json
import random
from pathlib import Path

import sentencepiece

FOLDER = Path(__file__).parent
WORDS = "the quick brown fox jumps over lazy dog model merges weights tensor 12 345 café über 東京"
# Without a space at the start, which transformers' classes handle differently.
TEXTS = ["the quick fox 12 café zzz", "two  spaces ", "", "a", "東京 über naïve ☃", "the<sep>fox"]
TEXTS += ["line\nbreak\ttab", "x<sep>", "1 234  5", "weights of the <sep> model", "\0é"]

if __name__ == "__main__":
    draw = random.Random(0)
    corpus = [" ".join(draw.choices(WORDS.split(), k=8)) for _ in range(500)]
    references = {}
    for algorithm in ("bpe", "unigram"):
        for prefix in (True, False):
            name = f"{algorithm}{'' if prefix else '-no-prefix'}"
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(corpus),
                model_prefix=str(FOLDER / name),
                vocab_size=320,
                model_type=algorithm,
                byte_fallback=True,
                user_defined_symbols=["<sep>"],
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=prefix,
                hard_vocab_limit=False,
                num_threads=1,
                minloglevel=2,
            )
            (FOLDER / f"{name}.vocab").unlink()
            model = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / f"{name}.model"))
            references[name] = {text: model.encode(text) for text in TEXTS}
    text = json.dumps(references, ensure_ascii=False, indent=1)
    (FOLDER / "references.json").write_text(text + "\n")
