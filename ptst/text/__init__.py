"""What a model reads: tokenizers, chat formats, templates, and which tokens are trained. No tensors here."""
