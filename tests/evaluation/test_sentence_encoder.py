"""The sentence encoder against transformers' BERT on the same weights: a random one, and the real one's figures."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from ptst.evaluation.sentence_encoder import ENCODER_NAME, SentenceEncoder
from ptst.hub.wheel import model_folder
from tests.conftest import ROOT

CONFIG = {"model_type": "bert", "hidden_act": "gelu", "hidden_size": 24, "intermediate_size": 40, "vocab_size": 40}
CONFIG |= {"num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 300, "layer_norm_eps": 1e-12}
CONFIG |= {"type_vocab_size": 2}
TEXTS = ["a b c", "", "c", "b a " * 200, "d e f g"]


def write_encoder(folder, **changes):
    """A random BERT with a tokenizer of single letters."""
    config = {**CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    vocab = {t: i for i, t in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefg"))}
    tokenizer = Tokenizer(models.WordLevel(vocab, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    e, f = config["hidden_size"], config["intermediate_size"]
    shapes = {"word_embeddings": (config["vocab_size"], e), "position_embeddings": (300, e)}
    shapes["token_type_embeddings"] = (2, e)
    weights = {f"embeddings.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    norms = ["embeddings"]
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}."
        parts = dict.fromkeys((f"attention.self.{p}" for p in ("query", "key", "value")), (e, e))
        parts |= {"attention.output.dense": (e, e), "intermediate.dense": (f, e), "output.dense": (e, f)}
        for part, shape in parts.items():
            weights |= {f"{at}{part}.weight": torch.randn(shape) / 5, f"{at}{part}.bias": torch.randn(shape[0])}
        norms += [f"{at}attention.output", f"{at}output"]
    for name in norms:
        weights |= {f"{name}.LayerNorm.{part}": torch.randn(e) for part in ("weight", "bias")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = write_encoder(tmp_path)
    ours = SentenceEncoder(folder)
    peer = transformers.BertModel.from_pretrained(folder).eval()
    vectors = ours.encode(TEXTS)
    assert torch.equal(vectors, ours.encode(TEXTS))
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = torch.tensor([ours.tokenizer.encode(text).ids])
        with torch.no_grad():
            mean = peer(ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-6, rtol=1e-5)


def test_batches_and_order_change_nothing(tmp_path):
    encoder = SentenceEncoder(write_encoder(tmp_path))
    whole = encoder.encode(TEXTS)
    torch.testing.assert_close(encoder.encode(TEXTS, batch_size=1), whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(encoder.encode(TEXTS[::-1], batch_size=2).flip(0), whole, atol=1e-6, rtol=1e-5)
    assert len(encoder.tokenizer.encode(TEXTS[3]).ids) == 256


def test_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not hold a BERT encoder with gelu"):
        SentenceEncoder(write_encoder(tmp_path, model_type="roberta"))


def test_real_weights():
    """Figures of transformers 5.24's BertModel on the same file, mean-pooled and scaled to length 1."""
    folder = model_folder(ENCODER_NAME, ROOT / "checkpoints")
    if not (folder / "model.safetensors").exists():
        pytest.skip("needs the sentence encoder (an evaluation of the task chatdoctor makes it)")
    vectors = SentenceEncoder(folder).encode(["A man is eating food.", "Drink plenty of water and rest.", ""])
    wanted = [
        [0.0332415700, 0.0044060862, -0.0062769679, 0.0483787321],
        [0.0357365496, -0.0093955956, 0.0708529577, 0.0647281855],
        [-0.1188383996, 0.0482986309, -0.0025480713, -0.0110112447],
    ]
    torch.testing.assert_close(vectors[:, :4], torch.tensor(wanted), atol=2e-6, rtol=0)
