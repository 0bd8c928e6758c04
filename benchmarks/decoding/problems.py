"""Prompts for both sides of `compare.py`; needs only transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def gsm8k(data: str) -> list[str]:
    return [row["question"] for row in _rows(Path(data) / "gsm8k_test.jsonl")]


def svamp(data: str) -> list[str]:
    rows = _rows(Path(data) / "svamp.jsonl")
    return [f"{row['Body'].strip()} {row['Question'].strip()}" for row in rows]


def chat(model: str, questions: list[str]) -> list[list[int]]:
    """Format questions with the model's chat template and return token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in questions
    ]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def fixed_prompts() -> list[list[int]]:
    """Return 32 prompts of 140 random tokens."""
    return np.random.default_rng(0).integers(3, 49_000, (32, 140)).tolist()


def _rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
