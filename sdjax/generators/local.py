"""The generator of a local model: the seed with its adapter, or any other supported model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from sdjax.decoding.decoder import Completion, Decoder
from sdjax.decoding.sampling import Sampling
from sdjax.generators.types import GeneratedText, GenerationRequest, OnText
from sdjax.models.lora import Adapter
from sdjax.models.types import Params
from sdjax.programs.extraction import extract_source


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LocalGenerator:
    """A loaded model with everything that determines its samples except their prompts.

    Attributes:
        decoder: decoder of the model, with its tokenizer.
        params: parameters of the model.
        adapter: its adapter, or None.
        sampling: sampling parameters.
        key: typed PRNG key, into which the number of each request is folded.
    """

    decoder: Decoder
    params: Params
    adapter: Adapter | None
    sampling: Sampling
    key: jax.Array

    def sample(self, requests: Sequence[GenerationRequest], *, on_text: OnText) -> None:
        """Decode the requests in one batch; see `sdjax.generators.types.Generator`.

        A text depends on its own request only, see `sdjax.decoding.decoder.Decoder`.

        Raises:
            UserError: a prompt is too long for the decoder.
        """

        def report(index: int, completion: Completion) -> None:
            on_text(requests[index].number, generated_text(completion))

        self.decoder.generate(
            self.params,
            [request.prompt for request in requests],
            adapter=self.adapter,
            sampling=self.sampling,
            key=self.key,
            sample_ids=[request.number for request in requests],
            on_completion=report,
        )


def generated_text(completion: Completion) -> GeneratedText:
    """Return a completion as a generator's text."""
    text = completion.text or ""
    return GeneratedText(
        text=text,
        source=extract_source(text),
        stopped=completion.stopped,
        tokens=completion.tokens,
    )
