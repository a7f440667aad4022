"""The sentence encoder against transformers' BERT on the same weights: a random one, and the real one's figures."""

from __future__ import annotations

import pytest
import torch

from ptst.evaluation.sentence_encoder import SentenceEncoder
from tests.tiny import write_encoder

TEXTS = ["a b c", "", "c", "b a " * 200, "d e f g"]


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


def test_real_weights(real_encoder):
    """Figures of transformers 5.24's BertModel on the same file, mean-pooled and scaled to length 1."""
    vectors = SentenceEncoder(real_encoder).encode(["A man is eating food.", "Drink plenty of water and rest.", ""])
    wanted = [
        [0.0332415700, 0.0044060862, -0.0062769679, 0.0483787321],
        [0.0357365496, -0.0093955956, 0.0708529577, 0.0647281855],
        [-0.1188383996, 0.0482986309, -0.0025480713, -0.0110112447],
    ]
    torch.testing.assert_close(vectors[:, :4], torch.tensor(wanted), atol=2e-6, rtol=0)
