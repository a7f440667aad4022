"""An OpenAI-compatible server over the engine: a model name for each adapter under each template."""
