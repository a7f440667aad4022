"""Fine-tuning of a model behind an OpenAI-compatible endpoint: files, jobs, and a run folder like a local one."""
