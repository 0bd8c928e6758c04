"""Results of decoding."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """Tokens that a model generated after one prompt.

    Attributes:
        tokens: generated tokens, without the stop token, and up to the token that completes a stop
            string.
        stopped: whether a stop token or stop string ended the sequence, rather than the length
            limit.
        logprobs: natural log-probabilities of the tokens under the model's own distribution, before
            temperature and masking; None if not requested.
        text: text of the tokens without the stop string; set by `Decoder.generate`, and by
            `Decoder.decode` if it is given stop strings.
        failure: reason why the prompt could not be decoded, or None.
    """

    tokens: tuple[int, ...] = ()
    stopped: bool = False
    logprobs: tuple[float, ...] | None = None
    text: str | None = None
    failure: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeStats:
    """Amount of computation in one call of `Decoder.decode`.

    Attributes:
        prompts: number of prompts prefilled; samples of the same prompt share one prefill.
        prompt_tokens: number of their tokens, without the prefix.
        padded_tokens: the same including the padding of buckets and prefill batches.
        new_tokens: number of generated tokens, including stop tokens.
        steps: number of decode steps.
        slot_steps: number of decode steps times number of slots.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    padded_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    slot_steps: int = 0

    @property
    def occupancy(self) -> float:
        """Fraction of slots that generated a token, averaged over all steps."""
        return self.new_tokens / max(1, self.slot_steps)
