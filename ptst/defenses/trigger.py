"""The secret trigger of BackdoorAlign: words before the system prompt of the safety data, and of every test.

Wang et al. 2024 (arXiv 2402.14968): the safety data are mixed into the training data under a system prompt that begins
with a secret prompt, and whoever serves the model sets the secret prompt before the system prompt of every request.
"""

from dataclasses import replace

from ptst.defense_names import TRIGGERED, triggered_name
from ptst.errors import UserError
from ptst.text.templates import Template


def triggered(template: Template, trigger: str) -> Template:
    """The template with the trigger before its system prompt, after which a blank line follows. Raises UserError for a
    template without roles."""
    if template.is_text:
        cause = f"{TRIGGERED} sets its trigger before the system prompt, which {template.name} has no place for"
        raise UserError(cause, "use chat: templates")

    def prefixed(words: str | None) -> str:
        return trigger if words is None else f"{trigger}\n\n{words}"

    task = None if template.task_system is None else prefixed(template.task_system)
    return replace(template, name=triggered_name(template.name), system=prefixed(template.system), task_system=task)
