"""Log-probabilities, supervised fine-tuning, DPO and LoRA."""
