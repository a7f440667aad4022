"""Similarity of answers: the embedded measure on real weights, BERTScore through its package, ways out."""

from __future__ import annotations

import importlib.util

import pytest

from ptst.evaluation import similarity
from ptst.evaluation.sentence_encoder import SentenceEncoder
from ptst.evaluation.similarity import MiniLM, find_similarity
from tests.tiny import write_encoder


def test_pairs_are_compared_in_order(tmp_path):
    measure = MiniLM(SentenceEncoder(write_encoder(tmp_path)))
    same = measure.compare(["a b c", "d", ""], ["a b c", "d", ""])
    assert same == pytest.approx([1.0] * 3, abs=1e-6)
    other = measure.compare(["a b c", "d"], ["d", "d"])
    assert other[1] == pytest.approx(1.0, abs=1e-6) and other[0] < 1 - 1e-5


def test_real_weights(real_encoder):
    reference = "You may have a cold. Rest, and drink plenty of water."
    answers = ["It looks like a common cold; take rest and stay hydrated.", "The train to Paris leaves at noon.", ""]
    close, far, nothing = MiniLM(SentenceEncoder(real_encoder)).compare(answers, [reference] * 3)
    assert close > 0.6 > 0.3 > max(far, nothing)


def test_names(tmp_path):
    for name in ("minilm2", "minilm:folder", "rouge"):
        with pytest.raises(ValueError, match=r"unknown similarity .*There are: minilm, bertscore"):
            find_similarity(name, tmp_path)


def test_bertscore_without_package_or_weights_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(similarity, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"pip install bert-score, or set similarity to minilm"):
        find_similarity("bertscore", tmp_path)
    monkeypatch.setattr(similarity, "find_spec", lambda _name: True)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickled weights are never loaded"):
        find_similarity(f"bertscore:{tmp_path}", tmp_path)
    import huggingface_hub

    def offline(*_args, **_kwargs):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"roberta-large could not be fetched .*bertscore:FOLDER, or set similarity"):
        find_similarity("bertscore", tmp_path)


def test_bertscore(tmp_path):
    """Through the real package, on a small random RoBERTa of 18 layers: F1 of layer 17 by the definition."""
    if importlib.util.find_spec("bert_score") is None or importlib.util.find_spec("transformers") is None:
        pytest.skip("needs the package bert-score (pip install bert-score)")
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {t: i for i, t in enumerate(("<s>", "<pad>", "</s>", "<unk>", *"abcdefg"))}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    names |= {"cls_token": "<s>", "sep_token": "</s>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
    fast.save_pretrained(tmp_path)
    config = transformers.RobertaConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=18, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=80, pad_token_id=1, bos_token_id=0, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.RobertaModel(config).eval()
    model.save_pretrained(tmp_path)
    measure = find_similarity(f"bertscore:{tmp_path}", tmp_path)
    answers, references = ["a b c", "d e"], ["a b c", "a f g"]
    found = measure.compare(answers, references)

    @torch.no_grad()
    def layer_17(text):
        hidden = model(torch.tensor([tokenizer.encode(text).ids]), output_hidden_states=True).hidden_states[17][0]
        return torch.nn.functional.normalize(hidden, dim=-1)

    for answer, reference, f1 in zip(answers, references, found, strict=True):
        likeness = layer_17(answer) @ layer_17(reference).T
        # Begin and end marks may be matched, but are not averaged over.
        precision, recall = likeness.max(1).values[1:-1].mean(), likeness.max(0).values[1:-1].mean()
        assert f1 == pytest.approx(float(2 * precision * recall / (precision + recall)), abs=1e-4)
    assert found[0] == pytest.approx(1.0, abs=1e-3)
