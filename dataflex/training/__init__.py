"""LoRA training on transformers.Trainer: its schedule, its checkpoints, its plots."""
