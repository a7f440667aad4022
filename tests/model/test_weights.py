"""Which files are the weights of a folder: never chosen in silence, and the same for reading and fingerprints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.big_model import LLAMA_2_7B, write_weights
from ptst.errors import UserError
from ptst.fingerprints import weights_fingerprint
from ptst.model import weights as weights_module
from ptst.model.weights import load_decoder, read_safetensors, save_full
from ptst.open import open_model
from tests.tiny import CONFIG, write_tiny_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return write_tiny_model(tmp_path)


def in_shards(folder, count=2, index=True, name="model-{:05d}-of-{:05d}.safetensors"):
    """The same weights in several files."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {key: name.format(i * count // len(names) + 1, count) for i, key in enumerate(names)}
    for file in set(files.values()):
        save_file({key: weights[key] for key in names if files[key] == file}, folder / file)
    if index:
        (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    return weights


def same(one, other):
    return all(torch.equal(a, other.state_dict()[name]) for name, a in one.state_dict().items())


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_read_with_and_without_an_index(folder, index):
    one = load_decoder(folder)
    in_shards(folder, 3, index)
    assert same(one, load_decoder(folder))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="which .* names, is missing" if index else "2 of 3 files of weights are there"):
        load_decoder(folder)


@pytest.mark.parametrize("name", ["adapter_model", "consolidated", "consolidated.00", "optimizer", "model.fp16"])
def test_files_that_are_no_weights_are_left_out_and_told(folder, capsys, name):
    one, before = load_decoder(folder), weights_fingerprint(folder)
    save_file({"model.norm.weight": torch.zeros(32), "exp_avg": torch.ones(3)}, folder / f"{name}.safetensors")
    assert same(one, load_decoder(folder))
    said = " ".join(capsys.readouterr().err.split())
    assert f"not read, as no part of the model: {name}.safetensors" in said
    assert (weights_fingerprint(folder) == before) is (name != "adapter_model")


def test_an_index_that_disagrees_with_its_shards(folder):
    weights = in_shards(folder)
    index = json.loads((folder / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == first)
    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {name: second}}))
    with pytest.raises(UserError, match=f"says that {name} is in {second}, and it is in {first}; fetch the index and"):
        load_decoder(folder)
    (folder / INDEX).write_text(json.dumps(index))
    held = {key: weights[key] for key, file in index["weight_map"].items() if file == first and key != name}
    save_file(held, folder / first)
    with pytest.raises(UserError, match=f"lack 1 tensors, the first is {name}, which .*index.json says is in {first};"):
        load_decoder(folder)


@pytest.mark.parametrize("name", ["model.layers.7.mlp.up_proj.weight", "model.other.weight", "norm.weight"])
def test_an_index_that_names_what_no_shard_holds(folder, name):
    in_shards(folder)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    shard = min(index.values())
    (folder / INDEX).write_text(json.dumps({"weight_map": {**index, name: shard}}))
    with pytest.raises(UserError, match=f"index.json says that {name} is in {shard}, and no .* holds it; fetch the"):
        load_decoder(folder)
    name, shard = "model.norm.weight", index["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps({"weight_map": {k: v for k, v in index.items() if k != name}}))
    with pytest.raises(UserError, match=f"{shard} holds tensor {name}, which .*index.json does not name; fetch the"):
        load_decoder(folder)


def test_an_index_and_shards_as_they_are_published(folder):
    """Older tools leave buffers and the second copy of a tied embedding out of the shards and in the index, or the
    other way round; `total_size` counts what they like."""
    one, weights = load_decoder(folder), in_shards(folder)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    first, second = sorted(set(index.values()))
    more = {"lm_head.weight": second, "model.layers.0.self_attn.rotary_emb.inv_freq": first}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 7}, "weight_map": {**index, **more}}))
    assert same(one, load_decoder(folder))
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    added = {"lm_head.weight": weights["model.embed_tokens.weight"], [*more][1]: torch.ones(4)}
    save_file({**load_file(folder / second), **added}, folder / second)
    assert same(one, load_decoder(folder))


def test_two_sets_of_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    weights = in_shards(folder)
    (folder / "model.safetensors").write_bytes(whole)
    for read in (load_decoder, weights_fingerprint):
        with pytest.raises(UserError, match=r"there are two sets of weights: model\.safetensors, and the files of"):
            read(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, "model.safetensors")}))
    load_decoder(folder)
    (folder / INDEX).unlink()
    (folder / "model.safetensors").unlink()
    (folder / "model-00003-of-00003.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match="two sets of weights: of 2 and of 3 files"):
        load_decoder(folder)


def test_an_index_decides_among_shards(folder, capsys):
    one = load_decoder(folder)
    in_shards(folder)
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "model-00003-of-00003.safetensors")
    assert same(one, load_decoder(folder))
    assert "not read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.norm.weight", "norm.weight"])
def test_a_tensor_that_comes_twice(folder, name):
    in_shards(folder)
    second = folder / "model-00002-of-00002.safetensors"
    first = folder / "model-00001-of-00002.safetensors"
    save_file({**load_file(first), name: torch.zeros(32)}, first)
    assert "model.norm.weight" in load_file(second)
    with pytest.raises(UserError, match=r"00002\.safetensors: tensor .* comes twice, here and in model-00001-of-00002"):
        load_decoder(folder)


def test_a_link_to_nothing(folder):
    """As in a cache of which files were removed."""
    path = folder / "model.safetensors"
    path.unlink()
    path.symlink_to("removed")
    with pytest.raises(UserError, match=r"model\.safetensors: is a link to a file that is not there; fetch"):
        load_decoder(folder)
    (folder / INDEX).symlink_to("removed")
    with pytest.raises(UserError, match=r"index\.json: is a link to a file that is not there; fetch"):
        load_decoder(folder)


def test_a_head_that_is_not_the_embedding(folder):
    assert CONFIG["tie_word_embeddings"]
    path = folder / "model.safetensors"
    weights = load_file(path)
    one, head = load_decoder(folder), weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": head}, path)
    assert same(one, load_decoder(folder)) and same(load_decoder(folder, torch.bfloat16), one.to(torch.bfloat16))
    head[-1, -1] += 1
    for other in (head, head[:9]):
        save_file({**weights, "lm_head.weight": other.contiguous()}, path)
        with pytest.raises(UserError, match=r"lm_head\.weight has other values; set tie_word_embeddings to false"):
            load_decoder(folder)
    save_file({**weights, "lm_head.weight": head}, path)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": False}))
    assert torch.equal(load_decoder(folder).lm_head.weight, head)


def test_a_full_copy_takes_every_file_that_makes_prompts(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("chat_template.jinja", "tool_use.jinja", "tokenizer.model", "special_tokens_map.json", "merges.txt"):
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("rag")
    for name in ("run.json", "adapter_config.json", INDEX, ".config.json.host.1.x.partial"):
        (folder / name).write_text("{}")
    in_shards(folder)
    save_full(load_decoder(folder), folder, out)
    copied = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert copied == {
        *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"),
        *("chat_template.jinja", "tool_use.jinja", "tokenizer.model", "special_tokens_map.json", "merges.txt"),
        "additional_chat_templates/rag.jinja",
    }
    assert same(load_decoder(folder), load_decoder(out))


def test_little_of_a_file_is_mapped_at_a_time(folder, monkeypatch):
    """Pages that were read are memory of the process until the file is closed."""
    path = folder / "model.safetensors"
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not list mappings")
    monkeypatch.setattr(weights_module, "MAPPED", 1)
    names = []
    for name, tensor in read_safetensors(path):
        names.append(name)
        assert torch.equal(tensor, load_file(path)[name])
        del tensor
        assert sum(str(path) in line for line in maps.read_text().splitlines()) <= 2, name
    assert sorted(names) == sorted(load_file(path))


def test_a_tied_head_stands_for_the_embedding(folder):
    """safetensors' save_model keeps one of two names for the same tensor, and it is the head's."""
    one, weights = load_decoder(folder), load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / "model.safetensors")
    assert same(one, load_decoder(folder))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.0.self_attn.q_proj.qweight", torch.zeros(4, 4), "use the folder of the unquantized model"),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", torch.ones(1), "use the folder of the unquantized model"),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(512, 1, dtype=torch.uint8), "of type uint8; .*unquantized"),
        ("_orig_mod.model.norm.weight", torch.ones(32), "save the model without the wrapper"),
        ("model.layers.9.mlp.up_proj.weight", torch.ones(1), "fetch the weights and config.json of one model"),
        ("model.norm.weight", torch.ones(31), "fetch the weights and config.json of one model"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_with_a_way_out(folder, name, tensor, message):
    save_file(load_file(folder / "model.safetensors") | {name: tensor}, folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_decoder(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", "pickled and not loaded: load them with transformers"),
        ("model-Q4_K_M.gguf", "before its conversion to GGUF"),
        ("consolidated.safetensors", "in Hugging Face's layout"),
        ("model.fp16.safetensors", r"rename the model's to model\.safetensors"),
    ],
)
def test_weights_in_other_files_are_refused_with_a_way_out(folder, file, message):
    (folder / "model.safetensors").rename(folder / file)
    with pytest.raises(UserError, match=rf"has no model\.safetensors \(only {file}\); .*{message}"):
        load_decoder(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"])
def test_a_pointer_of_git_lfs_is_not_the_file(folder, file):
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    if file == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"{file}: is only a pointer of Git LFS to the file; run git lfs pull"):
        open_model(str(folder)).load()


def test_the_folder_inside_is_named(folder):
    outer = folder.parent / "outer"
    (outer / "snapshots").mkdir(parents=True)
    folder = folder.rename(outer / "snapshots" / "0a1b")
    with pytest.raises(UserError, match=rf"it has no config\.json; give {folder}"):
        open_model(str(outer))


# Loads a folder at a dtype, and prints by how much memory at the peak, anonymous and in all that is private, exceeds
# what was held before and the model's own bytes.
_LOAD = """
import re, sys, threading, time
import torch
from ptst.model.weights import load_decoder
def held():
    found = dict(re.findall(r"(\\w+):\\s+(\\d+) kB", open("/proc/self/smaps_rollup").read()))
    return 1024 * int(found["Anonymous"]), 1024 * (int(found["Private_Clean"]) + int(found["Private_Dirty"]))
before, peak, done = held(), [0, 0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[:] = map(max, peak, held())
watcher = threading.Thread(target=watch)
watcher.start()
decoder = load_decoder(sys.argv[1], getattr(torch, sys.argv[2]))
done.set()
watcher.join()
own = sum(p.nbytes for p in decoder.parameters())
print(*(top - first - own for top, first in zip(peak, before)))
"""


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not count private memory")
@pytest.mark.parametrize(
    ("stored", "dtype", "layers"), [("float32", "float32", 8), ("float32", "bfloat16", 8), ("bfloat16", "bfloat16", 16)]
)
def test_loading_takes_little_more_than_the_model(tmp_path, stored, dtype, layers):
    """At most the largest tensor and 256 MiB more, in private memory, pages of the files among it."""
    config = LLAMA_2_7B | {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    write_weights(tmp_path, config, getattr(torch, stored), 500_000_000)
    largest = config["vocab_size"] * config["hidden_size"] * getattr(torch, dtype).itemsize
    files = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(files) > 1 and max(files) > largest + (256 << 20)  # what keeps a whole file fails
    command = [sys.executable, "-c", _LOAD, str(tmp_path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for more in map(int, done.stdout.split()):
        assert more <= largest + (256 << 20)
