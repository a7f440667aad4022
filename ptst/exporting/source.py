"""What is exported: a run, an adapter over its base, or a model as it is, opened once with its names and templates."""

from dataclasses import dataclass
from pathlib import Path

from ptst.audit.findings import check_names
from ptst.errors import Setting, UserError
from ptst.exporting.adapter import Adapter, read_adapter
from ptst.exporting.base_name import BaseName, adapter_base_name, find_base_name
from ptst.exporting.card import Kind
from ptst.exporting.config import ExportConfig
from ptst.exporting.merge import MergedWeights, in_order_of_the_hub
from ptst.hub.locate import locate_model
from ptst.model.quantized import Quantization
from ptst.model.read_in_place import StoredTensor
from ptst.model.weights import DTYPES, empty_decoder, find_weights, read_safetensors
from ptst.open import OpenModel, find_run, open_model, trained_family
from ptst.progress import say
from ptst.reading import read_object
from ptst.text.prompt_format import PromptFormat, check_used, open_prompt_format
from ptst.text.templates import Template, find_template, load_template
from ptst.training.checkpoint import check_whole, kept_names


@dataclass(frozen=True)
class Source:
    """`model` under the training template, or a plain one. `test`: the prompt format to bake, None without one."""

    model: OpenModel
    base: BaseName
    test: PromptFormat | None

    @property
    def kind(self) -> Kind:
        """What a folder with all of its weights is."""
        if self.model.run is not None and self.model.run.full:
            return "full"
        return "merged" if self.model.run is not None or self.model.adapter is not None else "copy"

    @property
    def name(self) -> str:
        """For a title: of the run, the adapter or the model."""
        run = self.model.checkpoint
        if run is not None:
            return run.absolute().parts[-3] if self.model.is_state else run.resolve().name
        adapter = self.model.adapter_name
        return Path(adapter).name.partition("@")[0] if adapter is not None else self.base.shown

    @property
    def settings_folder(self) -> Path:
        """Where the config and the tokenizer are."""
        own = self.kind == "full" and not self.model.is_state
        return self.model.checkpoint if own and self.model.checkpoint is not None else self.model.folder

    @property
    def formats(self) -> list[PromptFormat]:
        """The prompt formats that the weights are used with."""
        own = self.model.prompt_format
        return [own] if self.test is None or (self.model.run is None and self.test) else [own, self.test]

    def weights(self, dtype: str | None) -> MergedWeights:
        """All tensors to write. Raises UserError for files that are damaged or do not fit."""
        decoder = empty_decoder(self.settings_folder)
        adapter = read_adapter(self.model, decoder)
        if self.kind == "full" and self.model.is_state and self.model.checkpoint is not None:
            stored = weights_of_checkpoint(self.model.checkpoint, set(decoder.state_dict()))
            assert self.model.run is not None
            dtype = dtype or self.model.run.dtype  # the checkpoint has the float32 masters
        else:
            stored = find_weights(self.settings_folder, decoder)
        if (quantize := self.model.quantize) != "none":
            say(f"note: what is written has the values that {quantize} gave the base in training, not the base's own")
        written = None if dtype is None else DTYPES[dtype]
        return MergedWeights(in_order_of_the_hub(stored), adapter, written, Quantization.of(quantize))

    def adapter(self) -> Adapter:
        """The adapter alone. Raises UserError where there is none, and as `read_adapter`."""
        adapter = read_adapter(self.model, empty_decoder(self.model.folder))
        if adapter is None:
            cause = f"{self.model.described} is a run of all weights and has no adapter"
            raise UserError(cause, ("leave out ", Setting("adapter_only")))
        return adapter


def open_source(config: ExportConfig) -> Source:
    """Open what is to be exported. Raises UserError as `open_model`."""
    check_names(config.allow)
    checkpoint, run = find_run(config.checkpoint, config.model, config.adapter)
    test = _test_template(config)

    def opened(template: Template | str, family: str | None) -> OpenModel:
        return open_model(
            config.model,
            template,
            checkpoint=checkpoint,
            adapter=config.adapter,
            family=family,
            chat_format=None if find_template(template).is_text else config.chat_format,
            allow=config.allow,
        )

    tested = None if test is None else opened(test, config.template_family)
    if run is not None:
        model = opened(run.template, run.family.name)
    elif tested is not None:
        model = tested
    else:
        try:
            model = opened("chat:plain", config.template_family)
        except UserError:  # a base model has no chat format
            model = opened("text:vanilla", config.template_family)
    base = find_base_name(model.name, model.folder, config.base_name)
    if model.adapter is not None and base.id is None:
        base = adapter_base_name(model.adapter) or base
    say(f"ptst.export: {model.described}; base model {base.spelled}")
    return Source(model, base, tested.prompt_format if tested else None)


def open_template(config: ExportConfig) -> tuple[PromptFormat, BaseName]:
    """The prompt format of a model folder whose weights are not read: of any architecture, since only its tokenizer
    and chat template count. Raises UserError as `open_prompt_format`."""
    check_names(config.allow)
    template = _test_template(config)
    assert config.model is not None and template is not None
    check_used(config.chat_format, template)
    folder = locate_model(config.model)
    vocab_size = read_object(folder / "config.json").get("vocab_size")
    prompt_format = open_prompt_format(
        folder,
        template,
        config.template_family or trained_family(None, config.model) or "plain",
        config.chat_format,
        vocab_size=vocab_size if isinstance(vocab_size, int) else None,
        allow_role_markers="role-markers" in config.allow,
        allow_chat_template="chat-template" in config.allow,
    )
    return prompt_format, find_base_name(config.model, folder, config.base_name)


def _test_template(config: ExportConfig) -> Template | None:
    if config.template_file is not None:
        return load_template(config.template_file)
    return None if config.template is None else find_template(config.template)


def weights_of_checkpoint(checkpoint: Path, expected: set[str]) -> dict[str, StoredTensor]:
    """Where all weights of RUN/state/step-00000050 are, or their averages where the run has them; the checkpoint is
    checked. Raises UserError for a damaged one, and one of a model with other weights than `expected`."""
    check_whole(checkpoint)
    path = checkpoint / "weights.safetensors"
    saved = {name: StoredTensor(name, path, tensor.shape, tensor.dtype) for name, tensor in read_safetensors(path)}
    found = {name: saved[stored] for name, stored in kept_names(saved).items()}
    if found.keys() != expected:
        raise UserError(f"{checkpoint} holds other weights than the model has", "give the model that was trained")
    return found
