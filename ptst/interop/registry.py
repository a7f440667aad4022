"""What inspect_ai finds by its entry point: the model provider `ptst`. inspect_ai imports this module whenever it looks
for a provider, so that the provider itself, and torch, are imported with the first model of that name."""

from typing import Any

from inspect_ai.model import modelapi


@modelapi(name="ptst")
def ptst() -> Any:
    """The provider's class."""
    from ptst.interop.inspect_model import EngineAPI

    return EngineAPI
