"""Memory as the system counts it: what a process can still allocate, what it holds and held at most."""

import ctypes
import os
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
ELSEWHERE = 4 << 30  # systems other than Linux: a cautious guess


def free_memory(device: str | torch.device, root: Path = Path("/")) -> int:
    """Free memory in bytes: the GPU's, including torch's unused blocks; on a CPU, Linux's MemAvailable within the
    limits of the control groups. `root`: where /proc and /sys are, for tests."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    available = _number(root / "proc/meminfo", r"^MemAvailable:\s+(\d+)")
    limits = [ELSEWHERE if available is None else 1024 * available]
    for folder in _groups(root):
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit, taken = _number(folder / most, r"^(\d+)"), _number(folder / used, r"^(\d+)")
            if limit is not None and taken is not None:  # otherwise no such file, or "max": no limit
                # The usage includes the page cache, which can be dropped.
                patterns = (rf"^(?:total_)?{kind}_file (\d+)" for kind in ("inactive", "active"))
                limits.append(limit - taken + sum(_number(folder / "memory.stat", p) or 0 for p in patterns))
    return max(0, min(limits))


def resident_memory() -> int:
    """Bytes this process holds now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def peak_resident_memory() -> int:
    """Most bytes this process held. Linux's VmHWM counts from the start of the program; `ru_maxrss`, which serves
    elsewhere, includes what the process that started it held by then."""
    peak = _number(Path("/proc/self/status"), r"^VmHWM:\s+(\d+)")
    if peak is not None:
        return peak * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def return_large_blocks() -> None:
    """Have glibc take every block of 1 MiB or more from the system, and return it when it is freed. By itself it keeps
    freed blocks of up to 32 MiB between those in use, where larger ones do not fit. Nothing with another C library, and
    where the user has chosen otherwise. Freed blocks that are used again must be cleared anew, which takes time."""
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _groups(root: Path) -> set[Path]:
    """This process's control groups and their parents, of version 2 and of version 1's memory controller."""
    groups = root / "sys/fs/cgroup"
    found = {groups, groups / "memory"}
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            top = groups / "memory" if controllers else groups
            folder = top / name.lstrip("/")
            found |= {folder, *(f for f in folder.parents if f.is_relative_to(top))}
    return found


def _number(path: Path, pattern: str) -> int | None:
    try:
        found = re.search(pattern, path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
