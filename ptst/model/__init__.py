"""The decoder, its configuration, its weights on disk, LoRA and the training loss."""
