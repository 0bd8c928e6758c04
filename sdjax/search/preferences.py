"""The preference pairs of a run, for a training outside it."""

from pathlib import Path
from typing import Any

from sdjax.search.store import Store


def preferences_of_run(folder: Path) -> list[dict[str, Any]]:
    """Prompt, chosen and rejected of every pair of every iteration, each text pair once.

    Raises:
        UserError: there is no run in the folder, or its database is damaged.
    """
    with Store.open(folder) as store:
        prompts = store.prompts()
        pairs = store.pairs()
    rows = {
        (pair["winner_prompt"], pair["winner_text"], pair["loser_text"]): {
            "prompt": prompts[pair["winner_prompt"]],
            "chosen": pair["winner_text"],
            "rejected": pair["loser_text"],
        }
        for pair in pairs
    }
    return list(rows.values())
