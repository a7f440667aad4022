"""The command line: settings from flags, files and records; one sentence for a mistake, a traceback for a bug."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest

from ptst import cli
from ptst.audit.config import AuditConfig
from ptst.config_file import merge, read_config, to_toml
from ptst.errors import Setting, UserError, settings_group
from ptst.experiment.config import GridConfig
from ptst.settings import CommandSettings, EngineSettings
from ptst.training.config import TrainConfig, TrainSettings
from tests.conftest import ROOT


@dataclass(frozen=True, kw_only=True)
class Small(CommandSettings):
    """A small command."""

    micro_batch_tokens: int = 1
    """Tokens."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """Engine."""


def run(monkeypatch, command, *flags: str):
    monkeypatch.setattr(sys, "argv", ["small", *flags])
    return cli.run(command, Small, "small")


def fails(monkeypatch, capsys, command, *flags: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, command, *flags)
    return stopped.value.code, " ".join(capsys.readouterr().err.split())


def test_the_command_line_speaks_of_flags_and_the_library_of_settings(monkeypatch, capsys):
    def mistake(_config):
        raise UserError((Setting("micro_batch_tokens"), " is 0"), ("raise ", Setting("kv_memory")), "a.csv:3")

    with pytest.raises(UserError, match=r"^a\.csv:3: micro_batch_tokens is 0; raise kv_memory$"):
        mistake(None)
    assert fails(monkeypatch, capsys, mistake) == (
        2,
        "ptst.small: a.csv:3: --micro-batch-tokens is 0; raise --kv-memory",
    )

    def inside(config):
        with settings_group("engine"):
            mistake(config)

    told = fails(monkeypatch, capsys, inside)[1]
    assert "--micro-batch-tokens is 0; raise --engine.kv-memory" in told  # the command's own setting, then the group's


def test_a_grid_tells_training_data_from_test_data():
    told = [cli.flag_of(GridConfig, *asked) for asked in (("data", "train"), ("data", "eval"), ("lr", "train"))]
    assert told == ["--data", "--eval.data", "--train.lr"]


def test_a_bug_keeps_its_traceback_and_debug_shows_every_one(monkeypatch, capsys):
    def bug(_config):
        raise ValueError("of numpy, say")

    with pytest.raises(ValueError, match="of numpy"):
        run(monkeypatch, bug)

    def mistake(_config):
        raise UserError("a mistake")

    with pytest.raises(UserError):
        run(monkeypatch, mistake, "--debug")

    def missing(_config):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    code, told = fails(monkeypatch, capsys, missing)
    assert code == 2 and "torch is not installed" in told and "install" in told

    def full(_config):
        raise OSError(errno.ENOSPC, "No space left on device", "a/run.json")

    assert fails(monkeypatch, capsys, full) == (
        2,
        "ptst.small: a/run.json: the disk is full; make room, and run this again",
    )


def test_an_old_flag_works_with_a_note(monkeypatch, capsys):
    assert run(monkeypatch, lambda c: {"n": c.micro_batch_tokens}, "--micro-tokens", "7") == {"n": 7}
    assert run(monkeypatch, lambda c: {"n": c.micro_batch_tokens}, "--micro-tokens=8") == {"n": 8}
    assert run(monkeypatch, lambda c: {"n": c.micro_batch_tokens}, "--micro_tokens", "9") == {"n": 9}
    assert "note: --micro-tokens is now --micro-batch-tokens" in capsys.readouterr().err
    flags = ("--allow", "overlap", "seam", "--data", "seam")
    monkeypatch.setattr(sys, "argv", ["ptst.audit", *flags])
    found = cli.run(lambda c: {"allow": c.allow, "data": c.data}, AuditConfig, "audit")
    assert found == {"allow": ("overlap", "token-boundary"), "data": "seam"}
    assert "note: the audit rule seam is now token-boundary" in capsys.readouterr().err


def test_a_config_file_gives_settings_and_flags_win(monkeypatch, capsys, tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("micro-batch-tokens = 5\n[engine]\nkv_memory = 2\n")
    found = run(monkeypatch, lambda c: {"c": c}, "--config", str(file))["c"]
    assert (found.micro_batch_tokens, found.engine.kv_memory) == (5, 2.0)
    found = run(monkeypatch, lambda c: {"c": c}, "--config", str(file), "--micro-batch-tokens", "6")["c"]
    assert (found.micro_batch_tokens, found.engine.kv_memory) == (6, 2.0)
    assert run(monkeypatch, lambda c: pytest.fail("runs"), "--config", str(file), "--print-config") is None
    (tmp_path / "b.toml").write_text(capsys.readouterr().out)
    assert read_config(tmp_path / "b.toml", Small(), "small") == replace(found, micro_batch_tokens=5, config=None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("micro_batch_token = 1", "did you mean micro_batch_tokens?"),
        ("micro_batch_tokens = 'x'", "a.toml: micro_batch_tokens: 'x' is of the wrong type; a whole number is needed"),
        ("micro_batch_tokens = true", "a whole number is needed"),
        ("engine = 3", "engine must be a table, not int"),
        ("[engine]\nkv = 1", "a.toml: engine: unknown key 'kv'; did you mean kv_memory?"),
        ("micro_batch_tokens", "not valid TOML"),
    ],
)
def test_mistakes_in_a_config_file(monkeypatch, capsys, tmp_path, text, told):
    (tmp_path / "a.toml").write_text(text)
    code, said = fails(monkeypatch, capsys, lambda c: None, "--config", str(tmp_path / "a.toml"))
    assert code == 2 and told in said
    assert "check the path" in fails(monkeypatch, capsys, lambda c: None, "--config", "none.toml")[1]


def test_a_record_is_a_config_file(tmp_path):
    record = {"kind": "train", "settings": {"lr": 0.25, "target_modules": ["q_proj"], "out": "run", "limit": None}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    found = read_config(tmp_path / "run.json", TrainConfig(), "train")
    assert (found.lr, found.target_modules, found.out, found.limit) == (0.25, ("q_proj",), None, None)
    with pytest.raises(UserError, match=r"not the record of a ptst\.eval"):
        read_config(tmp_path / "run.json", TrainConfig(), "eval")
    (tmp_path / "run.json").write_text('{"kind": "train", "flags": {}}')
    with pytest.raises(UserError, match=r"not the record of a ptst\.train of this version"):
        read_config(tmp_path / "run.json", TrainConfig(), "train")


def test_a_recipe_in_a_config_file_is_the_recipe_on_the_command_line(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('recipe = "llama2-gsm8k"\nlr = 0.5\n')
    assert read_config(file, TrainConfig(), "train") == TrainConfig(recipe="llama2-gsm8k", lr=0.5)
    file.write_text('recipe = "laptop"\nquick = true\n[train]\nlr = 0.5\n')
    laptop = GridConfig(recipe="laptop", quick=True)
    assert read_config(file, GridConfig(), "grid") == replace(laptop, train=replace(laptop.train, lr=0.5))
    file.write_text("recipe = 3\n")
    with pytest.raises(UserError, match="recipe: 3 is of the wrong type"):
        read_config(file, TrainConfig(), "train")


@pytest.mark.parametrize("config", [TrainConfig(recipe="llama2-gsm8k"), GridConfig(recipe="laptop")])
def test_every_setting_survives_toml(tmp_path, config):
    (tmp_path / "a.toml").write_text(to_toml(config))
    assert read_config(tmp_path / "a.toml", type(config)(), "x") == config


def test_a_recipe_in_python_is_the_recipe_on_the_command_line():
    config = TrainConfig(recipe="llama2-chatdoctor", lr=3e-5)
    assert (config.lr, config.epochs, config.schedule, config.template_family) == (3e-5, 3.0, "cosine", "chatdoctor")
    assert GridConfig(recipe="llama2-gsm8k").train == TrainSettings(
        **{k: getattr(TrainConfig(recipe="llama2-gsm8k"), k) for k in TrainSettings.__dataclass_fields__}
    )
    assert GridConfig(recipe="laptop", quick=True, seeds=(5,)).seeds == (5,)
    with pytest.raises(UserError, match="did you mean llama2-gsm8k"):
        TrainConfig(recipe="llama2-gsm")
    with pytest.raises(UserError, match="wrong type"):
        merge(TrainConfig(), {"schedule": "round"}, "x")


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--help"], 0, "fine-tune a chat model"),
        (["trian"], 2, "did you mean train?"),
        (["train", "--help"], 0, "--micro-batch-tokens"),
        (["eval", "--templat", "x"], 2, "--template"),
        (["grid", "--help"], 0, "--train.lr"),
        (["audit", "--help"], 0, "--test-template"),
        (["chat", "--help"], 0, "--template"),
        (["judge", "--help"], 0, "--refusal-labels"),
        (["judge", "answers.csv", "--jugde", "keywords-7"], 2, "--judge"),
        (["align", "--help"], 0, "--own-answers"),
        (["export", "--help"], 0, "--adapter-only"),
        (["serve", "--help"], 0, "--api-key-file"),
        (["push", "--help"], 0, "--no-private"),
    ],
)
def test_help_and_a_typo_are_answered_without_torch(flags, code, told):
    """torch alone takes seconds to import."""
    script = "from ptst.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    line = [sys.executable, "-c", f"import sys; sys.argv = {['ptst', *flags]}\n{script}"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == code and told in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_flag_has_a_help_text(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ptst", name, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    flags = re.split(r"\n. (?=--?[a-z])", capsys.readouterr().out)[1:]
    assert len(flags) > 5
    for flag in flags:
        about = flag.partition("(default: ")[0]
        assert len(re.findall(r"(?<=[ \n])[a-z]{2,}\b", about)), flag


CONSOLE = "from ptst.cli import main; main()"


LONG = """
from ptst import cli
from ptst.audit.config import AuditConfig
cli.run(lambda c: {"a": "b" * 10**6}, AuditConfig, "audit")
"""


@pytest.mark.parametrize(
    ("line", "reads", "codes"),
    [
        (["-c", CONSOLE, "--help"], 1, (0, 141)),  # 0: all was written before the reader went
        (["-c", CONSOLE, "train", "--help"], 1, (0, 141)),
        (["-m", "ptst.train", "--print-config"], 0, (141,)),
        (["-c", LONG, "--json"], 1, (141,)),
    ],
)
def test_a_closed_pipe_ends_quietly(line, reads, codes):
    with subprocess.Popen([sys.executable, *line], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert len(process.stdout.read(reads)) == reads
        process.stdout.close()
        told = process.stderr.read()
    assert told == b"" and process.returncode in codes


def test_a_pipe_that_is_not_standard_output_is_told(monkeypatch, capsys):
    def other(_config):
        raise BrokenPipeError(32, "Broken pipe")

    assert fails(monkeypatch, capsys, other) == (2, "ptst.small: [Errno 32] Broken pipe")


def test_nobody_reading_the_words_ends_nothing(tmp_path):
    """`2>&1 | head`, or a terminal that was closed: a run goes on to its end."""
    code = "from ptst.progress import say, ProgressLine\nimport time\nwith ProgressLine('x', 9, every=0) as line:\n"
    code += f" for i in range(9): say('a' * 99); line.update(i)\nopen({str(tmp_path / 'end')!r}, 'w')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    process.stderr.close()
    assert process.wait() == 0 and (tmp_path / "end").exists()


@pytest.mark.parametrize("where", ["ptst.settings", "tyro", "torch"])
def test_ctrl_c_during_imports_ends_quietly(where):
    """As it comes in the middle of an import: of a command's first modules, and of those that its run needs."""
    script = f"""
import signal, sys
class Pressed:
    def find_spec(self, name, path=None, target=None):
        if name == {where!r}:
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Pressed())
import ptst.eval
ptst.eval.main()
"""
    flags = ["--model", "none", "--out", "none"]
    done = subprocess.run([sys.executable, "-c", script, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("stopped")


def test_an_import_that_ctrl_c_made_fail_is_no_bug(monkeypatch, capsys):
    def broken(_config):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("numpy._core.multiarray failed to import") from None

    assert fails(monkeypatch, capsys, broken) == (130, "ptst.small: stopped")
