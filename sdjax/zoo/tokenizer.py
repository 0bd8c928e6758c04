"""The zoo's tokenizer: a byte-level BPE that keeps digits apart and names in code together."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

PAD, END = "<|pad|>", "<|end|>"
PAD_ID, END_ID = 0, 1
VOCAB_SIZE = 1024

# Merges stay within a name (dots and underscores belong to it), a single digit, the head of a
# decimal fraction, a run of punctuation, or a line break with the indentation behind it.
_PIECES = r" ?[A-Za-z_][A-Za-z_.]*| ?\d\.(?=\d)|\d|\n *| ?[^\sA-Za-z_\d]+|\s"


def train_tokenizer(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """Learns the merges (Sennrich et al. 2016) from texts; the same for the same texts."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path, context: int) -> None:
    """Writes tokenizer.json and both small configurations as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "pad_token": PAD,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
    }
    generation = {"eos_token_id": END_ID, "pad_token_id": PAD_ID}
    for name, fields in {
        "tokenizer_config.json": settings,
        "generation_config.json": generation,
    }.items():
        (folder / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
