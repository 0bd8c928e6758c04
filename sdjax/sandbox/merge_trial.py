"""Description of the executables that a merge will compile, for a trial in a confined process."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal


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
    """What a merge compiles and how.

    Attributes:
        tensors: the tensors in scope.
        compiler: how executables are compiled: "quick" and "full" as in `CompileCache`, "single
            use" as in a merge from disk (`compile_for_single_use`; a tree is compiled in full).
    """

    tensors: tuple[TrialTensor, ...]
    compiler: Literal["quick", "full", "single use"]

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
