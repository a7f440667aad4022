"""Compile every kernel ahead of time, without a GPU: does it compile, fit into shared memory, and stay in registers?

    python -m ptst.kernels.compile            a table for sm_80 (A100) and sm_90 (H100, H200); of the others attention
    python -m ptst.kernels.compile --model    what the main loops of sm_90 do, and their bounds (main_loops.py)
    python -m ptst.kernels.compile --loops    writes main_loops.json, for the Triton that is installed
    python -m ptst.kernels.compile --readme   writes the tables in kernels/README.md

The kernels' own launch code runs on meta tensors over a stub driver, so that each launch is compiled with exactly the
specialization it has on a GPU (divisibility of pointers and strides, constants). Nothing runs. Exits with 1 on failure:
also where one of the main loops that README shows has grown by more than 5 % against main_loops.json.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from ptst.kernels import flash_attention, main_loops
from ptst.kernels.flash_blocks import SHARED
from ptst.kernels.launches import Launch, attention_launches, launches, prefill_launches
from ptst.kernels.machine_code import Loop, disassemble, loops

FULL = (80, 90)  # for these every kernel, for the others attention's
README = Path(__file__).resolve().parent / "README.md"
# Llama's shapes in bfloat16, a line for each kernel.
SHOWN = re.compile(
    r"(attention|prefill|decode) bfloat16 D=\d+ (W=0|K=8.*)|lora bfloat16 I=4096 O=4096.*|"
    r"folded bfloat16 E=4096 F=11008 r=16 [\w, ]+|rms_norm bfloat16 H=4096 (residual.*|"
    r"frozen)|(swiglu|loss) bfloat16 .=11008( and h)?|rope(_store)? bfloat16 D=128.*|"
    r"sampling V=128256|multi_lora bfloat16 T=64.*"
)


@dataclass(frozen=True)
class Compiled:
    """The compiler's report on one launch. `stack` and `local` are bytes per thread, above 0 if registers spill."""

    name: str
    note: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    blocks: str  # block shapes, by the kernel's names
    wgmma: bool  # whether it uses the warpgroup MMA of sm_90
    stages: int = 1
    tma_bytes: int = 0  # of all tiles that descriptors copy in one passage
    tiles: int = 0  # such tiles
    main: Loop | None = None  # read where bounds are computed: half precision on sm_90
    edge: Loop | None = None

    @property
    def faults(self) -> list[str]:
        spills = ["spills"] if self.stack + self.local else []
        large = ["too much shared memory"] if self.shared > SHARED[self.arch] else []
        multiplies = re.match("(attention|prefill) (bfloat16|float16)", self.note) and self.name != "delta"
        wide = "D=256" in self.note and self.name in ("dq", "dkdv")  # flash_blocks.py says why
        slow = ["no warpgroup MMA"] if multiplies and self.arch == 90 and not (self.wgmma or wide) else []
        return spills + large + slow


class _Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *_args, **_named):
        pass


class _Stub(DriverBase):
    """A driver that knows its target and launches nothing."""

    def __init__(self, target: GPUTarget):
        self.target = target
        self.launcher_cls = _Launcher
        properties = {"max_shared_mem": SHARED[target.arch], "multiprocessor_count": 132, "sm_clock_rate": 1}
        properties |= {"mem_clock_rate": 1, "mem_bus_width": 1}
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda _device: properties,
            load_binary=lambda *_args: (None, None, 0, 0, 1024),
            unload_module=lambda _module: None,
        )

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, _type):
        return "void*"

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("meta")

    def get_current_device(self):
        return 0

    def set_current_device(self, _device):
        pass

    def get_current_stream(self, _device=0):
        return 0

    def get_device_capability(self, _device=0):
        return divmod(self.target.arch, 10)

    def get_benchmarker(self):
        return lambda f, quantiles=None, **_named: (f(), [1.0, 1.0, 1.0])[1]


@contextlib.contextmanager
def recording(arch: int, note: str) -> Iterator[list[Compiled]]:
    """Compile and record every launch inside, for `arch`."""
    import triton.runtime.jit as runtime

    found: list[Compiled] = []
    kept, run = driver._active, runtime.JITFunction.run
    driver.set_active(_Stub(GPUTarget("cuda", arch, 32)))
    disassembled = arch == main_loops.ARCH and SHOWN.fullmatch(note)

    def compile_only(self, *args, grid, warmup, **named):
        self.device_caches.clear()  # cached by device, which is always the same one here
        kernel = run(self, *args, grid=grid, warmup=True, **named)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        usage = _usage(kernel.asm["cubin"])
        main, edges = loops(disassemble(kernel.asm["cubin"])) if disassembled else (None, [])
        tiles = [a for a in args if type(a).__name__ == "TensorDescriptor"]
        found.append(
            Compiled(
                self.__name__.lstrip("_"),
                note,
                arch,
                usage.get("REG", 0),
                usage.get("STACK", 0),
                usage.get("LOCAL", 0),
                kernel.metadata.shared,
                kernel.metadata.num_warps,
                " ".join(f"{k}={v}" for k, v in named.items() if k.startswith("B") and k.isupper()),
                "wgmma.mma_async" in kernel.asm["ptx"],
                kernel.metadata.num_stages,
                sum(math.prod(t.block_shape) * t.base.element_size() for t in tiles),
                len(tiles),
                main,
                edges[-1] if edges else None,
            )
        )
        return kernel

    runtime.JITFunction.run = compile_only
    try:
        yield found
    finally:
        runtime.JITFunction.run, driver._active = run, kept


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", out)}


def readme_section(compiled: list[Compiled]) -> str:
    """The text between the marks in README: Triton's version and the launches of SHOWN, then the main loops."""
    lines = [f"As Triton {triton.__version__} compiles them (`python -m ptst.kernels.compile --readme`):", ""]
    lines += ["| kernel | launch | architecture | blocks | warps | registers | spilled | shared |", "|" + "---|" * 8]
    for c in compiled:
        if SHOWN.fullmatch(c.note) and c.arch in FULL:
            sizes = f"{c.warps} | {c.registers} | {c.stack + c.local} | {c.shared / 1024:.1f} KiB |"
            lines.append(f"| {c.name} | {c.note} | sm_{c.arch} | {c.blocks} | {sizes}")
    lines += ["", *main_loops.markdown([c for c in compiled if SHOWN.fullmatch(c.note)])]
    return "\n".join(["", *lines, ""])


def readme_parts() -> list[str]:
    """README before, between and after the marks."""
    found = re.fullmatch(r"(.*<!-- compiled -->\n)(.*)(<!-- end -->.*)", README.read_text(), re.S)
    assert found, f"{README} lacks the marks"
    return list(found.groups())


def compile_all(arch: int, chosen: Iterator[Launch]) -> tuple[list[Compiled], int]:
    """What was compiled, a line printed for each, and the number of faults."""
    flash_attention.ARCH = arch
    compiled: list[Compiled] = []
    failed = 0
    for note, launch in chosen:
        with recording(arch, note) as found:
            launch()
        compiled += found
        for c in found:
            failed += bool(c.faults)
            sizes = f"{c.warps:5d} {c.registers:9d} {c.stack:5d} {c.shared:8d}"
            print(f"{c.name:16} {c.note:38} sm_{c.arch:3} {sizes}  {', '.join(c.faults)}", flush=True)
        if not found:
            failed += 1
            print(f"{note}: nothing was compiled")
    return compiled, failed


def shown(*architectures: int) -> list[Compiled]:
    """The launches of SHOWN, compiled; their lines go to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        chosen = [launch for launch in launches() if SHOWN.fullmatch(launch[0])]
        return [c for arch in architectures for c in compile_all(arch, iter(chosen))[0]]


def main() -> None:
    chosen = sys.argv[1:]
    if len(chosen) > 1 or not set(chosen) <= {"--model", "--loops", "--readme"}:
        sys.exit(f"ptst.kernels.compile: {' '.join(chosen)} is none of --model, --loops, --readme")
    if chosen == ["--model"]:
        print("\n".join(main_loops.markdown(shown(main_loops.ARCH))))
        return
    before, section, after = readme_parts()
    if chosen == ["--readme"]:
        README.write_text(before + readme_section(shown(*FULL)) + after)
        return
    if chosen == ["--loops"]:
        main_loops.write(triton.__version__, shown(main_loops.ARCH))
        return
    print(f"triton {triton.__version__}")
    print(f"{'kernel':16} {'launch':38} {'arch':6} {'warps':>5} {'registers':>9} {'stack':>5} {'shared':>8}")
    failed, compiled = 0, []
    for arch in SHARED:
        found, faults = compile_all(
            arch, launches() if arch in FULL else chain(attention_launches(), prefill_launches())
        )
        compiled += found
        failed += faults
    if f"Triton {triton.__version__} " in section and section != readme_section(compiled):
        failed += 1
        print("kernels/README.md is out of date: python -m ptst.kernels.compile --readme")
    for fault in main_loops.grown(triton.__version__, compiled):
        failed += 1
        print(fault)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
