"""A prompt format as `chat_template.jinja`, proven to give ptst's own ids before it is written."""

from ptst.exporting.card import BakedTemplate
from ptst.progress import say
from ptst.text.bake import bake_chat_template
from ptst.text.bake_proof import prove_chat_template
from ptst.text.prompt_format import PromptFormat


def bake(prompt_format: PromptFormat) -> BakedTemplate:
    """The chat template of a prompt format and its proof. Raises UserError for what cannot be said in Jinja, and where
    the ids differ."""
    say(f"baking {prompt_format.template.name}, {prompt_format.described}")
    jinja = bake_chat_template(prompt_format)
    proof = prove_chat_template(jinja, prompt_format)
    say(f"proven: {proof}")
    needs = tuple(
        f'It needs "{key}": {str(value).lower()} in tokenizer_config.json, where transformers reads Llama\'s class.'
        for key, value in proof.settings.items()
    )
    return BakedTemplate(
        prompt_format.template,
        prompt_format.family,
        prompt_format.format_name,
        jinja,
        (f"Proven: {proof}.", *needs),
        tuple(f"{name} ({count}): {proof.reasons[name]}" for name, count in proof.differences.items()),
        proof.settings,
    )
