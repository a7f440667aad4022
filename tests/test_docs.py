"""Documentation says what is there: links, paths, commands and their flags, versions."""

from __future__ import annotations

import re
import shlex
import tomllib
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import tyro

import ptst
from ptst.cli import COMMANDS
from ptst.experiment.ladder import blocks
from ptst.experiment.ladder.analyse import figures
from tests.conftest import ROOT

PAGES = sorted(
    p
    for p in {*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob(".github/**/*.md")}
    if p.relative_to(ROOT).parts[0] not in ("checkpoints", ".venv")
)
CONFIGS = {
    "train": "ptst.training.config:TrainConfig",
    "eval": "ptst.evaluation.config:EvalConfig",
    "grid": "ptst.experiment.config:GridConfig",
    "align": "ptst.experiment.align_config:AlignConfig",
    "audit": "ptst.audit.config:AuditConfig",
    "chat": "ptst.chat:ChatConfig",
    "judge": "ptst.evaluation.judge_config:JudgeConfig",
    "report": "ptst.reporting.config:ReportConfig",
    "status": "ptst.experiment.status.config:StatusConfig",
    "study": "ptst.experiment.ladder.study_config:StudyConfig",
    "push": "ptst.exporting.push_config:PushConfig",
    "serve": "ptst.serving.config:ServeConfig",
    "export": "ptst.exporting.config:ExportConfig",
    "defend": "ptst.defenses.command_config:DefendConfig",
    "tune-kernels": "ptst.tune_kernels:TuneKernelsConfig",
}
ROOMS = ("ptst", "kernels", "tests", "docs", "benchmarks", "examples", ".github", ".ci")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def commands(page: Path, spans: bool = True) -> list[str]:
    """Command lines of a page, from indented and fenced blocks and, where asked for, from code spans, without what is
    before `python`."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    blocks = re.findall(r"^(?:    |\t)(\S.*)$", text, re.M) + re.findall(
        r"^```(?:sh|bash|)\n(.*?)^```", text, re.M | re.S
    )
    lines = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    if spans:
        lines += [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    found = (
        re.search(r"(?:\bpython3? (?:-m )?\S*(?:ptst|pytest|benchmarks|examples).*|^(?:\S*/)?ptst \S.*)", x)
        for x in lines
    )
    return [re.sub(r"\s+[#<>|].*", "", match[0].strip()) for match in found if match]


def config_type(command: str) -> type:
    module, _, attribute = CONFIGS[command].partition(":")
    return getattr(import_module(module), attribute)


def test_every_command_has_its_configuration_here():
    assert set(CONFIGS) == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_exist(page):
    if page.name == "CHANGELOG.md":
        return  # it names what was
    for span in re.findall(r"`([^`\s]+)`", page.read_text(encoding="utf-8")):
        path = span.partition("::")[0].strip("/")
        if "/" in path and path.split("/")[0] in ROOMS and not re.search(r"[<>*{]|NAME|FILE", path):
            assert (ROOT / path).exists(), f"{name(page)} names {span}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page, capsys):
    if page.name == "CHANGELOG.md":
        return
    for command in commands(page):
        try:
            words = [w for w in shlex.split(command.replace("[", " ").replace("]", " ")) if w != "..."]
        except ValueError as error:
            pytest.fail(f"{name(page)}: {command}: {error}")
        words = words[1:] if words[0].startswith("python") else ["-m", f"ptst.{words[1]}", *words[2:]]
        check(words, f"{name(page)}: {command}")
        capsys.readouterr()


def check(words: list[str], where: str) -> None:
    """The words after `python`: a module or a script that exists, and flags that it knows."""
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file(), where
        source, rest = (ROOT / words[0]).read_text(), words[1:]
    elif words[1] == "pytest":
        assert all((ROOT / w).exists() for w in words[2:] if w.startswith("tests")), where
        return
    elif (known := words[1].removeprefix("ptst.")) in CONFIGS:
        if "--help" in words:
            words = words[: words.index("--help")]
        try:
            tyro.cli(config_type(known), args=words[2:])
        except SystemExit:
            pytest.fail(where)
        return
    elif words[1] == "ptst.interop.lm_eval":
        return  # its flags are lm-eval's
    elif words[1] in ("ptst", "ptst.--version"):
        return
    else:
        assert find_spec(words[1]), where
        source, rest = Path(find_spec(words[1]).origin).read_text(), words[2:]
    for flag in (w.partition("=")[0] for w in rest if w.startswith("--")):
        assert f'"{flag}"' in source or flag[2:].replace("-", "_") + ":" in source, f"{where}: {flag}"


def test_pages_that_the_code_names_exist():
    for source in [*ROOT.glob("ptst/**/*.py"), *ROOT.glob("kernels/*.py")]:
        for page in re.findall(r"docs/\w+\.\w+", source.read_text(encoding="utf-8")):
            assert (ROOT / page).exists(), f"{source} names {page}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if p.name != "README.md" and f"({p.name})" not in index] == []


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 80


def test_versions_agree():
    assert re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == ptst.__version__
    assert f"## [{ptst.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_hooks_are_programs_of_the_dev_extra():
    dev = " ".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"])
    programs = re.findall(r"entry: \.venv/bin/(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    package = {"check-added-large-files": "pre-commit-hooks"}
    assert programs
    assert [p for p in programs if package.get(p, p) not in dev] == []


def test_tables_of_outcomes_are_what_the_files_of_outcomes_give():
    """`python -m ptst.study --docs docs` writes them anew."""
    for path, written, computed in blocks.pages(ROOT / "docs"):
        assert written == computed, f"{name(path)} has other tables than docs/outcomes gives"
    for path, picture in figures(ROOT / "docs").items():
        assert path.read_text(encoding="utf-8") == picture, name(path)
