"""Tokenizers of model folders: text to token ids and back, identical to AutoTokenizer.

Importing transformers' AutoTokenizer takes 3 to 4 seconds, the tokenizers library 0.02. A folder
that tokenizer.json describes completely is therefore read by that library alone; transformers is
imported only for classes that rebuild their tokenizer and for chat templates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from sdjax.core.errors import UserError, truncated_repr
from sdjax.core.files import MAX_VOCABULARY_BYTES, read_bytes, read_text
from sdjax.io.chat_template import RENDERER
from sdjax.io.library_errors import library_errors
from sdjax.io.links import member
from sdjax.io.model_files import check_files
from sdjax.io.model_paths import locate
from sdjax.io.safetensors_reader import read_json
from sdjax.io.sentencepiece_tokenizer import build_tokenizer, has_piece_ids
from sdjax.io.tokenizer_limits import check_growth
from sdjax.io.tokenizer_settings import (
    PLAIN_CLASSES,
    check_class,
    check_settings,
    check_special_tokens,
    config_of_type,
    token_text,
)
from sdjax.models.hf_config import is_token_id, read_eos_token_ids

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SENTENCEPIECE_FILE = "tokenizer.model"
CHAT_TEMPLATE = "chat_template.jinja"

# Settings with which transformers modifies the tokenizer of tokenizer.json.
_CHANGING_SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "auto_map",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "fix_mistral_regex",
    "split_special_tokens",
)
# Above this vocabulary size transformers may patch the tokenizer's regular expression.
_MAX_UNPATCHED_VOCABULARY = 100_000
_TOKEN_FILES = (TOKENIZER_FILE, SENTENCEPIECE_FILE, "vocab.json", "tekken.json")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """Tokenizer of a model folder.

    Attributes:
        folder: the folder that it was loaded from.
        vocab_size: number of tokens, including added ones.
        bos_id: id of the start token, or None.
        eos_ids: ids of the end tokens in generation_config.json, otherwise in config.json,
            otherwise in the tokenizer's config.
        pad_id: id of the padding token, or None.
        has_chat_template: whether `render_chat` is available.
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
        """Return the ids of a text, with special tokens such as the start token if requested."""
        with library_errors(self.folder, "the tokenizer fails on a text"):
            return self._encode(text, add_special)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of token ids."""
        with library_errors(self.folder, "the tokenizer fails to decode"):
            return self._decode([int(token) for token in ids], skip_special)

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation with the chat template.

        The template contains the start token: encode the result with `add_special=False`.

        Args:
            messages: dicts with `role` and `content`.
            add_generation_prompt: whether to append the beginning of the model's answer.

        Raises:
            UserError: the tokenizer has no template, or the template rejects the messages.
        """
        if not self.has_chat_template:
            raise UserError(
                f"{self.folder}: the tokenizer has no chat template; "
                f"add {CHAT_TEMPLATE}, or use plain prompts"
            )
        special = self._full.special_tokens_map
        try:
            return RENDERER.render(
                self._full.get_chat_template(),
                [{key: text for key, text in one.items() if text is not None} for one in messages],
                add_generation_prompt=add_generation_prompt,
                tokens={name: _plain(token) for name, token in special.items()},
            )
        except ValueError as error:
            line = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self.folder}: the chat template rejects these messages ({line}); "
                "fix the template or the messages"
            ) from None

    def as_prompt(self, text: str) -> str:
        """Render a user message with the chat template; return it unchanged if there is none."""
        if not self.has_chat_template:
            return text
        return self.render_chat([{"role": "user", "content": text}])

    def encode_prompt(self, prompt: str) -> list[int]:
        """Return the ids of an `as_prompt` text, with one start token if the model has one."""
        return self.encode(prompt, add_special=not self.has_chat_template)


def load_tokenizer(model: str | Path) -> Tokenizer:
    """Load the tokenizer of a model.

    Args:
        model: a folder, or a name as in `sdjax.load_model`.

    Raises:
        UserError: there is no such model, or its tokenizer is missing or cannot be read.

    Examples:
        >>> import sdjax
        >>> tokenizer = sdjax.load_tokenizer("zoo:seed")
        >>> tokenizer.decode(tokenizer.encode("2 + 3", add_special=True))
        '2 + 3'
    """
    folder = locate(model)[0] if isinstance(model, str) else model
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder; give one with {TOKENIZER_FILE}")
    _require_files(folder)
    settings = read_json(folder / TOKENIZER_CONFIG)
    check_settings(settings, folder / TOKENIZER_CONFIG)
    plain = _plain_tokenizer(folder, settings)
    if plain is not None:
        token_id, vocab_size = plain.token_to_id, plain.get_vocab_size()

        def encode(text: str, add_special: bool) -> list[int]:
            return plain.encode(text, add_special_tokens=add_special).ids

        def decode(ids: list[int], skip_special: bool) -> str:
            return plain.decode(ids, skip_special_tokens=skip_special)

    else:
        full = load_full_tokenizer(folder)
        vocab = full.get_vocab()
        token_id, vocab_size = vocab.get, len(vocab)

        def encode(text: str, add_special: bool) -> list[int]:
            # Not verbose: the decoder handles texts longer than the context.
            return list(full.encode(text, add_special_tokens=add_special, verbose=False))

        def decode(ids: list[int], skip_special: bool) -> str:
            return full.decode(ids, skip_special_tokens=skip_special)

    def special(name: str) -> int | None:
        text = token_text(settings.get(name))
        return None if text is None else token_id(text)

    generation_config, model_config = (
        read_json(folder / name) for name in ("generation_config.json", "config.json")
    )
    eos = generation_config.get("eos_token_id", model_config.get("eos_token_id"))
    if eos is None:
        eos = special("eos_token")
    pad = special("pad_token")
    if pad is None:
        pad = generation_config.get("pad_token_id", model_config.get("pad_token_id"))
        if pad is not None and not is_token_id(pad):
            raise UserError(f"{folder}: pad_token_id must be a token id, not {truncated_repr(pad)}")
        pad = None if pad is not None and pad < 0 else pad
    return Tokenizer(
        folder=folder,
        vocab_size=vocab_size,
        bos_id=special("bos_token"),
        eos_ids=read_eos_token_ids({"eos_token_id": eos}, str(folder)),
        pad_id=pad,
        has_chat_template=bool(settings.get("chat_template")) or (folder / CHAT_TEMPLATE).is_file(),
        _encode=encode,
        _decode=decode,
    )


def _plain_tokenizer(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer | None:
    """Return the tokenizer of tokenizer.json, or None if transformers modifies or replaces it."""
    if not (folder / TOKENIZER_FILE).is_file():
        return read_sentencepiece_tokenizer(folder, settings)
    if settings.get("tokenizer_class") not in PLAIN_CLASSES:
        return None
    if any(settings.get(name) for name in _CHANGING_SETTINGS):
        return None
    plain = read_tokenizer_json(folder)
    # transformers adds a missing post-processor, and may clean up decoded text unless it is BPE.
    if plain.post_processor is None or not isinstance(plain.model, tokenizers.models.BPE):
        return None
    if plain.get_vocab_size() > _MAX_UNPATCHED_VOCABULARY:
        return None
    # transformers adds special tokens that are missing from tokenizer.json.
    added = {token.content for token in plain.get_added_tokens_decoder().values()}
    named = [value for name, value in settings.items() if name.endswith("_token")]
    for name in ("extra_special_tokens", "additional_special_tokens"):
        extra = settings.get(name) or []
        named += extra.values() if isinstance(extra, dict) else extra
    named += (settings.get("added_tokens_decoder") or {}).values()
    if any(token_text(token) not in added for token in named if token is not None):
        return None
    plain.no_truncation()
    plain.no_padding()
    return plain


def read_tokenizer_json(folder: Path) -> tokenizers.Tokenizer:
    """Read tokenizer.json of a folder. Raises UserError if it is damaged."""
    path = member(folder, TOKENIZER_FILE)
    with library_errors(path, "cannot be read"):
        content = read_bytes(path, MAX_VOCABULARY_BYTES)
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
        check_growth(tokenizer, path)
    return tokenizer


def _require_files(folder: Path) -> None:
    check_files(folder)
    if not any((folder / name).is_file() for name in _TOKEN_FILES):
        raise UserError(
            f"{folder}: no tokenizer; copy {TOKENIZER_FILE} and {TOKENIZER_CONFIG} next to its "
            "weights"
        )


def load_full_tokenizer(folder: Path) -> Any:
    """Load a folder's tokenizer with transformers.

    Raises:
        UserError: it cannot be read, or its settings name a class that is not a tokenizer or a file
            elsewhere.
    """
    _require_files(folder)
    settings = read_json(folder / TOKENIZER_CONFIG)
    check_settings(settings, folder / TOKENIZER_CONFIG)
    check_special_tokens(folder)
    model_config = read_json(folder / "config.json")
    check_class(settings, folder / TOKENIZER_CONFIG)
    check_class(model_config, folder / "config.json")
    if (backend := read_sentencepiece_tokenizer(folder, settings)) is not None:
        return _as_transformers(backend, folder, settings)
    from transformers import AutoTokenizer

    with library_errors(folder, "the tokenizer cannot be read"):
        # Explicitly False: by default transformers asks on the terminal whether to run the code.
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder),
            config=config_of_type(model_config),
            local_files_only=True,
            trust_remote_code=False,
        )
        if tokenizer.is_fast:
            check_growth(tokenizer.backend_tokenizer, folder)
    return tokenizer


def read_sentencepiece_tokenizer(
    folder: Path, settings: Mapping[str, Any]
) -> tokenizers.Tokenizer | None:
    """Read the SentencePiece model of a folder that has no tokenizer.json.

    Args:
        folder: the folder.
        settings: content of tokenizer_config.json, after `check_settings`.

    Returns:
        The tokenizer; None if there is tokenizer.json or no SentencePiece model, or if the ids of
        the tokenizer's class are not those of the model's pieces.

    Raises:
        UserError: it is damaged or of an unsupported kind.
    """
    path = member(folder, SENTENCEPIECE_FILE)
    if (folder / TOKENIZER_FILE).is_file() or not path.is_file():
        return None
    if not has_piece_ids(settings, read_json(folder / "config.json")):
        return None
    tokenizer = build_tokenizer(path, settings)
    check_growth(tokenizer, path)
    return tokenizer


def _as_transformers(
    backend: tokenizers.Tokenizer, folder: Path, settings: Mapping[str, Any]
) -> Any:
    """Return a tokenizer as one of transformers, with the special tokens and the chat template."""
    from transformers import PreTrainedTokenizerFast

    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {item["name"]: item["template"] for item in template}
    if (file := member(folder, CHAT_TEMPLATE)).is_file():
        template = read_text(file)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    tokens = {name: token_text(settings.get(name)) for name in names}
    with library_errors(folder, "the tokenizer cannot be read"):
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=template,
            **{name: text for name, text in tokens.items() if text is not None},
        )


def _plain(token: Any) -> str | list[str]:
    """Return a special token, or several, as text."""
    return [str(item) for item in token] if isinstance(token, list | tuple) else str(token)
