"""The search loop put together from mergekit, transformers and TRL, in one process.

    VENV/bin/python benchmarks/loop/peer.py REQUEST WORK

`compare.py` next to this file writes REQUEST, which has the models, the prompt, the problems and
settings of the demo. Each iteration samples programs with transformers' `generate`, executes them
in a merge method of mergekit, which writes every merged model to a folder, lets transformers answer
the problems with it, and trains the generator's LoRA adapter on pairs of programs with TRL's
`DPOTrainer`. The programs are written for `jax.numpy`; here NumPy takes its place, and what it
cannot run is refused. Nothing is confined: run only programs that you trust.

Prints JSON: the numbers of samples and of distinct scored programs, and the seconds of each phase.
"""

import inspect
import json
import re
import shutil
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

START = time.perf_counter()  # before the imports, which take several seconds

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from mergekit.config import MergeConfiguration  # noqa: E402
from mergekit.merge import run_merge  # noqa: E402
from mergekit.merge_methods.base import TensorGroup  # noqa: E402
from mergekit.merge_methods.easy_define import merge_method  # noqa: E402
from mergekit.merge_methods.registry import register  # noqa: E402
from mergekit.options import MergeOptions  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

METHOD = "discovered"
ANSWER = re.compile(r"\s*(?:\d+[+-]\d+=)?(-?\d+)\s*")  # the task's strict metric
SOURCE = re.compile(r"^(?:import |def ).*", re.MULTILINE | re.DOTALL)
LAYER = re.compile(r"layers\.(\d+)\.")
# The function that `merge` calls: set for each program, since a method is registered once.
program = None


class Loop:
    """The search of a request."""

    def __init__(self, request, work):
        self.request, self.work = request, work
        self.seconds = defaultdict(float)
        self.tokenizer = AutoTokenizer.from_pretrained(
            request["seed"], padding_side="left", trust_remote_code=False
        )
        seed = load(request["seed"])
        self.layers = seed.config.num_hidden_layers
        training = request["training"]
        lora = LoraConfig(
            r=training["rank"],
            lora_alpha=training["alpha"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        self.generator = get_peft_model(seed, lora)
        self.scores = {}  # source to accuracy; None if it was refused

    @contextmanager
    def timed(self, phase):
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start
        print(f"{phase}: {self.seconds[phase]:.1f} s", file=sys.stderr, flush=True)

    def run(self):
        register_merge(self)
        samples = 0
        for iteration in range(1, self.request["iterations"] + 1):
            with self.timed("generate"):
                texts = self.sample(iteration)
            samples += len(texts)
            sources = list(dict.fromkeys(filter(None, map(source_of, texts))))
            for source in sources:
                if source not in self.scores:
                    self.scores[source] = self.score(source)
            if iteration < self.request["iterations"]:
                with self.timed("train"):
                    self.train(sources)
        scored = [score for score in self.scores.values() if score is not None]
        return {
            "samples": samples,
            "distinct scored": len(scored),
            "best": max(scored, default=0.0),
            "phases": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
            "seconds in the process": round(time.perf_counter() - START, 1),
        }

    def sample(self, iteration):
        generation = self.request["generation"]
        inputs = self.tokenizer([generation["prompt"]] * generation["samples"], return_tensors="pt")
        self.generator.eval()
        with torch.inference_mode():
            found = self.generator.generate(
                **inputs,
                do_sample=True,
                temperature=generation["temperature"] / (1 + generation["slope"] * (iteration - 1)),
                top_k=0,
                max_new_tokens=generation["max_new_tokens"],
            )
        found = found[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(found, skip_special_tokens=True)

    def score(self, source):
        """Return the accuracy of the merged model, or None if the program cannot be used."""
        global program
        folder = self.work / "merged"
        shutil.rmtree(folder, ignore_errors=True)
        with self.timed("merge"):
            try:
                program = compile_program(source)
                run_merge(self.configuration(), str(folder), MergeOptions(quiet=True))
            except Exception as error:  # of the program, whatever it is
                print(f"refused: {type(error).__name__}: {error}", file=sys.stderr)
                return None
        with self.timed("load"):
            model = load(folder)
        with self.timed("answer"):
            return self.answer(model)

    def configuration(self):
        models = [{"model": path} for path in self.request["experts"].values()]
        return MergeConfiguration.model_validate(
            {
                "merge_method": METHOD,
                "base_model": self.request["seed"],
                "models": models,
                "dtype": "float32",
                "out_dtype": "bfloat16",
            }
        )

    def answer(self, model):
        problems = self.request["problems"]
        prompts = [problem["prompt"] for problem in problems]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            found = model.generate(
                **inputs, do_sample=False, max_new_tokens=self.request["answer_tokens"]
            )
        found = found[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(found, skip_special_tokens=True)
        matches = [ANSWER.fullmatch(text) for text in texts]
        correct = [
            match is not None and match[1] == problem["answer"]
            for match, problem in zip(matches, problems, strict=True)
        ]
        return float(np.mean(correct))

    def train(self, sources):
        """Train the adapter on pairs of the better and the worse programs of an iteration."""
        selection, training = self.request["selection"], self.request["training"]
        scored = [source for source in sources if self.scores[source] is not None]
        scored.sort(key=lambda source: -self.scores[source])
        chosen = scored[: round(len(scored) * selection["chosen_percent"] / 100)]
        rejected = scored[::-1][: round(len(scored) * selection["rejected_percent"] / 100)]
        prompt = self.request["generation"]["prompt"]
        pairs = [
            {"prompt": prompt, "chosen": good, "rejected": bad}
            for good in chosen
            for bad in rejected
            if self.scores[good] - self.scores[bad] >= selection["min_gap"]
        ]
        if not pairs:
            return
        rng = np.random.default_rng(0)
        kept = rng.permutation(len(pairs))[: selection["max_pairs"]]
        config = DPOConfig(
            str(self.work / "trainer"),
            max_steps=training["max_steps"],
            per_device_train_batch_size=training["batch_size"],
            learning_rate=training["learning_rate"],
            lr_scheduler_type="constant",
            beta=training["beta"],
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, training["nll_weight"]],
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        if "ref" in self.generator.peft_config:  # the reference of the last training
            self.generator.delete_adapter("ref")
        trainer = DPOTrainer(
            self.generator,
            args=config,
            train_dataset=Dataset.from_list([pairs[n] for n in kept]),
            processing_class=self.tokenizer,
        )
        trainer.train()


def load(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )


def source_of(text):
    """Return the program in a generated text, or None."""
    found = SOURCE.search(text)
    return found[0].strip() + "\n" if found and "def merge_models" in found[0] else None


def compile_program(source):
    """Return the merge function of a program, with NumPy in place of `jax.numpy`."""
    names = {}
    exec(source.replace("import jax.numpy as jnp", "import numpy as jnp"), names)
    return names["merge_models"]


def register_merge(loop):
    """Register the merge method that calls `program` for every tensor in scope."""
    slots = list(loop.request["experts"])

    @merge_method(name=METHOD)
    def discovered(group: TensorGroup) -> torch.Tensor:
        base, name = group.base.tensor, group.metadata.name
        if ".mlp." not in name:
            return base
        vectors = [(entry.tensor - base).numpy() for entry in group.non_base]
        optional = {
            "base": base.numpy(),
            "depth": int(LAYER.search(name)[1]) / max(1, loop.layers - 1),
            "kind": ".".join(name.split(".")[-3:-1]),
        }
        wanted = inspect.signature(program).parameters
        options = {key: value for key, value in optional.items() if key in wanted}
        with np.errstate(all="ignore"):
            merged = program(dict(zip(slots, vectors, strict=True)), **options)
        result = base + torch.from_numpy(np.broadcast_to(merged, base.shape).astype(np.float32))
        if not torch.isfinite(result).all():
            raise ValueError(f"{name}: not finite")
        return result

    register(discovered)


def main():
    request, work = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(request["rng_seed"])
    print(json.dumps(Loop(request, work).run()), flush=True)


if __name__ == "__main__":
    main()
