"""The scripts in examples/ and the Python of the README run, here on a small random model."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys

import pytest

import ptst
from tests.conftest import ROOT
from tests.tiny import write_tiny_model


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    write_tiny_model(tmp_path / "model")
    return "model"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "train_and_evaluate.py",
            r"validation loss before and after: \S+ \S+\n(?s:.*)chat:vanilla \S(?s:.*)\nchat:llama \S",
        ),
        ("sample_adapters.py", r"^base model: .*\n\S*train-\S+: .*\n\S*train-\S+: "),
        (
            "audit_your_data.py",
            r"row 1: info\n  in the loss: .*\nrow 2: warning\n.*\n  warning blank-answer: .*\nrow 3: info",
        ),
    ],
)
def test_an_example_runs(script, expected, model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, model])
    runpy.run_path(str(ROOT / "examples" / script))
    assert re.search(expected, capsys.readouterr().out)


def test_every_example_is_short_and_tested():
    scripts = sorted(p.name for p in (ROOT / "examples").glob("*.py"))
    assert scripts == ["audit_your_data.py", "sample_adapters.py", "train_and_evaluate.py"]
    assert all(len((ROOT / "examples" / s).read_text().splitlines()) < 60 for s in scripts)


def test_the_python_of_the_readme_runs(model, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert "smollm2-135m-instruct" in code
    exec(compile(code.replace("smollm2-135m-instruct", model), "README.md", "exec"), {})
    assert capsys.readouterr().out.rstrip().endswith("info")


def test_the_front_door_is_lazy_and_whole():
    code = (
        "import sys, ptst; ptst.TrainConfig, ptst.EvalConfig, ptst.Sampling, ptst.UserError, ptst.Conversation;"
        "assert 'torch' not in sys.modules, 'torch'; [getattr(ptst, name) for name in ptst.__all__];"
        "import ptst.open, ptst.notebook; assert all(callable(getattr(ptst, name)) for name in ptst.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    typed = re.findall(r"^    from (\S+) import \w+ as (\w+)$", (ROOT / "ptst" / "__init__.py").read_text(), re.M)
    assert {name: module for module, name in typed} == ptst._PLACES
    with pytest.raises(AttributeError, match="no attribute 'opn_model'"):
        _ = ptst.opn_model


def test_rows_and_runs_that_do_not_match_are_named(model):
    opened = ptst.open_model(model)
    with pytest.raises(ptst.UserError, match="give a list of rows"):
        ptst.generate(opened, "Hello")
    with pytest.raises(ptst.UserError, match="there are 1 runs for 2 prompts"):
        ptst.generate(opened, ["a", "b"], runs=[None])


def test_an_adapter_of_another_base_model_is_refused(model, tmp_path):
    run = ptst.fine_tune(ptst.TrainConfig(model=model, max_steps=1, examples_per_step=1)).folder
    (tmp_path / "other").mkdir()
    write_tiny_model(tmp_path / "other", seed=1)
    assert ptst.generate(ptst.open_model(model), ["a"], ptst.Sampling(max_new_tokens=1), runs=[run])
    with pytest.raises(ptst.UserError, match="was trained on other weights than other holds now"):
        ptst.generate(ptst.open_model("other"), ["a"], runs=[run])
