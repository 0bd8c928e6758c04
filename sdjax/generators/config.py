"""Config schema of generators, the section `generators` of a run's config."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from sdjax.core.config import STRICT, NonEmptyStr, PositiveFloat, PositiveInt
from sdjax.core.errors import truncated_repr
from sdjax.decoding.config import DecoderConfig

_VARIABLE = re.compile("[A-Z_][A-Z0-9_]*")
_NAME = re.compile("[a-z][a-z0-9_-]{0,39}")  # also the name of a file
# Fields of a request that its answer depends on in a way that `extra_body` must not change.
_OWN_FIELDS = ("model", "messages", "n", "stream")
_TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")  # fields of a request
_PATH = "/chat/completions"  # of requests, after `base_url`


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EndpointConfig:
    """Config of an OpenAI-compatible endpoint, such as vLLM or a hosted model.

    Attributes:
        base_url: address up to the version, such as "http://localhost:8000/v1"; requests go to
            BASE_URL/chat/completions.
        model: name of the model at the endpoint.
        api_key_env: name of the environment variable that contains the key; null sends no key.
        concurrency: maximum number of requests at a time.
        timeout: maximum duration of one request in seconds.
        retries: number of further attempts after one that failed, or that was refused because of
            too many requests.
        max_tokens: maximum number of tokens of an answer.
        max_tokens_total: budget of the run, in tokens of prompts and answers; null is unlimited. A
            request is made only if it fits into what is left.
        extra_body: further fields of each request, such as `reasoning_effort`; one that is null is
            removed, as `seed: null` for an endpoint that does not accept a seed.
        replay: file with the recorded answers of an earlier run; nothing is asked of the endpoint.
    """

    base_url: NonEmptyStr
    model: NonEmptyStr
    api_key_env: NonEmptyStr | None = None
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    timeout: PositiveFloat = 120.0
    retries: Annotated[int, Field(ge=0, le=100)] = 6
    max_tokens: PositiveInt = 2048
    max_tokens_total: PositiveInt | None = None
    extra_body: dict[str, Any] = Field(default_factory=dict)
    replay: NonEmptyStr | None = None

    @model_validator(mode="after")
    def _check(self) -> EndpointConfig:
        # The messages do not repeat values that may contain a key.
        if self.api_key_env is not None and not _VARIABLE.fullmatch(self.api_key_env):
            raise ValueError(
                "api_key_env must be the name of an environment variable in capital letters, such "
                "as OPENAI_API_KEY, not the key itself"
            )
        try:
            url = urlsplit(self.base_url)
            usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            usable = False
        if not usable or not self.base_url.isprintable() or " " in self.base_url:
            raise ValueError("base_url must be an address such as http://localhost:8000/v1")
        if "@" in url.netloc or url.query or url.fragment:
            raise ValueError(
                "base_url must not contain a name, a password or parameters, since it is stored "
                "with the run; set api_key_env"
            )
        if url.path.rstrip("/").endswith(_PATH):
            raise ValueError(f"base_url must end before {_PATH}, which is appended to it")
        self._check_extra_body()
        return self

    def _check_extra_body(self) -> None:
        for field in _OWN_FIELDS:
            if field in self.extra_body:
                raise ValueError(f"extra_body must not contain {field}")
        try:
            json.dumps(self.extra_body, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(
                "extra_body must be JSON, which has no infinite numbers and no .nan"
            ) from None
        for field in _TOKEN_LIMITS:
            limit = self.extra_body.get(field)
            if limit is not None and (type(limit) is not int or limit < 1):
                raise ValueError(
                    f"extra_body: {field} must be a whole number of at least 1, or null"
                )
        if self.max_tokens_total is not None and not self._limits:
            raise ValueError(
                "extra_body removes max_tokens, without which max_tokens_total cannot be kept; add "
                "max_completion_tokens to extra_body"
            )

    @property
    def _limits(self) -> list[int]:
        """The limits of an answer's tokens that requests contain."""
        fields = {"max_tokens": self.max_tokens} | self.extra_body
        return [fields[name] for name in _TOKEN_LIMITS if fields.get(name) is not None]

    @property
    def max_answer_tokens(self) -> int:
        """Maximum number of tokens of an answer, with `extra_body`."""
        return max(self._limits, default=self.max_tokens)

    @property
    def url(self) -> str:
        """Address of the requests."""
        return f"{self.base_url.rstrip('/')}{_PATH}"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GeneratorConfig:
    """Config of a generator in addition to the seed with its adapter: exactly one of three kinds.

    Attributes:
        model: a local model, named like an expert; the adapter of MODEL+ADAPTER is kept separate.
        decoding: config of its decoder; null is `generation.decoding`.
        endpoint: an OpenAI-compatible endpoint.
        programs: a folder of programs, NAME.py, relative to the working directory. Each is one
            sample, once per run, in the order of the names.
    """

    model: NonEmptyStr | None = None
    decoding: DecoderConfig | None = None
    endpoint: EndpointConfig | None = None
    programs: NonEmptyStr | None = None

    @model_validator(mode="after")
    def _check(self) -> GeneratorConfig:
        kinds = [self.model, self.endpoint, self.programs]
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("a generator has exactly one of model, endpoint and programs")
        if self.decoding is not None and self.model is None:
            raise ValueError("decoding is only for a generator with a model")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SharesConfig:
    """Config of the shares of several generators in an iteration; see `sdjax.generators.shares`.

    Attributes:
        minimum_percent: percentage of an iteration's samples that each generator gets at least.
        top_percent: percentage of the distinct scored programs, best first, that count as a success
            of their generators.
    """

    minimum_percent: Annotated[float, Field(ge=0, le=100)] = 10.0
    top_percent: Annotated[float, Field(gt=0, le=100)] = 10.0


def check_generators(
    names: Collection[str], reserved: Mapping[str, str], shares: SharesConfig, *, use_own: bool
) -> None:
    """Check the names of the generators, and that the minimum shares are possible.

    Args:
        names: names of the generators in addition to the run's own.
        reserved: the names that no generator may have, with what they stand for.
        shares: the minimum share.
        use_own: whether the run's own generator takes part.

    Raises:
        ValueError: a name that cannot be used, no generator, or too many.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"generators: the name {truncated_repr(name)} must be up to 40 of a-z, 0-9, - and "
                "_, and start with a letter"
            )
        if name in reserved:
            raise ValueError(
                f"generators: {name} is the name of {reserved[name]}; choose another name"
            )
    count = len(names) + use_own
    if count == 0:
        raise ValueError("generators must not be empty if generation.seed_generator is false")
    if count * shares.minimum_percent > 100:
        raise ValueError(
            f"generation.shares.minimum_percent ({shares.minimum_percent:g}) for each of {count} "
            f"generators is more than 100; lower it to at most {100 // count}"
        )
