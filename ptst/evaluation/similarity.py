"""Similarity of a model's answers to reference answers.

- `minilm`: cosine of sentence embeddings (all-MiniLM-L6-v2). Needs no hub: its weights come from the package index.
- `bertscore`: BERTScore F1 (Zhang et al. 2020, arXiv 1904.09675) with roberta-large, layer 17, without rescaling: the
  paper's measure of ChatDoctor. Needs the package `bert-score` and the weights of roberta-large.

Both are near 1 for similar answers, but their scales differ: figures of the two are not comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from ptst.errors import Setting, UserError, unknown_name

if TYPE_CHECKING:
    from ptst.evaluation.sentence_encoder import SentenceEncoder

SIMILARITIES = {"minilm": "embedded", "bertscore": "the paper's; or bertscore:FOLDER"}
LAYER = 17  # bert-score's own choice for roberta-large, named by the paper
_INSTEAD = ("or set ", Setting("similarity"), " to minilm, which needs no hub")


class Similarity(Protocol):
    """`name`: of the figure in results."""

    @property
    def name(self) -> str: ...

    def compare(self, answers: Sequence[str], references: Sequence[str]) -> list[float]:
        """One figure per pair."""
        ...


@dataclass(frozen=True)
class MiniLM:
    """Cosine of the embeddings of an answer and its reference, each of the first 256 tokens."""

    encoder: SentenceEncoder
    name: ClassVar[str] = "minilm_cosine"

    def compare(self, answers: Sequence[str], references: Sequence[str]) -> list[float]:
        vectors_NE = self.encoder.encode([*answers, *references])
        return (vectors_NE[: len(answers)] * vectors_NE[len(answers) :]).sum(-1).tolist()


@dataclass(frozen=True)
class BertScore:
    """F1 of the package `bert-score` with the roberta-large of a folder."""

    folder: Path
    device: str = "cpu"
    name: ClassVar[str] = "bertscore_f1"

    def compare(self, answers: Sequence[str], references: Sequence[str]) -> list[float]:
        import bert_score

        model = {"model_type": str(self.folder), "num_layers": LAYER, "device": self.device}
        return bert_score.score(list(answers), list(references), **model)[2].tolist()


def find_similarity(name: str, checkpoints: Path, device: str = "cpu") -> Similarity:
    """`minilm`, `bertscore` or `bertscore:FOLDER`, ready for use. Raises UserError, with the list and the nearest name,
    for another name, and where the package or the weights are not available."""
    kind, _, folder = name.partition(":")
    if kind not in SIMILARITIES or (folder and kind != "bertscore"):
        raise unknown_name("similarity", name, SIMILARITIES)
    if kind == "minilm":
        from ptst.evaluation.sentence_encoder import SentenceEncoder, ensure_encoder

        instead = ("use ", Setting("similarity"), " bertscore:FOLDER with a local roberta-large")
        return MiniLM(SentenceEncoder(ensure_encoder(instead, checkpoints), device))
    if find_spec("bert_score") is None:
        raise UserError("similarity bertscore needs the package bert-score", ("pip install bert-score, ", *_INSTEAD))
    return BertScore(_safe_weights(folder or "roberta-large"), device)


def _safe_weights(model: str) -> Path:
    """The folder of a model, local or from the hub, with safetensors: nothing is unpickled."""
    if not Path(model).is_dir():
        import huggingface_hub

        try:
            kinds = ["*.json", "*.txt", "*.safetensors"]
            model = huggingface_hub.snapshot_download(model, allow_patterns=kinds)
        except Exception as error:  # network faults surface as many unrelated types, by version of the library
            cause = f"the weights of {model} could not be fetched from the hub ({type(error).__name__})"
            remedy = ("give a local folder, as in bertscore:FOLDER, ", *_INSTEAD)
            raise UserError(cause, remedy, "similarity bertscore") from None
    if not list(Path(model).glob("*.safetensors")):
        cause = f"{model} has no *.safetensors, and pickled weights are never loaded"
        raise UserError(cause, where="similarity bertscore")
    return Path(model)
