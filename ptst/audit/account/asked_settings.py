"""Whether what is used is what the settings say: template, family, length limit and epochs, each read a second time."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ptst.audit.findings import Finding

if TYPE_CHECKING:
    from ptst.data.sources import Source
    from ptst.text.prompt_format import PromptFormat
    from ptst.training.config import TrainConfig


def check_settings(
    settings: "TrainConfig",
    prompt_format: "PromptFormat",
    training: Sequence[tuple["Source", float]],
    limit: int,
    max_positions: int,
) -> Iterator[Finding]:
    """Rule `setting-ignored`. `training`: each source with the epochs that it is planned with; `limit`: the longest
    example in tokens, of a model with `max_positions`."""
    sizes = [settings.max_length, settings.micro_batch_tokens, max_positions]
    mixed = [float(text.rpartition(":")[2]) for text in settings.mix]
    used: list[tuple[str, object, object]] = [
        ("max_length", min(size for size in sizes if isinstance(size, int)), limit),
        ("template_family", settings.template_family or training[0][0].family, prompt_format.family.name),
        ("epochs", [settings.epochs, *mixed], [epochs for _, epochs in training]),
    ]
    if settings.template_file is None:
        name = str(settings.template)
        used.append(("template", name if ":" in name else f"chat:{name}", prompt_format.template.name))
    for setting, asked, found in used:
        if asked != found:
            cause = f"{setting} should be {asked}, and {found} is used"
            yield Finding("setting-ignored", "", cause, expected=str(asked), seen=str(found))
