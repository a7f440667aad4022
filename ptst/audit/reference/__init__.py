"""An independent reading of tokenizer files, templates and data, which the pipeline is compared with."""
