"""Description of the executables that a merge will compile, for a trial in a confined process."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from sdjax.sandbox.refusal import Refusal

# How many times more memory the estimate may count than a compiled program needs, since it ignores
# XLA's fusion: 14 for `breadcrumbs`, the most of all shipped methods (3 experts, 4096 x 14336).
FUSION = 16


@dataclass(frozen=True, kw_only=True)
class TrialTensor:
    """One tensor of a merge.

    Attributes:
        path: path of the tensor.
        shape: its shape.
        base: dtype of the base's tensor; None if there is no base.
        experts: dtype of each expert's tensor, in slot order.
        changed: whether an expert has changed it, so that it is merged.
    """

    path: str
    shape: tuple[int, ...]
    base: str | None
    experts: tuple[str, ...]
    changed: bool = True


@dataclass(frozen=True, kw_only=True)
class MergeTrial:
    """Description of what a merge compiles.

    Attributes:
        memory: bytes that the devices of the merge have together.
        tensors: the tensors in scope.
        compiler: how executables are compiled: "quick" and "full" as in `CompileCache`, "single
            use" as in a merge from disk (`compile_for_single_use`; a tree is compiled in full).
        subtracted: IR of a program whose result is subtracted, to compare two programs.
        computes: what the executables compute: merged tensors, or the gradient of a scalar of them
            in the program's hyperparameters.
    """

    memory: int
    tensors: tuple[TrialTensor, ...]
    compiler: Literal["quick", "full", "single use"]
    subtracted: str | None = None
    computes: Literal["merge", "gradient"] = "merge"

    def to_json(self) -> str:
        """Serialize for a worker; `from_json` is the inverse."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "MergeTrial":
        """Deserialize the result of `to_json`."""
        data = json.loads(text)
        tensors = tuple(
            TrialTensor(**{**t, "shape": tuple(t["shape"]), "experts": tuple(t["experts"])})
            for t in data["tensors"]
        )
        return cls(**{**data, "tensors": tensors})


def check_estimate(estimate: int, memory: int) -> None:
    """Check the memory of a program before it is compiled.

    Args:
        estimate: bytes of all arrays that are alive at once, before fusion.
        memory: bytes that the devices of the merge have together.

    Raises:
        Refusal: the program needs more memory even if fusion removes most of its arrays.
    """
    if estimate > FUSION * memory:
        message = (
            f"the program keeps {estimate / 1e9:.3g} GB of arrays alive at once, but the machine "
            f"has {memory / 1e9:.3g} GB"
        )
        raise Refusal("too costly", "memory", message)
