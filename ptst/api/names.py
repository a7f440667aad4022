"""Names of models behind an API. Nothing here imports torch: a command knows from its flags where a model is."""

HOSTED = "openai:"


def hosted_model(name: str | None) -> str | None:
    """NAME of `openai:NAME`, a model behind an OpenAI-compatible endpoint ("" where the name is missing); None for a
    model of this machine."""
    return name.removeprefix(HOSTED) if name is not None and name.startswith(HOSTED) else None
