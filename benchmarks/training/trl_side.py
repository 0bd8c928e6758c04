"""The TRL side of `compare.py`: six DPO steps, full or LoRA, or twenty SFT steps (TRL 1.16).

`python trl_side.py full|lora|sft --work DIR --model MODEL [--adapter PEFT_FOLDER]` writes
DIR/trl-KIND.npz: losses, seconds and log-probabilities of each step, the first gradient, and the
peak memory of the process in bytes.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

PEAK_RATE, BATCH, LENGTH = 1e-4, 4, 256
# Settings shared by both sides.
COMMON = {
    "per_device_train_batch_size": BATCH,
    "learning_rate": PEAK_RATE,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "train_sampling_strategy": "sequential",
    "max_length": None,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
}


class RecordingTrainer:
    """Mixin that records losses, times, log-probabilities and gradients."""

    def start_record(self) -> None:
        self.losses, self.times, self.gradient, self.logprobs = [], [], {}, []

    def training_step(self, *arguments, **options):
        start = time.perf_counter()
        if self.times:
            self.times[-1] = start - self.start
        self.start = start
        loss = super().training_step(*arguments, **options)
        self.losses.append(float(loss))
        self.times.append(0.0)
        if not self.gradient:
            self.gradient = {
                name: parameter.grad.numpy().copy()
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None
            }
        return loss

    def train(self, *arguments, **options):
        result = super().train(*arguments, **options)
        self.times[-1] = time.perf_counter() - self.start
        return result


class RecordedDPO(RecordingTrainer, DPOTrainer):
    def _compute_loss(self, model, inputs, return_outputs):
        hook = model.register_forward_hook(
            lambda module, inputs, output: self.logprobs.append(
                output.log_probs.detach().sum(1).reshape(2, -1).T.numpy()
            )
        )
        try:
            return super()._compute_loss(model, inputs, return_outputs)
        finally:
            hook.remove()


class RecordedSFT(RecordingTrainer, SFTTrainer):
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["full", "lora", "sft"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, trust_remote_code=False
    )
    if options.adapter:
        model = PeftModel.from_pretrained(model, options.adapter, is_trainable=True)
    name = "texts" if options.kind == "sft" else "pairs"
    rows = [json.loads(line) for line in (options.work / f"{name}.jsonl").read_text().splitlines()]
    steps = len(rows) // BATCH
    out = str(options.work / "trl")
    if options.kind == "sft":
        config = SFTConfig(out, max_steps=steps, **COMMON)
        trainer = RecordedSFT(
            model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    else:
        config = DPOConfig(
            out,
            max_steps=steps,
            beta=0.1,
            precompute_ref_log_probs=True,
            pad_to_multiple_of=LENGTH,
            **COMMON,
        )
        trainer = RecordedDPO(
            model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    # The pass over the reference is not included.
    trainer.start_record()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    trainer.train()
    np.savez(
        options.work / f"trl-{options.kind}.npz",
        losses=trainer.losses,
        times=trainer.times,
        logprobs=np.array(trainer.logprobs),
        memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        memory_before=before,
        versions=json.dumps({"torch": torch.__version__, "trl": trl.__version__}),
        **{f"gradient/{key}": value for key, value in trainer.gradient.items()},
    )
    print(options.kind, "times", trainer.times, "losses", trainer.losses)


if __name__ == "__main__":
    main()
