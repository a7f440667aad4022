"""What is free is the least of what the machine has and what the control group allows; a peak is the process's own."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ptst.system_memory import ELSEWHERE, free_memory, peak_resident_memory

GB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:  {64 * GB // 1024} kB\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, ELSEWHERE),
        (MEMINFO, 64 * GB),
        # Version 2, in a group of its own: 8 GB, 3 taken, of which 1 is files that may be dropped.
        (
            MEMINFO
            | {
                "proc/self/cgroup": "0::/box\n",
                "sys/fs/cgroup/box/memory.max": f"{8 * GB}\n",
                "sys/fs/cgroup/box/memory.current": f"{3 * GB}\n",
                "sys/fs/cgroup/box/memory.stat": f"anon 5\nactive_file {GB // 2}\ninactive_file {GB // 2}\n",
            },
            6 * GB,
        ),
        # The limit may stand above the process's own group, in either version.
        (
            MEMINFO
            | {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/step/memory.current": "5\n",
                "sys/fs/cgroup/job/memory.max": f"{8 * GB}\n",
                "sys/fs/cgroup/job/memory.current": f"{GB}\n",
            },
            7 * GB,
        ),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "5:cpuset:/other\n4:memory:/job/step\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{8 * GB}\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{2 * GB}\n",
            },
            6 * GB,
        ),
        # No limit.
        (MEMINFO | {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"}, 64 * GB),
        # Version 1; more taken than allowed is nothing.
        (
            MEMINFO
            | {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GB}\n",
            },
            0,
        ),
    ],
)
def test_the_least_of_machine_and_control_group(tmp_path, files, free):
    assert free_memory("cpu", write(tmp_path, files)) == free


def test_this_machine():
    assert 0 < free_memory("cpu") < 1 << 50


def test_the_peak_does_not_include_what_the_starting_process_held():
    script = "from ptst.system_memory import peak_resident_memory; print(peak_resident_memory())"
    held = bytearray(b"1") * 800_000_000
    started = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert peak_resident_memory() > len(held)
    assert int(started.stdout) < 0.8 * len(held)


# Prints by how many MB the process has grown when all of 20 blocks of 8 MB but the last have been freed.
_BLOCKS = """
import torch
from ptst.system_memory import resident_memory, return_large_blocks
return_large_blocks()
before = resident_memory()
torch.ones(30 << 18)  # freed: by itself, glibc keeps blocks of this size from here on
blocks = [torch.ones(8 << 18) for _ in range(20)]
del blocks[:-1]
print((resident_memory() - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of another C library nothing is asked")
@pytest.mark.parametrize("chosen", [{}, {"MALLOC_MMAP_THRESHOLD_": str(1 << 25)}])
def test_large_blocks_return_to_the_system_unless_the_user_chose(chosen):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | chosen
    done = subprocess.run([sys.executable, "-c", _BLOCKS], env=environment, stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) > 120 if chosen else int(done.stdout) < 40
