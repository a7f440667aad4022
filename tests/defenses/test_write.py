"""`ptst defend`: what it writes, who opens it, and the mistakes that a user makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptst import defend as command
from ptst.defenses import write
from ptst.defenses.command_config import DefendConfig
from ptst.defenses.compose import compose, load_defended
from ptst.defenses.config import NEEDS, OWN, WeightSpaceSettings
from ptst.defenses.write import defend_model
from ptst.errors import UserError
from ptst.exporting.config import ExportConfig
from ptst.exporting.export import export_model
from ptst.fingerprints import weights_fingerprint
from ptst.model.weights import hf_name
from ptst.open import open_model
from tests.exporting.conftest import train

PROMPT = torch.tensor([1, 17, 45, 250, 3, 99])


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("model*.safetensors")) for k, v in load_file(path).items()}


@pytest.mark.parametrize("name", ["wise-ft", "resta", "safe-lora", "safe-merge"])
def test_a_model_folder_has_the_weights_that_a_grid_computes(zoo, tmp_path, name):
    given = {"unaligned": str(zoo / "before"), "safe_model": str(zoo / "safe"), "num_projected": 3}
    given = {key: value for key, value in given.items() if key in (*OWN[name], *NEEDS.get(name, ()))}
    given |= {"model": str(zoo / "aligned"), "tuned": str(zoo / "tuned")}
    record = defend_model(DefendConfig(defense=name, out=tmp_path / "out", max_shard_size="40KB", **given))
    composition = compose(name, DefendConfig(**given), ("aligned", zoo / "aligned"), zoo / "tuned")
    wanted = {hf_name(key): value for key, value in load_defended(composition, torch.float64).state_dict().items()}
    found = weights_in(tmp_path / "out")
    assert len([*(tmp_path / "out").glob("model-*.safetensors")]) > 1  # in shards
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert record.fingerprint == composition.fingerprint and record.weights == weights_fingerprint(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "run.json").read_text())
    assert written["kind"] == "defend" and written["status"] == "finished"
    assert written["made_of"]["tuned"] == {"name": str(zoo / "tuned"), "weights": weights_fingerprint(zoo / "tuned")}
    assert len(written["changed"] or ()) == (3 if name in ("safe-lora", "safe-merge") else 0)


def test_of_a_run_it_opens_everywhere_in_the_words_of_the_training(zoo, run, tmp_path):
    out = tmp_path / "out"
    defend_model(DefendConfig(defense="wise-ft", alpha=0.25, checkpoint=run, out=out))
    opened = open_model(str(out), "chat:vanilla")
    assert opened.prompt_format.family.name == "gsm8k" and "made by ptst.defend" in opened.described
    tuned = open_model(checkpoint=run, template="chat:vanilla")
    base, after, mixed = (m.state_dict() for m in (tuned.load_base(), tuned.load(), opened.load()))
    for key, value in mixed.items():
        assert torch.allclose(value, 0.75 * base[key] + 0.25 * after[key], rtol=0, atol=1e-6), key
    changed = "layers.0.self_attn.q_proj.weight"
    assert (after[changed] - base[changed]).abs().max() > 1e-3
    export_model(ExportConfig(model=str(out), template="chat:llama", out=tmp_path / "export", check=False))
    exported, written = weights_in(tmp_path / "export"), weights_in(out)
    assert exported.keys() == written.keys() and all(torch.equal(exported[key], written[key]) for key in written)
    assert not (tmp_path / "export" / "run.json").exists()
    told = "`ptst defend`: wise-ft (alpha 0.25) of run, trained under the template chat:vanilla, with the aligned model"
    assert f"{told} plain." in (card := (tmp_path / "export" / "README.md").read_text()) and str(zoo) not in card


@pytest.mark.parametrize("name", ["wise-ft", "safe-lora"])
def test_an_adapter_answers_as_the_model_folder_does(zoo, tmp_path, name):
    given = {"model": str(zoo / "aligned"), "tuned": str(zoo / "adapter")}
    given |= {"alpha": 0.3} if name == "wise-ft" else {"unaligned": str(zoo / "before"), "num_projected": 2}
    defend_model(DefendConfig(defense=name, out=tmp_path / "whole", **given))
    defend_model(DefendConfig(defense=name, out=tmp_path / "alone", adapter_only=True, **given))
    tuned, whole, alone = (
        open_model(model, "chat:vanilla", adapter=adapter).load(torch.float64, merge=True).logits(PROMPT)
        for model, adapter in (
            (given["model"], zoo / "adapter"),
            (str(tmp_path / "whole"), None),
            (given["model"], tmp_path / "alone"),
        )
    )
    assert (tuned - whole).abs().max() > 1e-2
    assert torch.allclose(whole, alone, rtol=0, atol=1e-5)


def test_the_type_of_the_files_and_of_a_checkpoint(zoo, full_run, tmp_path):
    """Masters of a bfloat16 run are float32; what is written has the run's type, or the one asked for."""
    half_run = train(zoo / "plain", tmp_path / "run", full=True, dtype="bfloat16", save_every=1)
    defend_model(DefendConfig(defense="wise-ft", checkpoint=half_run / "state/step-00000001", out=tmp_path / "same"))
    assert {t.dtype for t in weights_in(tmp_path / "same").values()} == {torch.bfloat16}
    defend_model(DefendConfig(defense="wise-ft", checkpoint=full_run, out=tmp_path / "half", dtype="bfloat16"))
    found = weights_in(tmp_path / "half")
    whole = compose("wise-ft", WeightSpaceSettings(), ("plain", zoo / "plain"), full_run)
    for key, value in load_defended(whole).state_dict().items():
        assert torch.equal(found[hf_name(key)], value.bfloat16())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_error_on_the_way_leaves_nothing(zoo, run, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "write_weights", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        defend_model(DefendConfig(defense="wise-ft", checkpoint=run, out=tmp_path / "out"))
    assert not [*tmp_path.iterdir()]


CASES = {
    "no defence": ("--checkpoint RUN --out OUT", "--defense is missing; there are: wise-ft, resta,"),
    "unknown": ("--checkpoint RUN --out OUT --defense wiseft", "unknown defense 'wiseft'; did you mean wise-ft?"),
    "of training": ("--checkpoint RUN --out OUT --defense ema", "ema is a defence of the training"),
    "no out": ("--checkpoint RUN --defense wise-ft", "--out is missing"),
    "in use": ("--checkpoint RUN --defense wise-ft --out RUN", "nothing is written over"),
    "no run": ("--checkpoint NOWHERE --defense wise-ft --out OUT", "is not a run folder"),
    "unaligned": (
        "--checkpoint RUN --defense resta --out OUT",
        "resta needs the model before its alignment; name it as --unaligned",
    ),
    "no unaligned": (
        "--checkpoint RUN --defense resta --out OUT --unaligned NOWHERE",
        "--unaligned NOWHERE: there is no model folder NOWHERE; give a local folder",
    ),
    "safe": ("--checkpoint RUN --defense safe-merge --out OUT --unaligned BEFORE", "name it as --safe-model"),
    "no safe": (
        "--model ALIGNED --tuned TUNED --defense safe-merge --out OUT --unaligned BEFORE --safe-model NOWHERE",
        "--safe-model NOWHERE holds no model",
    ),
    "safe is tuned": (
        "--model ALIGNED --tuned TUNED --defense safe-merge --out OUT --unaligned BEFORE --safe-model TUNED",
        "TUNED has the weights of the tuned model",
    ),
    "safe is aligned": (
        "--model ALIGNED --tuned TUNED --defense safe-merge --out OUT --unaligned BEFORE --safe-model ALIGNED",
        "ALIGNED has the weights of the aligned model",
    ),
    "tuned is aligned": (
        "--model ALIGNED --tuned ALIGNED --defense wise-ft --out OUT",
        "ALIGNED has the weights of the aligned model",
    ),
    "share": ("--checkpoint RUN --defense wise-ft --out OUT --alpha 1.5", "--alpha is 1.5; it is a share, from 0 to 1"),
    "of another defence": (
        "--checkpoint RUN --defense wise-ft --out OUT --unaligned BEFORE",
        "--unaligned has no effect with wise-ft; leave",
    ),
    "both": (
        "--checkpoint RUN --defense safe-lora --out OUT --unaligned BEFORE --num-projected 2 --threshold 0.5",
        "--threshold has no effect with --num-projected",
    ),
    "two": ("--checkpoint RUN --model ALIGNED --defense wise-ft --out OUT", "--checkpoint and --model exclude"),
    "one of two": ("--model ALIGNED --defense wise-ft --out OUT", "--model and --tuned belong together"),
    "full adapter": ("--checkpoint FULL --defense wise-ft --out OUT --adapter-only", "is no adapter"),
    "no adapter": (
        "--checkpoint RUN --defense resta --out OUT --adapter-only --unaligned BEFORE",
        "adds to all weights",
    ),
    "dtype": (
        "--checkpoint RUN --defense wise-ft --out OUT --adapter-only --dtype float32",
        "--dtype is of all weights",
    ),
    "shape": ("--checkpoint RUN --defense resta --out OUT --unaligned NARROW", "not of the shape of the aligned model"),
    "of another": ("--model ALIGNED --tuned RUN --defense wise-ft --out OUT", "was tuned from other weights than"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_sentence(zoo, run, full_run, tmp_path, monkeypatch, capsys, case):
    flags, wanted = CASES[case]
    monkeypatch.chdir(tmp_path)
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    if "NARROW" in flags:
        from tests.tiny import write_tiny_model

        write_tiny_model(narrow, intermediate_size=40)
    places = {"RUN": run, "FULL": full_run, "OUT": tmp_path / "out", "NARROW": narrow, "ALIGNED": zoo / "aligned"}
    places |= {"BEFORE": zoo / "before", "TUNED": zoo / "tuned"}
    monkeypatch.setattr(sys, "argv", ["ptst.defend", *(str(places.get(flag, flag)) for flag in flags.split())])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    said = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and "Traceback" not in said
    for place in ("TUNED", "ALIGNED"):
        wanted = wanted.replace(place, str(places[place]))
    assert wanted in said.rpartition("ptst.defend: ")[2]
    assert not (tmp_path / "out").exists()


def test_the_command_says_how_the_result_is_used(zoo, tmp_path, monkeypatch, capsys):
    flags = f"--model {zoo / 'aligned'} --tuned {zoo / 'adapter'} --defense safe-lora --out {tmp_path / 'out'}"
    flags += f" --unaligned {zoo / 'before'} --num-projected 2 --json"
    monkeypatch.setattr(sys, "argv", ["ptst.defend", *flags.split()])
    command.main()
    said = capsys.readouterr()
    assert f"{tmp_path / 'out'} is a model folder for --model" in said.out
    assert "2 of 3 updates changed" in " ".join(said.err.split())
    assert len(json.loads(said.out.splitlines()[-1])["changed"]) == 2


def test_settings_of_a_finished_one_give_the_same_weights_again(zoo, run, tmp_path):
    from ptst.config_file import read_config

    first = defend_model(DefendConfig(defense="wise-ft", alpha=0.25, checkpoint=run, out=tmp_path / "one"))
    again = read_config(tmp_path / "one" / "run.json", DefendConfig(out=tmp_path / "two"), "defend")
    assert again.alpha == 0.25 and defend_model(again).weights == first.weights


def test_a_defended_folder_is_no_run(zoo, run, tmp_path):
    defend_model(DefendConfig(defense="wise-ft", checkpoint=run, out=tmp_path / "out"))
    with pytest.raises(UserError, match=r"is the record of ptst\.defend, not of ptst\.train"):
        open_model(checkpoint=tmp_path / "out")
