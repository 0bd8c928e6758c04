"""All kinds of files that may come from a stranger, by name."""

from collections.abc import Callable

from tests.fuzzing import config_kinds, data_kinds, model_kinds, run_kinds
from tests.fuzzing.kinds import Kind

KINDS: dict[str, Callable[[], Kind]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        config_kinds.run_config,
        config_kinds.train_config,
        config_kinds.recipe,
        config_kinds.tunable,
        model_kinds.config_json,
        model_kinds.generation_config,
        model_kinds.tokenizer_json,
        model_kinds.tokenizer_config,
        model_kinds.sentencepiece,
        model_kinds.chat_template,
        model_kinds.safetensors,
        model_kinds.torch_weights,
        model_kinds.gguf,
        model_kinds.index,
        model_kinds.adapter,
        model_kinds.training_programs,
        data_kinds.jsonl,
        data_kinds.jsonl_gzip,
        data_kinds.dataset_folder,
        data_kinds.results,
        data_kinds.prompt,
        run_kinds.program,
        run_kinds.run,
        run_kinds.checkpoint,
        run_kinds.training_folder,
        run_kinds.partial_merge,
    )
}
