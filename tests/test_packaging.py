"""The wheel: what it holds, and that it works in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def sources() -> set[str]:
    """Everything under ptst/ and kernels/ that an installed copy needs, by its place in the wheel."""
    wanted = {".py", ".json", ".jsonl", ".toml", ".typed", ".jinja", ".css", ".js"}
    places = [("ptst", ROOT / "ptst"), ("ptst/kernels", ROOT / "kernels")]
    files = ((place, p.relative_to(top)) for place, top in places for p in top.rglob("*") if p.suffix in wanted)
    return {f"{place}/{p.as_posix()}" for place, p in files if "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    setuptools = pytest.importorskip("setuptools", reason="needs the package setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"needs setuptools 77 or later, not {setuptools.__version__}")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("ptst", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", str(out), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("ptst_lab-*.whl"))


def test_the_wheel_holds_every_source_file_and_no_other_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    assert names == sources()
    assert "ptst/kernels/attention.py" in names  # not the top-level `kernels`, which is another distribution's


def test_an_installed_copy_works_in_an_empty_folder(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (site / "kernels").exists()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    program = f"""
from pathlib import Path
from importlib.metadata import entry_points, version
import ptst, ptst.kernels.attention
from ptst.data.builtin.alignment_set import refusals
from ptst.data.builtin.safety_sets import harmful_requests
from ptst.experiment.laptop import default_system_file

assert all(Path(m.__file__).is_relative_to({str(site)!r}) for m in (ptst, ptst.kernels.attention))
assert Path(default_system_file()).is_file()
assert len(harmful_requests()) > 10 and len(refusals()) > 10
assert version("ptst-lab") == ptst.__version__
command, = entry_points(group="console_scripts", name="ptst")
assert command.load().__module__ == "ptst.cli"
"""
    for arguments in (["-m", "ptst.audit", "--help"], ["-c", program]):
        done = subprocess.run([sys.executable, *arguments], cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
