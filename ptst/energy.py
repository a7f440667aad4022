"""Energy by the meters of this machine: RAPL of the processor's packages (Linux, /sys/class/powercap), and NVML's
counter of the GPU that torch computes on (package nvidia-ml-py). A meter that cannot be read, by an unprivileged user
for instance, is left out. They count what the whole package or GPU takes, other processes included.
"""

import sys
import threading
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")
_POLL = 60.0  # seconds: RAPL's counter begins anew after some 260 kJ, which take a server's package 15 minutes
Joules = dict[str, float]


class Meters:
    """Joules since this was made, by meter (`package-0`, `gpu`); {} where none can be read."""

    def __init__(self, powercap: Path = _POWERCAP):
        self._lock = threading.Lock()
        self._ranges: dict[str, float] = {}
        self._sources: dict[str, Callable[[], float]] = {}
        self._find_packages(powercap)
        if (gpu := _gpu_counter()) is not None:
            self._sources["gpu"] = gpu
        self._last = {name: read() for name, read in self._sources.items()}
        self._total = dict.fromkeys(self._last, 0.0)

    def read(self) -> Joules:
        """What each meter counted so far."""
        with self._lock:
            for name in list(self._total):
                try:
                    now = self._sources[name]()
                except Exception:  # a driver that went away: no figure is better than a part of one
                    del self._total[name]
                    continue
                gone = now - self._last[name]
                self._total[name] += gone + (self._ranges.get(name, 0.0) if gone < 0 else 0.0)
                self._last[name] = now
            return dict(self._total)

    def watch(self) -> None:
        """Read now and then in the background, so that no counter begins anew twice unseen."""
        if self._ranges:
            threading.Thread(target=self._poll, name="energy", daemon=True).start()

    def _poll(self) -> None:
        wait = threading.Event()
        while not wait.wait(_POLL):
            self.read()

    def _find_packages(self, powercap: Path) -> None:
        for folder in sorted(powercap.glob("intel-rapl:*")):  # AMD's have that name, too
            try:
                name, counter = (folder / "name").read_text().strip(), folder / "energy_uj"
                counts = float(counter.read_text())
                most = float((folder / "max_energy_range_uj").read_text())
            except (OSError, ValueError):
                continue
            if name.startswith("package") and counts >= 0:  # cores and memory are parts of a package
                self._sources[name] = lambda counter=counter: float(counter.read_text()) / 1e6  # type: ignore[misc]
                self._ranges[name] = most / 1e6


def _gpu_counter() -> Callable[[], float] | None:
    """Reads the joules of torch's GPU since its driver was loaded; None without a GPU, NVML or such a counter."""
    torch = sys.modules.get("torch")  # what never loaded it computes on no GPU
    if torch is None or not torch.cuda.is_available():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no package, an old driver, a card without the counter
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


@cache
def _meters() -> Meters:
    meters = Meters()
    meters.watch()
    return meters


def joules() -> Joules:
    """Energy since this was first asked for in this process."""
    return _meters().read()


def spent(before: Mapping[str, float]) -> dict[str, Joules]:
    """`{"joules": ...}` since `before`, for a record of times; {} where nothing can be read."""
    now = joules()
    found = {name: now[name] - count for name, count in before.items() if name in now}
    return {"joules": found} if found else {}
