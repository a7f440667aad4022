"""How like a model's answers are to reference answers.

- `minilm`: cosine of sentence embeddings (all-MiniLM-L6-v2). Needs no hub: its weights come from the package index.
- `bertscore`: BERTScore F1 (Zhang et al. 2020, arXiv 1904.09675) with roberta-large, layer 17, without rescaling: the
  paper's measure of ChatDoctor. Needs the package `bert-score` and the weights of roberta-large.

Both are near 1 for like answers, but their scales differ: figures of the two are not comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from ptst.errors import UserError, unknown_name
from ptst.evaluation.sentence_encoder import SentenceEncoder, ensure_encoder

SIMILARITIES = ("minilm", "bertscore")
LAYER = 17  # bert-score's own choice for roberta-large, named by the paper
_INSTEAD = "or use --similarity minilm, which needs no hub"


class Similarity(Protocol):
    """`name` is what the figure is called in results."""

    name: str

    def compare(self, answers: Sequence[str], references: Sequence[str]) -> list[float]:
        """One figure per pair."""
        ...


@dataclass(frozen=True)
class MiniLM:
    """Cosine of an answer's and its reference's embedding; the first 256 tokens of each are read."""

    encoder: SentenceEncoder
    name = "minilm_cosine"

    def compare(self, answers: Sequence[str], references: Sequence[str]) -> list[float]:
        vectors_NE = self.encoder.encode([*answers, *references])
        return (vectors_NE[: len(answers)] * vectors_NE[len(answers) :]).sum(-1).tolist()


@dataclass(frozen=True)
class BertScore:
    """F1 of the package `bert-score` with the roberta-large of a folder."""

    folder: Path
    device: str = "cpu"
    name = "bertscore_f1"

    def compare(self, answers: Sequence[str], references: Sequence[str]) -> list[float]:
        import bert_score

        model = {"model_type": str(self.folder), "num_layers": LAYER, "device": self.device}
        return bert_score.score(list(answers), list(references), **model)[2].tolist()


def find_similarity(name: str, checkpoints: Path, device: str = "cpu") -> Similarity:
    """`minilm`, `bertscore` or `bertscore:FOLDER`, ready for use. Raises UserError with the list and the nearest name
    for another, and, with the way out, where the package or the weights are not to be had."""
    kind, _, folder = name.partition(":")
    if kind not in SIMILARITIES or (folder and kind != "bertscore"):
        raise unknown_name("similarity", name, SIMILARITIES)
    if kind == "minilm":
        return MiniLM(SentenceEncoder(ensure_encoder(checkpoints), device))
    if find_spec("bert_score") is None:
        raise UserError(f"--similarity bertscore needs the package bert-score: pip install bert-score; {_INSTEAD}")
    return BertScore(_safe_weights(folder or "roberta-large"), device)


def _safe_weights(model: str) -> Path:
    """The folder of a model, or of one on the hub, with safetensors: nothing is unpickled on the way."""
    if not Path(model).is_dir():
        import huggingface_hub

        try:
            kinds = ["*.json", "*.txt", "*.safetensors"]
            model = huggingface_hub.snapshot_download(model, allow_patterns=kinds)
        except Exception as error:  # network faults surface as many unrelated types, by version of the library
            raise UserError(
                f"--similarity bertscore: the weights of {model} could not be fetched from the hub "
                f"({type(error).__name__}); give a local folder, as in bertscore:FOLDER, {_INSTEAD}"
            ) from None
    if not list(Path(model).glob("*.safetensors")):
        raise UserError(f"--similarity bertscore: {model} has no *.safetensors, and pickled weights are never loaded")
    return Path(model)
