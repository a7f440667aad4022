"""What a model reads: tokenizers, chat formats, templates, and the loss mask. No tensors here."""
