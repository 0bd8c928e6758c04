"""A model folder's tokenizer: text to token ids and back, exactly as transformers' AutoTokenizer.

Importing AutoTokenizer takes 3 to 4 seconds, the tokenizers library under it 0.02. So a folder
whose tokenizer.json is the whole truth is read by that library alone, and transformers is imported
for the rest: classes that rebuild their tokenizer, and chat templates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from sdjax.core.errors import UserError
from sdjax.io.safetensors_reader import read_json
from sdjax.models.hf_config import read_eos_token_ids

FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"

# The classes that take tokenizer.json as it is.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Settings by which transformers changes what tokenizer.json says.
_CHANGING_SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "auto_map",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "fix_mistral_regex",
    "split_special_tokens",
)
# Beyond this size transformers may patch the tokenizer's regular expression.
_PATCHED_VOCABULARY = 100_000
_TOKEN_FILES = (FILE, "tokenizer.model", "vocab.json", "tekken.json")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """Text to ids and back.

    Attributes:
        folder: where it was read from.
        vocab_size: the number of tokens, added ones included.
        bos_id: the start token, or None.
        eos_ids: the tokens that end a text: of generation_config.json, else of config.json, else
            the tokenizer's own.
        pad_id: the padding token, or None.
        has_chat_template: whether `render_chat` works.
    """

    folder: Path
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    has_chat_template: bool
    _encode: Callable[[str, bool], list[int]] = dataclasses.field(repr=False)
    _decode: Callable[[list[int], bool], str] = dataclasses.field(repr=False)

    @functools.cached_property
    def _full(self) -> Any:
        return load_full_tokenizer(self.folder)

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """The ids of `text`, with the start token and the like if `add_special`."""
        return self._encode(text, add_special)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`."""
        return self._decode([int(token) for token in ids], skip_special)

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation by the chat template.

        A template writes the start token itself: encode its text with `add_special=False`.

        Args:
            messages: dicts of `role` and `content`.
            add_generation_prompt: whether the text ends where the model's answer starts.

        Raises:
            UserError: the tokenizer has no template, or the template refuses the messages.
        """
        if not self.has_chat_template:
            raise UserError(
                f"{self.folder}: the tokenizer has no chat template; "
                f"add {TEMPLATE}, or use plain prompts"
            )
        from jinja2 import TemplateError

        try:
            text = self._full.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except TemplateError as error:
            line = " ".join(str(error).split())
            raise UserError(
                f"{self.folder}: the chat template fails on these messages ({line}); correct either"
            ) from None
        return str(text)

    def as_prompt(self, text: str) -> str:
        """What a user says, by the chat template; as it is where there is none."""
        if not self.has_chat_template:
            return text
        return self.render_chat([{"role": "user", "content": text}])

    def encode_prompt(self, prompt: str) -> list[int]:
        """The ids of what `as_prompt` gives, with one start token where the model has one."""
        return self.encode(prompt, add_special=not self.has_chat_template)


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face folder.

    Raises:
        UserError: no such folder, no tokenizer in it, or files that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder; give one with {FILE}")
    _require_files(folder)
    settings = read_json(folder / SETTINGS)
    plain = _plain_tokenizer(folder, settings)
    if plain is not None:
        token_id, vocab_size = plain.token_to_id, plain.get_vocab_size()
        encode, decode = _plain_functions(plain)
    else:
        full = load_full_tokenizer(folder)
        vocab = full.get_vocab()
        token_id, vocab_size = vocab.get, len(vocab)
        encode, decode = _full_functions(full)

    def special(name: str) -> int | None:
        text = _token_text(settings.get(name))
        return None if text is None else token_id(text)

    generation, model = (
        read_json(folder / name) for name in ("generation_config.json", "config.json")
    )
    eos = generation.get("eos_token_id", model.get("eos_token_id"))
    if eos is None:
        eos = special("eos_token")
    pad = special("pad_token")
    if pad is None:
        pad = generation.get("pad_token_id", model.get("pad_token_id"))
    return Tokenizer(
        folder=folder,
        vocab_size=vocab_size,
        bos_id=special("bos_token"),
        eos_ids=read_eos_token_ids({"eos_token_id": eos}, str(folder)),
        pad_id=pad,
        has_chat_template=bool(settings.get("chat_template")) or (folder / TEMPLATE).is_file(),
        _encode=encode,
        _decode=decode,
    )


def _plain_tokenizer(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer | None:
    """The tokenizer of tokenizer.json, or None where transformers would change or replace it."""
    if not (folder / FILE).is_file():
        return None
    if settings.get("tokenizer_class") not in _PLAIN_CLASSES:
        return None
    if any(settings.get(name) for name in _CHANGING_SETTINGS):
        return None
    plain = read_file(folder)
    # Without a post-processor transformers makes one; without BPE it may clean up decoded text.
    if plain.post_processor is None or not isinstance(plain.model, tokenizers.models.BPE):
        return None
    if plain.get_vocab_size() > _PATCHED_VOCABULARY:
        return None
    # A special token that tokenizer.json does not know as one, transformers adds.
    known = {token.content for token in plain.get_added_tokens_decoder().values()}
    named = [value for name, value in settings.items() if name.endswith("_token")]
    for name in ("extra_special_tokens", "additional_special_tokens"):
        extra = settings.get(name) or []
        named += extra.values() if isinstance(extra, dict) else extra
    named += (settings.get("added_tokens_decoder") or {}).values()
    if any(_token_text(token) not in known for token in named if token is not None):
        return None
    plain.no_truncation()
    plain.no_padding()
    return plain


def read_file(folder: Path) -> tokenizers.Tokenizer:
    """What a folder's tokenizer.json holds. Raises UserError for a damaged one."""
    try:
        return tokenizers.Tokenizer.from_file(str(folder / FILE))
    except Exception as error:  # the library raises no narrower class
        line = " ".join(str(error).split())
        raise UserError(f"{folder / FILE}: cannot be read ({line}); copy the file again") from None


def _require_files(folder: Path) -> None:
    if not any((folder / name).is_file() for name in _TOKEN_FILES):
        raise UserError(f"{folder}: no tokenizer; copy {FILE} and {SETTINGS} beside the weights")


def _plain_functions(
    plain: tokenizers.Tokenizer,
) -> tuple[Callable[[str, bool], list[int]], Callable[[list[int], bool], str]]:
    def encode(text: str, add_special: bool) -> list[int]:
        return plain.encode(text, add_special_tokens=add_special).ids

    def decode(ids: list[int], skip_special: bool) -> str:
        return plain.decode(ids, skip_special_tokens=skip_special)

    return encode, decode


def _full_functions(
    full: Any,
) -> tuple[Callable[[str, bool], list[int]], Callable[[list[int], bool], str]]:
    def encode(text: str, add_special: bool) -> list[int]:
        # `verbose` would warn of texts beyond the context, which the decoder judges.
        return list(full.encode(text, add_special_tokens=add_special, verbose=False))

    def decode(ids: list[int], skip_special: bool) -> str:
        return full.decode(ids, skip_special_tokens=skip_special)

    return encode, decode


def load_full_tokenizer(folder: Path) -> Any:
    """transformers' own tokenizer of a folder. Raises UserError where it cannot be read."""
    _require_files(folder)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a tokenizer class raises on files that it cannot read
        line = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder}: the tokenizer cannot be read ({line}); copy its files again"
        ) from None


def _token_text(token: Any) -> str | None:
    """A token as settings spell it: its text, or a dict with it in `content`."""
    return token.get("content") if isinstance(token, dict) else token
