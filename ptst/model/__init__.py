"""The decoder, its configuration, its weights on disk, and LoRA."""
