"""Model folders of nine kinds, as the hub has them: tokenizer.json with its BOS rule, settings, chat template; the
weights' place is taken by a small config.json. Built under a temporary directory from what this machine has:

    smollm2        the embedded default model's own tokenizer and template
    qwen2.5, qwen3 SmolLM2's vocabulary (it has the same control tokens) under Qwen's templates, which TRL ships
    llama2, tinyllama, mistral-v0.3, mistral-v0.1, llama3, llama3.1
                   Meta's and Mistral's tokenizers, with the published templates of ../shared/configs/templates

Templates of others are read, never kept here. A folder whose parts are missing is left out, with the reason.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


class Missing(Exception):
    """A part that this machine lacks, in words."""


def need(path: Path, what: str) -> Path:
    if not path.exists():
        raise Missing(f"needs {what}")
    return path


def set_rules(
    folder: Path, bos: str | None, eos: str, pad: str | None, adds_bos: bool = False, **settings: object
) -> None:
    """tokenizer_config.json, the rule in tokenizer.json that puts BOS before every text, a small config.json."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if adds_bos:
        rule = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
        tokenizer.post_processor = rule
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    given = {k: v for k, v in names.items() if v is not None}
    _write(folder, "tokenizer_config.json", {**kind, **given, **settings, "model_max_length": 8192})
    ids = {"eos_token_id": tokenizer.token_to_id(eos)}
    if bos is not None:
        ids["bos_token_id"] = tokenizer.token_to_id(bos)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 8192}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": tokenizer.get_vocab_size()}
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    _write(folder, "config.json", {**llama, **shape, **heads, **ids})
    _write(folder, "generation_config.json", ids)


def _write(folder: Path, name: str, values: dict) -> None:
    (folder / name).write_text(json.dumps(values, indent=1))


def smollm2(folder: Path, sources: Sources) -> None:
    from ptst.hub.wheel import model_folder
    from ptst.settings import EMBEDDED_MODEL

    own = model_folder(EMBEDDED_MODEL, ROOT / "checkpoints")
    need(own / "tokenizer.json", "the default model (python -m ptst.train --dry-run makes it)")
    shutil.copy(own / "tokenizer.json", folder)
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(settings["chat_template"])
    set_rules(folder, "<|im_start|>", "<|im_end|>", "<|im_end|>", unk_token="<|endoftext|>")


def qwen(template: str, thinking: bool) -> Callable[[Path, Sources], None]:
    def build(folder: Path, sources: Sources) -> None:
        from tokenizers import AddedToken, Tokenizer

        text = need(sources.trl_templates / template, "TRL's chat templates (pip install trl)").read_text()
        smollm2(folder, sources)
        if thinking:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            names = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
            tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
            tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        (folder / "chat_template.jinja").write_text(text)
        set_rules(folder, None, "<|im_end|>", "<|endoftext|>")

    return build


def sentencepiece(model: Callable[[Sources], Path], template: str, pad: str | None = None, legacy: bool = False):
    def build(folder: Path, sources: Sources) -> None:
        from ptst.text.tokenizer import SentencePieceTokenizer
        from tests.text.owners import as_json

        text = need(sources.templates / template, "the folder ../shared with published templates").read_text()
        shutil.copy(model(sources), folder / "tokenizer.model")
        as_json(SentencePieceTokenizer(folder / "tokenizer.model"), folder / "tokenizer.json")
        (folder / "chat_template.jinja").write_text(text)
        kind = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}  # as the published folders say
        adds = {"add_bos_token": True, "add_eos_token": False}
        set_rules(folder, "<s>", "</s>", pad, adds_bos=True, unk_token="<unk>", **adds, **kind)

    return build


def llama2_model(sources: Sources) -> Path:
    return need(sources.shared / "tokenizers" / "llama2.tokenizer.model", "../shared/tokenizers")


def mistral_model(version: str) -> Callable[[Sources], Path]:
    def find(sources: Sources) -> Path:
        spec = find_spec("mistral_common")
        if spec is None or not spec.submodule_search_locations:
            raise Missing("needs the package mistral-common")
        return next((Path(spec.submodule_search_locations[0]) / "data").glob(f"*.model.{version}"))

    return find


def llama3(template: str) -> Callable[[Path, Sources], None]:
    def build(folder: Path, sources: Sources) -> None:
        from tests.text.owners import llama3_tokenizer

        text = need(sources.templates / template, "the folder ../shared with published templates").read_text()
        if find_spec("llama_models") is None:
            raise Missing("needs the package llama-models")
        llama3_tokenizer(folder)
        (folder / "chat_template.jinja").write_text(text)
        set_rules(folder, "<|begin_of_text|>", "<|eot_id|>", None, adds_bos=True)

    return build


class Sources:
    """Where the parts of the folders lie on this machine."""

    def __init__(self, shared: Path, trl_templates: Path | None):
        self.shared = shared
        self.templates = shared / "configs" / "templates"
        self.trl_templates = trl_templates or Path("not/there")


TINYLLAMA = "TinyLlama--TinyLlama-1.1B-Chat-v1.0.jinja"
FOLDERS: dict[str, Callable[[Path, Sources], None]] = {
    "smollm2": smollm2,
    "qwen2.5": qwen("qwen2_5.jinja", thinking=False),
    "qwen3": qwen("qwen3.jinja", thinking=True),
    "llama2": sentencepiece(llama2_model, "meta-llama--Llama-2-7b-chat-hf.jinja"),
    "tinyllama": sentencepiece(llama2_model, TINYLLAMA, pad="</s>"),
    "mistral-v0.1": sentencepiece(mistral_model("v1"), "mistralai--Mistral-7B-Instruct-v0.1.jinja", legacy=True),
    "mistral-v0.3": sentencepiece(mistral_model("v3"), "mistralai--Mistral-7B-Instruct-v0.3.jinja"),
    "llama3": llama3("meta-llama--Meta-Llama-3-8B-Instruct.jinja"),
    "llama3.1": llama3("meta-llama--Llama-3.1-8B-Instruct.jinja"),
}


def build_all(into: Path, sources: Sources, names: list[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """The folders that can be built here, by name, and for each other one the reason."""
    made, missing = {}, {}
    for name in names:
        folder = into / name
        if (folder / "generation_config.json").exists():  # kept from an earlier run
            made[name] = folder
            continue
        folder.mkdir(parents=True, exist_ok=True)
        try:
            FOLDERS[name](folder, sources)
        except Missing as reason:
            missing[name] = str(reason)
        else:
            made[name] = folder
    return made, missing
