"""Meters of energy: RAPL's files and NVML's counter, and what a record says of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ptst import energy
from ptst.energy import Meters
from ptst.reporting.material import Material
from ptst.reporting.statement import statement
from ptst.runs import claim
from tests.test_runs import a_record


def package(folder, name: str, microjoules: object, most: int = 100_000_000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")


def test_packages_are_counted_across_the_end_of_their_range_and_parts_of_them_are_not(tmp_path):
    package(tmp_path / "intel-rapl:0", "package-0", 90_000_000)
    package(tmp_path / "intel-rapl:0:0", "core", 1_000_000)
    package(tmp_path / "intel-rapl:1", "package-1", "unreadable")
    meters = Meters(tmp_path)
    assert meters.read() == {"package-0": 0}
    package(tmp_path / "intel-rapl:0", "package-0", 98_500_000)
    assert meters.read() == {"package-0": 8.5}
    package(tmp_path / "intel-rapl:0", "package-0", 2_000_000)
    assert meters.read() == {"package-0": pytest.approx(12.0)}
    (tmp_path / "intel-rapl:0/energy_uj").unlink()
    assert meters.read() == {} == Meters(tmp_path / "nowhere").read()


def test_the_gpu_that_torch_computes_on(tmp_path, monkeypatch):
    counts = iter((5_000, 6_000, 8_500))
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: {"GPU-abc": "its handle"}[name],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"its handle": next(counts)}[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert Meters(tmp_path).read() == {}, "there is no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid={1: "abc"}[index]))
    assert Meters(tmp_path).read() == {"gpu": 2.5}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Meters(tmp_path).read() == {}, "the package is not installed"


def test_a_finished_record_says_what_was_spent(tmp_path, monkeypatch):
    package(tmp_path / "intel-rapl:0", "package-0", 1_000_000)
    meters = Meters(tmp_path)
    monkeypatch.setattr(energy, "_meters", lambda: meters)
    out = tmp_path / "run"
    with claim(out, a_record()) as run:
        package(tmp_path / "intel-rapl:0", "package-0", 7_000_000)
        run.finish()
    assert json.loads((out / "run.json").read_text())["time"]["joules"] == {"package-0": 6}
    assert energy.spent({}) == {}


def test_the_report_adds_up_what_runs_and_cells_took():
    def told(*joules: object) -> str:
        of = Material(Path(), "grid", {}, testing_joules=list(joules))
        return {**dict(next(statement(of)).pairs)}["Energy"]

    assert told({"package-0": 1.8e6, "gpu": 3.6e6}, None, {"package-0": 0.9e6}) == (
        "package-0 0.75 kWh, gpu 1 kWh, in 2 of 3 runs and cells; "
        "all that the machine did meanwhile, so what ran side by side is counted twice"
    )
    assert told(None).startswith("not read") and told("damaged", {"gpu": "?"}).startswith("not read")
