"""How benchmarks measure: median times, extra memory at the peak, the machine's own ceilings, what ran where."""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
ROUNDS = 5  # calls of which a CPU's median is taken


def milliseconds(work: Callable[[], object]) -> float:
    """Median time of one call: between events with a cold L2 cache on a GPU, the process's CPU time on a CPU."""
    if ON_GPU:
        from triton.testing import do_bench

        return float(do_bench(work, warmup=20, rep=100, return_mode="median"))
    work()
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times) * 1e3


def graph_milliseconds(work: Callable[[], object]) -> float:
    """Median time of one call from a captured graph, so that the host does not show; CPU time on a CPU."""
    if not ON_GPU:
        return milliseconds(work)
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(work, rep=20, return_mode="median"))


def device_is_well() -> bool:
    """False after an error that the device does not recover from, such as an access outside of its memory."""
    try:
        if ON_GPU:
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _status(key: str) -> int:
    """Kilobytes of memory as Linux counts them for this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1])


def extra_megabytes(work: Callable[[], object]) -> float | None:
    """Memory at the peak of one call, its result included, above what is held before; None where it cannot be told."""
    gc.collect()
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = work()
        torch.cuda.synchronize()
        del kept
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
        before = _status("VmRSS")
        kept = work()
        peak = _status("VmHWM")
        del kept
    except (OSError, AttributeError):
        return None
    return (peak - before) * 1024 / 1e6


def ceilings() -> dict[str, float]:
    """TFLOP/s of a large matrix product and GB/s of a large copy, on this machine, now."""
    n = 8192 if ON_GPU else 1024
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    product = milliseconds(lambda: a @ b)
    source = torch.empty((1 << 30) if ON_GPU else (1 << 26), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    return {"tflops": 2 * n**3 / product / 1e9, "gbs": 2 * source.numel() / copy / 1e6}


def machine() -> dict[str, object]:
    """What the figures hold for: device, power limit, versions, commit."""

    def said(*command: str) -> str | None:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            return None

    told: dict[str, object] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "liger_kernel", "cut_cross_entropy", "transformers", "peft"):
        try:
            told[name] = __import__("importlib.metadata", fromlist=["version"]).version(name)
        except ImportError:
            told[name] = None
    told["commit"] = said("git", "rev-parse", "HEAD")
    if ON_GPU:
        told["device"] = torch.cuda.get_device_name()
        told["power_limit"] = said("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader")
        told["clocks"] = said("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem", "--format=csv,noheader")
        told["driver"] = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        told["device"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return told


def write_json(path: Path, content: object) -> None:
    """Replace a file at once, so that a run that is cut off leaves what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def main() -> None:
    """Print the machine and its ceilings; with an argument, write them there too."""
    told = machine() | {"ceilings": ceilings()}
    print(json.dumps(told, indent=1))
    if sys.argv[1:]:
        write_json(Path(sys.argv[1]), told)


if __name__ == "__main__":
    main()
