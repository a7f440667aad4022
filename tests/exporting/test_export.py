"""What an export holds: weights merged and rounded once, in files as the hub has them, and what others read of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from ptst.defenses.models import open_aligned, open_tuned
from ptst.exporting import merge, shards
from ptst.exporting.config import ExportConfig
from ptst.exporting.export import export_model
from ptst.fingerprints import weights_fingerprint
from ptst.model.adapter_files import read_lora_config
from ptst.open import open_model
from tests.exporting.conftest import train
from tests.model.peft_cases import config_of, write_adapter
from tests.tiny import write_tiny_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS = [f"layers.{i}.{'mlp' if p[0] in 'gud' else 'self_attn'}.{p}" for i in range(2) for p in ALL]


def export(out: Path, **settings):
    return export_model(ExportConfig(out=out, **{"check": False, **settings}))


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("model*.safetensors")) for k, v in load_file(path).items()}


def by_hand(model: Path, adapter: Path, scale: float, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The merged weights from the files alone, without a line of ptst's."""
    weights, matrices = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, weight in weights.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        merged = weight.float()
        if f"{key}.lora_A.weight" in matrices:
            merged = merged + scale * (matrices[f"{key}.lora_B.weight"] @ matrices[f"{key}.lora_A.weight"])
        weights[name] = merged.to(dtype or weight.dtype)
    return weights


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_merged_in_float32_and_rounded_once(run, model, tmp_path, dtype):
    report = export(tmp_path / "out", checkpoint=run, dtype=dtype)
    assert_same(weights_in(tmp_path / "out"), by_hand(model, run, 32.0 / 2, dtype and DTYPES[dtype]))
    assert report.kind == "merged" and json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 300
    if dtype:
        assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_of_a_bfloat16_base(tmp_path):
    """The type of each tensor of the base's files stays; the sum is never rounded before it is whole."""
    (tmp_path / "half").mkdir()
    model = write_tiny_model(tmp_path / "half", torch_dtype="float32")
    weights = load_file(model / "model.safetensors")
    halves = {k: v if v.dim() == 1 else v.bfloat16() for k, v in weights.items()}  # norms in float32
    save_file(halves, model / "model.safetensors", {"format": "pt"})
    adapter = write_adapter(tmp_path / "adapter", config_of("dump"), dict.fromkeys(PROJECTIONS, 2))
    export(tmp_path / "out", model=str(model), adapter=adapter)
    assert_same(weights_in(tmp_path / "out"), by_hand(model, adapter, 3 / 2))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("case", ["patterns", "patterns rslora", "rslora", "alpha pattern"])
def test_anybodys_adapter(model, tmp_path, case):
    """Ranks and scales by pattern; merged, and alone, where the patterns stay as they were."""
    config = config_of(case) | {"base_model_name_or_path": "org/base", "revision": "v2"}
    places = read_lora_config_of(tmp_path, config).places(PROJECTIONS)
    adapter = write_adapter(tmp_path / "adapter", config, {name: rank for name, (rank, _) in places.items()})
    export(tmp_path / "merged", model=str(model), adapter=adapter)
    weights, matrices = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    found = weights_in(tmp_path / "merged")
    for name, (_, scale) in places.items():
        a, b = (matrices[f"base_model.model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        wanted = weights[f"model.{name}.weight"].double() + scale * (b @ a)
        assert (scale * (b @ a)).abs().max() > 1e-3  # far more than the tolerance below
        assert torch.allclose(found[f"model.{name}.weight"].double(), wanted, rtol=0, atol=2e-6), name
    export(tmp_path / "alone", model=str(model), adapter=adapter, adapter_only=True)
    described = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    assert described == config
    assert_same(load_file(tmp_path / "alone" / "adapter_model.safetensors"), matrices)


def read_lora_config_of(folder: Path, config: dict):
    (folder / "described").mkdir()
    (folder / "described" / "adapter_config.json").write_text(json.dumps(config))
    return read_lora_config(folder / "described")


def test_tensors_of_other_trainers_get_pefts_names(model, tmp_path):
    ranks = {"layers.0.self_attn.q_proj": 2, "layers.1.self_attn.q_proj": 2}
    config = config_of("names") | {"target_modules": ["q_proj"]}
    plain = write_adapter(tmp_path / "plain", config, ranks)
    wrapped = lambda key: f"_orig_mod.{key}".replace(".weight", ".default.weight")  # noqa: E731
    odd = write_adapter(tmp_path / "odd", config, ranks, wrapped)
    export(tmp_path / "out", model=str(model), adapter=odd, adapter_only=True, base_name="a/b")
    files = (folder / "adapter_model.safetensors" for folder in (tmp_path / "out", plain))
    assert_same(*map(load_file, files))


def test_a_checkpoint_of_a_run(run, model, tmp_path):
    state = run / "state" / "step-00000001"
    export(tmp_path / "merged", checkpoint=state)
    export(tmp_path / "alone", checkpoint=state, adapter_only=True, base_name="org/tiny")
    stored = load_file(state / "weights.safetensors")
    alone = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    assert {f"base_model.model.model.{k}.weight" for k in stored} == alone.keys()
    assert all(torch.equal(alone[f"base_model.model.model.{k}.weight"], v) for k, v in stored.items())
    assert_same(weights_in(tmp_path / "merged"), by_hand(model, tmp_path / "alone", 32.0 / 2))
    last = by_hand(model, run, 32.0 / 2)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights_in(tmp_path / "merged")[name], last[name])
    assert json.loads((tmp_path / "merged" / "export.json").read_text())["step"] == 1
    assert "the weights of step 1" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize("full", [True, False])
def test_a_checkpoint_with_an_average_and_an_anchor(model, tmp_path, full):
    """Of the last step it gives what the run's folder gives, which is the average, whoever opens it."""
    safe = {"average": 0.5, "proximal": 1.0} | ({"full": True} if full else {"rank": 2})
    trained = train(model, tmp_path / "run", save_every=1, **safe)
    export(tmp_path / "end", checkpoint=trained)
    export(tmp_path / "state", checkpoint=trained / "state" / "step-00000002")
    assert_same(weights_in(tmp_path / "state"), weights_in(tmp_path / "end"))
    state = open_tuned(trained / "state" / "step-00000002", open_aligned("model", model), "checkpoint")
    for name, weight in weights_in(tmp_path / "end").items():
        assert torch.equal(state.tensor(name.removeprefix("model."), torch.float32, "cpu"), weight), name
    own = load_file(trained / "state" / "step-00000002" / "weights.safetensors")
    assert any(not torch.equal(own[f"average.{name}"], own[name]) for name in own if f"average.{name}" in own)


def test_a_run_of_all_weights(full_run, tmp_path):
    report = export(tmp_path / "out", checkpoint=full_run)
    assert report.kind == "full"
    assert_same(weights_in(tmp_path / "out"), load_file(full_run / "model.safetensors"))
    export(tmp_path / "half", checkpoint=full_run, dtype="bfloat16")
    halves = {k: v.bfloat16() for k, v in load_file(full_run / "model.safetensors").items()}
    assert_same(weights_in(tmp_path / "half"), halves)
    assert not (tmp_path / "out" / "run.json").exists()


def test_masters_of_a_full_run_are_rounded(model, tmp_path):
    """Its checkpoint has float32 masters; the run's weights are these in its own type."""
    full = train(model, tmp_path / "full", full=True, dtype="bfloat16", save_every=1)
    export(tmp_path / "out", checkpoint=full / "state" / "step-00000002")
    wanted = load_file(full / "model.safetensors")
    assert {v.dtype for v in wanted.values()} == {torch.bfloat16}
    assert_same(weights_in(tmp_path / "out"), wanted)


def test_shards_are_the_hubs(run, model, tmp_path):
    """One tensor that is larger than a shard, and the same files as the hub's library makes of real tensors."""
    export(tmp_path / "one", checkpoint=run)
    assert (tmp_path / "one" / "model.safetensors").exists() and not list((tmp_path / "one").glob("*index*"))
    export(tmp_path / "out", checkpoint=run, max_shard_size="0.02MB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    parts = [f"{part}_proj" for part in parts] + ["input_layernorm", "post_attention_layernorm"]
    layers = [f"layers.{i}.{part}" for i in range(2) for part in parts]
    order = [f"model.{name}.weight" for name in ("embed_tokens", *layers, "norm")]  # of transformers' modules
    split = split_torch_state_dict_into_shards({name: whole[name] for name in order}, max_shard_size=20_000)
    assert len(split.filename_to_tensors) > 3 and index["weight_map"] == split.tensor_to_filename
    assert index["metadata"] == split.metadata | {"total_parameters": sum(v.numel() for v in whole.values())}
    assert max(sum(v.nbytes for v in load_file(p).values()) for p in (tmp_path / "out").glob("*.safetensors")) > 20_000
    assert_same(weights_in(tmp_path / "out"), whole)
    assert weights_fingerprint(tmp_path / "out") != weights_fingerprint(tmp_path / "one")  # both are whole folders


def test_one_shard_is_in_memory(run, tmp_path, monkeypatch):
    """Values are read for the file that is written next, never for all of them."""
    read, written = [], []
    real_read, real_save = merge.MergedWeights.read, shards.save_safetensors

    def reading(self, names):
        for name, tensor in real_read(self, names):
            read.append(name)
            yield name, tensor

    def saving(path, tensors):
        assert sorted(read) == sorted(tensors) and sum(t.nbytes for t in tensors.values()) <= 40_000
        written.append(path.name)
        read.clear()
        real_save(path, tensors)

    monkeypatch.setattr(merge.MergedWeights, "read", reading)
    monkeypatch.setattr(shards, "save_safetensors", saving)
    export(tmp_path / "out", checkpoint=run, max_shard_size="40KB")
    assert written == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


def test_small_files(model, tmp_path, capsys):
    """As transformers lays them out; the licence of the base goes with it, and what is left out is said."""
    base = tmp_path / "base"
    shutil.copytree(model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/base", "torch_dtype": "float32"}))
    (base / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.6}')
    for name in ("LICENSE", "trainer_state.json", "special_tokens_map.json", "run-notes.txt"):
        (base / name).write_text("{}")
    adapter = write_adapter(tmp_path / "adapter", config_of("dump"), dict.fromkeys(PROJECTIONS, 2))
    report = export(tmp_path / "out", model=str(base), adapter=adapter, dtype="bfloat16")
    said = capsys.readouterr().err
    assert set(report.files) == {
        *("README.md", "config.json", "export.json", "generation_config.json", "model.safetensors", "LICENSE"),
        *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert f"not copied from {base}: run-notes.txt, trainer_state.json" in " ".join(said.split())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {"torch_dtype": "bfloat16"}
    # <|im_end|>, which ends an answer in training, was no end for other programs.
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [0, 2], "temperature": 0.6} and report.record["end_tokens_added"] == [2]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["base"]["id"] == "org/base" and str(tmp_path) not in json.dumps(record)


def test_adapter_alone(run, tmp_path):
    report = export(tmp_path / "out", checkpoint=run, adapter_only=True, base_name="org/tiny@main", license="mit")
    own = {"README.md", "adapter_config.json", "adapter_model.safetensors", "export.json"}
    assert set(report.files) == own | {"chat_template.jinja"}  # that of the base, whose tokenizer goes with it
    described = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["revision"]) == ("org/tiny", "main")
    files = (folder / "adapter_model.safetensors" for folder in (run, tmp_path / "out"))
    assert_same(*map(load_file, files))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: org/tiny\n" in text and 'revision="main"' in text and "license: mit\n" in text


def test_a_model_as_it_is(model, tmp_path):
    report = export(tmp_path / "out", model=str(model), dtype="bfloat16")
    assert report.kind == "copy"
    halves = {k: v.bfloat16() for k, v in load_file(model / "model.safetensors").items()}
    assert_same(weights_in(tmp_path / "out"), halves)


def test_ptst_reads_its_exports(run, tmp_path):
    """As a model, and as an adapter of the base."""
    export(tmp_path / "merged", checkpoint=run)
    export(tmp_path / "alone", checkpoint=run, adapter_only=True, base_name="a/tiny-model")
    tokens = torch.arange(3, 60)
    model = open_model(checkpoint=run)
    wanted = model.load().logits(tokens)
    assert (model.load_base().logits(tokens) - wanted).abs().max() > 1e-3  # far more than the tolerance below
    merged = open_model(str(tmp_path / "merged"), "chat:vanilla")
    alone = open_model(model.name, "chat:vanilla", adapter=tmp_path / "alone")
    for each in (merged, alone):
        assert torch.allclose(each.load().logits(tokens), wanted, atol=1e-5)


def test_transformers_and_peft_load_them(run, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'ptst-lab[interop]')")
    peft = pytest.importorskip("peft", reason="needs peft (pip install 'ptst-lab[interop]')")
    tokens = torch.arange(3, 60)
    model = open_model(checkpoint=run)
    wanted = model.load().logits(tokens)
    assert (model.load_base().logits(tokens) - wanted).abs().max() > 1e-3  # far more than the tolerance below
    (tmp_path / "base").mkdir()
    base = write_tiny_model(tmp_path / "base", model_type="llama")
    export(tmp_path / "merged", checkpoint=run, max_shard_size="40KB")
    described = tmp_path / "merged" / "config.json"
    # transformers needs the type of the model, which the tiny one leaves out.
    described.write_text(json.dumps(json.loads(described.read_text()) | {"model_type": "llama"}))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.allclose(peer(tokens[None]).logits[0], wanted, atol=2e-5)
    fresh = transformers.AutoModelForCausalLM.from_config(peer.config)  # one that was read is written by the alphabet
    fresh.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    indices = (tmp_path / name / "model.safetensors.index.json" for name in ("saved", "merged"))
    theirs, ours = (json.loads(path.read_text()) for path in indices)
    assert theirs["weight_map"] == ours["weight_map"] and theirs["metadata"] == ours["metadata"]
    export(tmp_path / "alone", checkpoint=run, adapter_only=True, base_name="org/tiny")
    peer = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peer = peft.PeftModel.from_pretrained(peer, tmp_path / "alone")
    with torch.inference_mode():
        assert torch.allclose(peer(tokens[None]).logits[0], wanted, atol=2e-5)
