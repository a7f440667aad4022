"""Defended models put together from files, against the papers' formulas over the same files in numpy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ptst.defenses.compose import Composition, compose, load_defended
from ptst.defenses.config import WeightSpaceSettings
from ptst.errors import UserError
from ptst.model.weights import hf_name, load_decoder
from ptst.open import open_model
from tests.defenses.conftest import RANKS, changed
from tests.tiny import FAMILIES, write_tiny_model

Weights = dict[str, np.ndarray]
CLOSE = {"rtol": 0, "atol": 1e-10}


def numpy_weights(folder: Path) -> Weights:
    return {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def numpy_updates(zoo: Path) -> Weights:
    """B A of the adapter by projection; peft's factor is alpha / rank."""
    from ptst.model.adapter_files import read_lora_config

    matrices = load_file(zoo / "adapter" / "adapter_model.safetensors")
    found = {}
    for name, (_, scale) in read_lora_config(zoo / "adapter").places(RANKS).items():
        a, b = (matrices[f"base_model.model.model.{name}.lora_{part}.weight"].double().numpy() for part in "AB")
        found[f"model.{name}.weight"] = scale * (b @ a)
    return found


def is_projection(name: str) -> bool:
    return name.endswith("_proj.weight")


def settings(zoo: Path, **given) -> WeightSpaceSettings:
    return WeightSpaceSettings(unaligned=str(zoo / "before"), safe_model=str(zoo / "safe"), **given)


def made(zoo: Path, name: str, tuned: str = "tuned", **given) -> Composition:
    return compose(name, settings(zoo, **given), ("aligned", zoo / "aligned"), zoo / tuned)


def assert_weights(composition: Composition, wanted: Weights) -> None:
    decoder = load_defended(composition, torch.float64)
    found = {hf_name(key): value.numpy() for key, value in decoder.state_dict().items()}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.allclose(found[name], value, **CLOSE), name


def tuned_weights(zoo: Path, tuned: str) -> Weights:
    if tuned == "tuned":
        return numpy_weights(zoo / "tuned")
    return {name: w + numpy_updates(zoo).get(name, 0.0) for name, w in numpy_weights(zoo / "aligned").items()}


BOTH = pytest.mark.parametrize("tuned", ["tuned", "adapter"])


@BOTH
def test_wise_ft(zoo, tuned):
    aligned, after = numpy_weights(zoo / "aligned"), tuned_weights(zoo, tuned)
    wanted = {name: 0.7 * aligned[name] + 0.3 * after[name] for name in aligned}
    assert_weights(made(zoo, "wise-ft", tuned, alpha=0.3), wanted)


@BOTH
def test_resta(zoo, tuned):
    aligned, before, after = numpy_weights(zoo / "aligned"), numpy_weights(zoo / "before"), tuned_weights(zoo, tuned)
    wanted = {name: after[name] + 0.4 * (aligned[name] - before[name]) for name in aligned}
    assert_weights(made(zoo, "resta", tuned, scale=0.4), wanted)


@BOTH
def test_resta_with_dare(zoo, tuned):
    """Each value of the update is either gone or divided by 1 - p, whatever the order of the tensors."""
    composition = made(zoo, "resta", tuned, scale=0.0, drop=0.5)
    aligned, after = numpy_weights(zoo / "aligned"), tuned_weights(zoo, tuned)
    kept = total = 0
    for key in reversed([*composition.tuned.stored]):
        left = composition.tensor(key).numpy() - aligned[hf_name(key)]
        update = after[hf_name(key)] - aligned[hf_name(key)]
        gone = np.abs(left) < 1e-12
        assert np.allclose(left[~gone], update[~gone] / 0.5, rtol=0, atol=1e-9), key
        kept, total = kept + (~gone).sum(), total + (np.abs(update) > 1e-9).sum()
    assert 0.4 < kept / total < 0.6
    masks = [composition.tensor(f"layers.{i}.mlp.down_proj.weight").numpy() for i in range(2)]
    masks = [np.abs(m - aligned[f"model.layers.{i}.mlp.down_proj.weight"]) < 1e-12 for i, m in enumerate(masks)]
    assert (masks[0] != masks[1]).any()  # each tensor has its own
    again, other = made(zoo, "resta", tuned, scale=0.0, drop=0.5), made(zoo, "resta", tuned, drop=0.5, drop_seed=1)
    key = "layers.0.self_attn.q_proj.weight"
    assert torch.equal(again.tensor(key), composition.tensor(key))
    assert not torch.equal(other.tensor(key), composition.tensor(key))


def safe_lora(zoo: Path, tuned: str) -> tuple[Weights, dict[str, float]]:
    """C dW of every projection, and its cosine with dW, with C as a matrix."""
    aligned, before, after = numpy_weights(zoo / "aligned"), numpy_weights(zoo / "before"), tuned_weights(zoo, tuned)
    updates, cosines = {}, {}
    for name in filter(is_projection, aligned):
        v, update = aligned[name] - before[name], after[name] - aligned[name]
        if update.any():
            c = v @ v.T / np.sqrt((v**2).sum())
            updates[name] = c @ update
            cosines[name] = (updates[name] * update).sum() / np.sqrt((updates[name] ** 2).sum() * (update**2).sum())
    return updates, cosines


@BOTH
def test_safe_lora(zoo, tuned):
    """Above the middle cosine an update stays, below it is projected; embedding and norms stay as tuned."""
    updates, cosines = safe_lora(zoo, tuned)
    threshold = float(np.median([*cosines.values()])) + 1e-9
    wanted = tuned_weights(zoo, tuned)
    for name, weight in numpy_weights(zoo / "aligned").items():
        if cosines.get(name, 1.0) < threshold:
            wanted[name] = weight + updates[name]
    composition = made(zoo, "safe-lora", tuned, threshold=threshold)
    assert_weights(composition, wanted)
    found = {hf_name(key): cosine for key, cosine in composition.cosines.items() if cosine is not None}
    assert found == pytest.approx(cosines, abs=1e-9)
    assert 0 < len(composition.changed) < len(cosines)
    assert made(zoo, "safe-lora", tuned, threshold=threshold, num_projected=1).changed == {
        min(composition.changed, key=composition.cosines.__getitem__)
    }


@BOTH
def test_safe_merge(zoo, tuned):
    _, cosines = safe_lora(zoo, tuned)
    safe, wanted = numpy_weights(zoo / "safe"), tuned_weights(zoo, tuned)
    threshold = float(np.median([*cosines.values()])) + 1e-9
    for name in cosines:
        if cosines[name] < threshold:  # both updates are over the same aligned weight
            wanted[name] = 0.7 * wanted[name] + 0.3 * safe[name]
    assert_weights(made(zoo, "safe-merge", tuned, threshold=threshold, safe_share=0.3), wanted)


def test_a_run_of_each_kind(zoo, run, full_run, tmp_path):
    """Its end, an epoch and a checkpoint give what they give when they are opened."""
    after = [run, run / "epoch-0.5", run / "state" / "step-00000001", full_run, full_run / "state" / "step-00000001"]
    for folder in after:
        composition = compose("wise-ft", WeightSpaceSettings(alpha=1.0), ("plain", zoo / "plain"), folder)
        wanted = open_model(checkpoint=folder, template="chat:vanilla").load(torch.float32).state_dict()
        found = load_defended(composition).state_dict()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted) and found.keys() == wanted.keys(), folder
        composition = replace(composition, settings=WeightSpaceSettings(alpha=0.0))
        base = load_decoder(zoo / "plain").state_dict()
        assert all(torch.equal(value, base[key]) for key, value in load_defended(composition).state_dict().items())


def test_biases_and_a_head_of_its_own(tmp_path):
    """Qwen2's: interpolated as all weights, and no projections for Safe LoRA, which leaves them as tuned."""
    (tmp_path / "aligned").mkdir()
    write_tiny_model(tmp_path / "aligned", tie_word_embeddings=False, **FAMILIES["qwen2"])
    tuned = changed(tmp_path / "aligned", tmp_path / "tuned", 1, 0.1)
    before = changed(tmp_path / "aligned", tmp_path / "before", 2, 0.1)
    given = WeightSpaceSettings(unaligned=str(before), num_projected=99)
    aligned, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "aligned", tuned))
    mixed, projected = (
        load_defended(compose(name, given, ("aligned", tmp_path / "aligned"), tuned)).state_dict()
        for name in ("wise-ft", "safe-lora")
    )
    for key in ("layers.1.self_attn.q_proj.bias", "lm_head.weight", "embed_tokens.weight", "norm.weight"):
        assert torch.allclose(mixed[key], (aligned[hf_name(key)] + after[hf_name(key)]) / 2, atol=1e-6), key
        assert torch.equal(projected[key], after[hf_name(key)]), key
    changes = [key for key, value in projected.items() if not torch.equal(value, after[hf_name(key)])]
    assert len(changes) == 2 * 7 and all(map(is_projection, changes))


def test_the_fingerprint_follows_what_the_weights_follow_from(zoo, tmp_path):
    first = made(zoo, "resta").fingerprint
    assert made(zoo, "resta", alpha=0.1, drop_seed=7).fingerprint == first  # wise-ft's; nothing is dropped
    others = [made(zoo, "resta", scale=0.1), made(zoo, "resta", drop=0.1), made(zoo, "resta", drop=0.1, drop_seed=7)]
    others += [made(zoo, "resta", "adapter"), made(zoo, "safe-lora"), made(zoo, "safe-lora", projection="orthogonal")]
    before = changed(zoo / "before", tmp_path / "other", 9, 0.1)
    others += [compose("resta", WeightSpaceSettings(unaligned=str(before)), ("a", zoo / "aligned"), zoo / "tuned")]
    assert len({first, *(other.fingerprint for other in others)}) == len(others) + 1


def refused(zoo: Path, name: str, tuned: Path | None = None, base: str = "aligned", **given) -> str:
    with pytest.raises(UserError) as error:
        compose(name, replace(settings(zoo), **given), (base, zoo / base), tuned or zoo / "tuned")
    return str(error.value)


def test_models_that_do_not_fit(zoo, run, full_run, tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    write_tiny_model(rows, vocab_size=304)
    assert "its embedding has 304 rows, that of aligned 300" in refused(zoo, "resta", unaligned=str(rows))
    assert "checkpoint" in refused(zoo, "wise-ft", rows) and "304 rows" in refused(zoo, "wise-ft", rows)
    deep = tmp_path / "deep"
    deep.mkdir()
    write_tiny_model(deep, num_hidden_layers=3)
    assert "is not of the shape of the aligned model" in refused(zoo, "safe-lora", unaligned=str(deep))
    assert "missing in aligned" in refused(zoo, "safe-merge", safe_model=str(deep))
    assert "unaligned nowhere: " in refused(zoo, "resta", unaligned="nowhere")
    assert "resta needs the model before its alignment" in refused(zoo, "resta", unaligned=None)
    assert "has the weights of the aligned model" in refused(zoo, "safe-lora", unaligned=str(zoo / "aligned"))
    assert "unknown defense in weight space 'ema'" in refused(zoo, "ema")
    for folder in (run, full_run, run / "state" / "step-00000001"):  # over `plain`
        assert "was tuned from other weights than aligned has" in refused(zoo, "wise-ft", folder)
    (tmp_path / "empty").mkdir()
    assert "holds no model" in refused(zoo, "wise-ft", tmp_path / "empty")


def test_weights_that_are_not_finite_have_no_cosine(zoo, tmp_path):
    """And are no reason to leave an update as it is."""
    broken = changed(zoo / "before", tmp_path / "broken", 1, 0.01)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    given = WeightSpaceSettings(unaligned=str(broken))
    composition = compose("safe-lora", given, ("aligned", zoo / "aligned"), zoo / "tuned")
    with pytest.raises(UserError, match=r"the cosine of model.layers.1.mlp.up_proj.weight is nan; look at the models"):
        _ = composition.changed


def test_the_same_values_in_another_file_are_the_same_weights(zoo, tmp_path):
    """Not the bytes of the files count: an unaligned model in bfloat16 that was aligned in no weight is refused."""
    halves = changed(zoo / "plain", tmp_path / "halves", 0, 0.0, torch.bfloat16)
    floats = changed(halves, tmp_path / "floats", 0, 0.0, torch.float32)
    with pytest.raises(UserError, match="has the weights of the aligned model"):
        compose("resta", WeightSpaceSettings(unaligned=str(halves)), ("floats", floats), zoo / "tuned")


def test_weights_that_a_type_cannot_hold(zoo, tmp_path):
    large = changed(zoo / "plain", tmp_path / "large", 0, 0.0)
    weights = load_file(large / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, large / "model.safetensors", {"format": "pt"})
    composition = compose("wise-ft", WeightSpaceSettings(alpha=1.0), ("plain", zoo / "plain"), large)
    with pytest.raises(
        UserError, match=r"model\.norm\.weight has values that float16 cannot hold; give dtype bfloat16"
    ):
        load_defended(composition, torch.float16)
    assert load_defended(composition, torch.bfloat16).norm.weight[0] > 9e5
