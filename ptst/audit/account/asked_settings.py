"""Whether what is used is what the settings say: template, family, length limit and epochs, each read a second time."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ptst.audit.findings import Finding
from ptst.audit.reference.mixes import asked_mix

if TYPE_CHECKING:
    from ptst.data.examples import TrainingSource
    from ptst.text.prompt_format import PromptFormat
    from ptst.training.config import TrainConfig


def check_settings(
    settings: "TrainConfig",
    prompt_format: "PromptFormat",
    training: Sequence["TrainingSource"],
    limit: int,
    max_positions: int,
) -> Iterator[Finding]:
    """Rule `setting-ignored`. `training`: each source with the epochs that it is planned with, and its own template;
    `limit`: the longest example in tokens, of a model with `max_positions`."""
    sizes = [settings.max_length, settings.micro_batch_tokens, max_positions]
    mixed = [asked_mix(text) for text in settings.mix]
    used_names = [s.under(prompt_format).template.name if s.template else None for s in training[1:]]
    used: list[tuple[str, object, object]] = [
        ("max_length", min(size for size in sizes if isinstance(size, int)), limit),
        ("template_family", settings.template_family or training[0].source.family, prompt_format.family.name),
        (
            "epochs",
            [settings.epochs, *(m.epochs or settings.epochs for m in mixed)],
            [source.epochs for source in training],
        ),
        ("mix", [m.full_name for m in mixed], used_names),
        ("mix", [m.file for m in mixed], [source.template_file for source in training[1:]]),
    ]
    if settings.template_file is None:
        name = str(settings.template)
        used.append(("template", name if ":" in name else f"chat:{name}", prompt_format.template.name))
    for setting, asked, found in used:
        if asked != found:
            cause = f"{setting} should be {asked}, and {found} is used"
            yield Finding("setting-ignored", "", cause, expected=str(asked), seen=str(found))
