"""Tokenizer of the zoo: byte-level BPE that splits numbers into digits but not code names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from sdjax.io.atomic_write import make_folder, write_file

PAD, END = "<|pad|>", "<|end|>"
PAD_ID, END_ID = 0, 1
VOCAB_SIZE = 1024

# BPE merges stay within a name (including dots and underscores), a single digit, the integer part
# of a decimal fraction, a run of punctuation, or a line break with the indentation after it.
_PIECES = r" ?[A-Za-z_][A-Za-z_.]*| ?\d\.(?=\d)|\d|\n *| ?[^\sA-Za-z_\d]+|\s"


def train_tokenizer(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """Train a BPE tokenizer (Sennrich et al. 2016) deterministically."""
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


def write_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path, max_seq_len: int) -> None:
    """Write the tokenizer to a folder in the format of `transformers`.

    Args:
        tokenizer: the tokenizer.
        folder: folder to write.
        max_seq_len: maximum sequence length.
    """
    make_folder(folder)
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "pad_token": PAD,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
    }
    generation = {"eos_token_id": END_ID, "pad_token_id": PAD_ID}
    for name, fields in {
        "tokenizer_config.json": settings,
        "generation_config.json": generation,
    }.items():
        write_file(folder / name, json.dumps(fields, indent=2) + "\n")
