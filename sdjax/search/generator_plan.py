"""The generators of a run in addition to the seed with its adapter, checked but without weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from jax.sharding import Mesh

from sdjax.core.config import errors_at
from sdjax.core.errors import UserError
from sdjax.decoding.config import check_length
from sdjax.decoding.decoder import Decoder
from sdjax.generators.config import EndpointConfig, GeneratorConfig
from sdjax.generators.endpoint import read_key
from sdjax.generators.program_folder import read_programs
from sdjax.generators.recording import Recording
from sdjax.io.hf_checkpoint import ModelReader
from sdjax.io.model_paths import locate
from sdjax.io.tokenizer import Tokenizer, load_tokenizer
from sdjax.search.config import RunConfig
from sdjax.search.memory.renderer import PromptRenderer, longest_prompt
from sdjax.sharding.multihost import broadcast_from_main, is_main_process


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LocalPlan:
    """A local model that writes programs.

    Attributes:
        tokenizer: its own tokenizer.
        decoder: decoder of the model.
    """

    tokenizer: Tokenizer
    decoder: Decoder

    @property
    def max_prompt_tokens(self) -> int:
        """Maximum number of tokens of a prompt."""
        sizes = self.decoder.config
        return len(sizes.prefix) + sizes.buckets[-1]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GeneratorsPlan:
    """The generators of a run in addition to its own, by name.

    Attributes:
        local: the local models.
        programs: the programs of each folder, in order.
        keys: the keys of the endpoints, on the main process.
    """

    local: Mapping[str, LocalPlan] = dataclasses.field(default_factory=dict)
    programs: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str | None] = dataclasses.field(default_factory=dict, repr=False)


def plan_generators(
    config: RunConfig, renderer: PromptRenderer, mesh: Mesh | None
) -> GeneratorsPlan:
    """Check the generators of a config; only the main process reads folders and keys.

    Args:
        config: config of the run.
        renderer: the prompt of the run.
        mesh: devices of the run.

    Raises:
        UserError: a missing or damaged model, a prompt that is too long for it, a folder without
            programs or with files that are refused, a key that is not in the environment, or a
            recording that cannot be read. The message starts with the place of the config's key.
    """
    local: dict[str, LocalPlan] = {}
    programs: dict[str, tuple[str, ...]] = {}
    keys: dict[str, str | None] = {}
    for name, generator in config.generators.items():
        key = f"generators.{name}"
        if generator.model is not None:
            with errors_at(config, f"{key}.model"):
                local[name] = _plan_local(config, generator, generator.model, renderer, mesh)
        elif generator.programs is not None:
            with errors_at(config, f"{key}.programs"):
                programs[name] = _shared_programs(Path(generator.programs))
        elif generator.endpoint is not None and is_main_process():
            keys[name] = _check_endpoint(config, key, generator.endpoint)
    return GeneratorsPlan(local=local, programs=programs, keys=keys)


def available_programs(config: RunConfig, plan: GeneratorsPlan) -> int | None:
    """Return how many programs the generators of a run can write; None is unlimited.

    Args:
        config: config of the run.
        plan: its generators.
    """
    if config.generation.seed_generator or plan.programs.keys() != config.generators.keys():
        return None
    return sum(map(len, plan.programs.values()))


def describe_generators(
    config: RunConfig, plan: GeneratorsPlan, renderer: PromptRenderer
) -> list[str]:
    """Return a line about the generators; none if there is only the run's own.

    Args:
        config: config of the run.
        plan: its generators.
        renderer: the prompt of the run.
    """
    if not config.generators:
        return []
    parts = (
        [f"seed ({config.generator or config.seed})"] if config.generation.seed_generator else []
    )
    for name, generator in config.generators.items():
        endpoint = generator.endpoint
        if endpoint is not None:
            where = endpoint.replay or endpoint.base_url
            tokens = _describe_tokens(config, endpoint, renderer)
            parts.append(f"{name} ({endpoint.model} from {where}, {tokens})")
        elif generator.programs is not None:
            count = len(plan.programs[name])
            programs = f"{count:,} program{'' if count == 1 else 's'}"
            parts.append(f"{name} ({programs} in {generator.programs})")
        else:
            parts.append(f"{name} ({generator.model})")
    return [f"generators: {', '.join(parts)}"]


def _describe_tokens(config: RunConfig, endpoint: EndpointConfig, renderer: PromptRenderer) -> str:
    """Return how many tokens an endpoint uses if it writes all samples, in the seed's tokens."""
    prompt = longest_prompt(renderer, config.generation.decoding.max_new_tokens)
    tokens = config.max_samples * (prompt + endpoint.max_answer_tokens)
    budget = endpoint.max_tokens_total
    if budget is not None and budget <= tokens:
        return f"at most {budget:,} tokens"
    return f"up to about {tokens:,} tokens without repeated requests"


def _plan_local(
    config: RunConfig,
    generator: GeneratorConfig,
    model: str,
    renderer: PromptRenderer,
    mesh: Mesh | None,
) -> LocalPlan:
    sizes = generator.decoding or config.generation.decoding
    folder, adapter = locate(model)
    reader = ModelReader(folder, adapter=adapter)
    reader.check_shapes()
    tokenizer = load_tokenizer(folder)
    check_length(reader.config, sizes.buckets[-1], sizes.max_new_tokens)
    decoder = Decoder(reader.config, sizes, tokenizer=tokenizer, mesh=mesh)
    plan = LocalPlan(tokenizer=tokenizer, decoder=decoder)
    own = dataclasses.replace(renderer, tokenizer=tokenizer, max_tokens=plan.max_prompt_tokens)
    length = longest_prompt(own, config.generation.decoding.max_new_tokens)
    if length > own.max_tokens:
        raise UserError(
            f"a prompt {config.generation.prompt!r} may have {length} tokens, but the largest "
            f"bucket is {sizes.buckets[-1]}; set `decoding` of the generator, with a bucket of at "
            f"least {length}"
        )
    return plan


def _shared_programs(folder: Path) -> tuple[str, ...]:
    """Return the programs that the main process reads."""
    content = broadcast_from_main(lambda: json.dumps(read_programs(folder)).encode())
    return tuple(json.loads(content))


def _check_endpoint(config: RunConfig, key: str, endpoint: EndpointConfig) -> str | None:
    if endpoint.replay is not None:
        with errors_at(config, f"{key}.endpoint.replay"):
            Recording(Path(endpoint.replay), write=False)
    with errors_at(config, f"{key}.endpoint.api_key_env"):
        return read_key(endpoint)
