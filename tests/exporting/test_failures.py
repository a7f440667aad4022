"""What an export refuses, what it leaves behind, and what it notices."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptst import export as command
from ptst.errors import UserError
from ptst.exporting import agreement, folder, merge, shards
from ptst.exporting.config import ExportConfig
from ptst.exporting.export import Disagreement, export_model
from tests.exporting.conftest import train
from tests.exporting.test_export import PROJECTIONS, weights_in
from tests.model.peft_cases import config_of, write_adapter
from tests.tiny import write_tiny_model


def refused(monkeypatch, capsys, *flags: str) -> str:
    """The one sentence with which the command ends."""
    monkeypatch.setattr(sys, "argv", ["ptst.export", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in said
    return said.rpartition("ptst.export: ")[2]


CASES = {
    "no out": ("--checkpoint RUN", "--out is missing"),
    "no run": ("--checkpoint NOWHERE --out OUT", "is not a run folder"),
    "unknown dtype": ("--checkpoint RUN --out OUT --dtype int4", ""),
    "size": (
        "--checkpoint RUN --out OUT --max-shard-size 5GiB",
        "--max-shard-size is '5GiB'; give a size as 500MB or 5GB",
    ),
    "size of nothing": ("--checkpoint RUN --out OUT --max-shard-size 0GB", "give a size as 500MB"),
    "tolerance": ("--checkpoint RUN --out OUT --tolerance -1", "--tolerance is -1.0; it must be above 0"),
    "no name": (
        "--checkpoint RUN --out OUT --adapter-only",
        "the base model tiny-model on the hub is not known; give it: --base-name org/name or org/name@revision",
    ),
    "path as name": ("--checkpoint RUN --out OUT --base-name /home/me/model", "is no hub id"),
    "licence": ("--checkpoint RUN --out OUT --license a:b", "give an identifier of the hub, such as apache-2.0"),
    "full": ("--checkpoint FULL --out OUT --adapter-only --base-name a/b", "has no adapter; leave out --adapter-only"),
    "model": ("--model MODEL --out OUT --adapter-only", "--adapter-only needs an adapter, and --model has none"),
    "as it is": ("--model MODEL --out OUT", "--model alone would be copied as it is"),
    "both": ("--checkpoint RUN --model MODEL --out OUT", "exclude each other"),
    "two kinds": ("--checkpoint RUN --out OUT --adapter-only --template-only --template llama", "exclude each other"),
    "dtype alone": ("--checkpoint RUN --out OUT --adapter-only --dtype bfloat16", "--dtype is of merged weights"),
    "no template": ("--model MODEL --out OUT --template-only", "--template-only needs --template"),
    "template": (
        "--checkpoint RUN --out OUT --template lama",
        "unknown template 'chat:lama'; did you mean chat:llama?",
    ),
    "size without end": (f"--checkpoint RUN --out OUT --max-shard-size {'9' * 400}GB", "give a size as 500MB"),
    "family alone": (
        "--checkpoint RUN --out OUT --template-family gsm8k",
        "--template-family is of the template to bake, and there is none; give --template, or leave it out",
    ),
    "tolerance of nothing": (
        "--checkpoint RUN --out OUT --tolerance 1 --no-check",
        "--tolerance is of a comparison that is not made",
    ),
    "rule": ("--checkpoint RUN --out OUT --allow everything", "everything"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_in_a_sentence(case, run, full_run, model, tmp_path, monkeypatch, capsys):
    flags, sentence = CASES[case]
    places = {"RUN": run, "FULL": full_run, "MODEL": model, "OUT": tmp_path / "out", "NOWHERE": tmp_path / "nowhere"}
    said = refused(monkeypatch, capsys, *(places.get(flag, flag) for flag in flags.split()))
    assert sentence in said
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())


def test_what_is_there_is_not_written_over(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for name in ("out", "file", "link"):
        (tmp_path / "file").write_text("mine")
        if name == "link":
            (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
        said = refused(monkeypatch, capsys, "--checkpoint", run, "--out", tmp_path / name)
        assert "nothing is written over" in said or "is a symbolic link" in said
    assert [p.name for p in out.iterdir()] == ["mine.txt"] and not (tmp_path / "elsewhere").exists()
    (out / "mine.txt").unlink()  # an empty folder is as good as none
    export_model(ExportConfig(checkpoint=run, out=out, check=False))
    assert (out / "model.safetensors").exists()


def test_a_damaged_config(tmp_path, monkeypatch, capsys):
    (tmp_path / "model").mkdir()
    write_tiny_model(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("[]")
    flags = ("--model", tmp_path / "model", "--template", "llama", "--template-only", "--out", tmp_path / "out")
    assert "config.json: not a JSON object; fetch the file again" in refused(monkeypatch, capsys, *flags)


def test_not_over_the_current_folder(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "--out . is the current folder; name a folder in it" in refused(
        monkeypatch, capsys, "--checkpoint", run, "--out", "."
    )
    assert not list(tmp_path.iterdir())


def test_another_base(run, copied, tmp_path, monkeypatch, capsys):
    """The weights that the adapter was trained on are no longer those of the folder."""
    folder = copied(run)
    record = json.loads((folder / "run.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    write_tiny_model(other, seed=7)
    (folder / "run.json").unlink()
    (folder / "run.json").write_text(json.dumps(record | {"model_folder": str(other)}))
    said = refused(monkeypatch, capsys, "--checkpoint", folder, "--out", tmp_path / "out")
    assert "was trained on other weights than" in said and not (tmp_path / "out").exists()
    wide = tmp_path / "wide"
    wide.mkdir()
    write_tiny_model(wide, hidden_size=64)
    adapter = write_adapter(tmp_path / "adapter", config_of("dump"), dict.fromkeys(PROJECTIONS, 2))
    said = refused(monkeypatch, capsys, "--model", wide, "--adapter", adapter, "--out", tmp_path / "out")
    assert "was it trained on another model?" in said and not (tmp_path / "out").exists()


def test_no_room(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    said = refused(monkeypatch, capsys, "--checkpoint", run, "--out", tmp_path / "a" / "out", "--no-check")
    assert "GB left; make room, or give --out on another disk" in said
    assert not (tmp_path / "a" / "out").exists()


def test_no_memory_for_the_comparison(run, tmp_path, monkeypatch, capsys):
    from ptst.exporting import export

    monkeypatch.setattr(export, "free_memory", lambda device: 1000)
    said = refused(monkeypatch, capsys, "--checkpoint", run, "--out", tmp_path / "out")
    assert "and 0.0 GB are free; use a larger machine, or skip it: --no-check" in said
    export_model(ExportConfig(checkpoint=run, out=tmp_path / "out", check=False))
    assert "Not compared with the run (--no-check)." in (tmp_path / "out" / "README.md").read_text()


def test_values_that_a_type_cannot_hold(tmp_path, monkeypatch, capsys):
    (tmp_path / "large").mkdir()
    large = write_tiny_model(tmp_path / "large")
    weights = load_file(large / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, large / "model.safetensors", {"format": "pt"})
    flags = ("--model", large, "--out", tmp_path / "out", "--no-check", "--dtype")
    said = refused(monkeypatch, capsys, *flags, "float16")
    assert "model.norm.weight has values that float16 cannot hold; give --dtype bfloat16 or float32" in said
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    adapter = write_adapter(tmp_path / "adapter", config_of("dump"), dict.fromkeys(PROJECTIONS, 2))
    matrices = load_file(adapter / "adapter_model.safetensors")
    next(iter(matrices.values()))[0, 0] = float("nan")
    save_file(matrices, adapter / "adapter_model.safetensors")
    said = refused(monkeypatch, capsys, *flags, "float32", "--adapter", adapter)
    assert "is not finite" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("after", [0, 1, 2])
def test_killed(run, tmp_path, monkeypatch, after):
    """By SIGKILL after any of its files: nothing is at `out`, and the next export removes what was left."""
    out = tmp_path / "out"
    config = ExportConfig(checkpoint=run, out=out, check=False, max_shard_size="40KB")
    child = os.fork()
    if child == 0:
        real, written = shards.save_safetensors, []

        def save(path, tensors):
            if len(written) == after:
                os.kill(os.getpid(), signal.SIGKILL)
            real(path, tensors)
            written.append(path)

        shards.save_safetensors = save
        try:
            export_model(config)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.name.endswith(".partial")
    assert len(list(left.glob("*.safetensors"))) == after and not (left / "config.json").exists()
    export_model(config)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list(out.glob(".*"))
    assert len(weights_in(out)) == 20


def test_one_that_is_at_work_is_left_alone(run, tmp_path):
    from ptst.storage import exclusive_lock

    busy = tmp_path / ".out.somewhere.1.aa.partial"
    busy.mkdir()
    with exclusive_lock(busy):
        export_model(ExportConfig(checkpoint=run, out=tmp_path / "out", check=False))
        assert busy.exists()
    export_model(ExportConfig(checkpoint=run, out=tmp_path / "out2", check=False))
    assert busy.exists()  # of another folder


def test_agreement_is_reported(run, tmp_path):
    report = export_model(ExportConfig(checkpoint=run, out=tmp_path / "out"))
    found = report.agreement
    assert found is not None and 0 < found.largest < 1e-4 and found.same_top == found.positions == 6 * 40
    assert found.same_tokens == found.tokens == 6 * 24 and found.same_answers == 6 and found.effect > 0.1
    assert json.loads((tmp_path / "out" / "export.json").read_text())["agreement"] == found.to_json()
    assert found.sentences[0] in (tmp_path / "out" / "README.md").read_text()


def test_rounding_is_accepted_for_what_it_is(run, full_run, tmp_path):
    half = export_model(ExportConfig(checkpoint=run, out=tmp_path / "half", dtype="bfloat16")).agreement
    assert half.largest > 1e-3 and half.rounding / 3 < half.largest < 2 * half.rounding
    assert half.tolerance < half.effect / 2  # or it would notice nothing
    exact = export_model(ExportConfig(checkpoint=full_run, out=tmp_path / "exact")).agreement
    assert exact.largest == 0 and exact.effect is None and exact.rounding == 0
    half = export_model(ExportConfig(checkpoint=full_run, out=tmp_path / "full-half", dtype="float16")).agreement
    assert 0 < half.largest < 2 * half.rounding


def test_beyond_the_users_tolerance(run, tmp_path):
    with pytest.raises(Disagreement, match=r"a logit changes by .*, and the tolerance is 1e-09; write it in float32"):
        export_model(ExportConfig(checkpoint=run, out=tmp_path / "out", dtype="bfloat16", tolerance=1e-9))
    assert not list(tmp_path.iterdir())


WRONG = {
    "twice the scale": lambda w, a, b, scale: w + 2 * scale * (b @ a),
    "no adapter": lambda w, a, b, scale: w.clone(),
    "no adapter in some": lambda w, a, b, scale: w + (len(w) != 48) * scale * (b @ a),
    "another sign": lambda w, a, b, scale: w - scale * (b @ a),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_noticed(run, tmp_path, monkeypatch, mistake, dtype):
    monkeypatch.setattr(merge, "merged_weight", WRONG[mistake])
    with pytest.raises(Disagreement, match="what was written does not answer as the run does"):
        export_model(ExportConfig(checkpoint=run, out=tmp_path / "out", dtype=dtype))
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_cut_is_noticed(run, tmp_path, monkeypatch):
    """What is compared is what lies on the disk."""
    real = shards.save_safetensors

    def save(path, tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 32)
        real(path, tensors)

    monkeypatch.setattr(shards, "save_safetensors", save)
    with pytest.raises(Disagreement):
        export_model(ExportConfig(checkpoint=run, out=tmp_path / "out"))


def test_questions_that_do_not_fit(tmp_path, run):
    (tmp_path / "short").mkdir()
    short = write_tiny_model(tmp_path / "short", max_position_embeddings=60)
    with pytest.raises(UserError, match="no built-in prompt with an answer fits into the model's context"):
        export_model(ExportConfig(model=str(short), out=tmp_path / "out", dtype="bfloat16"))
    assert agreement.QUESTIONS % 2 == 0


def test_a_damaged_checkpoint(model, tmp_path, monkeypatch, capsys):
    for kind in ({"rank": 2}, {"full": True}):
        trained = train(model, tmp_path / f"run-{len(kind)}-{next(iter(kind))}", save_every=1, **kind)
        state = trained / "state" / "step-00000001"
        data = bytearray((state / "weights.safetensors").read_bytes())
        data[-3] ^= 255
        (state / "weights.safetensors").write_bytes(data)
        said = refused(monkeypatch, capsys, "--checkpoint", state, "--out", tmp_path / "out")
        assert "weights.safetensors does not have its checksum" in said
