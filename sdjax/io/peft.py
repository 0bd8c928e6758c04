"""PEFT LoRA adapters, read and written."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sdjax.core.errors import UserError, truncated_repr
from sdjax.io.lora_alpha import LoraAlphas
from sdjax.io.peft_writer import ADAPTER_CONFIG as ADAPTER_CONFIG
from sdjax.io.peft_writer import LINEAR, PREFIX, write_factors
from sdjax.io.safetensors_reader import read_json
from sdjax.io.tensor_reader import TensorReader
from sdjax.io.weights import open_adapter_weights
from sdjax.models.config import ModelConfig
from sdjax.models.lora import ALL_PROJECTIONS, Adapter
from sdjax.models.params import kind_of, param_specs
from sdjax.models.tree import flatten, unflatten

# Suffixes of the tensor names of (A, B) of an embedding.
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
# Variants with another change than B @ A, and initializations that also change the model.
_UNSUPPORTED = (
    *("use_qalora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config"),
    "layer_replication",
)
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Name of the base of an adapter that a run has trained on a model that it had merged.
_MERGED_BASE = re.compile(r".+: program:[0-9a-f]+")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?")


logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraPair:
    """The factors of one adapted tensor, whose change is scale * B @ A.

    Attributes:
        a: name of A, [rank, in], in the adapter's files.
        b: name of B, [out, rank], in the adapter's files.
        scale: alpha / rank, or alpha / sqrt(rank) with `use_rslora`.
        transposed: whether the change is transposed before it is added.
        magnitude: name of the norms of the adapted weights per output (DoRA), or None.
        experts: number of experts of a tensor that has several, each with factors of its own: A is
            [experts * rank, in] and B [out, rank * experts].
    """

    a: str
    b: str
    scale: float
    transposed: bool
    magnitude: str | None = None
    experts: int | None = None


class ParameterPair(NamedTuple):
    """The factors of an adapted parameter (`target_parameters`), whose name is not stored.

    Attributes:
        module: the module of the parameter.
        a: name of A in the adapter's files.
        b: name of B in the adapter's files.
    """

    module: str
    a: str
    b: str


class PeftAdapter:
    """A PEFT adapter folder, with its tensors assigned to those of the model.

    Hu et al., "LoRA: low-rank adaptation of large language models", arXiv 2106.09685; `use_rslora`
    is arXiv 2312.03732, `use_dora` Liu et al., arXiv 2402.09353.

    Attributes:
        reader: reads the adapter's tensors.
        pairs: name of an adapted tensor of the model to its factors.
        parameters: factors of adapted parameters; `resolve` finds the names of these.
        replacements: name of a replaced tensor of the model (`modules_to_save`) to the name of its
            replacement in the adapter's files.
    """

    def __init__(self, folder: Path):
        """Open a folder. Raises UserError if it is not a LoRA adapter of a supported kind."""
        settings = read_json(folder / ADAPTER_CONFIG)
        if settings.get("peft_type") != "LORA":
            raise UserError(f"{folder}: not a LoRA adapter; {ADAPTER_CONFIG} must be of type LORA")
        for key in _UNSUPPORTED:
            if settings.get(key):
                raise UserError(
                    f"{folder / ADAPTER_CONFIG}: {key} is not supported; merge it with peft"
                )
        start = settings.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(_CHANGING_STARTS):
            raise UserError(
                f"{folder / ADAPTER_CONFIG}: init_lora_weights is {truncated_repr(start)}: such an "
                "adapter starts from changed weights of the model; save it with peft's "
                "path_initial_model_for_weight_conversion"
            )
        if settings.get("alora_invocation_tokens"):
            raise UserError(
                f"{folder / ADAPTER_CONFIG}: alora_invocation_tokens is not supported: such an "
                "adapter changes only a part of each text, which no merged model can"
            )
        for key in ("use_dora", "use_rslora", "fan_in_fan_out"):
            if not isinstance(settings.get(key), bool | None):
                shown = truncated_repr(settings[key])
                raise UserError(
                    f"{folder / ADAPTER_CONFIG}: {key} must be true or false, not {shown}"
                )
        self._targets = settings.get("target_parameters") or []
        if not isinstance(self._targets, list) or not all(
            isinstance(t, str) for t in self._targets
        ):
            shown = truncated_repr(self._targets)
            raise UserError(
                f"{folder / ADAPTER_CONFIG}: target_parameters must be a list of names, not {shown}"
            )
        self._settings = settings
        self._alphas = LoraAlphas(settings, folder / ADAPTER_CONFIG)
        self.reader = open_adapter_weights(folder)
        self._stored = frozenset(self.reader.names)
        self.parameters: list[ParameterPair] = []
        self.pairs: dict[str, LoraPair] = {}
        self.replacements: dict[str, str] = {}
        for stored in self.reader.names:
            self._assign(stored)
        if not self.pairs and not self.parameters and not self.replacements:
            raise UserError(f"{folder}: contains no adapter weights; copy the folder again")

    @property
    def base(self) -> str:
        """The name of the model that the adapter is for; "" if it does not say so."""
        base = self._settings.get("base_model_name_or_path")
        return base if isinstance(base, str) else ""

    def check(self, names: Collection[str], model: Path, *, is_base: bool = False) -> None:
        """Check that the adapter fits a model, and warn if it was trained on a merged model.

        Args:
            names: the names of the model's tensors.
            model: folder of the model, for messages.
            is_base: whether the model is known to be the one that the adapter was trained on.

        Raises:
            UserError: the adapter changes a tensor that the model does not have.
        """
        if not is_base and _MERGED_BASE.fullmatch(self.base):
            _warn_of_merged_base(self.reader.folder, self.base, model)
        if unknown := sorted({*self.pairs, *self.replacements} - set(names)):
            raise self._unknown(unknown[0], model)

    def resolve(self, model: TensorReader) -> None:
        """Find the adapted parameters in a model and add them to `pairs`.

        The files have only the module of a parameter. Which one it is, and the order of its axes,
        follow from the shapes of the factors.

        Raises:
            UserError: no parameter of the module fits, or several do.
        """
        for pair in self.parameters:
            (rows, in_size), (out_size, _) = map(self.reader.shape, (pair.a, pair.b))
            fits: dict[str, tuple[int | None, bool]] = {}
            for name in model.names:
                targeted = any(_is_name(name, target) for target in self._targets)
                if not targeted or name.rpartition(".")[0] != pair.module:
                    continue
                *experts, first, second = (0, 0, *model.shape(name))[-3:]
                forward, backward = (first, second) == (out_size, in_size), False
                if len(model.shape(name)) == 3:
                    backward = (first, second) == (in_size, out_size)
                    count: int | None = experts[0]
                    if not count or rows % count:
                        continue
                else:
                    count = None
                # A square matrix has the same shape in both orders of its axes.
                if forward != backward and name not in self.pairs:
                    fits[name] = count, backward
            if len(fits) != 1:
                raise UserError(
                    f"{self.reader.where(pair.a)} adapts one of the target_parameters of "
                    f"{pair.module}, but the shapes in {model.folder} do not decide which, or in "
                    "which order of its axes; merge it with peft"
                )
            ((name, (count, transposed)),) = fits.items()
            self.pairs[name] = LoraPair(
                a=pair.a,
                b=pair.b,
                scale=self._scale(name, rows // (count or 1)),
                transposed=transposed,
                experts=count,
            )

    def _unknown(self, name: str, model: Path) -> UserError:
        return UserError(
            f"{self.reader.folder}: adapts {name}, which {model} does not have; "
            "use the model that it was trained for"
        )

    def read_factors(self, pair: LoraPair) -> tuple[np.ndarray, np.ndarray]:
        """Return (A [rank, in], B [out, rank]) in float32."""
        a, b = (self.reader.read(name).astype(np.float32) for name in (pair.a, pair.b))
        return a, b

    def _assign(self, stored: str) -> None:
        name = stored.removeprefix(PREFIX)
        for (suffix_a, suffix_b), is_embedding in ((LINEAR, False), (_EMBEDDING, True)):
            if name.endswith(suffix_a):
                b = self._partner(stored, suffix_a, suffix_b)
                module = name.removesuffix(suffix_a)
                rank = self._rank(stored, b)
                # Several parameters of a module are adapted one around another.
                owner = re.sub(r"(\.base_layer)+$", "", module)
                if any(_is_name(owner, target.rpartition(".")[0]) for target in self._targets):
                    self.parameters.append(ParameterPair(owner, stored, b))
                    return
                self.pairs[f"{module}.weight"] = LoraPair(
                    a=stored,
                    b=b,
                    scale=self._scale(module, rank),
                    transposed=is_embedding or bool(self._settings.get("fan_in_fan_out")),
                    magnitude=self._magnitude(stored.removesuffix(suffix_a)),
                )
                return
            if name.endswith(suffix_b):
                self._partner(stored, suffix_b, suffix_a)
                return
        if (magnitude := _MAGNITUDE.fullmatch(stored)) and self._settings.get("use_dora"):
            factors = {magnitude[1] + suffix for suffix, _ in (LINEAR, _EMBEDDING)}
            if factors & self._stored:
                return
        if "lora_" in name:
            raise UserError(f"{self.reader.where(stored)} is not supported; merge it with peft")
        self.replacements[name.replace(".base_layer.", ".")] = stored

    def _magnitude(self, module: str) -> str | None:
        """Return the name of the magnitudes of a module, which an adapter of DoRA must have."""
        if not self._settings.get("use_dora"):
            return None
        for suffix in (".lora_magnitude_vector", ".lora_magnitude_vector.weight"):
            if module + suffix in self._stored:
                return module + suffix
        raise UserError(
            f"{self.reader.folder}: {module} has no lora_magnitude_vector, though use_dora is set; "
            "copy the folder again"
        )

    def _partner(self, stored: str, suffix: str, partner_suffix: str) -> str:
        partner = stored.removesuffix(suffix) + partner_suffix
        if partner not in self._stored:
            raise UserError(
                f"{self.reader.where(stored)} has no matching tensor {partner}; "
                "copy the folder again"
            )
        return partner

    def _rank(self, a: str, b: str) -> int:
        shape_a, shape_b = self.reader.shape(a), self.reader.shape(b)
        two_dimensional = len(shape_a) == len(shape_b) == 2
        if not two_dimensional or shape_a[0] != shape_b[1] or not shape_a[0]:
            raise UserError(
                f"{self.reader.where(a)} has shape {list(shape_a)} but {b} has shape "
                f"{list(shape_b)}, so they cannot be multiplied; copy the folder again"
            )
        return shape_a[0]

    def _scale(self, module: str, rank: int) -> float:
        alpha = self._alphas.of(module, rank)
        return alpha / (rank**0.5 if self._settings.get("use_rslora") else rank)


@functools.cache  # a command may open an adapter several times
def _warn_of_merged_base(adapter: Path, base: str, model: Path) -> None:
    logger.warning(
        "%s: this adapter was trained on the merged model %s, so that it fits %s only if that was "
        "written by `sdjax merge --run` from this program; `sdjax generate --run` uses it with its "
        "own model",
        *(adapter, truncated_repr(base), model),
    )


def merged_base(run: str, entry: str) -> str:
    """Return the name of a merged model as the base of an adapter.

    Args:
        run: name of the run folder.
        entry: entry of the program that merged it, program:IDENTITY.
    """
    return f"{run}: {entry}"


def _is_name(name: str, end: str) -> bool:
    """Return whether a name is another one, or ends with it after a dot."""
    return bool(end) and (name == end or name.endswith(f".{end}"))


def write_adapter(
    folder: Path,
    config: ModelConfig,
    adapter: Adapter,
    *,
    base: str,
    extra_files: Iterable[Path] = (),
) -> None:
    """Write an adapter that PEFT can load; the folder appears only when it is complete.

    With several processes, all of them must call this; the first one writes.

    Args:
        folder: must not exist, or must be empty.
        config: config of the model that the adapter is for.
        adapter: the LoRA factors.
        base: the model that the adapter is for, a folder or a name.
        extra_files: files to copy into the folder.

    Raises:
        UserError: the folder is not empty.
    """
    specs, flat = param_specs(config), flatten(adapter.factors)
    paths = dict.fromkeys(path.rsplit("/", 1)[0] for path in flat)
    write_factors(
        folder,
        {
            specs[path].hf_name.removesuffix(".weight"): (flat[f"{path}/a"], flat[f"{path}/b"])
            for path in paths
        },
        scale=adapter.scale,
        base=base,
        extra_files=extra_files,
    )


def read_adapter(
    folder: Path, config: ModelConfig, *, model: Path, is_base: bool = False
) -> Adapter:
    """Read a PEFT adapter as LoRA factors in float32 on the default device.

    An adapter that names a merged model of a run as its base gives a warning.

    Args:
        folder: the adapter's folder.
        config: config of the model that the adapter is for.
        model: folder of that model, for messages.
        is_base: whether the model is known to be the adapter's base; then there is no warning.

    Raises:
        UserError: not a LoRA adapter, for another model, or not representable as an `Adapter`: it
            changes tensors other than projections, or has several scales.
    """
    stored = PeftAdapter(folder)
    specs = param_specs(config)
    paths = {spec.hf_name: path for path, spec in specs.items()}
    stored.check(paths, model, is_base=is_base)
    if (problem := _unlike_factors(stored, paths)) is not None:
        raise UserError(f"{folder}: {problem}; merge it with peft")
    factors = {}
    for name, pair in stored.pairs.items():
        a, b = stored.read_factors(pair)
        shape, expected = (b.shape[0], a.shape[1]), specs[paths[name]].shape
        if shape != expected:
            raise UserError(
                f"{stored.reader.where(pair.a)} has an update of shape {list(shape)}, but {name} "
                f"has shape {list(expected)}; use the model that it was trained for"
            )
        factors[f"{paths[name]}/a"], factors[f"{paths[name]}/b"] = jnp.asarray(a), jnp.asarray(b)
    scale = next(iter(stored.pairs.values())).scale
    return Adapter(factors=unflatten(factors), scale=scale)


def has_plain_factors(folder: Path, config: ModelConfig) -> bool:
    """Return whether `read_adapter` can represent an adapter, which any reader can merge.

    Args:
        folder: the adapter's folder.
        config: config of the model that the adapter is for.
    """
    paths = {spec.hf_name: path for path, spec in param_specs(config).items()}
    stored = PeftAdapter(folder)
    return stored.pairs.keys() <= paths.keys() and _unlike_factors(stored, paths) is None


def _unlike_factors(stored: PeftAdapter, paths: Mapping[str, str]) -> str | None:
    """Return why an adapter cannot be an `Adapter`, or None; `paths` has the path of each name."""
    if (
        stored.replacements
        or stored.parameters
        or any(
            pair.transposed or pair.magnitude or kind_of(paths[name]) not in ALL_PROJECTIONS
            for name, pair in stored.pairs.items()
        )
    ):
        return "adapts tensors that are not projections, or by other means than LoRA factors"
    if len({pair.scale for pair in stored.pairs.values()}) != 1:
        return (
            f"{ADAPTER_CONFIG}: rank_pattern and alpha_pattern result in several scales, which is "
            "not supported"
        )
    return None
