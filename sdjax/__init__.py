"""Language models that invent algorithms to improve language models, in JAX.

Public names are imported on first use. `import sdjax` imports nothing, not even `typing`: the
command line must block Ctrl-C first.
"""

__version__ = "0.3.0"

__all__ = [
    "Decoder",
    "Merger",
    "PerExpert",
    "Sandbox",
    "__version__",
    "compute_stats",
    "evaluate",
    "from_nnx",
    "load_model",
    "load_stats",
    "load_tokenizer",
    "merge",
    "run_search",
    "to_nnx",
    "train_dpo",
    "train_sft",
    "tune",
]

TYPE_CHECKING = False  # type checkers take it to be true, as that of `typing`
if TYPE_CHECKING:
    from sdjax.decoding.decoder import Decoder as Decoder
    from sdjax.evaluation.api import evaluate as evaluate
    from sdjax.io.hf_checkpoint import load_model as load_model
    from sdjax.io.statistics_folder import load_stats as load_stats
    from sdjax.io.tokenizer import load_tokenizer as load_tokenizer
    from sdjax.merging.algorithm import PerExpert as PerExpert
    from sdjax.merging.api import merge as merge
    from sdjax.merging.engine import Merger as Merger
    from sdjax.models.nnx import from_nnx as from_nnx
    from sdjax.models.nnx import to_nnx as to_nnx
    from sdjax.sandbox.sandbox import Sandbox as Sandbox
    from sdjax.search.loop import run_search as run_search
    from sdjax.statistics.api import compute_stats as compute_stats
    from sdjax.training.api import train_dpo as train_dpo
    from sdjax.training.api import train_sft as train_sft
    from sdjax.tuning.api import tune as tune

_MODULE_OF = {
    "Decoder": "sdjax.decoding.decoder",
    "Merger": "sdjax.merging.engine",
    "PerExpert": "sdjax.merging.algorithm",
    "Sandbox": "sdjax.sandbox.sandbox",
    "compute_stats": "sdjax.statistics.api",
    "evaluate": "sdjax.evaluation.api",
    "from_nnx": "sdjax.models.nnx",
    "load_model": "sdjax.io.hf_checkpoint",
    "load_stats": "sdjax.io.statistics_folder",
    "load_tokenizer": "sdjax.io.tokenizer",
    "merge": "sdjax.merging.api",
    "run_search": "sdjax.search.loop",
    "to_nnx": "sdjax.models.nnx",
    "train_dpo": "sdjax.training.api",
    "train_sft": "sdjax.training.api",
    "tune": "sdjax.tuning.api",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sdjax' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # later lookups skip this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
